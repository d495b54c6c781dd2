"""What a source is: a folder, an imagefolder, a table or Parquet; recognised, or named with --kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotASource
from ..source.members import PICTURES
from ..source.places import tars_in
from .folder import list_folder
from .listing import Listing, Source, suffix_of
from .parquet import ParquetRows, parquet_files
from .table import TABLES, list_table

KINDS = {
    "folder": "a folder of pictures, each with its caption beside it",
    "imagefolder": "a folder of pictures with metadata.csv or metadata.jsonl",
    "table": "a CSV, TSV or JSON lines file of paths and captions",
    "parquet": "Parquet with pictures in it",
}
METADATA = "metadata"
LOOKED_AT = 10_000  # files of a folder that are looked at for what it is

Rows = Listing | ParquetRows


@dataclass(frozen=True, slots=True)
class Options:
    """How a source is read and packed; None is found out."""

    kind: str | None = None
    picture: str | None = None  # column of a table
    caption: str | None = None  # column of a table, or field of JSON files
    pictures: Path | None = None  # folder that a table's paths start from
    rows: int = 1000  # of a tar


def kind_of(place: Path) -> str:
    """Returns the kind of a source by what is there; NotASource where it is none that can be packed."""
    if place.is_file():
        suffix = suffix_of(place.name)
        if suffix in TABLES:
            return "table"
        if suffix == "parquet":
            return "parquet"
        raise NotASource(
            f"{place}: a file of {suffix or 'no suffix'!s}; expected a folder, or a file of "
            f"{', '.join(TABLES)} or parquet"
        )
    if not place.is_dir():
        raise NotASource(f"{place}: no such folder or file. Check the path")
    suffixes = _suffixes(place)
    if "tar" in suffixes and not suffixes & set(PICTURES):
        tars = place if tars_in(place) else place / "**/*.tar"
        raise NotASource(
            f"{place}: it holds tars already, so there is nothing to pack. Name them as a source, "
            f"sources: {{ {place.resolve().name}: {tars} }}"
        )
    if metadata_files(place):
        return "imagefolder"
    if suffixes & set(PICTURES):
        return "folder"
    if "parquet" in suffixes:
        return "parquet"
    return "folder"


def _suffixes(place: Path) -> set[str]:
    """Returns the suffixes of the first files of a folder."""
    suffixes, seen = set[str](), 0
    for _, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        suffixes |= {suffix_of(name) for name in names if not name.startswith(".")}
        seen += len(names)
        if seen > LOOKED_AT or (suffixes & set(PICTURES)):
            break
    return suffixes


def metadata_files(place: Path) -> list[Path]:
    """Returns the metadata files of an imagefolder, in the folder and in those directly below it."""
    files = [place / f"{METADATA}.{suffix}" for suffix in TABLES]
    with suppress(OSError):
        for folder in sorted(path for path in place.iterdir() if path.is_dir()):
            files += [folder / f"{METADATA}.{suffix}" for suffix in TABLES]
    return [file for file in files if file.is_file()]


def open_rows(
    place: Path,
    kind: str,
    options: Options,
    database: Path | None,
    advance: Callable[[int], None],
) -> Rows:
    """Returns the rows of a source in the order in which they are packed; a `database` on disk sorts
    them (None: one without a name). `advance` is called with names that are listed. NotASource where
    it has no picture, or is of another kind.
    """
    folder = (options.pictures or (place if place.is_dir() else place.parent)).resolve()
    source = Source(kind, folder)
    if kind == "parquet":
        files = parquet_files(place)
        if not files:
            raise NotASource(f"{place}: no Parquet file in it")
        return _with_rows(ParquetRows(files, source, options.picture, options.caption), place)
    if kind == "table" and not place.is_file() or kind != "table" and not place.is_dir():
        raise NotASource(f"{place}: not {KINDS[kind]}, which --kind {kind} asks for")
    listing = Listing(database, source, advance)
    try:
        if kind == "table":
            list_table(listing, place, folder, options.picture, options.caption)
        elif kind == "folder":
            list_folder(listing)
        else:
            _list_imagefolder(listing, metadata_files(place), options)
        listing.finish()
        return _with_rows(listing, place)
    except BaseException:
        listing.close()
        raise


def _list_imagefolder(listing: Listing, tables: Sequence[Path], options: Options) -> None:
    folder = listing.source.folder
    if not tables:
        raise NotASource(f"{folder}: no metadata.csv or metadata.jsonl in it")
    for table in tables:
        list_table(listing, table, table.parent.resolve(), options.picture, options.caption)
    # pictures that no table names are packed, too: their captions may be beside them
    list_folder(listing, {table.resolve() for table in tables}, rank=1)


def _with_rows(rows: Rows, place: Path) -> Rows:
    if rows.rows:
        return rows
    counts = rows.source.troubles.counts
    words = [f"{count:,} {trouble.replace('_', ' ')}" for trouble, count in counts.items()]
    words += [f"{count:,} of .{suffix}" for suffix, count in rows.source.others.most_common(8)]
    raise NotASource(
        f"{place}: no picture to pack ({', '.join(words) or 'nothing in it'}). Expected files of "
        f"{', '.join(PICTURES[:4])} and the like{_compressed(rows.source.others)}"
    )


def _compressed(suffixes: Collection[str]) -> str:
    """Returns what to do about compressed tars, where files of such suffixes are."""
    tars = sorted({"tgz", "gz", "bz2", "xz", "zst"} & set(suffixes))
    return f". If those of .{' and .'.join(tars)} are tars, unpack them to .tar" if tars else ""
