"""What a source holds, without encoding it: from its index where that stands, else from a few tars.

Rows of tars that have an index are known exactly. A few tars, spread over the source, are looked
into: which members their rows have, how long their captions are, some pictures and captions to try
the encoders on. Totals follow by the ratio to rows (where all are known) or to bytes of tars.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import CorruptColumn, IndexRow, Source, Store, open_source, read_index
from shards.column.members import member_of
from shards.column.source import ShardIndex, index_name

from ..config import ColumnConfig
from ..errors import BadTar, EncodeError, FetchFailed, MissingTar, NoSuchSuffix
from ..source.fetch import fetched
from ..source.index import index_heads
from ..source.members import read_captions
from ..source.tars import Tar as OpenTar
from ..source.tars import make_source, read_exactly, scan_tar

PICTURES = 256  # kept of a tar, to try the encoders on
FIRST, TRIES = 8, 32  # tars with rows that are looked at for a suffix, of so many


@dataclass(frozen=True, slots=True)
class Look:
    """A tar that was looked into. `captions` and `pictures` (by suffix) are empty where the tar
    itself is out of reach and its index alone was read.
    """

    shard: int
    rows: Sequence[IndexRow]
    tar_bytes: int
    index_bytes: int
    captions: dict[str, list[str | None]]  # a row each, None: none, or not readable
    pictures: dict[str, list[bytes]]  # of some rows

    def has(self, suffix: str) -> NDArray[np.bool_]:
        """Which rows have this member, (rows,)."""
        if suffix in self.captions:
            return np.array([caption is not None for caption in self.captions[suffix]], bool)
        return np.array([member_of(suffix) in row.members for row in self.rows], bool)

    def member_bytes(self, suffix: str) -> NDArray[np.int64]:
        """Size of this member in each row, 0 where it is not, (rows,)."""
        member = member_of(suffix)
        return np.array([row.members.get(member, (0, 0))[1] for row in self.rows], np.int64)


@dataclass(slots=True)
class Survey:
    """A source: its tars, the rows that are known and the tars that were looked into."""

    source: Source
    tars: list[str] | None  # where they are; None: they are out of reach, the index stands
    known: dict[int, int]  # rows of each tar that has an index
    looks: list[Look] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def shards(self) -> int:
        return len(self.source.tars)

    @property
    def full(self) -> bool:
        """Whether every tar was looked into, so that nothing is extrapolated."""
        return len(self.looks) == self.shards

    def rows(self) -> Estimate:
        if len(self.known) == self.shards:
            return exactly(sum(self.known.values()))
        return self.total([len(look.rows) for look in self.looks])

    def total(self, values: Sequence[float]) -> Estimate:
        """The sum over all tars of what was found in the tars looked into, a value for each."""
        if len(self.known) == self.shards:  # the ratio to rows is the tighter one
            sizes = [len(look.rows) for look in self.looks]
            return extrapolate(values, sizes, sum(self.known.values()), self.shards)
        sizes = [look.tar_bytes for look in self.looks]
        return extrapolate(values, sizes, sum(size for _, size in self.source.tars), self.shards)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total with its 95 % interval; nan to nan where one tar alone was looked into."""

    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, more: float) -> Estimate:
        return Estimate(self.value + more, self.low + more, self.high + more)


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def extrapolate(
    values: Sequence[float], sizes: Sequence[float], whole: float, population: int
) -> Estimate:
    """A total from a sample of `population` tars by the ratio to a size that is known of all.

    The interval is that of a ratio estimator of a finite population, with Student's t.
    """
    count = len(values)
    ratio = sum(values) / max(sum(sizes), 1e-9)
    if count == population:
        return exactly(sum(values))
    if count < 2:
        return Estimate(ratio * whole, math.nan, math.nan)
    from scipy.stats import t

    rest = np.array(values, float) - ratio * np.array(sizes, float)
    spread = math.sqrt(float(np.square(rest).sum()) / (count - 1))
    error = population * spread * math.sqrt((1 - count / population) / count)
    half = float(t.ppf(0.975, count - 1)) * error
    return Estimate(ratio * whole, max(0.0, ratio * whole - half), ratio * whole + half)


def find(name: str, tars: str | Sequence[str], shard_rows: int, folder: Store) -> Survey:
    """The source that a config names, and what of its index stands in `folder`; looks into nothing.

    Where no tar is in reach the records of an earlier run serve; MissingTar if there are none.
    """
    places: list[str] | None
    try:
        source, found = make_source(name, tars, shard_rows)
        places = [str(place) for place in found]
    except MissingTar:
        if folder.size("source.json") is None:
            raise
        source, places = open_source(folder), None
    else:
        source.check(folder)  # an index of other tars says nothing of these
    return Survey(source, places, index_heads(folder))


def refuse_unmatched(
    columns: Mapping[str, ColumnConfig], source: Source, tars: Sequence[str] | None, folder: Store,
    scratch: Path,
) -> None:  # fmt: skip
    """Raise NoSuchSuffix if a column's suffix is that of no member in the first tars with rows, and
    in some more of the source. Tars are read, or their indexes, until every suffix was seen.
    """
    shards, half = len(source.tars), FIRST // 2
    some = [*range(half), *(shards * i // half - 1 for i in range(1, half + 1))]
    some += [shards * i // TRIES for i in range(TRIES)]
    seen, looked, lacking = Counter[str](), list[str](), dict(columns)
    for shard in dict.fromkeys(shard for shard in some if 0 <= shard < shards):
        if not lacking or len(looked) == FIRST:
            break
        place = None if tars is None else tars[shard]
        tar = Tar(place, source.tars[shard][1], shard, source.shard_rows)
        try:
            rows = look_at(tar, folder, set(), set(), scratch).rows
        except (BadTar, CorruptColumn):
            continue  # it is reported when its turn comes
        except OSError:
            return  # so is this, and others would take as long
        looked.append(source.tars[shard][0])
        seen.update(suffix for row in rows for suffix in row.members)
        lacking = {n: c for n, c in lacking.items() if member_of(c.suffix) not in seen}
    if not looked or not lacking:
        return
    name, column = next(iter(lacking.items()))
    key = "image" if hasattr(column, "image") else "caption"
    held = ", ".join(f"{suffix!r} ({count:,})" for suffix, count in seen.most_common(12))
    raise NoSuchSuffix(
        f"columns.{name}.{key}: no sample of source {source.name!r} has a member with the suffix "
        f"{member_of(column.suffix)!r}, in {len(looked)} of {shards} tars that were looked at "
        f"({', '.join(map(repr, looked[:3]))}{', ...' if looked[3:] else ''}). Suffixes there, with "
        f"their rows: {held}. Set columns.{name}.{key} to one of them"
    )


def look_into(
    survey: Survey, folder: Store, count: int, captions: set[str], pictures: set[str], scratch: Path
) -> None:
    """Look into `count` tars spread evenly over the source; all, if there are no more."""
    shards = survey.shards
    count = min(count, shards)
    for shard in [(2 * i + 1) * shards // (2 * count) for i in range(count)]:
        place = None if survey.tars is None else survey.tars[shard]
        tar = Tar(place, survey.source.tars[shard][1], shard, survey.source.shard_rows)
        try:
            survey.looks.append(look_at(tar, folder, captions, pictures, scratch))
        except (BadTar, FetchFailed) as error:
            survey.notes.append(f"tar {shard} passed over: {error}")
    if not survey.looks:
        raise EncodeError(
            f"source {survey.source.name!r}: none of {count} tars could be looked into. "
            f"{survey.notes[-1] if survey.notes else 'It names no tar'}"
        )
    survey.notes.append(_how(survey))


def _how(survey: Survey) -> str:
    if survey.full:
        how = f"all {survey.shards} tars were looked into: nothing is extrapolated"
    elif len(survey.known) == survey.shards:
        how = f"rows of all {survey.shards} tars are known, {len(survey.looks)} were looked into"
    else:
        how = f"extrapolated from {len(survey.looks)} of {survey.shards} tars by their bytes"
    if survey.tars is None:
        how += "; no tar is in reach, so tokens are estimated from the bytes of captions"
    return how


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar of a source; `place` is None where only its index can be had."""

    place: str | None
    size: int
    shard: int
    shard_rows: int


def look_at(tar: Tar, folder: Store, captions: set[str], pictures: set[str], scratch: Path) -> Look:
    """Look into a tar: rows from its index where that stands; captions, and some pictures."""
    size = folder.size(index_name(tar.shard))
    index = None if size is None else read_index(folder, tar.shard)
    if tar.place is None and index is None:
        raise BadTar(f"tar {tar.shard}: neither it nor its index is in reach. Fetch it")
    if tar.place is None or (index is not None and not captions and not pictures):
        assert index is not None
        return Look(tar.shard, index.rows, tar.size, size or 0, {}, {})
    with fetched(tar.place, scratch, tar.size) as path, path.open("rb") as file:
        opened = OpenTar(file, tar.size)
        if index is not None:
            rows = index.rows
        else:
            rows, note = scan_tar(file, tar.shard_rows)
            size = len(ShardIndex.encode(64 * "0", tar.shard, rows, note))
        texts = {s: read_captions(rows, file.fileno(), s)[0] for s in captions}
        some = rows[:: max(1, len(rows) // PICTURES)]
        shown = {
            s: [_member(file.fileno(), row, s) for row in some if s in row.members]
            for s in pictures
        }
        opened.check()
    return Look(tar.shard, rows, tar.size, size or 0, texts, shown)


def _member(tar: int, row: IndexRow, suffix: str) -> bytes:
    offset, size = row.members[suffix]
    return read_exactly(tar, size, offset)
