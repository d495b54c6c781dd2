"""Real runs of the real command: exact resume, elastic resume, damage, signals, and what stops a run.

A process that trains takes some seconds to start, so runs are shared where they can be.
"""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train.config import TrainConfig
from train.model import DiT, DiTConfig

from .conftest import ROOT, command, environment, launch, tiny_config

PROGRESS = ("loss", "grad_norm", "lr", "position", "epoch")


def records(run: Path, first: int = 1) -> list[dict[str, Any]]:
    """Of each training step from `first` on, what does not depend on the clock."""
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: r[k] for k in ("step", *PROGRESS)} for r in found if "loss" in r and r["step"] >= first
    ]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def assert_same_files(a: Path, b: Path) -> None:
    """Same weights, moments and average, bit for bit."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names == sorted(p.name for p in b.glob("*.safetensors"))
    assert len(names) >= 3
    for name in names:
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one), name


@pytest.fixture(scope="module", params=[1, 2])
def straight(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, columns: Path
) -> Path:
    """Twenty steps without a break, on 1 rank with ZeRO 1 and on 2 ranks with ZeRO 2; all checkpoints kept."""
    folder = tmp_path_factory.mktemp(f"straight-{request.param}")
    zero = {"zero_optimization": {"stage": request.param}}
    words = ("save_every=1", "keep=20")
    done = launch(folder, columns, *words, ranks=request.param, deepspeed=zero)
    assert done.returncode == 0, done.stderr
    assert f"stage {request.param}" in done.stdout
    assert re.search(
        r"step 20/20  loss \d\.\d+ .* samples/s  data wait .*%  ETA 0:00:00", done.stdout
    )
    return folder / "tiny-vae"


def ranks_of(run: Path) -> int:
    return int(json.loads((step_folder(run, 20) / "manifest.json").read_text())["world"])


def copy_until(run: Path, step: int, folder: Path) -> Path:
    """The run as it was after `step`."""
    shutil.copytree(run, folder / run.name)
    for later in range(step + 1, 21):
        shutil.rmtree(step_folder(folder / run.name, later))
    return folder / run.name


def test_ten_and_ten_steps_are_twenty(straight: Path, tmp_path: Path, columns: Path) -> None:
    ranks = ranks_of(straight)
    zero = {"zero_optimization": {"stage": ranks}}
    for words in (["steps=10"], ["data.workers=1"]):  # read by another process: the same
        done = launch(tmp_path, columns, *words, ranks=ranks, deepspeed=zero)
        assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    cut = tmp_path / "tiny-vae"
    assert [r["step"] for r in records(cut)] == list(range(1, 21))
    assert records(straight) == records(cut)
    assert_same_files(step_folder(straight, 20), step_folder(cut, 20))


def test_a_refused_resume_changes_nothing(straight: Path, tmp_path: Path, columns: Path) -> None:
    run = copy_until(straight, 3, tmp_path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = launch(tmp_path, columns, "seed=7", "data.caption_dropout=0.5")
    assert done.returncode == 2
    assert "order.seed: found" in done.stderr
    assert "objective.caption_dropout: found" in done.stderr
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_the_average_is_that_of_the_weights(straight: Path) -> None:
    manifest = json.loads((step_folder(straight, 20) / "manifest.json").read_text())
    assert TrainConfig.model_validate(manifest["config"]).ema.decay == 0.9
    average = DiT(DiTConfig.model_validate(manifest["model"]), seed=0).state_dict()
    for step in range(1, 21):
        weights = load_file(step_folder(straight, step) / "weights.safetensors")
        assert not torch.equal(weights["proj_out.weight"], average["proj_out.weight"])
        average = {k: 0.9 * average[k] + 0.1 * weights[k] for k in average}
    found = load_file(step_folder(straight, 20) / "ema.safetensors")
    for name, wanted in average.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=0)


def test_another_world_goes_on(straight: Path, tmp_path: Path, columns: Path) -> None:
    """A step from the tenth checkpoint on 1 and on 2 ranks, with a rate so small that no weight moves."""
    if ranks_of(straight) == 1:
        pytest.skip("goes on from the 2-rank run")
    eleventh, found = records(straight, first=11)[0], {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run = copy_until(straight, 10, folder)
        held_out = {"source": str(columns / "toy-val"), "rows": 20, "batch": 8}
        zero = {"zero_optimization": {"stage": 2}}
        words = ("steps=11", "optim.lr=1e-38")
        done = launch(folder, columns, *words, ranks=ranks, validation=held_out, deepspeed=zero)
        assert done.returncode == 0, done.stderr
        (step,) = records(run, first=11)
        assert step["position"] == eleventh["position"]
        assert step["loss"] == pytest.approx(eleventh["loss"], rel=1e-6)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
        assert len(last["levels"]) == 8
        found[ranks] = last["loss"], last["normalised"], last["levels"]
    assert found[1] == found[2]  # to the last bit


def test_a_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path, columns: Path) -> None:
    if ranks_of(straight) == 2:
        pytest.skip("the checkpoints' own tests show the rest")
    run = copy_until(straight, 12, tmp_path)
    file = step_folder(run, 12) / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = launch(tmp_path, columns)
    assert done.returncode == 0, done.stderr
    assert "step-00000012 is damaged" in done.stdout
    assert "step-00000011: step 11, position 176" in done.stdout
    assert records(run) == records(straight)
    assert_same_files(step_folder(run, 20), step_folder(straight, 20))


def test_a_signal_saves_the_step_in_progress(tmp_path: Path, columns: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(columns, tmp_path, steps=10**6)))
    process = subprocess.Popen(
        command(path, 1), cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    seen = 0
    for text in process.stdout:
        if found := re.match(r"step (\d+)/", text):
            seen = int(found[1])
        if seen == 3:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143
    steps = [p.name for p in (tmp_path / "tiny-vae/checkpoints").glob("step-*")]
    assert len(steps) == 1
    saved = int(steps[0].removeprefix("step-"))
    logged = [int(s) for s in re.findall(r"step (\d+)/", rest)]
    assert saved == max([seen, *logged])
    assert f"stopped by SIGTERM after step {saved}, saved" in rest


def test_a_loss_that_is_not_finite_stops_all(tmp_path: Path, columns: Path) -> None:
    done = launch(tmp_path, columns, "optim.lr=1e38", ranks=2)
    assert done.returncode != 0  # torchrun's own code; the ranks leave with 3
    assert re.search(r"exitcode\s*:\s*3", done.stderr)
    assert "NonFiniteLoss" in done.stderr
    run = tmp_path / "tiny-vae"
    assert not (run / "checkpoints").exists()
    written = [json.loads(p.read_text()) for p in sorted(run.glob("nonfinite-*.json"))]
    assert [len(w["rows"]) for w in written] == [8, 8]  # each rank's part of the batch
    assert not set(written[0]["rows"]) & set(written[1]["rows"])
    assert written[0]["step"] == written[1]["step"] > 0


def test_a_wrong_path_is_said_before_anything_starts(tmp_path: Path, columns: Path) -> None:
    done = launch(tmp_path, columns, "data.latents=nowhere/vae")
    assert done.returncode == 2
    assert "nowhere/vae: no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny-vae").exists()
