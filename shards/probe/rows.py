"""The rows that a probe reads: which, their latents in blocks, their captions, their groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_rows
from ..column.members import chosen, suffix_read
from ..column.source import IndexRow, read_index
from ..column.statistics import latent_shape
from ..errors import BadStatistics, IdentityMismatch, NotAColumn
from ..format.norm import Norm
from ..read.column import Column
from ..read.compatible import check_same_members, check_same_source
from ..store.base import Store

Ints = NDArray[np.int64]
Floats32 = NDArray[np.float32]

BLOCK_BYTES = 16_000_000  # of the float32 latents in memory at once
TOKENS_AT_ONCE = 1 << 24  # values of hidden states


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows, normalised: (B, C, H, W) posterior means from the place `first` on, and variances of
    the posteriors, None where the column has none.
    """

    first: int
    mean: Floats32
    variance: Floats32 | None


class LatentRows(Protocol):
    """Rows of latents of one shape, which may be read again and again."""

    @property
    def shape(self) -> tuple[int, int, int]: ...  # (C, H, W)

    @property
    def count(self) -> int: ...

    def parts(self) -> Iterator[Part]: ...


@dataclass(frozen=True)
class ColumnRows:
    """Rows of a column by row id, normalised by a norm, the column's own unless given."""

    column: Column
    rows: Ints
    own_norm: Norm | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = latent_shape(self.column.layout)
        return channels, height, width

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def norm(self) -> Norm:
        """The norm; IdentityMismatch where there is none."""
        norm = self.own_norm or self.column.spec.norm
        if norm is None:
            raise IdentityMismatch(
                f"{self.column.path}: found no shift and scale, by which latents are compared. Encode it "
                "with a `norm` of its encoder"
            )
        return norm

    def parts(self) -> Iterator[Part]:
        """Yields the rows in their order; CorruptColumn for a row that does not fit its checksum,
        BadStatistics for one that is not finite.
        """
        shift, scale = self.norm.arrays
        moments = self.column.layout.kind == "moments"
        size = max(1, BLOCK_BYTES // (4 * int(np.prod(self.shape))))
        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            stored = self.column.decoded(self.column.read(rows, check=True)).astype(np.float32)
            finite = np.isfinite(stored).all((1, 2, 3))
            if not finite.all():
                raise BadStatistics(
                    f"{self.column.path}: found values that are not finite in row id {rows[~finite][0]}, "
                    f"which is said to be valid. Run `python -m shards verify {self.column.path}`"
                )
            mean, logvar = np.split(stored, 2, 1) if moments else (stored, None)
            variance = None
            if logvar is not None:  # with the bounds of `read.latents.draw`
                variance = np.exp(logvar.clip(-30.0, 20.0)) * scale**2
            yield Part(first, (mean - shift) * scale, variance)


def common_rows(columns: Sequence[Column]) -> Ints:
    """Returns the row ids that are valid in all columns, ascending; SourceMismatch where these are not
    of one source.
    """
    for column in columns[1:]:
        check_same_source(columns[0], column)
    check_same_members(columns)
    mask = columns[0].valid_mask()
    for column in columns[1:]:
        mask = mask & column.valid_mask()
    return valid_rows(mask)


def evenly(rows: Ints, count: int) -> Ints:
    """Returns at most `count` of the rows, evenly apart."""
    count = min(count, len(rows))
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)] if count else rows[:0]


def pooled_text(column: Column, rows: Ints) -> Floats32:
    """Returns the mean hidden state over the tokens of each row's caption, (N, D) float32; zeros where
    it has no token. IdentityMismatch unless the column is of tokens.
    """
    if column.layout.kind != "tokens":
        raise IdentityMismatch(
            f"{column.path}: found a column of {column.layout.kind}, expected one of tokens"
        )
    lengths = column.lengths(rows)
    width = column.layout.row_shape[1]
    pooled = np.zeros((len(rows), width), np.float32)
    size = max(1, TOKENS_AT_ONCE // (width * max(1, int(lengths.max(initial=1)))))
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        words = column.decoded(column.read(rows[part], check=True))
        tokens = (words.astype(np.uint32) << 16).view(np.float32)  # bfloat16: the upper half
        present = np.flatnonzero(lengths[part])
        starts = (np.cumsum(lengths[part]) - lengths[part])[present]
        if len(present):
            sums = np.add.reduceat(tokens, starts, axis=0)
            pooled[first + present] = sums / lengths[part][present, None]
    if not np.isfinite(pooled).all():
        bad = rows[~np.isfinite(pooled).all(1)][0]
        raise BadStatistics(
            f"{column.path}: found tokens that are not finite in row id {bad}. Run `python -m shards "
            f"verify {column.path}`"
        )
    return pooled


# Groups of captions -------------------------------------------------------------------------------


def caption_groups(
    column: Column, rows: Ints, text: Column | None = None, pattern: str | None = None
) -> tuple[Ints | None, str]:
    """Returns the number of each row's group, and what a group is; or None, and why there are none.

    A group is what a regular expression finds in the row's key, or without one the rows with an equal
    caption (of what `text` read), where half of the rows share theirs. BadStatistics of an expression that is
    none, or that finds nothing in a key.
    """
    try:
        entries = _entries(column.store.parent, column.layout.shard_rows, rows)
    except NotAColumn:
        return None, "no index of the source beside the column"
    if pattern is not None:
        try:
            matches = [re.search(pattern, entry.key) for entry in entries]
        except re.error as error:
            raise BadStatistics(
                f"found {pattern!r}, expected a regular expression: {error}"
            ) from None
        names = [match and match[0] for match in matches]
        if None in names:
            raise BadStatistics(
                f"found nothing of {pattern!r} in the key {entries[names.index(None)].key!r}, expected a "
                "part of each key. Give another expression"
            )
        return _numbers(names), f"keys alike in {pattern}"
    if text is None:
        return None, "no text column"
    suffix = suffix_read(text.spec.identity) or "txt"
    captions = [entry.captions.get(chosen(entry.captions, suffix) or "") for entry in entries]
    counts = Counter(captions)
    shared = sum(count for name, count in counts.items() if count > 1 and name is not None)
    if 2 * shared < len(rows):
        return None, f"{shared} of {len(rows)} rows share a caption; --groups names groups by keys"
    return _numbers(captions), "equal captions"


def _numbers(names: Sequence[str | None]) -> Ints:
    numbers: Ints = np.unique([name or "" for name in names], return_inverse=True)[1].astype(
        np.int64
    )
    return numbers


def _entries(source: Store, shard_rows: int, rows: Ints) -> list[IndexRow]:
    """Returns what the source's index says of each row id; NotAColumn where it is missing."""
    entries: list[IndexRow] = []
    shards = rows // shard_rows
    for shard in np.unique(shards):
        index = read_index(source, int(shard)).rows
        entries += [index[row] for row in (rows[shards == shard] % shard_rows).tolist()]
    return entries
