"""Encode tars into columns.

    python -m encode run configs/demo/encode.yaml
    python -m encode run CONFIG root=/data/cache engine.workers=8
    ray job submit --working-dir . -- python -m encode run CONFIG

A second run does nothing; an interrupted one goes on where it stopped. Exit codes: 0 done, 2
config, identity or disk, 3 finished but some shards failed (`report.json` and the output say
which), 4 no workers left, 130 drained after SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import configs

from .config import EncodeConfig
from .job import run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m encode", description="Encode tars into columns."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="encode what is missing")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args()
    return run(configs.load(EncodeConfig, args.config, args.overrides))


if __name__ == "__main__":
    configs.run(main)
