"""What may change when a run goes on, and what makes another run of it."""

import json
from pathlib import Path

import pytest

from shards import seal
from tests.train.conftest import tiny_config, write_columns
from tests.train.here import (
    columns_of,
    fitted,
    losses,
    manifest,
    step_folder,
    trained,
    written_down,
)
from train.config import OptimConfig, TrainConfig
from train.step.schedule import learning_rate


def test_another_global_batch_goes_on_with_the_same_order(columns: Path, tmp_path: Path) -> None:
    """Batches of 16, then of 40, then of 8: the samples are 0, 1, 2 and so on, and their rows those of the order."""
    log = tmp_path / "batches"
    optim = {"lr": 1e-3, "schedule": "linear", "warmup": 2}
    for batch, micro, steps in ((16, 4, 3), (40, 8, 5), (8, 4, 7)):
        config = tiny_config(
            columns, tmp_path, global_batch=batch, micro_batch=micro, steps=steps, save_every=100, optim=optim
        )  # fmt: skip
        checked = TrainConfig.model_validate(config)
        run = trained(config, batches=written_down(checked, log))
    batches = [json.loads(line) for line in log.read_text().splitlines()]
    assert [b[0] for b in batches] == [0, 16, 32, 48, 88, 128, 136]
    assert manifest(run, 7)["position"] == 3 * 16 + 2 * 40 + 2 * 8
    samples = [s for b in batches for s in b[1]]
    assert sorted(samples) == list(range(144))
    _, order = columns_of(checked)
    for position, numbers, sources, rows in batches:
        size = len(numbers)
        expected = order(position, size)
        assert [sources, rows, numbers] == [e.tolist() for e in expected]
    assert losses(run).keys() == set(range(1, 8))
    # The rate is a function of the step and of `steps`, whatever the batch.
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = {r["step"]: r["lr"] for r in lines if "lr" in r}
    optimizer = OptimConfig.model_validate(optim)
    for step, steps in ((3, 3), (5, 5), (7, 7)):
        assert rates[step] == pytest.approx(learning_rate(optimizer, step - 1, steps))


def test_a_position_between_batches_of_lanes_is_refused(columns: Path, tmp_path: Path) -> None:
    """Lanes are part of the run: a batch that they do not divide is no batch of it."""
    with pytest.raises(ValueError, match="no multiple of data.lanes"):
        TrainConfig.model_validate(tiny_config(columns, tmp_path, global_batch=20))


def test_checkpoints_of_a_newer_release_are_left_as_they_are(columns: Path, tmp_path: Path) -> None:
    """They are no damage: the run neither goes on from an older step nor takes any away."""
    run = trained(tiny_config(columns, tmp_path, steps=2, save_every=1))
    path = step_folder(run, 2) / "manifest.json"
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_bytes(seal(record | {"version": 2}))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, output, _ = fitted(tiny_config(columns, tmp_path, steps=4, save_every=1))
    assert (code, "version 2" in output) == (2, True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_other_columns_are_another_run(columns: Path, tmp_path: Path) -> None:
    """The refusal names the way: a new run from these weights."""
    cache = tmp_path / "cache"
    write_columns(cache / "toy", "toy", 150, 1)
    config = tiny_config(cache, tmp_path / "runs", steps=1)
    run = trained(config)
    changed = tmp_path / "changed"
    write_columns(changed / "toy", "toy", 150, 1, model="another")
    config = tiny_config(changed, tmp_path / "runs", steps=2)
    code, output, same = fitted(config)
    assert (code, same) == (2, run)
    assert "data.latents.identity.encoder: found 'toy', expected 'another'" in output
    assert f"init_from={step_folder(run, 1)}" in output
    new = {**config, "runs": str(tmp_path / "new"), "init_from": str(step_folder(run, 1))}
    assert manifest(trained(new), 2)["init"]["step"] == 1


def test_a_run_that_has_ended_keeps_its_config(columns: Path, tmp_path: Path) -> None:
    """Another rate trains nothing there, so the run's record does not name it."""
    run = trained(tiny_config(columns, tmp_path, steps=2, optim={"lr": 1e-3}))
    record = (run / "config.yaml").read_bytes()
    trained(tiny_config(columns, tmp_path, steps=2, optim={"lr": 1e-4}))
    assert (run / "config.yaml").read_bytes() == record
    trained(tiny_config(columns, tmp_path, steps=3, optim={"lr": 1e-4}))
    assert "lr: 0.0001" in (run / "config.yaml").read_text()
