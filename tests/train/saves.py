"""Everything that can befall a checkpoint while it is saved, and all damage to one that stands.

checkpoints   SIGKILL before, after and within every system call of a save, by 1 rank and by each of 2;
              each error that such a call can give, a full disk among them; a pause before each such call, in which
              another job takes the run over; every byte of every file changed; every file cut at every length
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from shards.column.lease import LEASE
from shards.format.atomic import canonical_json
from tests.forks import split, wait
from tests.memory import MEMORY, kept
from tests.shards.killer import Act, Call, Run, trace
from tests.shards.sweeps import CHANGING, WRITING, act_of, errors_of
from tests.soak.sweep import Case, Sweep
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointError, State
from train.model.dit import DiT, DiTConfig
from train.ranks.lock import RunLock
from train.ranks.world import World
from train.step.engine import Fragment

SCRATCH = os.environ.get("LATENTBANK_SCRATCH") or MEMORY
MODEL = DiT(
    DiTConfig(
        hidden_size=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=4,
        mlp_size=4,
        pos_embed="1d-rope",
        sample_size=4,
        timestep_conditioning="none",
        in_channels=1,
        out_channels=1,
        text_width=2,
    )  # fmt: skip
)
TOTALS = {name: p.numel() for name, p in MODEL.named_parameters()}
SIZE = sum(TOTALS.values())
RECORD: dict[str, Any] = {
    "objective": {"flow": {"shift": 3.0}, "caption_dropout": 0.1},
    "position": 0, "model": MODEL.config.model_dump(mode="json"), "data": {"latents": {"complete": "abc"}},
    "order": {"seed": 0, "lanes": 8, "window": 0}, "optimizer": {"kind": "adamw", "step": 1},
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))


class Piped(World):
    """Ranks that speak through pipes: processes of one thread each, as the tracer needs them."""

    def __init__(self, rank: int, pipes: list[Connection]) -> None:
        super().__init__(rank, len(pipes) or 1, torch.device("cpu"))
        object.__setattr__(self, "pipes", pipes)

    def gather(self, value: Any) -> list[Any]:
        """By way of rank 0. EOFError or an OSError where another rank has died."""
        pipes: list[Connection] = self.pipes  # type: ignore[attr-defined]
        if not pipes:
            return [value]
        if self.rank == 0:
            values = [value, *(pipe.recv() for pipe in pipes[1:])]
            for pipe in pipes[1:]:
                pipe.send(values)
            return values
        pipes[0].send(value)
        answer: list[Any] = pipes[0].recv()
        return answer


# A small checkpoint -----------------------------------------------------------------------------------------


def part(start: int, stop: int) -> list[Fragment]:
    """Fragments of the elements [start, stop) of all parameters laid end to end, as ZeRO cuts them."""
    fragments, at = [], 0
    for name, total in TOTALS.items():
        low, high = max(start, at), min(stop, at + total)
        if low < high:
            fragments.append(Fragment(name, low - at, high - at, 0, low - start))
        at += total
    return fragments


def state_of(step: int, start: int = 0, stop: int = SIZE) -> State:
    """Elements numbered from `start`, and the step added; kind k adds k * 1e6."""
    numbers = torch.arange(start, stop, dtype=torch.float32) + step
    flats = {kind: [numbers + 1e6 * k] for k, kind in enumerate(checkpoint.KINDS)}
    return State(part(start, stop), TOTALS, flats)


def save(
    folder: Path, step: int, world: World = ALONE, keep: int = 2, kept: Sequence[int] = ()
) -> Path:
    cuts = [SIZE * rank // world.size for rank in range(world.size + 1)]
    state = state_of(step, cuts[world.rank], cuts[world.rank + 1])
    return checkpoint.save(folder, state, MODEL, {**RECORD, "step": step}, world, keep, kept)


def resumed_step(folder: Path) -> int:
    """The step that a run would go on from; all of its values are as they were saved."""
    newest = checkpoint.newest(folder)
    assert newest is not None
    path, manifest = newest
    step = int(manifest["step"])
    assert path.name == f"step-{step:08d}"
    expected = state_of(step)
    loaded = checkpoint.load(path, manifest, state_of(0))
    for kind, flats in expected.flats.items():
        assert torch.equal(loaded.flats[kind][0], flats[0]), kind
    for ema in (False, True):
        model, _ = checkpoint.load_for_sampling(path, ema)
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(flat, expected.flats["ema" if ema else "weights"][0])
    return step


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="saves-") as name:
        yield Path(name)


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Kills and errors within a save -----------------------------------------------------------------------------

STEPS = (2, 3, 5)  # that stand; 5 is damaged. The save of 4 removes 2, and sets 5 aside
AFTER = [".damaged-step-00000005", "latest", "step-00000003", "step-00000004"]


@cache
def before() -> Path:
    """The checkpoints that a save finds."""
    folder = kept(SCRATCH)
    for step in STEPS:
        save(folder, step, keep=3)
    damage(folder / "step-00000005/manifest.json", 10)
    return folder


def damage(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def traced(folder: Path, ranks: int, rank: int, act: Act | None = None) -> Run:
    """Save step 4 with one of the ranks traced, and something done to it."""
    shutil.copytree(before(), folder, dirs_exist_ok=True)
    if ranks == 1:
        return trace(lambda: save(folder, 4), folder, act)
    ends = multiprocessing.Pipe()
    pid = split()
    if pid == 0:
        code = 1
        try:
            ends[rank].close()
            save(folder, 4, Piped(1 - rank, [ends[1 - rank]] * ranks))
            code = 0
        finally:
            os._exit(code)
    ends[1 - rank].close()

    def work() -> None:
        save(folder, 4, Piped(rank, [ends[rank]] * ranks))

    try:
        return trace(work, folder, act)
    finally:
        ends[rank].close()
        wait(pid)  # it has seen the end of the pipe


@cache
def calls(ranks: int, rank: int) -> tuple[Call, ...]:
    """Those that come again: now and then two ranks, which are forks, draw the same name for what they write, and one
    of them tries another."""
    earlier: set[tuple[str, ...]] = set()
    while True:
        with scratch() as folder:
            run = traced(folder / "c", ranks, rank)
            assert run.status == 0, run.error
            assert listing(folder / "c") == AFTER
        labels = tuple(map(label, run.calls))
        if labels in earlier:
            return run.calls
        earlier.add(labels)


def label(call: Call) -> str:
    """Without what is random in the names: of the owner, and those that safetensors gives to what it writes."""
    return re.sub(r"(\.staging-step-\d{8})-\w+|(\.tmp)\w{6}\b", r"\1\2*", call.label)


RENAMING = ("rename", "renameat", "renameat2", "rmdir", "unlinkat", "chmod")


def kill_cases() -> list[Case]:
    """Before every call, after those that change the disk, and within every write."""
    return [
        (fault, ranks, rank, call.number, label(call))
        for ranks, rank in ((1, 0), (2, 0), (2, 1))
        for call in calls(ranks, rank)
        for fault in ("kill before", "kill after", "tear")
        if fault == "kill before"
        or (fault == "kill after" and call.name in (*CHANGING, *RENAMING))
        or (fault == "tear" and call.name in WRITING and call.arguments[2] > 1)
    ]


def error_cases() -> list[Case]:
    return [
        (f"error {error}", ranks, rank, call.number, label(call))
        for ranks, rank in ((1, 0), (2, 1))
        for call in calls(ranks, rank)
        for error in dict.fromkeys(
            [*errors_of(call), *(["EIO", "EACCES"] if call.name in RENAMING else [])]
        )
    ]


def check_save(fault: str, ranks: int, rank: int, at: int, name: str) -> None:
    """What stands after it is whole: step 3 or step 4. The run goes on, saves again, and leaves nothing behind."""
    act = act_of(fault[6:], at) if fault.startswith("error") else Act(fault, at)  # type: ignore[arg-type]
    with scratch() as scratched:
        for attempt in range(8):  # now and then the calls are others, see `calls`
            folder = scratched / f"c{attempt}"
            with suppress(ValueError, IndexError):  # that call is no write here
                run = traced(folder, ranks, rank, act)
                if label(run.calls[at]) == name:
                    break
        else:
            raise AssertionError(f"no call {name!r} was met")
        if fault.startswith("error"):
            if run.status:
                assert run.error.startswith("CheckpointError"), run.error
                assert str(folder) in run.error, f"the message names no file: {run.error!r}"
        else:
            assert run.killed, run
        assert resumed_step(folder) in (3, 4)
        save(folder, 4)
        assert resumed_step(folder) == 4
        names = [name for name in listing(folder) if not name.startswith(".damaged-")]
        assert names == AFTER[1:]


# A pause within a save ----------------------------------------------------------------------------------------


def paused(folder: Path, meanwhile: Act | None = None) -> Run:
    """The job that has the lock saves step 4."""
    checkpoints = folder / "checkpoints"
    shutil.copytree(before(), checkpoints)

    def work() -> None:
        lock = RunLock(folder)
        lock.take()
        save(checkpoints, 4, World(0, 1, torch.device("cpu"), lock=lock))

    return trace(work, checkpoints, meanwhile)


def pause_cases() -> list[Case]:
    return [
        ("pause", end, call.number, label(call))
        for call in calls(1, 0)
        for end in ("saving", "works", "ended")
    ]


def check_pause(end: str, at: int, name: str) -> None:
    """Meanwhile another job takes over and saves two checkpoints, and ends, goes on or is about to save a third: what
    it wrote stays as it is."""
    with scratch() as folder:
        checkpoints, lock = folder / "checkpoints", RunLock(folder)
        stored: dict[Path, bytes] = {}

        def successor() -> None:
            record = json.loads((folder / LEASE).read_bytes())
            (folder / LEASE).write_bytes(canonical_json({**record, "expires": 0.0}))
            lock.take()
            world = World(0, 1, torch.device("cpu"), lock=lock)
            step = resumed_step(checkpoints)
            for later in (step + 1, step + 2):
                path = save(checkpoints, later, world)
                stored.update({file: file.read_bytes() for file in path.iterdir()})
            if end == "saving":
                file = checkpoint.stage(checkpoints / f"step-{step + 3:08d}", world) / "state"
                file.write_bytes(b"as much as is written yet")
                stored[file] = file.read_bytes()
            if end == "ended":
                lock.release()

        run = paused(folder, Act("pause", at, meanwhile=successor))
        assert stored, "it was not paused"
        assert not run.error or run.error.startswith("RunLocked"), run.error
        assert {path: path.read_bytes() for path in stored} == stored
        newest = max(path.parent.name for path in stored if path.name == "manifest.json")
        assert f"step-{resumed_step(checkpoints):08d}" == newest
        lock.release()


# Damage -----------------------------------------------------------------------------------------------------

_standing: dict[int, Path] = {}


def standing() -> Path:
    """Two sound checkpoints of this process, for cases that put them back as they were."""
    if os.getpid() not in _standing:
        folder = kept(SCRATCH)
        for step in (3, 4):
            save(folder, step)
        _standing[os.getpid()] = folder
    return _standing[os.getpid()]


@cache
def files() -> dict[str, bytes]:
    """Of the newer one."""
    return {p.name: p.read_bytes() for p in sorted((standing() / "step-00000004").iterdir())}


def flip_cases() -> list[Case]:
    return [("flip", name, place) for name, data in files().items() for place in range(len(data))]


def cut_cases() -> list[Case]:
    """Every length from 0 on, and some that are too long; as many of the large files as of the manifest."""
    cases: list[Case] = []
    for name, data in files().items():
        step = max(1, len(data) // 2000)
        cases += [
            ("cut", name, size)
            for size in (*range(0, len(data), step), len(data) + 1, len(data) + 512)
        ]
    return cases


def check_damage(fault: str, name: str, place: int) -> None:
    """The damaged checkpoint is refused by whoever reads that file, and a run goes on from the one before."""
    path, data = standing() / "step-00000004", files()[name]
    if fault == "flip":
        damage(path / name, place, place % 8)
    else:
        (path / name).write_bytes((data + bytes(512))[:place])
    try:
        newest = checkpoint.newest(standing())
        assert newest is not None
        assert newest[0].name == "step-00000003", "a damaged checkpoint was taken"
        read = {"ema.safetensors": True, "weights.safetensors": False, "manifest.json": True}
        if name in read:
            try:
                checkpoint.load_for_sampling(path, ema=read[name])
            except CheckpointError:
                return
            raise AssertionError(f"{name} was sampled from")
    finally:
        (path / name).write_bytes(data)


def check(fault: str, *rest: Any) -> None:
    if fault == "pause":
        check_pause(*rest)
    else:
        (check_damage if fault in ("flip", "cut") else check_save)(fault, *rest)


def cases() -> list[Case]:
    return [*kill_cases(), *error_cases(), *pause_cases(), *flip_cases(), *cut_cases()]


def group(case: Case) -> str:
    if case[0] in ("flip", "cut"):
        return f"{case[0]} of {str(case[1]).split('-')[0]}"
    if case[0] == "pause":
        return f"pause, successor {case[1]}: {str(case[3]).split()[1]}"
    return f"{case[0]}, rank {case[2]} of {case[1]}: {str(case[4]).split()[1]}"


SWEEP = Sweep(
    "checkpoints", "a fault within the save of a checkpoint, or damage to one", cases, check, group
)
