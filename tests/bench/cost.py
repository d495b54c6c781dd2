"""CPU seconds, memory, and what may be claimed of them: for the benchmarks of every stage."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def cpu_seconds() -> float:
    """User and system seconds of this process and of its children that have ended."""
    whole = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        whole += used.ru_utime + used.ru_stime
    return whole


def cpu_of(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    before = cpu_seconds()
    work()
    return cpu_seconds() - before


def keep_memory() -> None:
    """Let malloc keep what is freed, in one arena for all threads.

    Else half of the CPU time of a model on a CPU is the kernel's, which clears the same pages again
    and again; how often depends on the thread and on chance, and drowns what is to be compared.
    Has no effect but where malloc is glibc's.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # of malloc.h
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim, 2**31 - 1), (top_pad, 1 << 26)):
            libc.mallopt(option, value)


def rss_mb() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def median_interval(
    values: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high): 95 % of the medians of samples drawn with replacement."""
    chance = np.random.default_rng(seed)
    array = np.array(values, float)
    medians = np.median(chance.choice(array, (draws, len(array))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(array)), float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """What A took over what B took, measured in turns: the median of the ratios and its 95 % interval."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    median, low, high = median_interval(ratios)
    return {"ratio": median, "ratio_low": low, "ratio_high": high, "ratios": ratios}


def promise(what: str, found: float, sign: str, bound: float) -> dict[str, Any]:
    """Something that is promised of a measurement, and whether it holds; `sign` is >= or <=."""
    holds = found >= bound if sign == ">=" else found <= bound
    return {"what": what, "found": found, "promised": f"{sign} {bound:g}", "holds": bool(holds)}


def verdict(made: dict[str, Any]) -> str:
    """A promise as a line to print."""
    word = "holds" if made["holds"] else "DOES NOT HOLD"
    return f"{made['what']}: {made['found']:.3g}, {made['promised']}: {word}"


def write_found(found: dict[str, Any], path: Path | None) -> None:
    """Add the load at the end, and write all of it down where that is asked for."""
    found["load_after"] = os.getloadavg()[0]
    if path:
        write_json(path, found)


def write_json(path: Path, found: dict[str, Any]) -> None:
    """A benchmark's results, in a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def tree_cpu_seconds(root: int) -> dict[int, float]:
    """CPU seconds of a process and of all below it, their own ended children included, by pid."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    tick = 100.0  # of /proc, on every Linux
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        seconds[pid] = sum(map(int, fields[11:15])) / tick
    below = {root}
    while more := {p for p, above in parents.items() if above in below} - below:
        below |= more
    return {pid: seconds[pid] for pid in below if pid in seconds}
