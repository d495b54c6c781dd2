"""What may befall a job of the trainer, with real signals to real processes; each ends in the weights, moments, average
and log of a job that nothing befell, once it is started again.

training   ranks killed, stopped, told to end, hanging or poisoned, at 1, 2 and 4 ranks; jobs suspended until
           another one has taken over

Each function is one case: of the tests, and in great numbers of the soak run.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from shards.read.stream import Batch
from tests.memory import MEMORY, kept
from tests.soak.sweep import Case, Sweep
from tests.train.conftest import tiny_config, write_columns
from tests.train.processes import JOBS, Job, Wrap, called, command, fitting, start
from train.checkpoints import checkpoint
from train.ranks.lock import RunLock
from train.ranks.world import World

SCRATCH = os.environ.get("LATENTBANK_SCRATCH") or MEMORY
STEPS = 12
PROGRESS = ("loss", "grad_norm", "lr", "position", "epoch")
GUARD = {"silence": 8.0, "hang": 20.0}  # as short as a busy machine allows


# Runs, and what is left of them ------------------------------------------------------------------------------------


@cache
def columns() -> Path:
    cache = kept(SCRATCH)
    write_columns(cache / "toy", "toy", 150, 1)
    write_columns(cache / "toy-val", "toy-val", 20, 2)
    return cache


def values_of(folder: Path, ranks: int, **changes: Any) -> dict[str, Any]:
    """Of a run that saves every other step: on 1 rank with ZeRO 1, on more with ZeRO 2."""
    held_out = {"source": str(columns() / "toy-val"), "rows": 8, "batch": 1, "every": 6}
    zero = {"zero_optimization": {"stage": min(ranks, 2)}}
    values = {"steps": STEPS, "save_every": 2, "validation": held_out, "deepspeed": zero}
    return tiny_config(columns(), folder, **{**values, **changes})


def go(folder: Path, ranks: int, *words: str, **changes: Any) -> Job:
    """Start the command."""
    return command(write_yaml(folder, ranks, **changes), words, ranks)


def write_yaml(folder: Path, ranks: int, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values_of(folder, ranks, **changes)))
    return path


def held(
    folder: Path, ranks: int, point: str, calls: int, *words: str, logs: str = "", **changes: Any
) -> Job:
    """Returns a job whose rank 0 has stopped itself as it entered a function, after so many calls of it."""
    path = write_yaml(folder, ranks, **changes)

    def work(rank: int) -> None:
        if rank == 0:
            stop_at(point, calls)
        called([str(path), *words])

    job = start(work, ranks, folder / logs)
    job.until(lambda: is_stopped(job.pids[0]), f"stop at {point}")
    return job


@cache
def straight(ranks: int) -> Path:
    """A run that nothing befell, with all its checkpoints."""
    folder = kept(SCRATCH)
    job = go(folder, ranks, "save_every=1", f"keep={STEPS}")
    assert job.wait() == [0] * ranks, job.text()
    return folder / "tiny-vae"


def records(run: Path, first: int = 1) -> list[dict[str, Any]]:
    """Of each training step from `first` on, what does not depend on the clock."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: r[k] for k in ("step", *PROGRESS)} for r in lines if "loss" in r and r["step"] >= first
    ]


def validations(run: Path) -> list[list[Any]]:
    """Step and loss of each validation."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [[r["step"], r["validation"]["loss"]] for r in lines if "validation" in r]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def saved(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def same_files(a: Path, b: Path) -> None:
    """Same weights, moments and average, bit for bit."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names == sorted(p.name for p in b.glob("*.safetensors"))
    assert len(names) >= 3
    for name in names:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first), name


def ends_as_straight(folder: Path, ranks: int) -> None:
    """Started again, it comes to where a run comes that nothing befell, and leaves nothing behind."""
    job = go(folder, ranks)
    assert job.wait() == [0] * ranks, job.text()
    run, undisturbed = folder / "tiny-vae", straight(ranks)
    assert records(run) == records(undisturbed)
    assert validations(run) == validations(undisturbed)
    same_files(step_folder(run, STEPS), step_folder(undisturbed, STEPS))
    assert not list(run.glob("lease*"))
    assert not list((run / "checkpoints").glob(".[!d]*"))


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="fault-") as name:
        before = len(JOBS)
        try:
            yield Path(name)
        finally:
            for job in JOBS[before:]:
                job.kill()
            del JOBS[before:]


# Batches that do something -----------------------------------------------------------------------------------------


def at(step: int, rank: int, happen: Callable[[Batch], None]) -> Wrap:
    """Let something happen as a rank asks for the batch of a step (from 0)."""

    def wrap(stream: Iterator[Batch], world: World) -> Iterator[Batch]:
        for batch in stream:
            if world.rank == rank and batch.position == 16 * step:
                happen(batch)
            yield batch

    return wrap


def forever(batch: Batch) -> None:
    while True:
        time.sleep(0.01)


HOW: dict[str, Callable[[Batch], Any]] = {
    "segfault": lambda batch: ctypes.string_at(0),
    "exit": lambda batch: os._exit(0),
    "kill": lambda batch: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda batch: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": forever,
}
CODES = {"segfault": -signal.SIGSEGV, "exit": 0, "kill": -signal.SIGKILL, "stop": 4, "loop": 4}


def poison(batch: Batch) -> None:
    batch.moments[1] = torch.nan


# The cases ---------------------------------------------------------------------------------------------------------


def lost(folder: Path, how: str, ranks: int, rank: int, step: int) -> Job:
    """Start a job of which one rank dies or hangs before a step."""
    return fitting(folder, values_of(folder, ranks, guard=GUARD), ranks, at(step, rank, HOW[how]))


def check_lost(job: Job, how: str, ranks: int, rank: int) -> None:
    """All others end by themselves, with the exit code for it, and name the rank."""
    survivors = [survivor for survivor in range(ranks) if survivor != rank]
    job.until(lambda: job.poll() or job.codes.keys() >= set(survivors), "end of the others")
    job.send(signal.SIGCONT, rank)  # one that was stopped finds that it was given up
    codes = job.wait()
    assert codes[rank] == CODES[how], job.text()
    for survivor in survivors:
        assert codes[survivor] == 4, job.text()
        text = job.text(survivor)
        names_it = f"rank {rank} (" in text or (rank == 0 and "or else rank 0" in text)
        assert names_it, text
        assert "Start the run again" in text
    if how == "loop":
        assert "faults.py" in job.text(rank), "the line where it hangs"


def rank_lost(how: str, ranks: int, rank: int, step: int) -> None:
    with scratch() as folder:
        job = lost(folder, how, ranks, rank, step)
        check_lost(job, how, ranks, rank)
        ends_as_straight(folder, ranks)


def killed(ranks: int, seed: int) -> None:
    """SIGKILL to all ranks at any moment, again and again until a run comes through."""
    chance = random.Random(seed)
    with scratch() as folder:
        for _ in range(8):
            job = go(folder, ranks)
            if chance.random() < 0.5:
                job.until(lambda: saving(folder / "tiny-vae") or job.poll(), "save")  # noqa: B023
                time.sleep(chance.uniform(0, 0.1))
            else:
                time.sleep(chance.uniform(0, 4))
            job.kill()
        ends_as_straight(folder, ranks)


def saving(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".staging-*"))


def terminated(name: str, ranks: int, to: str, seed: int) -> None:
    """A signal to one rank or to all, at any moment after the first step: all save the same step and leave."""
    chance = random.Random(seed)
    number = getattr(signal, name)
    with scratch() as folder:
        job = go(folder, ranks, "steps=100000")
        job.logged("step 1/")
        time.sleep(chance.uniform(0, 1.5))
        job.send(number, *([] if to == "all" else [chance.randrange(ranks)]))
        check_terminated(folder / "tiny-vae", job, number)


def check_terminated(run: Path, job: Job, number: int) -> int:
    """The last step that was made is saved, and is said to be; returns it."""
    codes = job.wait()
    assert codes == [128 + number] * len(codes), job.text()
    steps = [int(step) for step in re.findall(r"^step (\d+)/", job.text(0), re.MULTILINE)]
    assert saved(run)[-1] == max(steps)
    assert f"stopped by {signal.Signals(number).name} after step {max(steps)}, saved" in job.text(0)
    last = records(run)[-1]
    assert last["step"] == max(steps)
    assert not list((run / "checkpoints").glob(".*"))
    return max(steps)


def terminated_saving(name: str, ranks: int, times: int) -> None:
    """A signal, one to three times and each time at another place of a save: it ends, and the job leaves with it."""
    number, save = getattr(signal, name), 3
    with scratch() as folder:
        job = held(folder, ranks, SAVING[times - 1], save - 1, "steps=100000", "save_every=1")
        for _ in range(times):
            job.send(number)
        job.send(signal.SIGCONT)
        last = check_terminated(folder / "tiny-vae", job, number)
        assert last == save, "it went on for another step"


def terminated_validating(name: str, ranks: int) -> None:
    """A signal during validation: it is abandoned, and the job saves and leaves. Started again, the job
    makes it, also where there is no step left."""
    number = getattr(signal, name)
    with scratch() as folder:
        calls = (
            8 // ranks + 1
        )  # of the first validation, and one of the second, which is the last step's
        job = held(folder, ranks, "step/validate.py:_chunk", calls, "save_every=100000")
        job.send(number)
        job.send(signal.SIGCONT)
        assert check_terminated(folder / "tiny-vae", job, number) == STEPS
        assert "validation abandoned" in job.text(0)
        ends_as_straight(folder, ranks)
        ends_as_straight(folder, ranks)


def killed_saving(ranks: int, save: int, wait: int) -> None:
    """SIGKILL to all ranks some milliseconds after the beginning of a given save."""
    with scratch() as folder:
        run = folder / "tiny-vae"
        job = held(folder, ranks, SAVING[1], save - 1, "save_every=1")
        job.send(signal.SIGCONT)
        time.sleep(wait / 1000)
        job.kill()
        assert not saved(run) or saved(run)[-1] >= save - 1
        ends_as_straight(folder, ranks)


def poisoned(mode: str, ranks: int, rank: int, step: int) -> None:
    """A latent of one rank's batch is not finite: all ranks stop, or leave the weights alone, in that very step."""
    with scratch() as folder:
        run, guard = folder / "tiny-vae", {"nonfinite": mode}
        values = values_of(folder, ranks, save_every=1, keep=STEPS, guard=guard)
        job = fitting(folder, values, ranks, at(step, rank, poison))
        codes = job.wait()
        check_rows(run, ranks, rank, step)
        if mode == "stop":
            assert codes == [3] * ranks, job.text()
            assert all("NonFiniteLoss" in job.text(r) for r in range(ranks))
            assert f"it left the weights as they were after {step} updates" in job.text(0)
            ends_as_straight(folder, ranks)
            return
        assert codes == [0] * ranks, job.text()
        manifests = [
            json.loads((step_folder(run, n) / "manifest.json").read_text())
            for n in range(1, STEPS + 1)
        ]
        updates = [m["optimizer"]["step"] for m in manifests]
        assert updates == [n if n <= step else n - 1 for n in range(1, STEPS + 1)]
        assert [m["position"] for m in manifests] == [16 * n for n in range(1, STEPS + 1)]
        if step:
            same_files(step_folder(run, step + 1), step_folder(run, step))


def check_rows(run: Path, ranks: int, rank: int, step: int) -> None:
    """Each rank has written down its rows, which are no other rank's; the bad one is among them."""
    reports = [json.loads(p.read_text()) for p in sorted(run.glob("nonfinite-*.json"))]
    assert [w["step"] for w in reports] == [step] * ranks
    assert len({row for w in reports for row in w["rows"]}) == 16
    assert [len(w["rows_with_such_a_loss"]) for w in reports] == [r == rank for r in range(ranks)]
    assert reports[rank]["rows_with_such_a_loss"] == [reports[rank]["rows"][1]]


def elastic(worlds: tuple[int, ...], precision: str) -> None:
    """A run that goes on with another number of ranks every few steps: same positions, losses within rounding."""
    changes: dict[str, Any] = {}
    if precision == "bf16":
        autocast = {"enabled": True, "dtype": "bfloat16"}
        zero = {"zero_optimization": {"stage": 2}, "torch_autocast": autocast}
        changes = {"deepspeed": zero, "validation": {}}
    bound = {"fp32": 1e-6, "bf16": 1e-3}[precision]
    with scratch() as folder:
        run, undisturbed = folder / "tiny-vae", folder / "whole/tiny-vae"
        if changes:
            job = go(undisturbed.parent, worlds[0], **changes)
            assert job.wait() == [0] * worlds[0], job.text()
        else:
            undisturbed = straight(worlds[0])
        for i, ranks in enumerate(worlds):
            job = go(folder, ranks, f"steps={STEPS * (i + 1) // len(worlds)}", **changes)
            assert job.wait() == [0] * ranks, job.text()
        result, expected = records(run), records(undisturbed)
        assert [r["position"] for r in result] == [r["position"] for r in expected]
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(result, expected, strict=True))
        assert worst <= bound, worst


# Suspended, and taken over ------------------------------------------------------------------------------------------

# function -> how often it is called before, of a run of 12 steps that saves every other one
POINTS = {
    "loop.py:_begin": 0, "report/records.py:forget_after": 0, "checkpoints/checkpoint.py:stage": 1,
    "checkpoints/checkpoint.py:write_state": 1, "checkpoints/checkpoint.py:_write_whole": 1,
    "checkpoints/checkpoint.py:_replace": 1, "checkpoints/checkpoint.py:_prune": 2, "report/metrics.py:write": 6,
    "report/metrics.py:close": 0,
}  # fmt: skip
LEASE_SECONDS = 2.0
SAVING = [f"checkpoints/checkpoint.py:{name}" for name in ("stage", "write_state", "_replace")]


def stop_at(point: str, calls: int) -> None:
    """SIGSTOP to this process as it enters a function, after so many calls of it."""
    file, name = point.split(":")

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if (
            event == "call"
            and code.co_name == name
            and code.co_filename.endswith(f"/{file}")
            and "/train/" in code.co_filename
        ):
            calls -= 1
            if calls < 0:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.setprofile(profile)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def suspended(point: str, ranks: int, wakes: str) -> None:
    """A job is suspended, its lease expires, another job takes over; when the first one wakes up it changes nothing."""
    with scratch() as folder:
        run, path = folder / "tiny-vae", folder / "tiny.yaml"
        with short_leases():
            first = held(folder, ranks, point, POINTS[point], logs="first")
        first.send(signal.SIGSTOP)
        time.sleep(LEASE_SECONDS)
        second = start(lambda rank: called([str(path)]), ranks, folder / "second")
        if wakes == "ended":
            assert second.wait() == [0] * ranks, second.text()
        else:
            second.logged("data mix")
        first.send(signal.SIGCONT)
        assert second.wait() == [0] * ranks, second.text()
        assert first.wait() == [5] * ranks, first.text()
        assert "RunLocked" in first.text(0)
        assert "another job took over this folder" in first.text(0)
        undisturbed = straight(ranks)
        assert records(run) == records(undisturbed)
        assert saved(run) == [STEPS - 4, STEPS - 2, STEPS]
        same_files(step_folder(run, STEPS), step_folder(undisturbed, STEPS))
        checkpoint.verified(step_folder(run, STEPS - 2))
        ends_as_straight(folder, ranks)


@contextmanager
def short_leases() -> Iterator[None]:
    """Of the jobs that are forked here."""
    before = RunLock.__init__.__defaults__
    RunLock.__init__.__defaults__ = (LEASE_SECONDS,)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        RunLock.__init__.__defaults__ = before  # type: ignore[attr-defined]


KINDS: dict[str, Callable[..., None]] = {
    "suspended": suspended,
    "killed": killed, "killed saving": killed_saving, "rank lost": rank_lost, "terminated": terminated,
    "terminated saving": terminated_saving, "terminated validating": terminated_validating, "poisoned": poisoned,
}  # fmt: skip


def cases() -> list[Case]:
    worlds, names = (1, 2, 4), ("SIGTERM", "SIGINT")
    result: list[Case] = [("killed", ranks, seed) for ranks in worlds for seed in range(8)]
    result += [
        ("killed saving", ranks, save, wait)
        for ranks in (1, 2)
        for save in (1, 2, 7)
        for wait in (0, 5, 10, 20, 40)
    ]
    result += [
        ("rank lost", how, ranks, rank, step)
        for how in HOW
        for ranks, rank in ((2, 0), (2, 1), (4, 2))
        for step in (0, 5)
    ]
    result += [("rank lost", "loop", 1, 0, step) for step in (0, 5)]
    result += [
        ("suspended", point, ranks, wakes)
        for point in POINTS
        for ranks in (1, 2)
        for wakes in ("beside it", "ended")
    ]
    result += [
        ("terminated", name, ranks, to, seed)
        for name in names
        for ranks in worlds
        for to in ("one", "all")
        for seed in range(5)
    ]
    result += [
        ("terminated saving", name, ranks, times)
        for name in names
        for ranks in worlds
        for times in (1, 2, 3)
    ]
    result += [("terminated validating", name, ranks) for name in names for ranks in worlds]
    result += [
        ("poisoned", mode, ranks, rank, step)
        for mode in ("stop", "skip")
        for ranks, rank in ((1, 0), (2, 0), (2, 1), (4, 3))
        for step in (0, 5)
    ]
    return result


def check(kind: str, *arguments: Any) -> None:
    KINDS[kind](*arguments)


SWEEP = Sweep("training", "a fault of a training job", cases, check, lambda case: str(case[0]))
