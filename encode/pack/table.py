"""Tables that name pictures and captions: CSV, TSV, JSON lines, and the metadata of an imagefolder."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.column import CAPTION_BYTES
from shards.format.atomic import open_file, parse_json

from ..errors import NotASource
from ..source.members import PICTURES
from .listing import Inside, Listing, status_of, suffix_of

COMMAS = {"csv": None, "tsv": "\t"}  # None: what its first line has most of
LINES = ("jsonl", "ndjson")
TABLES = (*COMMAS, *LINES)
# names of columns, in the order in which they are looked for, whatever their case
PICTURE_NAMES = (
    "file_name", "filename", "image", "image_path", "picture", "path", "file_path", "filepath",
    "file", "img", "img_path", "jpg", "png",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "text", "prompt", "captions", "description", "txt", "title", "sentence",
)  # fmt: skip
MOST_BYTES = 1 << 24  # of a line


def column_named(name: str | None, known: Sequence[str], names: Sequence[str], what: str) -> str:
    """Returns a column of a table: the one that is named, else the first that is known. NotASource."""
    if name is not None and name in names:
        return name
    lower = {column.lower(): column for column in reversed(names)}
    if name is None and (match := next((lower[k] for k in known if k in lower), None)):
        return match
    expected = name or f"one of {', '.join(known)}"
    raise NotASource(
        f"found the columns {', '.join(names) or 'none'}, expected {expected} for the {what}. Name it "
        f"with --{what}"
    )


def list_table(
    listing: Listing, table: Path, folder: Path, picture: str | None, caption: str | None
) -> None:
    """Adds the pictures that a table names from `folder`, which is the listing's or below it, with
    their captions.
    """
    inside, source, start = Inside(listing.source.folder), listing.source, str(folder)
    names: tuple[str, str] | None = None
    elsewhere, lines = 0, 0
    for line, row in table_rows(table):
        lines += 1
        if row is None:
            source.troubles.add("broken_lines", f"{table}:{line}")
            continue
        if names is None:
            try:
                columns = [name for name in row if name]
                names = (
                    column_named(picture, PICTURE_NAMES, columns, "picture"),
                    column_named(caption, CAPTION_NAMES, columns, "caption"),
                )
            except NotASource as error:
                raise NotASource(f"{table}: {error}") from None
        name, text = (_text(row.get(column)) for column in names)
        if not name:
            source.troubles.add("caption_without_picture", f"{table}:{line}")
            continue
        try:
            place = None if "://" in name else inside.path(os.path.join(start, name))
            if place is None:
                elsewhere += 1
                source.troubles.add("outside", f"{table}:{line}: {name}")
                continue
            status = status_of(inside.full(place))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            source.troubles.add("picture_missing", f"{table}:{line}: {name}")
            continue
        except OSError as error:
            source.troubles.add("unreadable", error)
            continue
        if suffix_of(place) in PICTURES:
            listing.add(place, status, text=text or None)
        else:
            source.others[suffix_of(place) or "none"] += 1
    if lines and elsewhere == lines:
        raise NotASource(
            f"{table}: every path of {lines:,} lines leaves {folder} or is a url (the first: "
            f"{source.troubles.places['outside'][0]}). Name the folder that the paths start from with "
            "--pictures; pictures of the web are brought here by img2dataset"
        )


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def table_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    """Yields (line, values by column) of a table, None for a line that cannot be read. The file is
    read as it goes, never whole. NotASource where it is no table.
    """
    suffix = suffix_of(path.name)
    with open(open_file(path), "rb") as file:
        try:
            yield from _json_lines(file) if suffix in LINES else _csv(file, COMMAS.get(suffix))
        except (csv.Error, UnicodeDecodeError) as error:
            raise NotASource(
                f"{path}: no table in UTF-8 ({error}). Save it as CSV or JSON lines"
            ) from None


def _json_lines(file: Any) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    line = 0
    while data := file.readline(MOST_BYTES):
        line += 1
        if not data.strip():
            continue
        try:
            row = parse_json(data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data)
        except ValueError:
            row = None
        yield line, row if isinstance(row, dict) else None


def _csv(file: Any, delimiter: str | None) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(CAPTION_BYTES)
    if delimiter is None:
        start = text.readline(MOST_BYTES)
        delimiter = max(",;\t|", key=start.count)
        text.seek(0)
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    for row in reader:
        whole = None not in row and None not in row.values()
        yield reader.line_num, row if whole else None
