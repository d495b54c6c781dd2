"""Runs of the command: exact resume, elastic resume, damage, refusals, and what a run says of itself.

Ranks are forks of this process (`ranks.py`), and runs are shared; one test goes through torchrun's agent.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.lines import next_lines
from tests.train import faults
from tests.train.conftest import ROOT, launch, write_config
from tests.train.faults import STEPS, elastic, records, same_files, step_folder
from tests.train.processes import by_agent
from train import loop
from train.__main__ import main
from train.config import TrainConfig
from train.loop import Trainer
from train.model.dit import DiT, DiTConfig
from train.model.flow import losses

WORDS = (f"steps={STEPS}", f"keep={STEPS}", "save_every=1")


@pytest.fixture(scope="module")
def columns() -> Path:
    return faults.columns()


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow), 4])
def straight(request: pytest.FixtureRequest) -> Path:
    """Twelve steps without a break, on 1 rank with ZeRO 1 and on 2 and 4 ranks with ZeRO 2; all checkpoints kept."""
    run = faults.straight(request.param)
    output = (run.parent / "log-0").read_text()
    assert f"stage {min(request.param, 2)}" in output
    assert re.search(r"step 12/12  loss \d\.\d+ .* samples/s  data wait .*%  ETA 0:00:00", output)
    (line,) = next_lines(output)
    assert line.startswith(f"next: python -m eval generate --checkpoint {run} ")
    return run


def zero(ranks: int) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": min(ranks, 2)}}}


def manifest_of(run: Path, step: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((step_folder(run, step) / "manifest.json").read_text())
    return result


def ranks_of(run: Path) -> int:
    return int(manifest_of(run, STEPS)["world"])


def copy_until(run: Path, step: int, folder: Path) -> Path:
    """The run as it was after `step`."""
    shutil.copytree(run, folder / run.name)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(step_folder(folder / run.name, later))
    return folder / run.name


def test_six_and_six_steps_are_twelve(straight: Path, tmp_path: Path, columns: Path) -> None:
    run, ranks = copy_until(straight, 6, tmp_path), ranks_of(straight)
    process = launch(tmp_path, columns, *WORDS, ranks=ranks, **zero(ranks))
    assert process.returncode == 0, process.stderr
    assert "step-00000006: step 6, position 96" in process.stdout
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    assert records(straight) == records(run)
    same_files(step_folder(straight, STEPS), step_folder(run, STEPS))


def test_the_average_is_that_of_the_weights(straight: Path) -> None:
    manifest = manifest_of(straight, STEPS)
    assert TrainConfig.model_validate(manifest["config"]).ema.decay == 0.9
    average = DiT(DiTConfig.model_validate(manifest["model"]), seed=0).state_dict()
    for step in range(1, STEPS + 1):
        weights = load_file(step_folder(straight, step) / "weights.safetensors")
        assert not torch.equal(weights["proj_out.weight"], average["proj_out.weight"])
        average = {k: 0.9 * average[k] + 0.1 * weights[k] for k in average}
    result = load_file(step_folder(straight, STEPS) / "ema.safetensors")
    for name, expected in average.items():
        torch.testing.assert_close(result[name], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("worlds", "precision"),
    [((4, 2, 1, 4), "fp32"), pytest.param((2, 1, 2), "bf16", marks=pytest.mark.slow)],
)
def test_other_numbers_of_ranks_go_on(worlds: tuple[int, ...], precision: str) -> None:
    elastic(worlds, precision)


def test_validation_is_the_same_for_any_world(tmp_path: Path, columns: Path) -> None:
    """A step from the sixth checkpoint of 2 ranks on 1, 2 and 4, with a rate so small that no weight moves."""
    two = faults.straight(2)
    seventh, result = records(two, first=7)[0], []
    held_out = {"source": str(columns / "toy-val"), "rows": 20, "batch": 6}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        run = copy_until(two, 6, folder)
        words = ("steps=7", "optim.lr=1e-38")
        process = launch(folder, columns, *words, ranks=ranks, validation=held_out, **zero(2))
        assert process.returncode == 0, process.stderr
        (step,) = records(run, first=7)
        assert step["position"] == seventh["position"]
        assert step["loss"] == pytest.approx(seventh["loss"], rel=1e-6)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
        assert len(last["levels"]) == len(last["levels_normalised"]) == 8
        result.append({k: v for k, v in last.items() if k != "seconds"})
    assert result[0] == result[1] == result[2]  # to the last bit


def test_another_batch_goes_on_in_the_same_order(tmp_path: Path, columns: Path) -> None:
    """The loss of a batch of 32 is the mean of those of the two batches of 16 that stand in its place."""
    losses = {}
    for batch, steps in ((16, 8), (32, 7)):
        folder = tmp_path / str(batch)
        run = copy_until(faults.straight(1), 6, folder)
        words = (f"steps={steps}", "optim.lr=1e-38", f"global_batch={batch}", "micro_batch=8")
        assert launch(folder, columns, *words).returncode == 0
        losses[batch] = [r["loss"] for r in records(run, first=7)]
        assert manifest_of(run, steps)["position"] == 128
    assert losses[32] == [pytest.approx(sum(losses[16]) / 2, rel=1e-6)]


def test_a_refused_resume_changes_nothing(tmp_path: Path, columns: Path) -> None:
    ranks = 2
    run = copy_until(faults.straight(ranks), 3, tmp_path)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    process = launch(tmp_path, columns, "data.window=16", "data.caption_dropout=0.5", ranks=ranks)
    assert process.returncode == 2
    assert process.stderr.count("order.window: found") == ranks  # each says so
    assert "objective.caption_dropout: found" in process.stderr
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, columns: Path) -> None:
    ranks = 2
    straight = faults.straight(ranks)
    run = copy_until(straight, 8, tmp_path)
    file = step_folder(run, 8) / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    process = launch(tmp_path, columns, *WORDS, ranks=ranks, **zero(ranks))
    assert process.returncode == 0, process.stderr
    assert "step-00000008 is damaged" in process.stdout
    assert "step-00000007: step 7, position 112" in process.stdout
    assert records(run) == records(straight)
    same_files(step_folder(run, STEPS), step_folder(straight, STEPS))


def test_folders_beside_the_steps_are_left_alone(
    tmp_path: Path,
    columns: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that is put aside under a name of its own is not gone on from, and a copy of one is not removed."""
    run = copy_until(faults.straight(1), 8, tmp_path)
    aside, copy = (
        run / "checkpoints" / f"step-{name}" for name in ("00000008.old", "00000002-best")
    )
    step_folder(run, 8).rename(aside)
    shutil.copytree(step_folder(run, 2), copy)
    before = {p: p.read_bytes() for folder in (aside, copy) for p in folder.iterdir()}
    words = ["saved", str(write_config(tmp_path, columns))]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"{step_folder(run, 7)} ")
    process = launch(tmp_path, columns, f"steps={STEPS}", "keep=2", "save_every=1")
    assert process.returncode == 0, process.stderr
    assert "step-00000007: step 7, position 112" in process.stdout
    same_files(step_folder(run, STEPS), step_folder(faults.straight(1), STEPS))
    assert {p: p.read_bytes() for folder in (aside, copy) for p in folder.iterdir()} == before
    kept = {step_folder(run, step) for step in (STEPS - 1, STEPS)}
    assert set((run / "checkpoints").glob("step-*")) == {aside, copy, *kept}


def command(words: list[str], output: Path) -> int:
    """As a user types it: each rank starts with its imports, which take seconds."""
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    with output.open("w") as log:
        return subprocess.run([*run, *words], cwd=ROOT, stdout=log, stderr=log).returncode


def agent(words: list[str], output: Path) -> int:
    return by_agent(words[1:], 2, output)


@pytest.mark.parametrize("launcher", [agent, pytest.param(command, marks=pytest.mark.slow)])
def test_torchrun_stops_all_ranks_at_a_loss_that_is_not_finite(
    tmp_path: Path, columns: Path, launcher: Callable[[list[str], Path], int]
) -> None:
    words = ["train", str(write_config(tmp_path, columns)), "optim.lr=1e38"]
    log = tmp_path / "log"
    assert launcher(words, log) != 0  # torchrun's own code; the ranks leave with 3
    output = log.read_text()
    assert re.search(r"exitcode\s*:\s*3", output)
    assert "NonFiniteLoss" in output
    run = tmp_path / "tiny-vae"
    assert not (run / "checkpoints").exists()
    reports = [json.loads(p.read_text()) for p in sorted(run.glob("nonfinite-*.json"))]
    assert [len(w["rows"]) for w in reports] == [8, 8]  # each rank's part of the batch
    assert not set(reports[0]["rows"]) & set(reports[1]["rows"])
    assert reports[0]["step"] == reports[1]["step"] > 0


class Overflow(torch.autograd.Function):
    """Changes no value, and makes its gradient infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # of any inputs
        return gradient * torch.inf


def test_a_gradient_that_overflows_is_a_skipped_step_in_the_log(
    tmp_path: Path, columns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is finite all the same; the means are of the steps that moved the weights."""
    step = Trainer.step

    def overflowing(trainer: Trainer, *inputs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if trainer.step_number == 3:
                patch.setattr(loop, "losses", lambda *x: Overflow.apply(losses(*x)))
            return step(trainer, *inputs)

    monkeypatch.setattr(Trainer, "step", overflowing)
    changes = {"guard": {"nonfinite": "skip"}, "steps": 6, "log_every": 2}
    process = launch(tmp_path, columns, **changes)
    assert process.returncode == 0, process.stdout
    assert "the gradient of step 3 is not finite on some rank" in process.stdout
    run = tmp_path / "tiny-vae"
    assert manifest_of(run, 6)["optimizer"]["step"] == 5
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [r["not_finite"] for r in lines if "loss" in r] == [0, 1, 0]


@pytest.mark.slow  # most of it torchrun, which stops and starts ranks
def test_torchrun_starts_all_ranks_again_where_one_died(
    tmp_path: Path, columns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --max-restarts 1: they go on from the last checkpoint, to the same weights."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = write_config(tmp_path, columns, **zero(2))

    def die_once() -> None:
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            step = Trainer.step

            def deadly(trainer: Trainer, *inputs: Any) -> Any:
                if trainer.step_number == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(trainer, *inputs)

            Trainer.step = deadly  # type: ignore[method-assign]

    code = by_agent([str(config), *WORDS], 2, tmp_path / "log", die_once, max_restarts=1)
    output = (tmp_path / "log").read_text()
    assert code == 0, output
    assert output.count("resumed from ") == 1
    run = tmp_path / "tiny-vae"
    assert [r["step"] for r in records(run)] == list(range(1, STEPS + 1))
    same_files(step_folder(run, STEPS), step_folder(faults.straight(2), STEPS))


def test_a_wrong_path_is_said_before_anything_starts(tmp_path: Path, columns: Path) -> None:
    process = launch(tmp_path, columns, "data.latents=nowhere/vae", ranks=2)
    assert process.returncode == 2
    assert process.stderr.count("nowhere/vae: no such folder") == 2
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "tiny-vae").exists()
