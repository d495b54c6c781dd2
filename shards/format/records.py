"""What a record may hold: every field, its type and its bounds, as pydantic models. Nothing is converted.

A digest says that a record is as it was written; it does not say by whom. So before a number of a
record sizes an array, or a name of it becomes a path, it has passed its model. `parse` returns the
record, or raises CorruptColumn (FormatVersion for a field that this version does not know) with the
file, the field, what was found and what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    Strict,
    TypeAdapter,
    model_validator,
)

from ..errors import CorruptColumn, FormatVersion, NotARecord
from .atomic import Json, canonical_json, refuse_version, seal, sha256
from .checks import STRICT, BaseName, Count, Digest, Text, UnknownField, check, mismatch
from .layout import (
    BLOCK,
    COLUMN,
    COMMIT,
    COMPLETE,
    FAILURE,
    INDEX,
    MASK,
    MAX_ROWS,
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    NORM,
    SOURCE,
    STATISTICS,
    VERSION,
    ZARR_ROWS,
    ColumnSpec,
    Layout,
    Status,
)
from .norm import MAX_NUMBER, Norm

# Largest file of a sealed record by kind; parsed, JSON takes up to twenty times as much memory.
RECORD_BYTES = {
    COLUMN: 1 << 22,
    COMMIT: 1 << 24,
    COMPLETE: 1 << 26,
    SOURCE: 1 << 26,
    MASK: 1 << 26,
}
MAX_CAPTIONS = 256  # members or captions of one sample


def _bounded(number: float) -> float:
    """Refuses what float32 has no room for, NaN among it; an integer stays one."""
    if not abs(number) <= MAX_NUMBER:
        raise ValueError(mismatch(number, "a finite number"))
    return number


AS_LIST = Strict(False)  # JSON has lists where Python has tuples
Shard = Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
Rows = Annotated[int, Field(ge=0, le=MAX_SHARD_ROWS)]
AllRows = Annotated[int, Field(ge=0, le=MAX_ROWS)]
ShardRows = Annotated[int, Field(ge=ZARR_ROWS, le=MAX_SHARD_ROWS, multiple_of=ZARR_ROWS)]
Version = Annotated[int, Field(ge=VERSION, le=VERSION)]
Name = Annotated[str, Field(max_length=256)]
Number = Annotated[int | float, AfterValidator(_bounded)]
# the path of an object below its column: never out of it
ObjectPath = Annotated[
    str, Field(max_length=256, pattern=r"^[a-z]+(/[A-Za-z0-9][A-Za-z0-9_-]*(\.[a-z]+)?){1,8}$")
]
Run = Annotated[tuple[Rows, Rows, Rows], AS_LIST]
Object = Annotated[tuple[ObjectPath, Annotated[int, Field(ge=0, le=2**50)], Digest], AS_LIST]
Span = Annotated[tuple[Count, Count], AS_LIST]  # offset and size
Digests = Annotated[dict[Annotated[str, Field(max_length=1024)], Digest], Field(max_length=16)]


class Record(BaseModel):
    model_config = STRICT


class Sealed(Record):
    """A record of a file of its own, of the format `KIND`."""

    KIND: ClassVar[str]
    format: Name
    version: Version
    digest: Digest


class Quantisation(Record):
    scheme: Name
    channel: Annotated[list[Number], Field(min_length=1, max_length=2**20)]
    relative_error: Number
    rows: AllRows
    # of each channel; absent of tokens
    channel_error: Annotated[list[Number], Field(min_length=1, max_length=2**20)] = None  # type: ignore[assignment]


class ColumnRecord(Sealed):
    """column.json: what `ColumnSpec`, `Layout` and `Norm` take."""

    KIND = COLUMN
    identity: dict[str, Any]
    layout: Layout
    norm: Norm | None
    empty_tokens: Annotated[int, Field(ge=1, lt=2**16)] | None
    zarr: Digests
    quantisation: Quantisation = None  # type: ignore[assignment]  # absent, but never null

    @model_validator(mode="after")
    def _fits(self) -> ColumnRecord:
        self.spec()
        return self

    def spec(self) -> ColumnSpec:
        scales = self.quantisation.model_dump(exclude_unset=True) if self.quantisation else None
        return ColumnSpec(self.identity, self.layout, self.norm, self.empty_tokens, scales)


class CommitRecord(Sealed):
    """A commit: its blocks and runs fit its rows, its objects are below the column."""

    KIND = COMMIT
    shard: Shard
    rows: Rows
    not_ok: Annotated[tuple[Run, ...], AS_LIST, Field(fail_fast=True)]
    objects: Annotated[tuple[Object, ...], AS_LIST, Field(max_length=2**15)]
    blocks: Annotated[tuple[Digest, ...], AS_LIST, Field(max_length=MAX_SHARD_ROWS // ZARR_ROWS)]
    index: Name
    column: Digest
    content: Digest
    provenance: dict[str, Any]
    members: Digests = None  # type: ignore[assignment]  # absent, but never null

    @model_validator(mode="after")
    def _fits(self) -> CommitRecord:
        if len(self.blocks) != -(-self.rows // ZARR_ROWS):
            raise ValueError(f"blocks: found {len(self.blocks)} digests of {self.rows} rows")
        if len({path for path, _, _ in self.objects}) != len(self.objects):
            raise ValueError("objects: the same path twice")
        first, count, status = _columns(self.not_ok)
        unknown = set(status.tolist()) - (set(Status) - {Status.OK})
        if unknown or not _in_order(first, count, self.rows):
            raise ValueError(
                f"not_ok: found runs out of order, or of no such status, in {self.rows} rows"
            )
        return self


class ValidBits(Record):
    words: Annotated[int, Field(ge=0, le=MAX_ROWS // BLOCK)]
    sha256: Digest


class CompleteRecord(Sealed):
    """A COMPLETE record: its sums fit its shards."""

    KIND = COMPLETE
    column: Digest
    # rows, content and index of each
    shards: Annotated[
        list[Annotated[tuple[Rows, Digest | None, Name | None], AS_LIST]],
        Field(max_length=MAX_SHARDS, fail_fast=True),
    ]
    failed: Annotated[
        list[Annotated[tuple[Shard, Text], AS_LIST]], Field(max_length=MAX_SHARDS, fail_fast=True)
    ]
    truncated: Annotated[list[Run], Field(fail_fast=True)]  # shard, first row, count
    counts: Annotated[dict[Name, AllRows], Field(max_length=16)]
    valid: ValidBits

    @model_validator(mode="after")
    def _fits(self) -> CompleteRecord:
        rows = np.array([n for n, _, _ in self.shards], np.int64)
        present = np.array([content is not None for _, content, _ in self.shards], bool)
        indexed = np.array([index is not None for _, _, index in self.shards], bool)
        if (present != indexed).any() or rows[~present].any():
            raise ValueError("shards: found rows or an index of a shard without content")
        words = int((-(-rows // BLOCK)).sum())
        if self.valid.words != words:
            raise ValueError(f"valid: found {self.valid.words} words, expected {words}")
        if sum(self.counts.values()) != rows.sum():
            raise ValueError(f"counts: they do not add up to the {rows.sum()} rows")
        if any(shard >= len(rows) or present[shard] for shard, _ in self.failed):
            raise ValueError("failed: found a shard that has content, or that there is not")
        shard, first, count = _columns(self.truncated)
        if len(shard):
            start = shard * MAX_SHARD_ROWS  # below 2^63: both are bounded
            if shard.max() >= len(rows) or not _in_order(start + first, count, start + rows[shard]):
                raise ValueError("truncated: found runs out of order, or beyond their shard")
        return self


class MaskRecord(Sealed):
    """The first line of a mask of rows: its bits fit its tars."""

    KIND = MASK
    source: Text
    shard_rows: ShardRows
    # rows and index of each tar; none of one that had not been read
    shards: Annotated[
        list[Annotated[tuple[Rows, Name | None], AS_LIST]],
        Field(max_length=MAX_SHARDS, fail_fast=True),
    ]
    kept: AllRows
    made: dict[str, Any]
    valid: ValidBits

    @model_validator(mode="after")
    def _fits(self) -> MaskRecord:
        rows = np.array([n for n, _ in self.shards], np.int64)
        if rows.max(initial=0) > self.shard_rows or len(rows) * self.shard_rows > MAX_ROWS:
            raise ValueError(
                f"shards: found more than {self.shard_rows} rows in a tar, or too many"
            )
        if any(n and index is None for n, index in self.shards):
            raise ValueError("shards: found rows of a tar without an index")
        words = int((-(-rows // BLOCK)).sum())
        if self.valid.words != words:
            raise ValueError(f"valid: found {self.valid.words} words, expected {words}")
        return self


class StatisticsRecord(Sealed):
    """The first line of sums over a shard's valid rows; `sums` is the sha256 of what follows."""

    KIND = STATISTICS
    column: Digest
    shard: Shard
    content: Digest  # of the commit whose rows were added
    rows: Rows
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    sums: Digest


class NormRecord(Sealed):
    """The first line of a shift and a scale of a column's latents, measured over the rows of one COMPLETE
    record; `arrays` is the sha256 of what follows.
    """

    KIND = NORM
    column: Digest
    complete: Digest
    method: Literal["measured", "measured-per-place"]
    rows: AllRows
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=3)]
    arrays: Digest


def _columns(runs: Sequence[Run]) -> NDArray[np.int64]:
    """Returns the three columns of a list of runs, (3, n)."""
    return np.array(runs, np.int64).reshape(-1, 3).T


def _in_order(
    first: NDArray[np.int64], count: NDArray[np.int64], rows: int | NDArray[np.int64]
) -> bool:
    """Returns whether runs follow one another within the rows."""
    end = first + count
    return bool((count > 0).all() and (end <= rows).all() and (first[1:] >= end[:-1]).all())


class FailureRecord(Sealed):
    KIND = FAILURE
    shard: Shard
    reason: Text


class SourceRecord(Sealed):
    """source.json: base names only, and the fingerprint of just these."""

    KIND = SOURCE
    name: Name
    tars: Annotated[
        list[Annotated[tuple[BaseName, Count], AS_LIST]],
        Field(max_length=MAX_SHARDS, fail_fast=True),
    ]
    shard_rows: ShardRows
    fingerprint: Digest

    @model_validator(mode="after")
    def _fits(self) -> SourceRecord:
        if len(self.tars) * self.shard_rows > MAX_ROWS:
            raise ValueError(f"{len(self.tars)} tars of {self.shard_rows} rows")
        if self.fingerprint != sha256(canonical_json(self.tars)):
            raise ValueError("fingerprint: it is not of the tars listed")
        return self


class IndexHead(Record):
    format: Name
    version: Version
    source: Name
    shard: Shard
    rows: Rows
    note: Text | None


Members = Annotated[dict[Name, Span], Field(max_length=MAX_CAPTIONS)]
Captions = Annotated[dict[Name, Digest], Field(max_length=MAX_CAPTIONS)]
IndexLine = Annotated[tuple[Text, Members, Captions], AS_LIST]  # key, members, captions
INDEX_ROW: TypeAdapter[Any] = TypeAdapter(IndexLine, config=STRICT)


def corrupt(name: str, fault: str, kind: str = "record") -> CorruptColumn:
    return CorruptColumn(
        f"{name}: damaged {kind}: {fault}. Restore it, or delete it and encode again"
    )


T = TypeVar("T", bound=BaseModel)


@overload
def parse(record: Any, schema: type[T], name: str, kind: str = "record") -> T: ...
@overload
def parse(record: Any, schema: TypeAdapter[Any], name: str, kind: str = "record") -> Any: ...
def parse(record: Any, schema: Any, name: str, kind: str = "record") -> Any:
    """Returns the typed form of a record; `name` is the file, for the message."""
    try:
        return check(schema, record)
    except UnknownField as error:
        raise FormatVersion(f"{name}: {error}. Use the release that wrote it") from None
    except (ValueError, RecursionError) as error:
        raise corrupt(name, str(error), kind) from None


def parse_index_head(head: Any, name: str) -> IndexHead:
    """Returns the first line of an index."""
    try:
        refuse_version(head, name, INDEX, VERSION)
    except (KeyError, TypeError):
        raise corrupt(name, "its first line does not say what it is", "index") from None
    return parse(head, IndexHead, name, "index")


def sealed(record: Json, schema: type[BaseModel], name: str) -> bytes:
    """Returns the bytes of a record that has passed its reader's schema; NotARecord if it does not."""
    data = seal(record)
    try:
        check(schema, json.loads(data))
        if len(data) > (limit := RECORD_BYTES.get(record["format"], 1 << 20)):
            raise ValueError(f"found {len(data)} bytes, expected at most {limit}")
    except ValueError as error:
        raise NotARecord(f"{name}: nothing was written: {error}") from None
    return data
