"""What the engine costs beside a bare loop, how busy it keeps an encoder, and how it scales.

    python -m encode bench overhead          # CPU seconds of the engine over those of a bare loop
    python -m encode bench busy              # share of the time that a slow encoder is at work
    python -m encode bench scale             # 1,000 tars of 1,000 rows: cost a shard, memory, resuming
    python -m encode bench statistics        # CPU seconds with the sums that norms are made of, over without
    python -m encode bench --json FILE       # all four

All of it is made up in a temporary folder (pictures, models of random weights, columns) and removed.
"""

from __future__ import annotations

import argparse

from shards.console import positive
from shards.places import local_path

PARTS = ("overhead", "busy", "scale", "statistics")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m encode bench`."""
    parser.add_argument(
        "part", nargs="?", choices=(*PARTS, "all"), default="all", help="what is measured"
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write all results there"
    )
    parser.add_argument(
        "--folder",
        type=local_path,
        help="where the temporary folder goes: a disk (default: the system's)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=20,
        help="turns of A and B (%(default)s; statistics: twice as many)",
    )
    parser.add_argument(
        "--rows", type=positive, help="rows of a tar (default: 64 or 256, else 1,000)"
    )
    parser.add_argument(
        "--shards", type=positive, help="tars (default: 8 for busy, 1,000 for scale)"
    )
    parser.add_argument("--no-ray", action="store_true", help="leave out what needs Ray")


def run_bench(args: argparse.Namespace) -> int:
    """`python -m encode bench`: run the parts, print their tables, write them down."""
    from tests.bench.turns import measured

    from . import (  # torch and diffusers are loaded when they are needed
        busy,
        overhead,
        scale,
        statistics,
    )

    runs = {
        "overhead": overhead.run,
        "busy": busy.run,
        "scale": scale.run,
        "statistics": statistics.run,
    }
    chosen = PARTS if args.part == "all" else (args.part,)
    return measured({part: runs[part] for part in chosen}, args)
