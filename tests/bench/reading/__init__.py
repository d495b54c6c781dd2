"""How fast columns are read, beside the limit of the machine and beside other libraries.

`samples`, `measure` and `peers` import nothing else of ours: they also run in the environment of
the peers, where this package has another name. So importing the package itself imports nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ORDERS = ("sequential", "shuffled", "shuffled+crc")  # the last compares every row's checksum
MODES = [f"{order}-{state}" for order in ORDERS for state in ("warm", "cold")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m shards bench`."""
    from shards.console import positive
    from shards.places import local_path

    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write all rows there")
    parser.add_argument(
        "--folder", type=local_path, default=Path("/var/tmp/latentbank-bench"),
        help="work folder on the disk to measure; 18 GB, kept and used again (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=positive, default=4096, help="samples of 0.5 MB (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=4, choices=range(1, 1001), metavar="N",
        help="turns of each reader (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=local_path, metavar="PYTHON",
        help="python of the peers' environment (`make bench` makes it from bench/peers.txt)",
    )  # fmt: skip
    parser.add_argument("--readers", nargs="*", help="only these, and raw (default: all)")
    parser.add_argument("--modes", nargs="*", choices=MODES, help="only these (default: all)")


def run_bench(args: argparse.Namespace) -> int:
    """`python -m shards bench`; 1 if a reader failed or delivered other rows."""
    from . import run  # loads torch

    return run.bench(args)
