"""What the distances cost once the features are kept: CPU seconds of each, with its influences, on one core.

    python -m tests.bench.evaluation.distances --json FILE      # about five minutes
    python -m tests.bench.evaluation.distances --light          # toy sizes: that it runs, and nothing else

Features are random, as wide as Inception's. FID of few pictures is timed too, where nobody should take it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.distances.frechet import Gaussian
from eval.distances.metrics import METRICS
from eval.distances.references import Reference
from shards import exits
from tests.bench import turns
from tests.bench.cost import cpu_of, median_interval, promise

ROUNDS, WIDTH, COUNTS, REAL = 5, 2_048, (1_000, 5_000), 10_000
KINDS = ("mind", "precision", "recall", "kid", "fid", "fdr")
LIMIT = 2.0  # CPU seconds of MIND of 1,000 pictures

Json = dict[str, Any]


def reference_of(label: str, count: int, width: int, seed: int) -> Reference:
    features = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    pictures = tuple(f"{label}{i}" for i in range(count))
    fitted = Gaussian.fitted(features)  # once a command, and stored with a file's reference
    return Reference(label, {"source": label}, features, (None,) * count, pictures, fitted)


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    """Each distance of each number of pictures in turns; (results, table)."""
    width, counts, real = (16, (100,), 200) if light else (WIDTH, COUNTS, REAL)
    reference = reference_of("real", real, width, 1).beside(reference_of("other", real, width, 2))
    chance = np.random.default_rng(0)
    features = {n: (chance.standard_normal((n, width)) * 1.1).astype(np.float32) for n in counts}
    seconds: dict[str, list[float]] = {f"{kind} {n}": [] for kind in KINDS for n in counts}
    for _ in turns.turns("distances", range(rounds)):
        for kind in KINDS:
            for n in counts:
                work = partial(METRICS[kind].distance, features[n], reference, False)
                seconds[f"{kind} {n}"].append(cpu_of(work))
    medians = {name: median_interval(values) for name, values in seconds.items()}
    promised = medians[f"mind {counts[0]}"][0]
    result: Json = {
        "rounds": rounds,
        "width": width,
        "real": real,
        "cpu_s": medians,
        "promises": [promise("CPU seconds of MIND of 1,000 pictures", promised, "<=", LIMIT)],
    }
    return result, table(result)


def table(result: Json) -> Table:
    title = f"{result['width']} features, {result['real']} real pictures, {result['rounds']} turns"
    table = Table("distance and pictures", "CPU seconds", "95 % interval", title=title)
    for name, (median, low, high) in result["cpu_s"].items():
        table.add_row(name, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    return table


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measures, prints, writes down."""
    return turns.measured({"distances": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
