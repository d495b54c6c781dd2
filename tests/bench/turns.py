"""What benchmarks that take turns have in common: options, a folder that goes, what is printed and written down."""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shards.console import positive
from shards.format.atomic import Json
from shards.places import local_path
from tests.bench.cost import keep_memory, verdict, write_found
from tests.bench.reading.report import machine

# (an empty folder, turns, whether sizes are toys) -> what was found, with its "promises", and a table of it
Measure = Callable[[Path, Any, bool], tuple[Json, Table]]


def add_options(parser: argparse.ArgumentParser, rounds: int | None, told: str) -> None:
    """`rounds`: how many turns by default, of which `told` speaks."""
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write all results there"
    )
    parser.add_argument(
        "--folder", type=local_path, help="where the temporary folder goes: a disk (default: the system's)"
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help=f"turns of A and B ({told})"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of torch (%(default)s)")
    parser.add_argument("--light", action="store_true", help="toy sizes, to see that it runs")


def parsed(doc: str, rounds: int) -> argparse.Namespace:
    """The command line of a module that measures one thing."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add_options(parser, rounds, "%(default)s")
    return parser.parse_args()


def measured(parts: Mapping[str, Measure], args: argparse.Namespace) -> int:
    """Measure each part, print what was found and promised, write it down; the exit code."""
    torch.set_num_threads(args.threads)
    keep_memory()
    console = Console()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="latentbank-bench-") as name:
        found: Json = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine(Path(name)), "threads": args.threads,
            "light": args.light, "torch": torch.__version__,
        }  # fmt: skip
        for part, measure in parts.items():
            folder = Path(name) / part
            folder.mkdir()
            found[part], table = measure(folder, args.rounds, args.light)
            console.print(table)
            for promise in found[part]["promises"]:
                console.print(verdict(promise), highlight=False)
    write_found(found, args.json)
    return 0
