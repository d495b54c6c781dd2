"""Run sweeps in full: two processes at most, and never twice what was done.

What is done stands in `soak/<sweep>.jsonl`, a line for some hundred cases, under the digest of the
code that did it; other code starts anew. A failure is written down with its case and stops nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tests.memory import MEMORY
from tests.soak.registry import SWEEPS
from tests.soak.sweep import Case, Outcome, run

ROOT = Path(__file__).parents[2]
STATE = ROOT / "soak"
CHUNKS = 400  # parts that a sweep is cut into: what an interruption costs is one of them
PROCESSES = 2
METHOD = "spawn"  # of starting them: they inherit nothing
SCRATCH = "LATENTBANK_SCRATCH"  # where the sweeps put their columns


FOLDERS = ("shards", "tests/shards", "tests/soak")  # the code that all sweeps run and test
ENCODE = ("configs", "encode", "tests/bench/encoding", "tests/encode", "tests/servers")
TRAIN = (
    *ENCODE,
    "eval",
    "train",
    "tests/demo",
    "tests/train",
)  # tests train from the demo's pictures
MORE = {  # what one sweep alone does
    "encode": ENCODE,
    "interrupts": ENCODE,
    "checkpoints": TRAIN,
    "training": TRAIN,
    "generate": (*TRAIN, "tests/eval"),
    "seeds": TRAIN,
    "studies": (*TRAIN, "tests/eval"),
    "pair": (*TRAIN, "tests/eval"),
    "panel": TRAIN,
    "stores": ("tests/proxy",),
    "kernels": ("configs", "encode", "train", "eval", "tests"),
}


def files(sweep: str = "") -> list[Path]:
    """Returns the modules of the code that runs and of the code that is tested (not of the fast tests,
    but where a sweep runs them).
    """
    below = [(ROOT / f).rglob("*.py") for f in (*FOLDERS, *MORE.get(sweep, ()))]
    paths = {*(ROOT / "tests").glob("*.py"), *chain(*below)}
    return sorted(p for p in paths if sweep == "kernels" or not p.name.startswith("test_"))


def code(sweep: str = "") -> str:
    """Returns a digest of `files`: a sweep whose code has another begins anew."""
    digest = hashlib.sha256()
    for path in files(sweep):
        name = str(path.relative_to(ROOT)).encode()
        digest.update(name + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def chunks(cases: Sequence[Case]) -> list[tuple[int, list[Case]]]:
    """The cases in parts, with the number of the first of each. They are shuffled before, always in
    the same way: what a run that ended early has done is an even sample.
    """
    mixed = list(cases)
    random.Random(0).shuffle(mixed)
    size = max(1, -(-len(mixed) // CHUNKS))
    return [(i, mixed[i : i + size]) for i in range(0, len(mixed), size)]


class State:
    """What is done of one sweep."""

    def __init__(self, name: str, digest: str, new: bool = False) -> None:
        self.path, self.digest = STATE / f"{name}.jsonl", digest
        self.done: dict[int, Outcome] = {}
        if new:
            self.path.unlink(missing_ok=True)
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:  # empty, or the run was killed while it wrote it
                continue
            if record.pop("code") == digest:
                first = record.pop("first")
                record["failures"] = [(tuple(case), why) for case, why in record["failures"]]
                self.done[first] = Outcome(**record)

    def add(self, first: int, outcome: Outcome) -> None:
        self.done[first] = outcome
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            # on a line of its own, whatever half a line stands before it
            record = {"code": self.digest, "first": first, **asdict(outcome)}
            file.write(f"\n{json.dumps(record)}\n")

    def total(self) -> Outcome:
        """All that is done, added up."""
        total = Outcome()
        for _, part in sorted(self.done.items()):
            total.cases += part.cases
            total.inputs += part.inputs
            total.failures += part.failures
            total.seconds += part.seconds
            for group, count in part.groups.items():
                total.groups[group] = total.groups.get(group, 0) + count
        return total


def work(name: str, cases: list[Case]) -> Outcome:
    """In a worker: check some cases of a sweep."""
    return run(SWEEPS[name], cases)


def soak(
    names: Iterable[str], new: bool = False, processes: int = PROCESSES, limit: float = math.inf
) -> dict[str, Outcome]:
    """Run these sweeps to the end, or each for `limit` seconds; what each came to."""
    outcomes = {}
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="soak-") as scratch:
        os.environ[SCRATCH] = scratch
        with Progress(
            TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        ) as bar:  # fmt: skip
            for name in names:
                state = State(name, code(name), new)
                cases = SWEEPS[name].cases()
                parts = [(first, part) for first, part in chunks(cases) if first not in state.done]
                end = time.monotonic() + limit
                task = bar.add_task(name, total=len(cases), rate="", failed="")
                bar.advance(task, state.total().cases)
                seconds, checked = 0.0, 0
                for first, outcome in spread(name, parts, processes):
                    state.add(first, outcome)
                    seconds, checked = seconds + outcome.seconds, checked + outcome.cases
                    failed = len(state.total().failures)
                    bar.update(
                        task,
                        advance=outcome.cases,
                        rate=f"{processes * checked / max(seconds, 1e-9):.0f}/s",
                        failed=f"{failed} failed" if failed else "",
                    )
                    if time.monotonic() > end:
                        break
                outcomes[name] = state.total()
    return outcomes


def spread(
    name: str, parts: list[tuple[int, list[Case]]], processes: int = PROCESSES
) -> Iterator[tuple[int, Outcome]]:
    """Parts of a sweep over the processes; one that dies fails the cases it had."""
    waiting = list(reversed(parts))
    while waiting:
        pool = ProcessPoolExecutor(processes, get_context(METHOD))
        running: dict[Future[Outcome], tuple[int, list[Case]]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    part = waiting.pop()
                    running[pool.submit(work, name, part[1])] = part
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    first, cases = running[future]
                    outcome = future.result()
                    del running[future]
                    yield first, outcome
        except BrokenProcessPool:  # one of them died, or was killed from outside: each by itself
            for first, cases in running.values():
                yield from alone(name, first, cases)
        finally:
            pool.shutdown(cancel_futures=True)


def alone(name: str, first: int, cases: list[Case]) -> Iterator[tuple[int, Outcome]]:
    """One part in a process of its own, which may die."""
    with ProcessPoolExecutor(1, get_context(METHOD)) as pool:
        try:
            yield first, pool.submit(work, name, cases).result()
        except BrokenProcessPool:
            yield first, died(cases)


def died(cases: list[Case]) -> Outcome:
    why = f"the process died within this case or the {len(cases) - 1} after it"
    return Outcome(len(cases), [], {"process died": len(cases)}, [(cases[0], why)], 0.0)


def shown(case: Any) -> str:
    """A case as the command line takes it."""
    return json.dumps(list(case), ensure_ascii=True)
