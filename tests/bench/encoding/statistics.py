"""CPU seconds of the engine with the sums over rows that measured norms are made of, over those without.

    A  encode a tar with `engine.statistics`
    B  the same without

The same tar, encoder and process, in turns; the first pair is not counted. The cases are those of
`overhead`. A tar of them has few rows, so what is written once a shard weighs more than in a data set.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from rich.table import Table

from encode.run.local_worker import InlineExecutor
from shards.column.statistics import block_sums, statistics_name
from shards.console import render
from shards.format.atomic import Json
from tests.bench.cost import cpu_of, paired, promise
from tests.bench.turns import turns

from .overhead import CASES, Bench, Case, encode, engine_config

TARGET = 1.08


def compare(bench: Bench, rounds: int) -> Json:
    """Ratio of CPU seconds, with sums over without, of each round."""
    plain = engine_config().model_copy(update={"statistics": False})
    executors = {True: bench.executor, False: InlineExecutor({"vae": bench.encoder}, plain)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in turns(bench.case.vae, range(-1, rounds)):
        for statistics in (True, False) if number % 2 else (False, True):  # there and back
            task = bench.task()
            spent = cpu_of(lambda task=task, s=statistics: encode(executors[s], task))  # type: ignore[misc]  # a lambda with defaults
            store = task.targets["vae"].store
            if (store.size(statistics_name(0)) is not None) != statistics:
                raise RuntimeError(f"{store.url}: expected sums {statistics}")
            if number >= 0:
                seconds[statistics].append(spent)
            root = task.folder.parent.folder
            assert root is not None
            shutil.rmtree(root)
    executors[False].stop()
    each = 1e3 / bench.case.rows
    return {
        "rounds": rounds, "rows": bench.case.rows, "resolution": bench.case.resolution,
        **paired(seconds[True], seconds[False]),
        "cpu_ms_a_row": float(np.median(seconds[True])) * each,
        "sums_alone_ms_a_row": alone(bench, rounds),
    }  # fmt: skip


def alone(bench: Bench, rounds: int) -> float:
    """CPU milliseconds of a row's sums, without anything of a shard; the median."""
    spec, rows = bench.task().targets["vae"].spec, bench.case.rows
    values = np.random.default_rng(0).normal(size=(rows, *spec.layout.row_shape))
    stored = values.astype(np.float16)
    spent = [
        cpu_of(lambda: block_sums(spec, rows, lambda part: stored[part])) for _ in range(rounds)
    ]
    return 1e3 * float(np.median(spent)) / rows


def run(folder: Path, args: argparse.Namespace) -> tuple[Json, str]:
    """Both cases, in twice the rounds of the other parts; (results, text)."""
    found: Json = {}
    for name, case in CASES.items():
        rows = args.rows or case.rows
        place = folder / name.replace(" ", "-")
        bench = Bench(place, Case(case.vae, case.resolution, case.width, case.height, rows))
        found[name] = compare(bench, 2 * args.rounds)
        bench.close()
    table = Table("sums over rows", *CASES, title="with over without, CPU seconds")
    for column in table.columns[1:]:
        column.justify = "right"
    cases = [found[name] for name in CASES]
    table.add_row("ratio, median", *(f"{case['ratio']:.3f}" for case in cases))
    table.add_row(
        "95 % interval", *(f"{case['ratio_low']:.3f} to {case['ratio_high']:.3f}" for case in cases)
    )
    table.add_row("engine, ms a row", *(f"{case['cpu_ms_a_row']:.2f}" for case in cases))
    table.add_row("sums alone, ms a row", *(f"{case['sums_alone_ms_a_row']:.3f}" for case in cases))
    found["promises"] = [
        promise(f"sums over rows, {name}: at most", found[name]["ratio_high"], "<=", TARGET)
        for name in CASES
    ]
    return found, render(table)
