"""Samples a second of a stream over int8 latents over those of the same stream over float16 ones.

    python -m tests.bench.reading.latents --json bench/latents.json

    float16   latents of the shape of a RAE, 768 x 16 x 16, and short captions
    int8      the same as int8 with a scale a channel and a scale a place, multiplied to float16 by the reader

They take turns within one process, as those of `tests.bench.reading.captions` do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from shards import exits, open_join
from shards.format.atomic import Json
from shards.tools.convert import convert
from tests.bench import turns

from .captions import ROUNDS, compared, table
from .readers import write_columns
from .samples import BATCH, Samples

ROWS, RAE, WIDTH = 1_024, (768, 16, 16), 8


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    samples = Samples(2 * BATCH, (4, 4, 4), WIDTH) if light else Samples(ROWS, RAE, WIDTH)
    write_columns(folder, samples, "latents")
    convert(folder / "latents", folder / "int8", element="int8")
    names = {"float16": "latents", "int8": "int8"}
    joins = {
        name: (open_join(folder / column, folder / "text"), False)
        for name, column in names.items()
    }  # fmt: skip
    results = compared(joins, samples, rounds)
    results["row_bytes"] = {
        name: join.latents.layout.unit_bytes for name, (join, _) in joins.items()
    }
    return results, table(results, "latents")


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measures, prints, writes down."""
    return turns.measured({"latents": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
