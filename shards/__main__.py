"""Look at columns and at the order in which a run reads them.

    python -m shards info COLUMN
    python -m shards verify COLUMN              # exit code 1 if anything is damaged
    python -m shards digest COLUMN              # equal for equal content, however it was made
    python -m shards order LATENTS TEXT --global-batch 64 --seed 0 --position 0 --world 1 --rank 0
    --steps 3

Exit codes: 0 done, 1 `verify` found damage, 2 a wrong path, option or column (the message says
which).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .errors import ShardsError
from .info import describe
from .join import open_join
from .order import Order
from .verify import logical_digest, verify


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m shards",
        description="Look at columns and the order in which a run reads them.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "schema, identity, rows by status, sizes, latent statistics"),
        ("verify", "check every record, object and row; exit code 1 if anything is bad"),
        ("digest", "one digest of the column's logical content"),
    ):
        commands.add_parser(name, help=text).add_argument("column", type=Path)
    order = commands.add_parser("order", help="the row ids of each step, one JSON object a line")
    order.add_argument("latents", type=Path)
    order.add_argument("text", type=Path)
    order.add_argument(
        "--also", type=Path, nargs="*", default=[], help="columns joined for their statuses"
    )
    order.add_argument("--global-batch", type=int, required=True)
    for option, default in (
        ("seed", 0), ("position", 0), ("world", 1), ("rank", 0), ("steps", 1), ("lanes", 64), ("window", 0),
    ):  # fmt: skip
        order.add_argument(f"--{option}", type=int, default=default)
    order.add_argument("--truncated", action="store_true", help="admit rows of cut-off pictures")
    return top


def print_order(args: argparse.Namespace) -> int:
    """One line a step; `step` counts global batches from the start of the run."""
    join = open_join(args.latents, args.text, args.also, args.truncated)
    order = Order([join.words], args.seed, args.lanes, args.window)
    for k in range(args.steps):
        position = args.position + k * args.global_batch
        _, rows, _ = order(position, args.global_batch, args.world, args.rank)
        print(json.dumps({"step": position // args.global_batch, "rows": rows.tolist()}))
    return 0


def print_verdict(column: Path) -> int:
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("verify", total=None)
        faults = verify(column, lambda done, of: bar.update(task, completed=done, total=of))
    print("\n".join(faults) if faults else f"{column}: sound")
    return 1 if faults else 0


def main() -> int:
    args = parser().parse_args()
    try:
        if args.command == "order":
            return print_order(args)
        if args.command == "verify":
            return print_verdict(args.column)
        print(logical_digest(args.column) if args.command == "digest" else describe(args.column))
    except ShardsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
