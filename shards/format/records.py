"""What may stand in a record: every field, its type and its bounds. Nothing is converted.

A digest says that a record is as it was written; it does not say by whom. So before a number of a
record sizes an array, or a name of it becomes a path, it has passed here. Each function returns the
record it was given, or raises CorruptColumn (FormatVersion for a field that this version does not
know) with the file, the field, what was found and what was expected.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn, FormatVersion, NotARecord
from .atomic import Json, canonical_json, refuse_version, seal, sha256
from .layout import (
    BLOCK,
    COLUMN,
    COMMIT,
    COMPLETE,
    INDEX,
    MAX_NUMBER,
    MAX_ROWS,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    SOURCE,
    VERSION,
    ZARR_ROWS,
    ColumnSpec,
    Status,
)

# Largest file of a sealed record by kind; parsed, JSON takes up to twenty times as much memory.
RECORD_BYTES = {COLUMN: 1 << 22, COMMIT: 1 << 24, COMPLETE: 1 << 26, SOURCE: 1 << 26}
MAX_TEXT = 2**16  # characters of a key, a name, a note or a reason
MAX_CAPTIONS = 256  # members or captions of one sample

Check = Callable[[Any], None]  # raises ValueError("..., expected ...") for a wrong value
HEX = re.compile(r"[0-9a-f]{64}")
OBJECT = re.compile(r"[a-z]+(/[A-Za-z0-9][A-Za-z0-9_-]*(\.[a-z]+)?){1,8}")


class Unknown(ValueError):
    """A field that this version does not know."""

    def __str__(self) -> str:
        return f"found the field {self.args[0][:80]!r}, which this program does not know"


def found(value: Any, expected: str) -> ValueError:
    shown = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return ValueError(
        f"found {shown if len(shown) <= 80 else shown[:77] + '...'}, expected {expected}"
    )


# ---- values -------------------------------------------------------------------------------------


def integer(least: int, most: int, multiple: int = 1) -> Check:
    """A JSON integer; True and 1.0 are none."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most or value % multiple:
            by = f" by {multiple}" if multiple > 1 else ""
            raise found(value, f"an integer from {least} to {most}{by}")

    return check


def text(most: int = MAX_TEXT) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > most:
            raise found(value, f"a text of at most {most} characters")

    return check


def digest(value: Any) -> None:
    if not isinstance(value, str) or not HEX.fullmatch(value):
        raise found(value, "a sha256 in hexadecimal")


def number(value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:  # false for a NaN, too
        raise found(value, "a finite number")


def anything(value: Any) -> None:
    pass


def finite(value: Any) -> None:
    """A number of any size that a float can have."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise found(value, "a finite number")


def boolean(value: Any) -> None:
    if type(value) is not bool:
        raise found(value, "true or false")


def one_of(*values: str) -> Check:
    def check(value: Any) -> None:
        if value not in values:
            raise found(value, f"one of {', '.join(values)}")

    return check


def mapping(value: Any) -> None:
    if not isinstance(value, dict):
        raise found(value, "an object")


def base_name(value: Any) -> None:
    """A file's name without a folder: never a path."""
    wrong = not isinstance(value, str) or value in ("", ".", "..") or len(value.encode()) > 255
    if wrong or set(value) & {"/", "\\", "\0"}:
        raise found(value, "a file's base name")


def object_path(value: Any) -> None:
    """The path of an object below its column: never out of it."""
    if not isinstance(value, str) or len(value) > 256 or not OBJECT.fullmatch(value):
        raise found(value, "the path of an object of the column")


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def listed(check: Check, least: int, most: int) -> Check:
    def of_list(value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise found(value, f"a list of {least} to {most}")
        for place, item in enumerate(value):
            at(place, check, item)

    return of_list


def row(*checks: Check) -> Check:
    """A list with one value of each kind."""

    def of_row(value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(checks):
            raise found(value, f"a list of {len(checks)}")
        for place, (item, check) in enumerate(zip(value, checks, strict=True)):
            at(place, check, item)

    return of_row


def table(name: Check, check: Check, most: int) -> Check:
    """An object of few fields of any name."""

    def of_table(value: Any) -> None:
        mapping(value)
        if len(value) > most:
            raise found(value, f"an object of at most {most} fields")
        for key, item in value.items():
            at("", name, key)
            at(key, check, item)

    return of_table


def fields(required: Mapping[str, Check], more: Mapping[str, Check] | None = None) -> Check:
    """An object of just these fields."""

    def of_fields(value: Any) -> None:
        mapping(value)
        checks = {**required, **(more or {})}
        for key in value:
            if key not in checks:
                raise Unknown(key)
        for key in required:
            if key not in value:
                raise ValueError(f"{key} is missing")
        for key, item in value.items():
            at(key, checks[key], item)

    return of_fields


def having(required: Mapping[str, Check], more: Mapping[str, Check] | None = None) -> Check:
    """An object of these fields, perhaps of `more`, and of any others."""

    def of_some(value: Any) -> None:
        mapping(value)
        for key in required:
            if key not in value:
                raise ValueError(f"{key} is missing")
        for key, check in {**required, **(more or {})}.items():
            if key in value:
                at(key, check, value[key])

    return of_some


def at(place: str | int, check: Check, value: Any) -> None:
    """Check a value that stands at a place; the place is told with the fault."""
    try:
        check(value)
    except Unknown:
        raise
    except ValueError as error:
        message = str(error)
        if message.startswith("found"):
            message = f": {message}"
        elif not message.startswith("["):
            message = f".{message}"
        raise ValueError(f"{place if isinstance(place, str) else f'[{place}]'}{message}") from None


def integers(value: Any, width: int, most: int) -> NDArray[np.int64]:
    """A list of rows of `width` integers from 0 to `most` as (n, width) int64. Made for long lists:
    one pass each over types and values.
    """
    if (
        not isinstance(value, list)
        or set(map(type, value)) - {list}
        or set(map(len, value)) - {width}
        or set(map(type, chain.from_iterable(value))) - {int}
    ):
        raise found(value, f"a list of {width} integers each")
    try:
        array = np.array(value, np.int64).reshape(-1, width)
    except OverflowError:
        array = np.full((1, width), -1, np.int64)
    if array.size and not 0 <= array.min() <= array.max() <= most:
        raise found(value, f"integers from 0 to {most}")
    return array


# ---- records ------------------------------------------------------------------------------------

LAYOUT = fields(
    {
        "kind": text(32),
        "row_shape": listed(integer(1, 2**31 - 1), 1, 8),
        "shards": integer(0, MAX_SHARDS),
        "shard_rows": integer(ZARR_ROWS, MAX_SHARD_ROWS, ZARR_ROWS),
    },
    {"element": text(32), "codec": optional(text(32)), "backend": text(32)},
)
NORM = fields({"shift": listed(number, 1, 2**16), "scale": listed(number, 1, 2**16)})
SEALED: dict[str, Check] = {
    "format": text(64),
    "version": integer(VERSION, VERSION),
    "digest": digest,
}
QUANTISATION = fields(
    {
        "scheme": text(256),
        "channel": listed(number, 1, 2**20),
        "relative_error": number,
        "rows": integer(0, MAX_ROWS),
    }
)
COLUMN_FIELDS = fields(
    {
        **SEALED,
        "identity": mapping,
        "layout": LAYOUT,
        "norm": optional(NORM),
        "empty_tokens": optional(integer(1, 2**16 - 1)),
        "zarr": table(text(256), digest, 16),
    },
    {"quantisation": QUANTISATION},
)
COMMIT_FIELDS = fields(
    {
        **SEALED,
        "shard": integer(0, MAX_SHARDS - 1),
        "rows": integer(0, MAX_SHARD_ROWS),
        "not_ok": lambda value: None,  # see `parse_commit`
        "objects": listed(row(object_path, integer(0, 2**50), digest), 0, 2**15),
        "blocks": listed(digest, 0, MAX_SHARD_ROWS // ZARR_ROWS),
        "index": text(256),
        "column": digest,
        "content": digest,
        "provenance": mapping,
    },
    {"members": table(text(1024), digest, 16)},
)
COMPLETE_FIELDS = fields(
    {
        **SEALED,
        "column": digest,
        "shards": listed(
            row(integer(0, MAX_SHARD_ROWS), optional(digest), optional(text(256))), 0, MAX_SHARDS
        ),
        "failed": listed(row(integer(0, MAX_SHARDS - 1), text()), 0, MAX_SHARDS),
        "truncated": lambda value: None,  # see `parse_complete`
        "counts": table(text(64), integer(0, MAX_ROWS), 16),
        "valid": fields({"words": integer(0, MAX_ROWS // BLOCK), "sha256": digest}),
    }
)
FAILURE_FIELDS = fields({**SEALED, "shard": integer(0, MAX_SHARDS - 1), "reason": text()})
SOURCE_FIELDS = fields(
    {
        **SEALED,
        "name": text(256),
        "tars": listed(row(base_name, integer(0, 2**62)), 0, MAX_SHARDS),
        "shard_rows": integer(ZARR_ROWS, MAX_SHARD_ROWS, ZARR_ROWS),
        "fingerprint": digest,
    }
)
INDEX_HEAD = fields(
    {
        "format": text(64),
        "version": integer(VERSION, VERSION),
        "source": text(256),
        "shard": integer(0, MAX_SHARDS - 1),
        "rows": integer(0, MAX_SHARD_ROWS),
        "note": optional(text()),
    }
)
PLACE = integer(0, 2**62)
INDEX_ROW = row(
    text(),
    table(text(256), row(PLACE, PLACE), MAX_CAPTIONS),
    table(text(256), digest, MAX_CAPTIONS),
)


def parse(record: Any, check: Check, name: str, kind: str = "record") -> Json:
    """A record that has passed a check; `name` is the file, for the message."""
    try:
        check(record)
    except Unknown as error:
        raise FormatVersion(f"{name}: {error}. Use the release that wrote it") from None
    except (ValueError, RecursionError) as error:
        raise corrupt(name, str(error), kind) from None
    return record  # type: ignore[no-any-return]  # what has passed is a JSON object


def corrupt(name: str, what: str, kind: str = "record") -> CorruptColumn:
    return CorruptColumn(
        f"{name}: damaged {kind}: {what}. Restore it, or delete it and encode again"
    )


# What a record of each kind must be beyond the types of its fields, for its writer and its reader.


def column_record(record: Any) -> None:
    """column.json: what `ColumnSpec`, `Layout` and `Norm` take."""
    COLUMN_FIELDS(record)
    ColumnSpec.from_record(record)


def commit_record(record: Any) -> None:
    """A commit: its blocks and runs fit its rows, its objects stay in the column."""
    COMMIT_FIELDS(record)
    rows = record["rows"]
    if len(record["blocks"]) != -(-rows // ZARR_ROWS):
        raise ValueError(f"blocks: found {len(record['blocks'])} digests of {rows} rows")
    if len({path for path, _, _ in record["objects"]}) != len(record["objects"]):
        raise ValueError("objects: the same path twice")
    first, count, status = _runs(record, "not_ok")
    bad = set(status.tolist()) - (set(Status) - {Status.OK})
    if bad or not _apart(first, count, rows):
        raise ValueError(f"not_ok: found runs out of order, or of no such status, in {rows} rows")


def _runs(record: Json, field: str) -> NDArray[np.int64]:
    """The three columns of a list of runs."""
    try:
        return integers(record[field], 3, MAX_SHARD_ROWS).T
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def _apart(
    first: NDArray[np.int64], count: NDArray[np.int64], rows: int | NDArray[np.int64]
) -> bool:
    """Whether runs follow one another within the rows."""
    end = first + count
    return bool((count > 0).all() and (end <= rows).all() and (first[1:] >= end[:-1]).all())


def complete_record(record: Any) -> None:
    """A COMPLETE record: its sums fit its shards."""
    COMPLETE_FIELDS(record)
    shards: Sequence[tuple[int, str | None, str | None]] = record["shards"]
    rows = np.array([n for n, _, _ in shards], np.int64)
    there = np.array([content is not None for _, content, _ in shards], bool)
    if any((content is None) != (index is None) for _, content, index in shards) or (
        rows[~there].any()
    ):
        raise ValueError("shards: found rows or an index of a shard without content")
    words = int((-(-rows // BLOCK)).sum())
    if record["valid"]["words"] != words:
        raise ValueError(f"valid: found {record['valid']['words']} words, expected {words}")
    if sum(record["counts"].values()) != rows.sum():
        raise ValueError(f"counts: they do not add up to the {rows.sum()} rows")
    if any(shard >= len(shards) or there[shard] for shard, _ in record["failed"]):
        raise ValueError("failed: found a shard that has content, or that there is not")
    shard, first, count = _runs(record, "truncated")
    if len(shard):
        place = shard * MAX_SHARD_ROWS + first  # below 2^63: both are bounded
        if shard.max() >= len(rows) or not (
            _apart(place, count, shard * MAX_SHARD_ROWS + rows[shard])
        ):
            raise ValueError("truncated: found runs out of order, or beyond their shard")


def source_record(record: Any) -> None:
    """source.json: base names only, and the fingerprint of just these."""
    SOURCE_FIELDS(record)
    if len(record["tars"]) * record["shard_rows"] > MAX_ROWS:
        raise ValueError(f"{len(record['tars'])} tars of {record['shard_rows']} rows")
    if record["fingerprint"] != sha256(canonical_json(record["tars"])):
        raise ValueError("fingerprint: it is not of the tars listed")


def sealed(record: Json, check: Check, name: str) -> bytes:
    """A record as it is written, once its reader's check has passed; NotARecord if it would not."""
    data = seal(record)
    try:
        check(json.loads(data))
        if len(data) > (most := RECORD_BYTES.get(record["format"], 1 << 20)):
            raise ValueError(f"found {len(data)} bytes, expected at most {most}")
    except (ValueError, Unknown) as error:
        raise NotARecord(f"{name}: nothing was written: {error}") from None
    return data


def parse_column(record: Any, name: str) -> Json:
    """column.json, unsealed."""
    return parse(record, column_record, name)


def parse_commit(record: Any, name: str) -> Json:
    """A commit record, unsealed."""
    return parse(record, commit_record, name)


def parse_complete(record: Any, name: str) -> Json:
    """A COMPLETE record, unsealed."""
    return parse(record, complete_record, name)


def parse_failure(record: Any, name: str) -> Json:
    """A failure record, unsealed."""
    return parse(record, FAILURE_FIELDS, name)


def parse_source(record: Any, name: str) -> Json:
    """source.json, unsealed."""
    return parse(record, source_record, name)


def parse_index_head(head: Any, name: str) -> Json:
    """The first line of an index."""
    try:
        refuse_version(head, name, INDEX, VERSION)
    except (KeyError, TypeError):
        raise corrupt(name, "its first line does not say what it is", "index") from None
    return parse(head, INDEX_HEAD, name, "index")


def parse_index_row(line: Any, name: str) -> list[Any]:
    """Any later line of an index: key, members, captions."""
    return parse(line, INDEX_ROW, name, "index")  # type: ignore[return-value]
