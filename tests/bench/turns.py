"""What benchmarks that take turns have in common: options, a folder that goes, what is printed and written down."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from shards.console import Bar, positive
from shards.format.atomic import Json
from shards.places import local_path
from tests.bench.cost import keep_memory, verdict, write_found

# (an empty folder, options) -> the results, with "promises" if it makes any, and what is printed
Measure = Callable[[Path, argparse.Namespace], tuple[Json, Any]]


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


def timed(measure: Callable[[Path, Any, bool], tuple[Json, Any]]) -> Measure:
    """Returns a part that takes the options of `add_options`: rounds, and whether sizes are toys."""
    return lambda folder, args: measure(folder, args.rounds, args.light)


def parsed(doc: str, rounds: int) -> argparse.Namespace:
    """The command line of a module that measures one thing."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add_options(parser, rounds, "%(default)s")
    return parser.parse_args()


def turns(name: str, numbers: Sequence[int]) -> Iterator[int]:
    """Yields each number while a bar shows how far the benchmark is."""
    with Bar(name, len(numbers), "turns") as bar:
        for number in numbers:
            yield number
            bar.advance(1)


def measured(parts: Mapping[str, Measure], args: argparse.Namespace) -> int:
    """Measures each part, prints its table and what it promises, and writes all of it as JSON where
    `--json` asks for it. Returns the exit code.
    """
    from tests.bench.reading.report import machine  # loads torch, of which --help has no need

    keep_memory()
    console = Console()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="latentbank-bench-") as name:
        results: Json = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine(Path(name)),
            "cores": os.cpu_count(), "load": os.getloadavg()[0],
        }  # fmt: skip
        if hasattr(args, "threads"):
            import torch

            torch.set_num_threads(args.threads)
            results |= {"threads": args.threads, "light": args.light, "torch": torch.__version__}
        for part, measure in parts.items():
            print(f"{part}: preparing and measuring", file=sys.stderr, flush=True)
            folder = Path(name) / part
            folder.mkdir()
            results[part], shown = measure(folder, args)
            console.print(shown, markup=False, soft_wrap=isinstance(shown, str))
            for promise in results[part].get("promises", ()):
                console.print(verdict(promise), highlight=False)
    write_found(results, args.json)
    return 0
