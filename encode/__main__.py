"""Encode tars into columns.

    python -m encode plan CONFIG                   # bytes, hours and money, before starting
    python -m encode run configs/demo/encode.yaml
    python -m encode run CONFIG root=/data/cache engine.workers=8
    python -m encode status CONFIG --watch
    python -m encode retry-failed CONFIG           # only shards that have failed
    python -m encode download DATASET FOLDER
    python -m encode bench
    ray job submit --working-dir . -- python -m encode run CONFIG

A second run does nothing; an interrupted one goes on where it stopped. Exit codes: 0 done, 2
config, identity or disk, 3 finished but some shards failed, a column has no usable row, or objects
that are committed are missing (`report.json` and the output say which), 4 no workers left, 5 a
column is held by another command, 130 drained after SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import configs
from shards.console import bench_module
from shards.places import local_path
from shards.printing import safe_output

from .config import EncodeConfig
from .run.job import Options, run

OTHERS = {  # module, and what it is for
    "plan": ("plan.plan", "bytes, hours and money of a config, before starting"),
    "status": ("report.status", "how far the columns are, and what a run waits for"),
    "download": ("source.download", "bring a data set here"),
    "bench": ("", "measure the engine's own cost"),  # of tests/bench
}


def main() -> int:
    safe_output()
    parser = argparse.ArgumentParser(
        prog="python -m encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "encode what is missing"),
        ("retry-failed", "encode what has failed before, and nothing else"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=local_path)
        command.add_argument("overrides", nargs="*", metavar="a.b=value")
        command.add_argument(
            "--allow-failed", action="store_true",
            help="complete columns without the shards that failed",
        )  # fmt: skip
        command.add_argument(
            "--ignore-space", action="store_true",
            help="start although the target seems to have too little room",
        )  # fmt: skip
        command.add_argument(
            "--break-lease", action="store_true",
            help="take a column over from a command that is surely gone",
        )  # fmt: skip
    for name, (module, text) in OTHERS.items():
        command = commands.add_parser(name, help=text)
        if sys.argv[1:2] == [name]:  # the others are not loaded
            _module(module).add_options(command)
    args = _parsed(parser)
    if args.command in OTHERS:
        verb = _module(OTHERS[args.command][0])
        return int(getattr(verb, f"run_{args.command}")(args))
    config = configs.load(EncodeConfig, args.config, args.overrides)
    if args.allow_failed:
        config = config.model_copy(update={"allow_failed": True})
    return run(config, Options(args.command == "retry-failed", args.ignore_space, args.break_lease))


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__) if name else bench_module("encoding")


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Overrides may stand behind options, which argparse does not allow of a subcommand."""
    args, behind = parser.parse_known_args()
    if behind:
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in behind):
            parser.error(f"unrecognized arguments: {' '.join(behind)}")
        args.overrides += behind
    return args


if __name__ == "__main__":
    configs.run(main)
