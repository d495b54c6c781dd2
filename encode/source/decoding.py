"""Pictures of a tar as batches of square crops, in order, decoded ahead of the encoders.

A picture is decoded once, whatever the number of columns and resolutions made of it. What a batch
holds depends on the shard and the config alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards import IndexRow, Status
from shards.column.members import DIGEST_BYTES
from shards.format.layout import HAS_VALUES, ZARR_ROWS
from shards.read.prefetch import map_ahead

from ..meter import Timer
from .images import decode, transform
from .tars import read_exactly

AHEAD = 2  # batches decoded before they are asked for
CHUNK = 16  # rows decoded by a thread at a time: few enough to share out, enough to cost nothing

Span = tuple[int, int]  # first row, and the one after the last


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of some rows, (rows, R, R, 3) uint8 by view; rows without a picture hold anything."""

    span: Span
    status: Mapping[str, NDArray[np.uint8]]  # by suffix
    images: Mapping[View, NDArray[np.uint8]]
    digests: Mapping[str, NDArray[np.uint8]]  # of each row's member by suffix, (rows, 32)

    @classmethod
    def empty(cls, span: Span, views: Iterable[View]) -> Batch:
        count = span[1] - span[0]
        images = {
            view: np.empty((count, view.resolution, view.resolution, 3), np.uint8) for view in views
        }
        suffixes = {view.suffix for view in images}
        return cls(
            span, {suffix: np.zeros(count, np.uint8) for suffix in suffixes}, images,
            {suffix: np.zeros((count, DIGEST_BYTES), np.uint8) for suffix in suffixes},
        )  # fmt: skip

    def good(self, suffix: str) -> NDArray[np.intp]:
        """Rows of the batch that hold a picture."""
        return np.flatnonzero(np.isin(self.status[suffix], HAS_VALUES))


def spans(rows: int, batch: int) -> list[Span]:
    """Batches of a shard; none lies across the border of a block of 1,024 rows."""
    return [
        (first, min(first + batch, block + ZARR_ROWS, rows))
        for block in range(0, rows, ZARR_ROWS)
        for first in range(block, min(block + ZARR_ROWS, rows), batch)
    ]


def load(rows: Sequence[IndexRow], tar: int, batch: Batch, first: int, after: int) -> None:
    """Decode rows `first` to `after` of a batch into it; `tar` is an open file."""
    views: dict[str, list[View]] = {}
    for view in batch.images:
        views.setdefault(view.suffix, []).append(view)
    for i in range(first, after):
        members = rows[batch.span[0] + i].members
        for suffix, wanted in views.items():
            if suffix not in members:
                batch.status[suffix][i] = Status.IMAGE_MISSING
                continue
            offset, size = members[suffix]
            data = read_exactly(tar, size, offset)
            # about 2 % of the CPU time of decoding and cropping
            batch.digests[suffix][i] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            image, batch.status[suffix][i] = decode(data)
            if image is not None:
                for view in wanted:
                    batch.images[view][i] = transform(image, view.resolution)


def decoded(
    rows: Sequence[IndexRow], tar: int, views: Sequence[View], batch: int,
    pool: ThreadPoolExecutor, timer: Timer,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Batches of a shard, decoded in the threads of a pool. Close it before the file."""

    def chunks() -> Iterator[tuple[Batch, int, int]]:
        for span in spans(len(rows), batch):
            into, count = Batch.empty(span, views), span[1] - span[0]
            for first in range(0, count, CHUNK):
                yield into, first, min(first + CHUNK, count)

    def load_chunk(chunk: tuple[Batch, int, int]) -> tuple[Batch, bool]:
        into, first, after = chunk
        with timer("decode"):
            load(rows, tar, into, first, after)
        return into, after == into.span[1] - into.span[0]

    depth = AHEAD * -(-batch // CHUNK)
    with closing(map_ahead(pool, load_chunk, chunks(), depth)) as results:
        for into, last in results:
            if last:
                yield into


@dataclass(frozen=True, slots=True)
class View:
    """What an image encoder is shown: the member with this suffix, cropped to this size. Encoders
    of one view share one decoding.
    """

    resolution: int
    suffix: str
