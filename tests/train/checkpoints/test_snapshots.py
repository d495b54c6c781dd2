"""Snapshots of power averages on real small trainings, and averages of other lengths that are made of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shards import seal
from shards.read.stream import Batch, Stream
from tests.memory import MEMORY
from tests.train.conftest import launch, tiny_config
from tests.train.here import columns_of, fitted, manifest, step_folder, trained
from tests.train.processes import fitting
from train.checkpoints import checkpoint, snapshots
from train.checkpoints.checkpoint import CheckpointError, load_for_sampling
from train.checkpoints.identity import compared, training_of
from train.checkpoints.reference import export
from train.checkpoints.snapshots import (
    FOLDER,
    EmaLengthRefused,
    digest_of_length,
    load_of_length,
    refuse_planned,
)
from train.config import EmaConfig, TrainConfig
from train.model.dit import DiT
from train.ranks.world import World

POWER = [0.05, 0.1]
STEPS = 128


def config(columns: Path, runs: Path, snapshots: int, **changes: Any) -> dict[str, Any]:
    ema = {"decay": 0.9, "power": POWER, "snapshots": snapshots}
    return tiny_config(columns, runs, **{"ema": ema, "optim": {"lr": 1e-3}, **changes})


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / FOLDER).iterdir())


def flat(state: Any) -> np.ndarray:
    """All parameters end to end, fp64."""
    parts = [value.detach().double().numpy().ravel() for _, value in sorted(state.items())]
    return np.concatenate(parts)


def parameters(model: DiT) -> np.ndarray:
    return flat(dict(model.named_parameters()))


def exponent_of(length: float) -> float:
    """By bisection of the deviation, sqrt(g+1) / ((g+2) sqrt(g+3)), which falls with g from 0 on."""
    low, high = 0.0, 1e6
    for _ in range(200):
        g = (low + high) / 2
        deviation = (g + 1) ** 0.5 / ((g + 2) * (g + 3) ** 0.5)
        low, high = (g, high) if deviation > length else (low, g)
    return low


def tracked(path: np.ndarray, length: float) -> np.ndarray:
    """What an average that is updated in every step by (1 - 1/t)^(g+1) comes to, fp64."""
    average, power = np.zeros_like(path[0]), exponent_of(length) + 1
    for t, weights in enumerate(path, 1):
        kept = (1 - 1 / t) ** power
        average = kept * average + (1 - kept) * weights
    return average


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def weights_by_step(run: Path, steps: int) -> np.ndarray:
    """(steps, parameters)"""
    names = dict(load_for_sampling(run)[0].named_parameters())
    states = [load_file(step_folder(run, n + 1) / "weights.safetensors") for n in range(steps)]
    return np.stack([flat({name: s[name] for name in names}) for s in states])


@pytest.fixture(scope="module")
def wandered(columns: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """A run of 128 steps with 32 snapshots, and its weights after each step."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as runs:  # which has 128 checkpoints to write
        run = trained(config(columns, Path(runs), 32, steps=STEPS, save_every=1, keep=STEPS))
        yield run, weights_by_step(run, STEPS)


def test_lengths_equal_those_tracked_directly(wandered: tuple[Path, np.ndarray]) -> None:
    """Within 1e-3 of all weights in relative L2, for 0.03 to 0.20 with 32 snapshots in fp16; tracked ones exactly."""
    run, path = wandered
    assert steps_of(run) == list(range(4, STEPS + 1, 4))
    for length in (0.03, 0.035, 0.04, 0.06, 0.08, 0.12, 0.15, 0.17, 0.2):
        model, record, _ = load_of_length(run, length)
        assert record["step"] == STEPS
        assert apart(parameters(model), tracked(path, length)) < 1e-3
    for length in POWER:
        assert apart(parameters(load_of_length(run, length)[0]), tracked(path, length)) < 1e-6
    # lengths do differ, by more than what is allowed
    assert apart(tracked(path, 0.03), tracked(path, 0.035)) > 1e-3


def test_sixteen_snapshots_and_an_earlier_step(
    wandered: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """Every other snapshot, as a run with 16 has them, does for 0.05 to 0.15; so does step 64 of the run with 32."""
    run, path = wandered
    for length in (0.06, 0.1, 0.15):
        model, record, _ = load_of_length(step_folder(run, 64), length)
        assert record["step"] == 64
        assert apart(parameters(model), tracked(path[:64], length)) < 1e-3
    half = tmp_path / "half"
    shutil.copytree(step_folder(run, STEPS), half / "checkpoints" / f"step-{STEPS:08d}")
    shutil.copytree(run / FOLDER, half / FOLDER)
    for step in steps_of(run)[::2]:
        shutil.rmtree(half / FOLDER / f"step-{step:08d}")
    for length in (0.05, 0.055, 0.07, 0.09, 0.11, 0.13, 0.15):
        model, _, _ = load_of_length(half, length)
        assert apart(parameters(model), tracked(path, length)) < 1e-3


def test_other_lengths_are_refused_with_what_they_need(wandered: tuple[Path, np.ndarray]) -> None:
    run, _ = wandered
    with pytest.raises(EmaLengthRefused, match=r"found 32 .* for one of length 0.02. It takes 61"):
        load_of_length(run, 0.02)
    with pytest.raises(EmaLengthRefused, match=r"found 16 .* train with ema.snapshots=62$"):
        load_of_length(step_folder(run, 64), 0.03)


def test_the_digest_is_of_the_length_and_of_what_it_is_made_of(
    wandered: tuple[Path, np.ndarray],
) -> None:
    run, _ = wandered
    digests = [load_of_length(run, length)[2] for length in (0.06, 0.06, 0.07)]
    digests.append(load_of_length(step_folder(run, 64), 0.06)[2])
    assert digests[0] == digests[1] == digest_of_length(run, 0.06)  # which reads no weights
    assert len(set(digests)) == 3


def test_what_a_run_will_have_kept_is_known_before(wandered: tuple[Path, np.ndarray]) -> None:
    """A plan refuses the lengths that the run itself refuses at a step, with the same numbers."""
    run, _ = wandered
    planned = EmaConfig(power=(0.05, 0.1), snapshots=32)
    for step in (16, 63, 64, 100, STEPS):
        for length in (0.02, 0.03, 0.05, 0.06, 0.2):
            refused = []
            for check in (
                lambda: digest_of_length(step_folder(run, step), length),  # noqa: B023
                lambda: refuse_planned(planned, STEPS, step, length),  # noqa: B023
            ):
                try:
                    check()
                except EmaLengthRefused as error:
                    refused.append(str(error).partition(" snapshots of ")[2])
            assert len(refused) in (0, 2)
            assert len(set(refused)) <= 1
    with pytest.raises(EmaLengthRefused, match="step 64 will have 16 snapshots .*=62$"):
        refuse_planned(planned, STEPS, 64, 0.03)
    with pytest.raises(EmaLengthRefused, match="found no ema.power"):
        refuse_planned(EmaConfig(), STEPS, STEPS, 0.1)


def test_a_damaged_snapshot_is_never_part_of_an_average(
    wandered: tuple[Path, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, path = wandered
    copy = tmp_path / "copy"
    shutil.copytree(step_folder(run, STEPS), copy / "checkpoints" / f"step-{STEPS:08d}")
    shutil.copytree(run / FOLDER, copy / FOLDER)
    file = copy / FOLDER / "step-00000120/state-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="step-00000120 is damaged"):
        load_of_length(copy, 0.06)
    # one of another run, though sound
    record = json.loads((file.parent / "manifest.json").read_text())
    del record["digest"]
    (file.parent / "manifest.json").write_bytes(seal(record | {"world": 7}))
    with caplog.at_level(logging.WARNING):
        model, _, _ = load_of_length(copy, 0.1)
    assert "step-00000120 is left out: its manifest is another one" in caplog.text
    assert apart(parameters(model), tracked(path, 0.1)) < 1e-6


@pytest.fixture(scope="module")
def whole(columns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with 4 snapshots that nothing interrupts."""
    return trained(config(columns, tmp_path_factory.mktemp("whole"), 4, steps=12, save_every=4))


def tensors_of(run: Path) -> dict[str, bytes]:
    """Bytes of each tensor of each checkpoint and snapshot."""
    return {
        f"{path.relative_to(run)}: {name}": values.numpy().tobytes()
        for path in sorted(run.rglob("*.safetensors"))
        for name, values in load_file(path).items()
    }


def test_the_plain_average_is_what_it_is_without(
    columns: Path, tmp_path: Path, whole: Path
) -> None:
    """Weights, moments and average are bit for bit those of a run without power averages, which has no word of them."""
    plain = trained(
        config(columns, tmp_path, 4, steps=12, save_every=4, ema={"decay": 0.9})
    )  # fmt: skip
    assert not (plain / FOLDER).exists()
    assert manifest(plain, 12)["average"].keys() == {"initial_share"}
    for name in ("weights.safetensors", "ema.safetensors"):
        digests = [manifest(run, 12)["files"][name] for run in (plain, whole)]
        assert digests[0] == digests[1]
    without, beside = (
        load_file(step_folder(run, 12) / "state-00000-of-00001.safetensors") for run in (plain, whole)
    )  # fmt: skip
    assert all(torch.equal(values, beside[name]) for name, values in without.items())
    assert {name.split("/")[0] for name in beside.keys() - without.keys()} == {
        "power-0.05",
        "power-0.1",
    }


def killed(columns: Path, folder: Path, module: ModuleType, name: str, call: int) -> Path:
    """A run of 12 steps whose process kills itself as it calls a function of a module for the `call`-th time."""
    calls = 0
    function = getattr(module, name)

    def dies(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)

    def stops(stream: Iterator[Batch], world: World) -> Iterator[Batch]:
        setattr(module, name, dies)  # in the run's own process
        yield from stream

    job = fitting(folder, config(columns, folder, 4, steps=12, save_every=4), 1, stops)
    assert job.wait() == [-signal.SIGKILL], job.text()
    return folder / "tiny-vae"


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (checkpoint, "write_state", 1),  # of step 3
        (snapshots, "atomic_write", 2),  # of step 6
        (snapshots, "fsync_path", 3),  # of step 9, which the checkpoint of step 8 does not name
        (snapshots, "make_durable", 3),  # the same, whose folder has its name already
        (snapshots, "sha256_file", 4),  # of step 12
    ],
)
def test_a_killed_run_goes_on_exactly(
    columns: Path, tmp_path: Path, whole: Path, module: ModuleType, name: str, call: int
) -> None:
    """Snapshots are whole or absent after the kill, and in the end all tensors are bit for bit those of the run that
    was not killed; `keep` has left the snapshots alone."""
    run = killed(columns, tmp_path, module, name, call)
    for folder in (run / FOLDER).glob("step-*"):
        checkpoint.verified(folder, kind=snapshots.KIND)
    trained(config(columns, tmp_path, 4, steps=12, save_every=4))
    assert steps_of(run) == [3, 6, 9, 12]
    assert tensors_of(run) == tensors_of(whole)


def test_another_number_of_steps(columns: Path, tmp_path: Path) -> None:
    """Snapshots that were made stay, those to come are spaced by the new number. A continuation that was abandoned
    leaves none."""
    run = trained(config(columns, tmp_path, 4, steps=4, save_every=2, keep=20))
    assert steps_of(run) == [1, 2, 3, 4]
    trained(config(columns, tmp_path, 4, steps=12, save_every=2, keep=20))
    assert steps_of(run) == [1, 2, 3, 4, 6, 9, 12]
    listed = manifest(run, 12)["average"]["power"]
    assert [entry["step"] for entry in listed["snapshots"]] == steps_of(run)
    assert (listed["lengths"], listed["updates"]) == (POWER, 12)
    for step in (10, 12):
        shutil.rmtree(step_folder(run, step))
    trained(config(columns, tmp_path, 4, steps=16, save_every=2, keep=20, optim={"lr": 1e-4}))
    assert steps_of(run) == [1, 2, 3, 4, 6, 12, 16]


def test_ranks_hold_their_own_parts(columns: Path, tmp_path: Path, whole: Path) -> None:
    """Two ranks write two files a snapshot, from which averages are made as from one; one rank goes on from them."""
    changes: dict[str, Any] = {"ema": {"decay": 0.9, "power": POWER, "snapshots": 12}, "keep": 20}
    changes |= {"optim": {"lr": 1e-3}, "save_every": 1}
    job = launch(tmp_path, columns, ranks=2, steps=12, **changes)
    assert job.returncode == 0, job.stdout
    run = tmp_path / "tiny-vae"
    names = [f"state-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    for step in steps_of(run):
        folder = run / FOLDER / f"step-{step:08d}"
        assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *names]
    path = weights_by_step(run, 12)
    for length in (0.07, 0.1, 0.12):
        model = load_of_length(run, length)[0]
        assert apart(parameters(model), tracked(path, length)) < 1e-3
    of_one = parameters(load_of_length(whole, 0.1)[0])
    assert apart(of_one, tracked(path, 0.1)) < 1e-4
    job = launch(tmp_path, columns, ranks=1, steps=14, **changes)
    assert job.returncode == 0, job.stdout
    averages = parameters(load_of_length(run, 0.1)[0])
    assert apart(averages, tracked(weights_by_step(run, 14)[:14], 0.1)) < 1e-6


def test_steps_that_are_skipped_are_no_updates(columns: Path, tmp_path: Path) -> None:
    """Of 14 steps two have losses that are not finite: averages are of the other 12, and each counts once."""
    values = config(
        columns, tmp_path, 14, steps=14, save_every=1, keep=20, guard={"nonfinite": "skip"}
    )
    checked = TrainConfig.model_validate(values)

    def batches(position: int, world: World) -> Iterator[Batch]:
        sources, order = columns_of(checked)
        with Stream(sources, order, position=position, global_batch=16) as stream:
            for batch in stream:
                if batch.position // 16 in (4, 5):
                    batch.moments.fill_(torch.nan)
                yield batch

    run = trained(values, batches=batches)
    assert manifest(run, 14)["average"]["power"]["updates"] == 12
    path = np.delete(weights_by_step(run, 14), [4, 5], 0)
    for length in (0.05, 0.12):
        model = load_of_length(run, length)[0]
        assert apart(parameters(model), tracked(path, length)) < 1e-3


@pytest.mark.parametrize("power", [None, [0.05, 0.12]])
def test_a_run_keeps_its_lengths(
    columns: Path, tmp_path: Path, whole: Path, power: list[float] | None
) -> None:
    """A power average is one of all updates, so it neither begins nor changes within a run."""
    copy = tmp_path / "tiny-vae"
    shutil.copytree(whole, copy)
    ema = {"decay": 0.9, "power": power, "snapshots": 4}
    code, output, run = fitted(config(columns, tmp_path, 4, steps=16, ema=ema))
    assert (code, run) == (2, copy)
    assert "ema.power: found" in output


def test_a_run_without_power_averages(columns: Path, tmp_path: Path) -> None:
    run = trained(tiny_config(columns, tmp_path, steps=2))
    with pytest.raises(EmaLengthRefused, match=r"found no power averages.*ema.power=\[0.05,0.10\]"):
        load_of_length(run, 0.1)
    with pytest.raises(CheckpointError, match="found no checkpoint"):
        load_of_length(tmp_path / "nothing", 0.1)
    exports = tmp_path / "exports"
    exports.mkdir()
    with pytest.raises(EmaLengthRefused, match="found no power averages"):
        export(step_folder(run, 2), exports / "out", "safetensors", 0.1)
    assert list(exports.iterdir()) == []


def test_lengths_move_no_weights(columns: Path, tmp_path: Path, whole: Path) -> None:
    """Trainings that differ in power averages alone count as the same."""
    plain = trained(config(columns, tmp_path, 4, steps=12, save_every=4, ema={"decay": 0.9}))
    first, second = (training_of(manifest(run, 12)) for run in (plain, whole))
    assert first["ema"] == second["ema"] == {"decay": 0.9}
    assert not compared(first, second).all
