"""Look at columns, check, mend, compare and move them. A COLUMN is a folder or a url (file://,
s3://, gs://, az://).

    python -m shards info COLUMN [--json] [--html FILE]
    python -m shards verify COLUMN... [--processes N] [--json]     # every byte, by all cores
    python -m shards verify COLUMN --source FOLDER     # and the tars, against what was encoded
    python -m shards repair COLUMN [--yes]         # puts aside what is bad; encode makes it again
    python -m shards gc COLUMN [--yes] [--older-than 24h] [--generations] [--quarantine]
    python -m shards digest COLUMN... [--deep]     # equal for equal content, however it was made
    python -m shards diff A B
    python -m shards convert SRC DST [--backend webdataset] [--codec blosc] [--element int8]
    python -m shards copy SRC DST [--with-source]
    python -m shards stage SRC... FOLDER           # to a node's own disk, before a job
    python -m shards mask COLUMN --keys FILE --out MASK    # the rows that a run is to train on
    python -m shards norm COLUMN [--per-place]     # mean and deviation of its latents, for `data.norm`
    python -m shards order LATENTS TEXT --global-batch 64 --seed 0 --position 0 --world 1 --rank 0
    --steps 3
    python -m shards order LATENTS TEXT --global-batch 64 --window 1024 --variance
    python -m shards order LATENTS TEXT --more LATENTS TEXT --weights 0.85 0.15 --global-batch 64
    python -m shards bench [--json FILE]           # how fast this machine reads; see `make bench`

Exit codes: 0 done (`verify`: sound, `diff`: equal content), 1 `verify` or `digest --deep` found
damage (`verify --source`: or tars other than those that were encoded), `repair` left some, `diff`
found a difference, a reader of `bench` failed, 2 a wrong path, option or column, or no room (the
message says which), 5 another command holds the column's lease, 128 + n after the signal n (130
after Ctrl-C). `verify` of several goes on after one that is no column, and leaves with 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from . import exits
from .console import Parser, bench_module, bound, not_negative, number, overview, positive
from .places import local_path, place
from .printing import command
from .signals import in_time, stoppable

VERBS = {
    "info": "schema, identity, rows by status, sizes, statistics of a column",
    "verify": "check every record, object and row; exit code 1 if anything is bad",
    "repair": "put aside what is damaged, so that encode makes it again",
    "gc": "remove what interrupted writers left",
    "digest": "one digest of a column's logical content",
    "diff": "in what two columns differ; exit code 1 if in anything",
    "convert": "the same column, stored in another way",
    "copy": "a column to another place; goes on where it stopped",
    "stage": "columns to a node's own disk; prints what to give to train",
    "mask": "a file of the rows that a run trains on, from keys, scores or row ids",
    "norm": "measure mean and deviation of a column's latents, for `data.norm`",
    "order": "the row ids of each step, one JSON object a line",
    "bench": "measure reading, beside the machine's limit and other libraries",
}
EXAMPLES = (
    "python -m shards info demo/cache/openmoji/vae-plain",
    "python -m shards verify demo/cache/openmoji/vae-plain",
    "python -m shards copy demo/cache/openmoji/vae-plain /data/vae-plain --with-source",
)
COLUMN = "a column: a folder or url"
MODULES = {"digest": "verify", "stage": "copy"}  # of verbs that have none of their name


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    top = Parser(prog="python -m shards", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    verbs = {n: commands.add_parser(n, help=text, description=text) for n, text in VERBS.items()}
    _add_all(verbs)
    return top


def add_options(verb: str, parser: argparse.ArgumentParser) -> None:
    """Adds the options of a verb."""
    _add_all({name: parser if name == verb else Parser() for name in VERBS})


def _add_all(verbs: Mapping[str, argparse.ArgumentParser]) -> None:
    def add(verb: str, *names: str, flag: bool = False, **options: Any) -> None:
        verbs[verb].add_argument(*names, **options | ({"action": "store_true"} if flag else {}))

    for verb in ("info", "repair", "gc", "norm"):
        add(verb, "column", help=COLUMN)
    for verb in ("verify", "digest"):
        add(verb, "column", nargs="+", help=COLUMN)
    add("info", "--json", flag=True, help="one JSON object")
    add(
        "info",
        "--html",
        metavar="FILE",
        type=local_path,
        help="also a page, with charts of the channels or lengths",
    )
    add("info", "--mask", action="append", default=[], metavar="FILE", type=place,
        help="how many rows `data.mask` leaves; several may be given")  # fmt: skip
    add("verify", "--json", flag=True, help="faults as JSON lines")
    add("verify", "--source", action="append", default=[], metavar="FOLDER",
        help="folder or url of the source's tars, which are compared with what was encoded; several "
        "may be given")  # fmt: skip
    for verb in ("repair", "gc"):
        add(verb, "--yes", flag=True, help="do it; else only say what")
        add(verb, "--break-lease", flag=True, help="take the lease from a holder that is gone")
    add("gc", "--older-than", default="24h", help="such as 90s, 30m, 24h, 7d")
    add("gc", "--generations", flag=True,
        help="also superseded COMPLETE records (runs pin them, and cannot resume without)")  # fmt: skip
    add("gc", "--quarantine", flag=True, help="also what repair put aside")
    add("digest", "--deep", flag=True, help="read the data and recompute all")
    add("diff", "a", help=COLUMN)
    add("diff", "b", help="the column that it is compared with")
    for verb in ("convert", "copy"):
        add(verb, "source", help=COLUMN)
        add(verb, "target", help="where the new column goes: a folder or url")
    add(
        "convert",
        "--backend",
        choices=("zarr", "webdataset"),
        default="zarr",
        help="how it is stored",
    )
    add(
        "convert",
        "--codec",
        choices=("none", "blosc"),
        default="none",
        help="of Zarr: how it is compressed",
    )
    add("convert", "--element", choices=("int8", "float16"),
        help="int8 tokens, features, or latents without posterior: half the bytes, lossy; float16: "
        "features and latents of int8 as they are read")  # fmt: skip
    for verb in ("verify", "repair", "digest", "diff", "convert", "norm"):
        add(verb, "--processes", type=positive, help="how many; all cores if left out")
    add("copy", "--with-source", flag=True, help="source.json and the indexes too")
    add("stage", "source", nargs="+", help=COLUMN)
    add("stage", "folder", help="of the node's own disk")
    for verb in ("copy", "stage"):
        add(verb, "--threads", type=positive, default=8, help="objects copied at a time")
    add("mask", "column", help="any complete column of the source")
    add("mask", "--keys", required=True, type=local_path, metavar="FILE",
        help="a key a line; a .csv or .jsonl with `key` (and `tar`); a .npy of bools by row id, or of "
        "row ids")  # fmt: skip
    add("mask", "--out", required=True, type=place, metavar="MASK", help="file for `data.mask`")
    add("mask", "--drop", flag=True, help="FILE names the rows that are left out, not those kept")
    add("mask", "--at-least", action="append", default=[], type=bound, metavar="FIELD=NUMBER",
        help="of a .csv or .jsonl: entries with such a value alone; several may be given")  # fmt: skip
    add("mask", "--at-most", action="append", default=[], type=bound, metavar="FIELD=NUMBER",
        help="likewise")  # fmt: skip
    add("norm", "--per-place", flag=True,
        help="of each place of a channel, as representation autoencoders have it; else of a channel")  # fmt: skip
    add("order", "latents", help="a column by a VAE")
    add("order", "text", help="a column of its captions")
    add("order", "--also", nargs="*", default=[], help="columns joined for their statuses")
    add("order", "--mask", nargs="*", default=[], type=place, metavar="FILE",
        help="files of `shards mask`: the rows that they name alone")  # fmt: skip
    add("order", "--more", nargs=2, action="append", default=[], metavar=("LATENTS", "TEXT"),
        help="a further source; several may be given")  # fmt: skip
    share = "share of each source; else concatenated"
    add("order", "--weights", type=number(1e-9), nargs="*", help=share)
    add("order", "--partial", flag=True, help="columns that are not complete, too")
    add(
        "order",
        "--global-batch",
        type=positive,
        required=True,
        help="samples of a step, all ranks together",
    )
    for option, kind, default, text in (
        ("seed", not_negative, 0, "of the order"),
        ("position", not_negative, 0, "samples that the run has consumed"),
        ("world", positive, 1, "ranks of the run"),
        ("rank", not_negative, 0, "whose rows are printed"),
        ("steps", positive, 1, "how many are printed"),
        ("lanes", positive, 64, "strands of the order, each read by one rank"),
        ("window", not_negative, 0, "samples that are shuffled together; 0: a lane's whole epoch"),
    ):
        add("order", f"--{option}", type=kind, default=default, help=text)
    add("order", "--truncated", flag=True, help="admit rows of cut-off pictures")
    add("order", "--variance", flag=True,
        help="instead: how well it mixes; variance of the mean of 1, 8 and 64 batches, 1.00 = "
        "independent draws, beside (a full shuffle), if a tenth of it lies between units of rows"
    )  # fmt: skip
    if sys.argv[1:2] == ["bench"]:
        bench_module("reading").add_options(verbs["bench"])


def print_order(args: argparse.Namespace) -> int:
    """Prints a line a step; `step` counts global batches from the start of the run. With several
    sources, `sources` says of which each row is.
    """
    from .read.opening import open_sources
    from .tools.shuffle_quality import batch_variances, table

    latents, texts = zip((args.latents, args.text), *args.more, strict=True)
    sources = open_sources(
        latents, texts, args.also, args.truncated, weights=args.weights, partial=args.partial,
        masks=args.mask,
    )  # fmt: skip
    order = sources.order(args.seed, args.lanes, args.window)
    if args.variance:
        print(
            table(
                batch_variances(
                    order, args.global_batch, sources.by_source[0].latents.layout.shard_rows
                )
            )
        )
        return 0
    for k in range(args.steps):
        position = args.position + k * args.global_batch
        source, rows, _ = order(position, args.global_batch, args.world, args.rank)
        source, rows = sources.locate(source, rows)
        line = {"step": position // args.global_batch, "rows": rows.tolist()}
        print(json.dumps(line | ({"sources": source.tolist()} if args.more else {})))
    return 0


def run(args: argparse.Namespace) -> int:
    """Runs a verb, whose module is loaded now."""
    if args.command == "order":
        return print_order(args)
    if args.command == "bench":
        return int(bench_module("reading").run_bench(args))
    module = import_module(f".tools.{MODULES.get(args.command, args.command)}", __package__)
    return int(getattr(module, f"run_{args.command}")(args))


@command
def main() -> int:
    if not sys.argv[1:]:
        purpose = "look at columns, check and move them"
        print(overview("python -m shards", purpose, VERBS, EXAMPLES))
        return 0
    args = parser().parse_args()
    try:
        with in_time():
            return stoppable(lambda: run(args))
    except Exception as error:
        return exits.failed(error)


if __name__ == "__main__":
    exits.run(main)
