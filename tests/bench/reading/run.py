"""Prepare the stores, start one process a reader, let them take turns, and report.

1. Each store is written once, from the same samples, and synced to disk.
2. Each reader gets a process pinned to one core. Its first pass is compared row by row with the
   samples: a reader that delivers anything else has no numbers.
3. Rounds: for each mode, raw, this program and the others go over all samples, one after another,
   and in every other round the other way about.
   Warm: every file is read once right before. Cold: the kernel is told to drop every file's pages.
4. A ratio is of the samples per second of a reader to those of raw in the same round and mode.

Memory is anonymous and shared memory (RssAnon + RssShmem of /proc/PID/status, looked at every
10 ms from outside), its peak over all passes of a reader less what stood after its imports.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from shards.console import Bar
from tests.bench.cost import verdict, write_json

from . import ORDERS, peers, readers
from .measure import ONE_THREAD
from .report import READERS, machine, promises, summary, table, versions
from .samples import Samples, digest_of_all, row_digest

HERE = Path(__file__).parent
ALONE = "latentbank_bench"  # name of this package in the environment of the peers
WRITERS = (*readers.WRITERS, *peers.WRITERS)
OWN_PYTHON = ("webdataset",)  # a dependency of ours too
FORMAT = 1  # of the stores: raised when what is written changes
Json = dict[str, Any]


class Failed(RuntimeError):
    """A process of the bench ended early; the message has the end of what it said."""


def command(python: Path, folder: Path, module: str, *arguments: str) -> list[str]:
    """Run a module of this package: as one of ours, or alone where nothing else is ours."""
    if python == Path(sys.executable):
        return [str(python), "-m", f"tests.bench.reading.{module}", *arguments]
    # a link, so that the folder in the path holds this package and nothing that could be imported
    (folder / "alone").mkdir(exist_ok=True)
    link = folder / "alone" / ALONE
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(HERE)
    return [str(python), "-m", f"{ALONE}.{module}", *arguments]


def environment(python: Path, folder: Path) -> dict[str, str]:
    path = HERE.parents[2] if python == Path(sys.executable) else folder / "alone"
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": str(path), "PYTHONUNBUFFERED": "1"}


def module_of(store_or_reader: str) -> str:
    ours = store_or_reader in readers.READERS or store_or_reader in readers.WRITERS
    return "readers" if ours else "peers"


def python_of(name: str, peer_python: Path | None) -> Path | None:
    """The interpreter of a reader, None where its environment is not there."""
    if module_of(name) == "readers" or name in OWN_PYTHON:
        return Path(sys.executable)
    return peer_python


# Stores -------------------------------------------------------------------------------------------


def expected_digests(folder: Path, samples: Samples) -> dict[int, str]:
    """What a pass must deliver, by number of columns; from the samples, not from any store."""
    path = folder / "expected.json"
    wanted = {"format": FORMAT, "samples": samples.record()}
    if path.exists():
        standing = json.loads(path.read_text())
        if {key: standing[key] for key in wanted} == wanted:
            return {int(columns): digest for columns, digest in standing["digests"].items()}
        for store in WRITERS:  # samples of other parameters: every store is of no use
            shutil.rmtree(folder / store, ignore_errors=True)
    need = 8 * samples.row_bytes(2)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise Failed(
            f"{folder}: {free / 1e9:.0f} GB are free, the stores of {samples.rows} samples take "
            f"{need / 1e9:.0f} GB. Give --folder on another disk, or fewer --rows"
        )
    pairs = [(row_digest(m, None), row_digest(m, t)) for m, t in samples]
    digests = {1: digest_of_all(p[0] for p in pairs), 2: digest_of_all(p[1] for p in pairs)}
    path.write_text(json.dumps({**wanted, "digests": digests}))
    return digests


def prepare(store: str, python: Path, folder: Path, samples: Samples) -> None:
    """Write a store, unless it stands; it appears under its name when it is whole and synced."""
    final, staging = folder / store, folder / f"{store}.part"
    if final.exists():
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    record = json.dumps(samples.record())
    made = subprocess.run(
        command(python, folder, module_of(store), "write", store, str(staging), record),
        env=environment(python, folder), capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        raise Failed(f"{store} could not be written:\n{made.stderr[-800:]}")
    for path in files(staging):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staging.rename(final)


def files(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def evict(store: Path) -> None:
    """Drop the pages of every file from memory."""
    for path in files(store):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(store: Path) -> None:
    """Read every file once."""
    buffer = bytearray(1 << 22)
    for path in files(store):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached(store: Path) -> float:
    """Share of a store's pages that are in memory, by mincore."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    inside = pages = 0
    for path in files(store):
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            vector = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(memory, np.uint8)
            libc.mincore(
                ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size),
                vector.ctypes.data_as(ctypes.c_void_p),
            )  # fmt: skip
            del view
            inside, pages = inside + int((vector & 1).sum()), pages + vector.size
    return inside / max(1, pages)


# Readers ------------------------------------------------------------------------------------------


class Process:
    """A reader in a process of its own, asked for one pass at a time."""

    def __init__(self, name: str, python: Path, folder: Path, samples: Samples, core: int) -> None:
        self.name, self.reader = name, READERS[name]
        self.store = folder / self.reader.store
        self.peak = self.base = 0.0
        log = name.replace(", ", "-") + ".log"
        self._log = (folder / log).open("w+")
        record = json.dumps(samples.record())
        arguments = ("read", name, str(folder), record, str(core))
        self._process = subprocess.Popen(
            command(python, folder, module_of(name), *arguments),
            env=environment(python, folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True,
        )  # fmt: skip
        self._answer()
        self.base = self._memory()

    def _answer(self) -> Json:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            answer: Json = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(0)
        raise Failed(f"{self.name} ended early:\n{self._log.read()[-800:]}")

    def _memory(self) -> float:
        """Anonymous and shared memory, MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        lines = (line.split() for line in status.splitlines())
        return sum(int(w[1]) for w in lines if w[0] in ("RssAnon:", "RssShmem:")) / 1e3

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.01):
            try:
                self.peak = max(self.peak, self._memory())
            except (FileNotFoundError, ProcessLookupError):
                return

    def go(self, order: str, check: bool = False) -> Json:
        """One pass."""
        assert self._process.stdin
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,), daemon=True)
        watcher.start()
        try:
            self._process.stdin.write(json.dumps({"order": order, "check": check}) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            return self._answer()
        finally:
            done.set()
            watcher.join()

    def close(self) -> None:
        """End the process and see it out."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:  # threads of a library that do not end
            self._process.kill()
            self._process.wait()
        self._log.close()


def check(process: Process, expected: dict[int, str]) -> None:
    """A pass in each order, row by row; Failed if it is not of exactly the samples."""
    for order in process.reader.orders:
        if process.go(order, check=True)["digest"] != expected[process.reader.columns]:
            raise Failed(f"{process.name}: a {order} pass delivers other rows than were written")


def turn(process: Process, order: str, state: str) -> Json:
    """One measured pass."""
    warm(process.store) if state == "warm" else evict(process.store)
    share = cached(process.store)
    result = process.go(order)
    return {
        "reader": process.name,
        "mode": f"{order}-{state}",
        "samples_per_s": result["rows"] / result["seconds"],
        "mb_per_s": result["bytes"] / result["seconds"] / 1e6,
        "cpu_s_per_gb": result["cpu_seconds"] / result["bytes"] * 1e9,
        "cached_before": share,
        "load": os.getloadavg()[0],
    }


def scale(folder: Path) -> Json:
    """Opening 32 million rows and starting late in a run, in a process of their own."""
    python = Path(sys.executable)
    written = any((folder / "records" / "text" / "complete").glob("*.json"))
    for verb in ("measure",) if written else ("write", "measure"):
        done = subprocess.run(
            [*command(python, folder, "scale", verb, str(folder))],
            env=environment(python, folder), capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"scale {verb} ended early:\n{done.stderr[-800:]}")
    answer: Json = json.loads(done.stdout)
    return answer


def compare(
    folder: Path, samples: Samples, names: Sequence[str], peer_python: Path | None, rounds: int,
    modes: Sequence[str] | None, console: Console,
) -> tuple[list[Json], list[Json], list[str]]:  # fmt: skip
    """(summary rows, single turns, faults) of some readers."""
    expected = expected_digests(folder, samples)
    core = max(os.sched_getaffinity(0))
    faults: list[str] = []
    running: dict[str, Process] = {}
    turns: list[Json] = []
    with ExitStack() as stack:
        for name in names:
            python = python_of(name, peer_python)
            if python is None:
                faults.append(f"{name}: not run, the peers' environment is not there")
                continue
            console.print(f"{name}: writing its store if need be, then comparing every row")
            try:
                prepare(READERS[name].store, python, folder, samples)
                process = Process(name, python, folder, samples, core)
                stack.callback(process.close)
                check(process, expected)
                running[name] = process
            except Failed as error:
                faults.append(str(error))
        plan = [
            (number, order, state, name)
            for number in range(rounds)
            for order in ORDERS
            for state in ("warm", "cold")
            if modes is None or f"{order}-{state}" in modes
            # there and back: whoever goes first after a change of mode meets another cache
            for name in (list(running) if number % 2 == 0 else reversed(running))
            if order in READERS[name].orders
        ]
        bar = stack.enter_context(Bar("read", len(plan), "turns"))
        for number, order, state, name in plan:
            turns.append({"round": number, **turn(running[name], order, state)})
            bar.advance(1)
        peaks = {name: process.peak - process.base for name, process in running.items()}
    return summary(turns, peaks), turns, faults


def bench(args: argparse.Namespace) -> int:
    """`python -m shards bench`; 1 if a reader failed or delivered other rows."""
    console = Console(stderr=True)
    names = [n for n in READERS if not args.readers or n.startswith("raw") or n in args.readers]
    unknown = set(args.readers or ()) - set(READERS)
    if unknown:
        console.print(f"unknown readers {sorted(unknown)}: one of {list(READERS)} expected")
        return 2
    if args.peers is None and any(python_of(name, None) is None for name in names):
        console.print("no peers' environment: `make bench` makes .venv-peers from bench/peers.txt")
    try:
        samples = Samples(args.rows)
    except ValueError as error:
        console.print(f"--rows: {error}")
        return 2
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        rows, turns, faults = compare(
            args.folder, samples, names, args.peers, args.rounds, args.modes, console
        )
        large = scale(args.folder)
    except Failed as error:
        console.print(f"error: {error}")
        return 2
    Console().print(table(rows))
    Console().print({name: round(value, 4) for name, value in large.items()})
    kept = promises(rows, large)
    for promise in kept:
        console.print(verdict(promise), style=None if promise["holds"] else "red")
    for fault in faults:
        console.print(f"[red]{fault}")
    if args.json:
        report = {
            "date": started,
            "machine": machine(args.folder),
            "versions": versions(args.peers),
            "samples": samples.record() | {"mean_bytes": samples.row_bytes(2) // samples.rows},
            "rows": rows,
            "scale": large,
            "promises": kept,
            "turns": turns,
            "faults": faults,
        }
        write_json(args.json, report)
    return 1 if any("not run" not in fault for fault in faults) else 0
