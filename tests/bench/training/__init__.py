"""What the trainer costs beside a bare loop of the same model, and what it costs to go on after many steps.

    python -m train bench overhead            # CPU seconds of a step of the trainer over those of a bare loop
    python -m train bench averages            # CPU seconds of a step with two power averages over one without
    python -m train bench resume              # from the start of a run to the end of its first step, at two steps
    python -m train bench --json FILE         # all
    python -m train bench --light             # toy sizes: that it runs, and nothing else

What caching saves is measured where the encoders are: `python -m tests.bench.evaluation.online`.
Columns, runs and checkpoints are made up in a temporary folder and removed.
"""

import argparse

from tests.bench import turns

PARTS = ("overhead", "averages", "resume")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m train bench`."""
    parser.add_argument(
        "part", nargs="?", choices=(*PARTS, "all"), default="all", help="what is measured"
    )
    turns.add_options(parser, None, "default: 60, 60 and 20")


def run_bench(args: argparse.Namespace) -> int:
    """`python -m train bench`: run the parts, print what was found and promised, write it down."""
    from tests.bench.training import averages, overhead, resume

    parts = {"overhead": overhead, "averages": averages, "resume": resume}
    runs = {name: turns.timed(part.run) for name, part in parts.items()}
    chosen = PARTS if args.part == "all" else (args.part,)
    return turns.measured({part: runs[part] for part in chosen}, args)
