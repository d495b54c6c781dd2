"""What the trainer costs beside a bare loop of the same model, and what it costs to go on after many steps.

    python -m train bench overhead            # CPU seconds of a step of the trainer over those of a bare loop
    python -m train bench resume              # from the start of a run to the end of its first step, at two steps
    python -m train bench --json FILE         # both
    python -m train bench --light             # toy sizes: that it runs, and nothing else

What caching saves is measured where the encoders are: `python -m eval.bench_online`. Columns, runs and checkpoints are
made up in a temporary folder and removed.
"""

import argparse
import tempfile
import time
from pathlib import Path

from shards.storage import Json

PARTS = ("overhead", "resume")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m train bench`."""
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results there")
    parser.add_argument(
        "--folder", type=Path, help="where the temporary folder goes: a disk (default: the system's)"
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="turns of A and B (default: 60 and 20)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--light", action="store_true", help="toy sizes, to see that it runs")


def run_bench(args: argparse.Namespace) -> int:
    """`python -m train bench`: run the parts, print what was found and promised, write it down."""
    import torch
    from rich.console import Console

    from shards.bench.cost import keep_memory, verdict, write_found
    from shards.bench.report import machine

    from . import overhead, resume

    torch.set_num_threads(args.threads)
    keep_memory()
    console = Console()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="latentbank-bench-") as name:
        found: Json = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine(Path(name)), "threads": args.threads,
            "light": args.light, "torch": torch.__version__,
        }  # fmt: skip
        for part in PARTS if args.part == "all" else (args.part,):
            folder = Path(name) / part
            folder.mkdir()
            measure = {"overhead": overhead.run, "resume": resume.run}[part]
            found[part], table = measure(folder, args.rounds, args.light)
            console.print(table)
            for promise in found[part]["promises"]:
                console.print(verdict(promise), highlight=False)
    write_found(found, args.json)
    return 0
