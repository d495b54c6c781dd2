"""Pictures and captions as people have them, into the tars that `encode` reads.

    python -m encode pack photos/ data/photos               # 0001.jpg with 0001.txt or 0001.json
    python -m encode pack imagefolder/ data/mine            # metadata.csv or metadata.jsonl
    python -m encode pack captions.csv data/mine --picture path --caption text
    python -m encode pack train-00000-of-00004.parquet data/mine

The same source gives the same bytes, in tars of --rows rows sorted by key; an interrupted packing goes
on behind its last whole tar. Exit codes: 0 packed, or it was before, 2 source, target or disk are not
as expected, 3 packed, but less than half of the pictures and captions found each other, 128 + n
stopped by signal n.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from configs import word
from shards import NoRoom
from shards.console import Bar, counted, positive, render, say_next
from shards.format.atomic import Json
from shards.places import local_path
from shards.signals import stoppable

from ..errors import EncodeError
from ..source.members import PICTURES
from ..source.places import MEANING
from .kinds import KINDS, Options, kind_of, open_rows
from .listing import PACKED, TROUBLES, trouble_text
from .table import TABLES
from .writer import WORKING, Packed, read_report, working, write_tars

LOST = 3  # exit code where most is lost
DEFAULTS = Options()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("source", type=local_path, help="a folder, table or Parquet file")
    parser.add_argument("out", type=local_path, help="a new folder for the tars")
    parser.add_argument("--kind", choices=list(KINDS), help="what SOURCE is (found out)")
    parser.add_argument(
        "--picture", metavar="COLUMN", help="a table's column of pictures (by its name)"
    )
    parser.add_argument(
        "--caption", metavar="COLUMN", help="a table's column of captions, or a field of JSON files"
        " (by its name)",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=local_path, metavar="FOLDER",
        help="where a table's paths start (its own folder)",
    )  # fmt: skip
    parser.add_argument("--rows", type=positive, default=DEFAULTS.rows, help="rows of a tar")


def run_pack(args: argparse.Namespace) -> int:
    """Runs `python -m encode pack`; returns the exit code."""
    options = Options(args.kind, args.picture, args.caption, args.pictures, args.rows)
    return stoppable(lambda: _pack(args.source, args.out, options))


def _pack(source: Path, out: Path, options: Options) -> int:
    try:
        packed = pack(source, out, options)
    except OSError as error:
        if getattr(type(error), "exit_code", None) is not None:
            raise
        raise EncodeError(
            f"cannot pack into {out}: {error}. Whole tars stay; run it again"
        ) from error
    print(report(packed.record))
    print(
        ("packed into" if packed.fresh else "packed already:") + f" {out}. As a source of encode:\n"
    )
    print(source_lines(packed))
    models = ("--vae", "flux", "--text", "gemma-2b")
    say_next("encode", "init", "--sources", out, *models, note="or models of your own")
    if mostly_lost(packed.record):
        print(render(f"{source}: {lost_words(packed.record)}"), file=sys.stderr)
        return LOST
    return 0


def pack(source: Path, out: Path, options: Options = DEFAULTS) -> Packed:
    """Packs a source into tars in `out`, or finds that it was packed before. Raises NotASource, NoRoom,
    OSError.
    """
    kind = options.kind or kind_of(source)
    with _database(out) as database, _room_for_names(out):
        print(render(f"{source}: {KINDS[kind]}"), flush=True)
        with Bar("list", unit="pictures") as bar:
            rows = open_rows(source, kind, options, database, bar.advance)
        try:
            with Bar("pack", rows.rows, "pictures") as bar:
                return write_tars(
                    rows, source, out, options.rows, options.caption, bar.advance, bar.skip
                )
        finally:
            rows.close()


@contextmanager
def _database(out: Path) -> Iterator[Path | None]:
    """Yields a database for the rows of a target, in its working folder, which is held. Of a target that
    is packed it has no name and nothing is held: several runs may compare it with its source at once.
    """
    if read_report(out) is not None and not (out / WORKING).exists():
        yield None
        return
    with working(out) as folder:
        yield folder / "listing.sqlite"


@contextmanager
def _room_for_names(out: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise NoRoom(
            f"{out}: the list of rows cannot be written ({error}). Make room, then run it again"
        ) from error


def mostly_lost(record: Json) -> bool:
    """Returns whether less than half of what a source holds became rows with a picture and a caption."""
    counts = record["troubles"]["counts"]
    lost = sum(count for trouble, count in counts.items() if trouble not in PACKED)
    whole = record["rows"] - counts.get("without_caption", 0)
    return bool(2 * whole < record["rows"] + lost)


def lost_words(record: Json) -> str:
    """Returns what to say of a source of which most is lost."""
    words = "most pictures and captions did not find each other; the table says why"
    tables = [suffix for suffix in TABLES if suffix in record["others"]]
    if record["kind"] == "folder" and tables:
        words += (
            f". If a .{tables[0]} file in it names pictures and captions, pack that file: `python -m "
            "encode pack FILE OUT`"
        )
    return words


def report(record: Json) -> str:
    """Returns what was packed and what was not, for a reader."""
    troubles = record["troubles"]
    heads = ["the first of them"] if any(troubles["counts"].values()) else []
    table = Table("count", "what", *heads, title=f"{record['source']}: {record['kind']}")
    table.columns[0].justify = "right"
    for column in table.columns[2:]:
        column.overflow = "fold"  # a path is of use only whole
    rows = "row" if record["rows"] == 1 else "rows"
    table.add_row(f"{record['rows']:,}", f"{rows} packed, in {counted(len(record['tars']), 'tar')}")
    for trouble in TROUBLES:
        if count := troubles["counts"].get(trouble):
            places = "\n".join(troubles["places"][trouble])
            table.add_row(f"{count:,}", trouble_text(trouble, count), places)
    for suffix, count in record["others"].items():
        files = "file" if count == 1 else "files"
        table.add_row(f"{count:,}", f"{files} of .{suffix}, neither picture nor caption")
    return render(table)


def source_lines(packed: Packed) -> str:
    """Returns the lines of an encode config that name a packed source."""
    last, folder = len(packed.record["tars"]) - 1, packed.folder.resolve()
    name = re.sub(r"[^\w.-]", "-", folder.name)
    braces = f"{{00000..{last:05d}}}" if last else "00000"
    place = str(folder) if MEANING & set(str(folder)) else f"{folder}/{braces}.tar"
    lines = [f"sources: {{ {word(name)}: {json.dumps(place, ensure_ascii=False)} }}"]
    pictures = [suffix for suffix in PICTURES if suffix in packed.record["suffixes"]]
    lines.append(f"# pictures: {', '.join(pictures)}")
    return "\n".join(lines) + "\n"
