"""How much of the time an encoder is at work that takes 12 ms a picture and no CPU, as a GPU does.

The pictures are decoded by the machine's own cores meanwhile. Counted from the first shard handed out
to the end of the last, so the first pictures and the last commits are waited for and count against it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from encode.config import EngineConfig, MomentsColumn
from encode.meter import Stats
from encode.models.encoder import ImageEncoder, Words
from encode.registry import ModelSpec
from encode.run.local_worker import Done, Executor, InlineExecutor, Worker
from encode.run.ray_workers import RayExecutor, RayWorker
from encode.run.scheduler import IN_FLIGHT
from encode.source.decoding import View
from shards.console import render
from shards.format.atomic import Json

from .synthetic import picture, tasks_of, write_tar

SHARDS, ROWS = 8, 1_000
SLEEP_SECONDS = 0.012  # a picture
RESOLUTION = 256
SHARD_ROWS = 1_024
TARGET = 0.95
COLUMN = "sleeping"


class Sleeper(ImageEncoder):
    """Rows of zeros, after a while. `sleep` lets other threads run, as a GPU would."""

    def __init__(self, seconds: float = SLEEP_SECONDS, resolution: int = RESOLUTION) -> None:
        self.config = MomentsColumn.model_validate(
            {"kind": "moments", "encoder": "sleeper", "resolution": resolution}
        )
        self.weights = "0" * 64
        self.model = ModelSpec.model_validate({"class": "Sleeper", "path": "sleeper"})
        self.view = View(resolution, "jpg")
        self._seconds = seconds

    def rows(self, images: NDArray[np.uint8]) -> Words:
        time.sleep(self._seconds * len(images))
        side = self.view.resolution // 8
        return np.zeros(
            (len(images), 32, side, side), np.float16
        )  # of the real size, to be written


class SleepingWorker(RayWorker):
    """The actor that holds it: no config names such an encoder."""

    def __init__(self, node: str, engine: EngineConfig, seconds: float, resolution: int) -> None:
        self._worker = Worker({COLUMN: Sleeper(seconds, resolution)}, engine)
        self._node = node


class SleepingExecutor(RayExecutor):
    """One such actor on a Ray of its own."""

    worker_class = SleepingWorker

    def __init__(self, engine: EngineConfig, seconds: float, resolution: int) -> None:
        super().__init__({}, {}, engine)
        node = str(self._ray.get_runtime_context().get_node_id())
        self._args: Any = node, engine, seconds, resolution

    def now(self, worker: int) -> Stats:
        """What it has counted up to this moment."""
        _, stats = self._ray.get(self._actors[worker].handle.stats.remote())
        found: Stats = stats
        return found


def engine_config(threads: int) -> EngineConfig:
    return EngineConfig(threads=threads, torch_threads=1, batch=64, device="cpu")


def measure(executor: Executor, tasks: list[Any], now: Any) -> Json:
    """Hand out all shards, two at a time, and tell how busy the encoder was meanwhile."""
    executor.start(0)
    while not executor.ready(0):
        executor.events(0.2)
    before, start = now(0), time.perf_counter()
    waiting, flying, rows = list(enumerate(tasks)), 0, 0
    while waiting or flying:
        while waiting and flying < IN_FLIGHT:
            executor.submit(0, *waiting.pop(0))
            flying += 1
        for event in executor.events(1.0):
            if not isinstance(event, Done):
                raise RuntimeError(f"a shard did not end well: {event}")
            flying -= 1
            rows += event.result.rows
    after, seconds = now(0), time.perf_counter() - start
    busy = after.busy - before.busy
    waits = {reason: after.waits[reason] - before.waits[reason] for reason in after.waits}
    return {
        "rows": rows, "seconds": seconds, "busy": busy / (busy + sum(waits.values())),
        "waits_s": waits,
    }  # fmt: skip


def run(
    folder: Path, args: argparse.Namespace, seconds: float = SLEEP_SECONDS,
    resolution: int = RESOLUTION,
) -> tuple[Json, str]:  # fmt: skip
    """Inline and, unless told otherwise, through Ray; (results, text)."""
    shards, rows = args.shards or SHARDS, args.rows or ROWS
    tars = []
    shown = [picture(i, 320, 256) for i in range(32)]
    for number in range(shards):
        tars.append(folder / f"{number:05d}.tar")
        write_tar(tars[-1], ((shown[i % len(shown)], b"a picture") for i in range(rows)))
    engine = engine_config(max(1, len(os.sched_getaffinity(0))))
    found: Json = {
        "target": TARGET, "shards": shards, "rows_a_shard": rows, "ms_a_picture": 1e3 * seconds,
        "threads": engine.threads, "resolution": resolution,
    }  # fmt: skip
    room = -(-rows // SHARD_ROWS) * SHARD_ROWS
    encoder = Sleeper(seconds, resolution)
    inline = InlineExecutor({COLUMN: encoder}, engine)
    try:
        tasks = tasks_of(folder / "inline", tars, {COLUMN: encoder}, room)
        found["inline"] = measure(inline, tasks, lambda worker: inline.stats()[worker])
    finally:
        inline.stop()
    if not args.no_ray:
        through_ray = SleepingExecutor(engine, seconds, resolution)
        try:
            tasks = tasks_of(folder / "ray", tars, {COLUMN: encoder}, room)
            found["ray"] = measure(through_ray, tasks, through_ray.now)
        finally:
            through_ray.stop()
    return found, text_of(found)


def text_of(found: Json) -> str:
    """Busy share and waits."""
    table = Table(
        "executor", "rows", "seconds", "busy", "waits, s",
        title=f"an encoder that sleeps {found['ms_a_picture']:.0f} ms a picture, "
        f"{found['shards']} shards",
    )  # fmt: skip
    ways = [way for way in ("inline", "ray") if way in found]
    for way in ways:
        got = found[way]
        waits = ", ".join(f"{reason} {spent:.2f}" for reason, spent in got["waits_s"].items())
        table.add_row(
            way, f"{got['rows']:,}", f"{got['seconds']:.1f}", f"{100 * got['busy']:.1f} %", waits
        )
    least = min(found[way]["busy"] for way in ways)
    verdict = "holds" if least >= TARGET else "does NOT hold"
    return render(table, f"busy at least {100 * least:.1f} %; the target of {TARGET:.0%} {verdict}")
