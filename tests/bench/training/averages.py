"""CPU seconds of a step that updates two power averages too, over those of a step that does not.

One run of `fit` has them (`ema.power`), and every other step leaves them out. A pair is two steps that follow one
another; which of them comes first alternates. Model and batch are such that averages weigh much: a batch of 8 samples,
a quarter of what a rank of the shipped configs has. The first pair is not counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table
from torch import Tensor

from shards.format.atomic import Json
from shards.read.stream import Batch, Stream
from tests.bench.cost import cpu_seconds, paired, promise
from tests.bench.reading.samples import Samples
from train.checkpoints.snapshots import PowerAverages
from train.config import TrainConfig
from train.ranks.world import World
from train.run import fit, open_columns

from .runs import TOY, Size, config_of, forked, model

ROUNDS = 60
RATIO = 1.06  # what is promised of the ratio
HEAVY = Size(model(256, 6), Samples(256), 8)


class Turns:
    """The batches that `fit` asks for, and whether the step between two of them updates the averages."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.sources = config, open_columns(config, None)
        self.cpu: dict[bool, list[float]] = {True: [], False: []}
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.updates = self.parameters = 0
        self.on = False

    def update(self, averages: PowerAverages, weights: list[Tensor], number: int) -> None:
        """In place of `PowerAverages.update`."""
        if self.on:
            super(PowerAverages, averages).update(weights, number)
            self.updates += 1
            self.parameters = sum(part.numel() for part in weights)

    def __call__(self, position: int, world: World) -> Iterator[Batch]:
        """As `fit` takes them; a step ends where it asks for the next batch."""
        c = self.config
        order = self.sources.order(c.seed, c.data.lanes, c.data.window)
        stream = Stream(self.sources, order, position=position, global_batch=c.global_batch)
        with stream:
            for step, batch in enumerate(stream):
                self.on = step % 4 in (0, 3)
                start, cpu = time.perf_counter(), cpu_seconds()
                yield batch
                self.cpu[self.on].append(cpu_seconds() - cpu)
                self.seconds[self.on].append(time.perf_counter() - start)


def run(folder: Path, rounds: int | None, light: bool) -> tuple[Json, Table]:
    """Train for a while, every other step without the averages; (results, table)."""
    found = forked(lambda: measure(folder, rounds or ROUNDS, TOY if light else HEAVY))
    return found, table(found)


def measure(folder: Path, rounds: int, size: Size) -> Json:
    """The results of so many turns."""
    steps = 2 * rounds + 4  # the first pair and the last are not counted
    config = config_of(folder, size, steps=steps, ema={"power": [0.05, 0.10], "snapshots": 2})
    turns = Turns(config)
    PowerAverages.update = lambda *arguments: turns.update(*arguments)  # type: ignore[method-assign]  # of this fork
    fit(config, folder / "run", turns)
    cpu, seconds = (
        {on: spent[1 : rounds + 1] for on, spent in both.items()}
        for both in (turns.cpu, turns.seconds)
    )
    ratio = paired(cpu[True], cpu[False])
    return {
        "rounds": rounds, **ratio, "updates": turns.updates, "parameters": turns.parameters, "batch": size.batch,
        "model": size.model, "cores": os.cpu_count(),
        "cpu_s": {str(on): float(np.median(spent)) for on, spent in cpu.items()},
        "seconds": {str(on): float(np.median(spent)) for on, spent in seconds.items()},
        "promises": [
            promise("CPU of a step with two more averages, upper end of 95 %", ratio["ratio_high"], "<=", RATIO),
        ],
    }  # fmt: skip


def table(found: Json) -> Table:
    shown = Table("a step", "with power averages", "without", title=(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['batch']} samples a step, {found['rounds']} turns"
    ))  # fmt: skip
    for name, key in (("CPU seconds, median", "cpu_s"), ("seconds, median", "seconds")):
        shown.add_row(name, f"{found[key]['True']:.3f}", f"{found[key]['False']:.3f}")
    shown.add_row("CPU ratio, median", f"{found['ratio']:.3f}", "1")
    shown.add_row("95 % interval", f"{found['ratio_low']:.3f} to {found['ratio_high']:.3f}", "")
    return shown
