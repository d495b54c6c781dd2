"""What a source holds, without encoding it: from its index where that exists, else from a few tars.

Rows of tars that have an index are known exactly. A few tars, spread over the source, are sampled:
which members their rows have, their captions, and some pictures to try the encoders on. Totals
follow by the ratio to rows (where those of all tars are known) or to bytes of tars.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards import (
    ColumnSpec,
    CorruptColumn,
    FormatVersion,
    IndexRow,
    NotAColumn,
    Source,
    Store,
    open_source,
    read_index,
)
from shards.column import OR, ShardIndex, chosen, index_name, member_of, suffix_read
from shards.console import counted
from shards.read import open_spec

from ..config import EncodeConfig, PictureColumn
from ..errors import BadTar, EncodeError, FetchFailed, MissingTar, NoSuchSuffix
from ..source import members
from ..source.fetch import fetched
from ..source.fetched_again import recorded_source
from ..source.index import index_heads
from ..source.members import read_captions
from ..source.tars import Tar, make_source, read_exactly, scan_tar

PICTURES = 256  # kept of a tar, to try the encoders on
FIRST, TRIES = 8, 32  # tars with rows that are searched for a suffix, of so many
LOOKED = 3  # tars whose pictures say which suffixes a column reads that names none


@dataclass(frozen=True, slots=True)
class TarSample:
    """What a tar holds. `captions` and `pictures` (by suffix) are empty where the tar itself is out
    of reach and its index alone was read.
    """

    shard: int
    rows: Sequence[IndexRow]
    tar_bytes: int
    index_bytes: int
    # one for each row, None where there is none or it cannot be read
    captions: dict[str, list[str | None]]
    # of some rows, as encoded
    pictures: dict[str, list[bytes]]

    def has(self, suffix: str) -> NDArray[np.bool_]:
        """Returns which rows have this member, (rows,)."""
        if suffix in self.captions:
            return np.array([caption is not None for caption in self.captions[suffix]], bool)
        return np.array([chosen(row.members, suffix) is not None for row in self.rows], bool)

    def member_bytes(self, suffix: str) -> NDArray[np.int64]:
        """Returns the size of this member in each row, 0 where a row lacks it, (rows,)."""
        read = [chosen(row.members, suffix) or "" for row in self.rows]
        sizes = [
            row.members.get(name, (0, 0))[1] for row, name in zip(self.rows, read, strict=True)
        ]
        return np.array(sizes, np.int64)


@dataclass(frozen=True, slots=True)
class SourceJob:
    """A source of a config, where its records are, and the columns that the config names."""

    source: Source
    # path or url of each tar; None where only its index can be had
    tars: Sequence[str | None]
    folder: Store
    scratch: Path
    # by name of the column in the config; empty until a worker has loaded the encoders
    specs: Mapping[str, ColumnSpec] = field(default_factory=dict)
    # suffix of the pictures of each column for which the config names none
    images: Mapping[str, str] = field(default_factory=dict)
    # bytes of a tar for each of its rows, in those that were looked into; None: no row was seen
    row_bytes: float | None = None
    # bytes of tars that failed and are of another size than the source says, by shard
    sizes: Mapping[int, int] = field(default_factory=dict)

    def size(self, shard: int) -> int:
        """Returns the bytes of a tar as it is now."""
        return self.sizes.get(shard, self.source.tars[shard][1])

    def suffix(self, config: EncodeConfig, name: str) -> str:
        """Returns which members a column reads of this source."""
        return self.images.get(name, config.columns[name].suffix)

    def sample(
        self, shard: int, captions: Collection[str] = (), pictures: Collection[str] = ()
    ) -> TarSample:
        """Returns the rows of a tar, from its index where that exists, with the captions and some
        pictures of these suffixes. Raises BadTar, FetchFailed or CorruptColumn.
        """
        place, size = self.tars[shard], self.size(shard)
        index_bytes = self.folder.size(index_name(shard))
        index = None if index_bytes is None else read_index(self.folder, shard)
        if place is None and index is None:
            raise BadTar(f"tar {shard}: neither it nor its index is in reach. Fetch it")
        if place is None or (index is not None and not captions and not pictures):
            assert index is not None
            return TarSample(shard, index.rows, size, index_bytes or 0, {}, {})
        with fetched(place, self.scratch, size) as path, path.open("rb") as file:
            tar, rows = Tar(file, size), None if index is None else index.rows
            sample = sample_of(file, shard, self.source.shard_rows, rows, captions, pictures)
            tar.check()
        return sample if index is None else replace(sample, index_bytes=index_bytes or 0)

    def tar_rows(self) -> Mapping[int, int]:
        """Returns the rows of each tar of which they are known."""
        return index_heads(self.folder)


def sample_of(
    tar: BinaryIO,
    shard: int,
    limit: int,
    rows: Sequence[IndexRow] | None,
    captions: Collection[str],
    pictures: Collection[str],
) -> TarSample:
    """Returns the rows of an open tar (`rows`, where its index is known; else at most `limit`, or
    BadTar), with its captions and some pictures of these suffixes.
    """
    handle, index_bytes = tar.fileno(), 0
    if rows is None:
        rows, note = scan_tar(tar, limit)
        index_bytes = len(ShardIndex.encode(64 * "0", shard, rows, note))
    texts = {suffix: read_captions(rows, handle, suffix)[0] for suffix in captions}
    images = {
        suffix: [
            read_exactly(handle, row.members[member][1], row.members[member][0])
            for row in rows[:: picture_step(len(rows))]
            if (member := chosen(row.members, suffix)) is not None
        ]
        for suffix in pictures
    }
    return TarSample(shard, rows, os.fstat(handle).st_size, index_bytes, texts, images)


def picture_step(rows: int) -> int:
    """Returns how many rows of a tar there are to each picture that is kept of it."""
    return max(1, rows // PICTURES)


def open_job(config: EncodeConfig, name: str, index_alone: bool = False) -> SourceJob:
    """Returns a source of a config, compared with its records and with the suffixes of the columns.

    Raises MissingTar where tars do not exist, unless none is in reach and `index_alone` lets the
    records of an earlier run serve; NoSuchSuffix, and what `Source.check` raises of another
    source's records.
    """
    folder = config.root_store.child(name)
    tars: Sequence[str | None]
    sizes: Mapping[int, int] = {}
    try:
        source, tars = make_source(name, config.sources[name], config.shard_rows)
    except MissingTar:
        if not index_alone or folder.size("source.json") is None:
            raise
        source = open_source(folder)
        tars = [None] * len(source.tars)
    else:
        # an index of other tars says nothing of these
        source, sizes = recorded_source(source, folder)
    job = SourceJob(source, tars, folder, config.engine.scratch_folder, sizes=sizes)
    return with_images(config, job)


def with_images(config: EncodeConfig, job: SourceJob) -> SourceJob:
    """Returns the source with the suffixes that each column of pictures reads for which the config
    names none: those of the column on disk, else of PICTURES those that are read in the first, the last
    and the middle tar with rows. So a source of jpg alone has the columns that `image: jpg` makes.

    Raises NoSuchSuffix if a column's suffix is that of no member in the first tars with rows, and
    in some more of the source. Tars are read, or their indexes, until every suffix was seen.
    """
    source, shards, half = job.source, len(job.tars), FIRST // 2
    columns, images, open_names = dict[str, str](), dict[str, str](), set[str]()
    for name, column in config.columns.items():
        columns[name] = column.suffix
        if isinstance(column, PictureColumn) and column.image is None:
            existing = _on_disk(job.folder.child(name))
            if existing is None:
                open_names.add(name)
                columns[name] = OR.join(members.PICTURES)
            else:
                columns[name] = images[name] = existing
    order = [0, shards - 1, shards // 2] if open_names else []
    order += [*range(half), *(shards * i // half - 1 for i in range(1, half + 1))]
    order += [shards * i // TRIES for i in range(TRIES)]
    counts, pictures, names = Counter[str](), Counter[str | None](), list[str]()
    seen_rows = seen_bytes = 0

    def resolved() -> SourceJob:
        read = OR.join(suffix for suffix in members.PICTURES if suffix in pictures)
        read_by = images | dict.fromkeys(open_names if read else (), read)
        return replace(job, images=read_by, row_bytes=seen_bytes / seen_rows if seen_rows else None)

    for shard in dict.fromkeys(shard for shard in order if 0 <= shard < shards):
        enough = LOOKED if open_names else 0
        if (not columns and len(names) >= enough) or len(names) == FIRST:
            break
        try:
            rows = job.sample(shard).rows
        except (BadTar, CorruptColumn):
            continue  # it is reported when its turn comes
        except OSError:
            return resolved()  # so is this, and others would take as long
        names.append(source.tars[shard][0])
        seen_rows, seen_bytes = seen_rows + len(rows), seen_bytes + source.tars[shard][1]
        counts.update(suffix for row in rows for suffix in row.members)
        pictures.update(chosen(row.members, OR.join(members.PICTURES)) for row in rows)
        columns = {n: s for n, s in columns.items() if chosen(counts, s) is None}
    if not names or not columns:
        return resolved()
    name, wanted = next(iter(columns.items()))
    key = "image" if isinstance(config.columns[name], PictureColumn) else "caption"
    suffixes = ", ".join(f"{suffix!r} ({count:,})" for suffix, count in counts.most_common(12))
    raise NoSuchSuffix(
        f"columns.{name}.{key}: no sample of source {source.name!r} has a member with the suffix "
        f"{member_of(wanted).replace(OR, ', ')!r}, in {len(names)} of {counted(shards, 'tar')} that were looked at "
        f"({', '.join(map(repr, names[:3]))}{', ...' if names[3:] else ''}). Suffixes there, "
        f"with their rows: {suffixes}. Set columns.{name}.{key} to one of them, or a "
        "list"
    )


def _on_disk(column: Store) -> str | None:
    """Returns the suffix that a column was made of; None where there is none that can be read."""
    with suppress(NotAColumn, CorruptColumn, FormatVersion):
        return suffix_read(open_spec(column)[0].identity)
    return None


# Totals -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total with its 95 % interval; nan to nan where one tar alone was sampled."""

    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    def plus(self, term: float) -> Estimate:
        return Estimate(self.value + term, self.low + term, self.high + term)


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def extrapolate(
    values: Sequence[float], sizes: Sequence[float], total_size: float, population: int
) -> Estimate:
    """Returns a total from a sample of `population` tars, by the ratio to a size known of them all.

    The interval is that of a ratio estimator of a finite population, with Student's t (Cochran,
    Sampling Techniques, 1977, chapter 6).
    """
    count = len(values)
    ratio = sum(values) / max(sum(sizes), 1e-9)
    if count == population:
        return exactly(sum(values))
    if count < 2:
        return Estimate(ratio * total_size, math.nan, math.nan)
    from scipy.stats import t

    residuals = np.array(values, float) - ratio * np.array(sizes, float)
    spread = math.sqrt(float(np.square(residuals).sum()) / (count - 1))
    error = population * spread * math.sqrt((1 - count / population) / count)
    half = float(t.ppf(0.975, count - 1)) * error
    return Estimate(
        ratio * total_size, max(0.0, ratio * total_size - half), ratio * total_size + half
    )


class Survey:
    """A source with the rows that its index knows and `count` sampled tars, spread evenly over it
    (all, if there are no more). Raises EncodeError where none of them can be sampled.
    """

    def __init__(
        self, job: SourceJob, count: int, captions: Collection[str], pictures: Collection[str]
    ) -> None:
        self.job, self.shards = job, len(job.tars)
        # rows of each tar that has an index
        self.tar_rows = job.tar_rows()
        self.samples: list[TarSample] = []
        self.notes: list[str] = []
        count = min(count or self.shards, self.shards)
        for shard in [(2 * i + 1) * self.shards // (2 * count) for i in range(count)]:
            try:
                self.samples.append(job.sample(shard, captions, pictures))
            except (BadTar, FetchFailed) as error:
                self.notes.append(f"tar {shard} passed over: {error}")
        if not self.samples:
            raise EncodeError(
                f"source {job.source.name!r}: none of {counted(count, 'tar')} could be looked into. "
                f"{self.notes[-1] if self.notes else 'It names no tar'}"
            )
        if len(self.samples) == self.shards:
            note = "all of it was looked into: nothing is extrapolated"
        elif len(self.tar_rows) == self.shards:
            note = f"its rows are known, {counted(len(self.samples), 'tar')} looked into"
        else:
            note = f"extrapolated from {len(self.samples)} of {counted(self.shards, 'tar')} by their bytes"
        if None in job.tars:
            note += "; no tar is in reach, so tokens are estimated from the bytes of captions"
        self.notes.append(note)

    def rows(self) -> Estimate:
        if len(self.tar_rows) == self.shards:
            return exactly(sum(self.tar_rows.values()))
        return self.total([len(sample.rows) for sample in self.samples])

    def total(self, values: Sequence[float]) -> Estimate:
        """Returns the sum over all tars of a value of each sampled tar."""
        if len(self.tar_rows) == self.shards:  # the ratio to rows is the tighter one
            sizes = [len(sample.rows) for sample in self.samples]
            return extrapolate(values, sizes, sum(self.tar_rows.values()), self.shards)
        sizes = [sample.tar_bytes for sample in self.samples]
        total_size = sum(size for _, size in self.job.source.tars)
        return extrapolate(values, sizes, total_size, self.shards)
