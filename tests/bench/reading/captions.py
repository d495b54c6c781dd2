"""Samples a second of a stream with int8 captions over those of the same stream with bfloat16 ones.

    python -m tests.bench.reading.captions --json bench/captions.json

    bfloat16         a stream over latents and captions, half a megabyte a sample
    int8             the same with int8 captions, handed over as they are stored
    int8, tokens     and multiplied to bfloat16 on this CPU, as a trainer without a GPU does

They take turns within one process, an epoch each, there and back. The first turn is not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from shards import JoinedColumns, exits, open_join
from shards.format.atomic import Json
from shards.read.stream import Stream
from shards.tools.convert import convert
from tests.bench import turns
from tests.bench.cost import cpu_of, paired, promise

from .readers import write_columns
from .samples import BATCH, Samples

ROUNDS, EPOCHS = 12, 2  # epochs of a turn, for the thread to be ahead no more than at its start
TURNS = {"bfloat16": ("text", False), "int8": ("int8", False), "int8, tokens": ("int8", True)}


def epoch(join: JoinedColumns, rows: int, multiply: bool) -> int:
    """Reads a turn's samples; returns the bytes that came."""
    order, size = join.order(), 0
    batches = EPOCHS * rows // BATCH
    with Stream(join, order, position=order.epoch_samples, global_batch=BATCH) as stream:
        for batch in islice(stream, batches):
            size += batch.moments.nbytes + (batch.tokens if multiply else batch.text).nbytes
    return size


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    samples = Samples(2 * BATCH, (4, 4, 4), 16) if light else Samples(1_024)
    write_columns(folder, samples)
    convert(folder / "text", folder / "int8", element="int8")
    joins = {name: open_join(folder / "latents", folder / name) for name in ("text", "int8")}
    results = compared(
        {name: (joins[text], each) for name, (text, each) in TURNS.items()}, samples, rounds
    )
    name, low = (
        "rate of int8 over that of bfloat16, lower end",
        results["rate"]["int8"]["ratio_low"],
    )
    results["promises"] = [promise(name, low, ">=", 0.9)]
    return results, table(results, "captions")


def compared(
    joins: Mapping[str, tuple[JoinedColumns, bool]], samples: Samples, rounds: int
) -> Json:
    """Streams of these joins in turns, each with whether captions are multiplied: samples and CPU of
    each, and its rate over that of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in joins}
    cpu: dict[str, list[float]] = {name: [] for name in joins}
    for turn in turns.turns("streams", range(rounds + 1)):
        for name, (join, multiply) in list(joins.items())[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            spent = cpu_of(partial(epoch, join, samples.rows, multiply))
            if turn:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(spent)
    count, first = EPOCHS * samples.rows, next(iter(joins))
    return {
        "rounds": rounds, "samples": samples.record(),
        "samples_s": {name: count / float(np.median(each)) for name, each in seconds.items()},
        "cpu_ms": {name: 1e3 * float(np.median(each)) / count for name, each in cpu.items()},
        "rate": {name: paired(seconds[first], each) for name, each in seconds.items()},
    }  # fmt: skip


def table(results: Json, title: str) -> Table:
    first = next(iter(results["rate"]))
    shown = Table(title, "samples/s", "CPU ms a sample", f"rate over {first}", "95 % interval")
    for name, rate in results["rate"].items():
        cells: list[Any] = [f"{results['samples_s'][name]:,.0f}", f"{results['cpu_ms'][name]:.3f}"]
        interval = f"{rate['ratio_low']:.2f} to {rate['ratio_high']:.2f}"
        shown.add_row(name, *cells, f"{rate['ratio']:.2f}", interval)
    return shown


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measures, prints, writes down."""
    return turns.measured({"captions": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
