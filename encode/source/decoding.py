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
from shards.column import DIGEST_BYTES, chosen
from shards.format import HAS_VALUES, ZARR_ROWS
from shards.read import map_ahead

from ..meter import Timer
from .images import decode, transform
from .tars import read_exactly

AHEAD = 2  # batches decoded before they are asked for
CHUNK = 16  # rows that a thread decodes at a time: few enough to share out, enough to cost nothing

Span = tuple[int, int]  # first row, and the one after the last


@dataclass(frozen=True, slots=True)
class View:
    """What an image encoder is shown: the member with this suffix (of `jpg|png` the first that a row
    has), cropped to this size. Encoders of one view share one decoding.
    """

    resolution: int
    suffix: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Crops of some rows, (rows, R, R, 3) uint8 by view; rows without a picture hold anything."""

    span: Span
    status: Mapping[str, NDArray[np.uint8]]  # by suffix
    images: Mapping[View, NDArray[np.uint8]]
    digests: Mapping[str, NDArray[np.uint8]]  # of each row's member by suffix, (rows, 32)

    @classmethod
    def empty(cls, span: Span, views: Iterable[View]) -> Batch:
        count, views = span[1] - span[0], list(views)
        suffixes = {view.suffix for view in views}
        return cls(
            span,
            {suffix: np.zeros(count, np.uint8) for suffix in suffixes},
            {v: np.empty((count, v.resolution, v.resolution, 3), np.uint8) for v in views},
            {suffix: np.zeros((count, DIGEST_BYTES), np.uint8) for suffix in suffixes},
        )

    def good(self, suffix: str) -> NDArray[np.intp]:
        """Returns the rows of the batch that hold a picture."""
        return np.flatnonzero(np.isin(self.status[suffix], HAS_VALUES))


def spans(rows: int, batch: int) -> list[Span]:
    """Returns the batches of a shard; none lies across the border of a block of 1,024 rows."""
    return [
        (first, min(first + batch, block + ZARR_ROWS, rows))
        for block in range(0, rows, ZARR_ROWS)
        for first in range(block, min(block + ZARR_ROWS, rows), batch)
    ]


def load(rows: Sequence[IndexRow], tar: int, batch: Batch, first: int, stop: int) -> None:
    """Decodes rows `first` to `stop` of a batch into it; `tar` is an open file."""
    for i in range(first, stop):
        members = rows[batch.span[0] + i].members
        for suffix, status in batch.status.items():
            member = chosen(members, suffix)
            if member is None:
                status[i] = Status.IMAGE_MISSING
                continue
            offset, size = members[member]
            data = read_exactly(tar, size, offset)
            # about 2 % of the CPU time of decoding and cropping
            batch.digests[suffix][i] = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
            image, status[i] = decode(data)
            if image is not None:
                for view, crops in batch.images.items():
                    if view.suffix == suffix:
                        crops[i] = transform(image, view.resolution)


def decoded(
    rows: Sequence[IndexRow], tar: int, views: Sequence[View], size: int,
    pool: ThreadPoolExecutor, timer: Timer,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Yields batches of a shard, decoded in the threads of a pool. Close it before the file."""

    def chunks() -> Iterator[tuple[Batch, int, int, bool]]:
        for span in spans(len(rows), size):
            batch, count = Batch.empty(span, views), span[1] - span[0]
            for first in range(0, count, CHUNK):
                yield batch, first, min(first + CHUNK, count), first + CHUNK >= count

    def load_chunk(chunk: tuple[Batch, int, int, bool]) -> Batch | None:
        batch, first, stop, last = chunk
        with timer("decode"):
            load(rows, tar, batch, first, stop)
        return batch if last else None

    depth = AHEAD * -(-size // CHUNK)
    with closing(map_ahead(pool, load_chunk, chunks(), depth)) as batches:
        yield from filter(None, batches)
