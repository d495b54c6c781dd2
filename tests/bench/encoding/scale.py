"""What the driver does at 1,000 tars of 1,000 rows: its cost a shard, its memory, and how long it
takes to see that everything is there.

The pictures are tiny and the encoder is next to nothing, so that a million rows take minutes; all else
is a run as it is: tars scanned, columns written, committed, reported. The tars are one file under many
names. The driver's cost is the CPU time of its thread, from the first look to the report; shards are
encoded in other threads, or in an actor. What Ray's own threads in the driver take goes by time and not
by shards, and is told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from encode.config import EncodeConfig
from encode.models import load_encoders
from encode.plan.sample_source import open_job
from encode.report.status import status
from encode.run.job import run as run_job
from encode.run.job import start_executor
from encode.run.prepare import RunPlan, claim_columns, prepare
from encode.source.tars import make_source
from shards.console import render
from shards.format.atomic import Json
from shards.format.layout import MAX_SHARDS
from tests.bench.cost import rss_mb

from .synthetic import picture, save_vae, write_tar

SHARDS, ROWS = 1_000, 1_000
SHARD_ROWS = 1_024
SIDE = 16  # of the pictures, px
TARGETS = {"driver_ms_a_shard": 5.0, "resume_s": 2.0}
LARGE = 1_000_000  # shards that the figures are extended to
FLAT = 1.1  # times the memory of the first decile, in the last one
DECILE = 10


def write_tars(folder: Path, shards: int, rows: int) -> str:
    """One tar of one tiny picture, under many names; their brace pattern."""
    first = folder / "one.tar"
    data = picture(0, SIDE, SIDE)
    write_tar(first, ((data, b"a caption") for _ in range(rows)))
    for number in range(shards):
        os.link(first, folder / f"{number:05d}.tar")
    return f"{folder}/{{{0:05d}..{shards - 1:05d}}}.tar"


def config_of(folder: Path, shards: int, rows: int) -> EncodeConfig:
    room = -(-rows // SHARD_ROWS) * SHARD_ROWS
    vae = {"class": "AutoencoderKL", "path": str(save_vae(folder / "vae", "demo"))}
    return EncodeConfig.model_validate({
        "root": str(folder / "cache"),
        "sources": {"many": write_tars(folder / "tars", shards, rows)},
        "columns": {"vae": {"kind": "moments", "encoder": vae, "resolution": 8}},
        "shard_rows": room,
        "engine": {"executor": "inline", "batch": 256, "device": "cpu"},
    })  # fmt: skip


class Memory:
    """Memory of this process, looked at every so often while a block runs."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.mb: list[float] = []
        self._seconds, self._over = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            self.mb.append(rss_mb())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.mb.append(rss_mb())

    def deciles(self) -> list[float]:
        """The mean of each tenth of the time, MB."""
        return [
            float(part.mean()) for part in np.array_split(np.array(self.mb), DECILE) if len(part)
        ]


def quietly(config: EncodeConfig) -> None:
    """A run, to its end, without its words."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run_job(config)
    if code:
        raise RuntimeError(f"the run ended with exit code {code}: {said.getvalue()[-500:]}")


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def costs(config: EncodeConfig) -> NDArray[np.float64]:
    """(CPU seconds of this thread, of this process, seconds) of a run."""
    clocks = time.thread_time, time.process_time, time.perf_counter
    before = np.array([clock() for clock in clocks])
    quietly(config)
    spent: NDArray[np.float64] = np.array([clock() for clock in clocks]) - before
    return spent


def measure(config: EncodeConfig, shards: int) -> Json:
    """A run from nothing to its report, less what one of a single shard takes: per shard."""
    first = str(config.sources["many"]).replace(f"..{shards - 1:05d}", f"..{0:05d}")
    for _ in range(2):  # the first one imports
        shutil.rmtree(f"{config.root}-one", ignore_errors=True)
        alone = {"sources": {"many": first}, "root": f"{config.root}-one"}
        fixed = costs(config.model_copy(update=alone))
    with Memory() as memory:
        whole = costs(config)
    driver, process, seconds = ((whole - fixed) / max(1, shards - 1)).tolist()
    deciles = memory.deciles()
    return {
        "seconds": float(whole[2]),
        "driver_ms_a_shard": 1e3 * driver,
        "process_ms_a_shard": 1e3 * process,  # inline, encoding is a part of it
        "other_threads_ms_a_second": 1e3 * (process - driver) / seconds,
        "fixed_cpu_s": float(fixed[1]),
        "memory_mb_by_decile": [round(value, 1) for value in deciles],
        "memory_growth": deciles[-1] / deciles[min(1, len(deciles) - 1)],
    }


def prepared(config: EncodeConfig) -> RunPlan:
    """The plan of a run, with what it costs to load the encoders."""
    executor = start_executor(config)
    try:
        return prepare(config, [open_job(config, name) for name in config.sources], executor)
    finally:
        executor.stop()


def resuming(config: EncodeConfig, shards: int) -> Json:
    """Seconds to see that everything is there, and to say so; bytes that a shard takes in memory."""
    plan = prepared(config)
    loading = timed(lambda: load_encoders(config.columns, config.engine))
    looking = timed(lambda: prepared(config))  # loads them, too
    listing = timed(lambda: claim_columns(plan, False))
    empty = config.model_copy(update={"root": f"{config.root}-empty"})
    fresh = prepared(empty)
    tracemalloc.start()
    try:
        made = [make_source(name, tars, config.shard_rows) for name, tars in empty.sources.items()]
        claim_columns(fresh, False)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        shutil.rmtree(empty.root)
    if len(plan.tasks) or len(fresh.tasks) != shards or len(made) != 1:
        raise RuntimeError(f"{len(plan.tasks)} and {len(fresh.tasks)} shards to do, 0 and {shards}")
    return {
        "resume_s": looking + listing,
        "of_which_models_s": loading,
        "whole_run_s": timed(lambda: quietly(config)),
        "status_s": timed(lambda: status(config)),
        "bytes_a_task": held / shards,
    }


def run(folder: Path, args: argparse.Namespace) -> tuple[Json, str]:
    """Inline and, unless told otherwise, through Ray; (results, text)."""
    shards, rows = args.shards or SHARDS, args.rows or ROWS
    config = config_of(folder, shards, rows)
    found: Json = {"targets": TARGETS, "shards": shards, "rows_a_shard": rows}
    found["inline"] = measure(config, shards)
    found["resume"] = resuming(config, shards)
    if not args.no_ray:
        shutil.rmtree(config.root)
        engine = config.engine.model_copy(update={"executor": "ray", "workers": 1})
        through_ray = config.model_copy(update={"engine": engine})
        found["ray"] = measure(through_ray, shards)
    return found, text_of(found)


def text_of(found: Json) -> str:
    """Figures, targets, and what they mean for a million shards."""
    table = Table(
        "driver", "shards", "rows", "seconds", "ms a shard", "memory, MB: 1st, 2nd, last tenth",
        title="one column of next to nothing",
    )  # fmt: skip
    ways = [way for way in ("inline", "ray") if way in found]
    for way in ways:
        got = found[way]
        mb = got["memory_mb_by_decile"]
        table.add_row(
            way, f"{found['shards']:,}", f"{found['shards'] * found['rows_a_shard']:,}",
            f"{got['seconds']:.0f}", f"{got['driver_ms_a_shard']:.2f}",
            f"{mb[0]:.0f}, {mb[min(1, len(mb) - 1)]:.0f}, {mb[-1]:.0f}",
        )  # fmt: skip
    back = found["resume"]
    each = max(found[way]["driver_ms_a_shard"] for way in ways)
    growth = max(found[way]["memory_growth"] for way in ways)
    checks = {
        f"driver at most {TARGETS['driver_ms_a_shard']:.0f} ms a shard": each
        <= TARGETS["driver_ms_a_shard"],
        f"everything seen to be there within {TARGETS['resume_s']:.0f} s": back["resume_s"]
        <= TARGETS["resume_s"],
        "memory flat": growth <= FLAT,
    }
    lines = []
    if ray := found.get("ray"):
        lines.append(
            f"Ray in the driver: {ray['fixed_cpu_s']:.1f} CPU s to start and stop, then its threads "
            f"{ray['other_threads_ms_a_second']:.1f} ms CPU a second (with the driver's own "
            f"{ray['process_ms_a_shard']:.1f} ms a shard here, where a shard takes "
            f"{ray['seconds'] / found['shards']:.2f} s)"
        )
    many = LARGE / found["shards"]
    seeing = max(0.0, back["resume_s"] - back["of_which_models_s"]) * many
    return render(
        table,
        f"everything there: seen in {back['resume_s']:.2f} s ({back['of_which_models_s']:.2f} s of it "
        f"the model), said and reported again in {back['whole_run_s']:.2f} s; status in "
        f"{back['status_s']:.2f} s",
        *lines,
        *(f"{name}: {'holds' if good else 'does NOT hold'}" for name, good in checks.items()),
        f"for {LARGE:,} shards ({-(-LARGE // MAX_SHARDS)} sources of at most {MAX_SHARDS:,}): the "
        f"driver takes {each * LARGE / 3.6e6:.1f} CPU hours in all and "
        f"{back['bytes_a_task'] * LARGE / 1e9:.2f} GB; it sees what is there in {seeing / 60:.1f} "
        f"min, status in {back['status_s'] * many / 60:.1f} min",
    )
