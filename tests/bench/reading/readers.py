"""Readers of our columns: raw (the limit), this program, and zarr-python on the same files.

python -m tests.bench.reading.readers read raw FOLDER SAMPLES CORE
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.column.commits import put_complete
from shards.column.writer import ShardWriter, create_column, put_empty
from shards.format.layout import ZARR_ROWS, ColumnSpec, Layout
from shards.format.norm import Norm
from shards.read.batch_layout import SLOW, WARM
from shards.read.column import Column
from shards.read.join import JoinedColumns
from shards.read.objects import HINT_GAP
from shards.read.opening import open_join
from shards.read.order import Order
from shards.read.stream import Stream

from . import ORDERS
from .measure import Reader, main
from .samples import BATCH, MAX_TOKENS, Batch, Ring, Samples

STORE = "columns"
Ints = NDArray[np.int64]


def write_columns(folder: Path, samples: Samples, kind: str = "moments") -> None:
    """Both columns by the writer that `encode` uses; a shard of 1,024 rows, so row id = sample. The first
    has moments, or the same numbers as latents of twice the channels."""
    shards = -(-samples.rows // ZARR_ROWS)
    identity = {"source": "samples of the bench"}
    latents = ColumnSpec(
        identity, Layout(kind, samples.shape, shards, ZARR_ROWS), Norm((0.0,), (1.0,))
    )
    text = ColumnSpec(
        identity, Layout("tokens", (MAX_TOKENS, samples.width), shards, ZARR_ROWS), None, 1
    )
    digests = [create_column(folder / name, spec) for name, spec in ours(latents, text)]
    put_empty(folder / "text", text, samples[0][1][:1])
    for shard in range(shards):
        rows = range(shard * ZARR_ROWS, min((shard + 1) * ZARR_ROWS, samples.rows))
        values = zip(*(samples[row] for row in rows), strict=True)
        for (name, spec), digest, column in zip(ours(latents, text), digests, values, strict=True):
            writer = ShardWriter(folder / name, spec, digest, shard, len(rows), "index")
            writer.put_block(
                list(column) if spec is text else np.stack(column), np.zeros(len(rows), np.uint8)
            )
            writer.commit({})
    for (name, _), digest in zip(ours(latents, text), digests, strict=True):
        put_complete(folder / name, digest, shards, allow_failed=False)


def ours(latents: ColumnSpec, text: ColumnSpec) -> list[tuple[str, ColumnSpec]]:
    return [("latents", latents), ("text", text)]


def rows_of(folder: Path, samples: Samples, order: str) -> Iterator[Ints]:
    """Rows of each batch: of the second epoch of a run, or of the first where crc is asked for."""
    shuffle = Order([Column.open(folder / STORE / "latents").valid_mask()])
    for start in range(0, samples.rows, BATCH):
        if order == "sequential":
            yield np.arange(start, start + BATCH)
        else:
            yield shuffle(start + (0 if "crc" in order else shuffle.epoch_samples), BATCH)[1]


def in_file(lengths: Ints) -> Ints:
    """Token at which each row starts in its file of 1,024 rows."""
    ends = np.cumsum(lengths)
    first = np.arange(len(lengths)) // ZARR_ROWS * ZARR_ROWS
    starts: Ints = ends - lengths - (ends - lengths)[first]
    return starts


def flat(tensor: torch.Tensor | None) -> memoryview:
    """The bytes of a tensor."""
    assert tensor is not None
    return tensor.view(torch.uint8).reshape(-1).numpy().data


class Hints:
    """When to tell the disk what comes next: by the same rule as the stream's, which leaves hints
    out while everything comes from memory.
    """

    def __init__(self) -> None:
        self._warm, self._start, self._disk = 0, time.perf_counter(), disk_reads()

    @property
    def wanted(self) -> bool:
        return self._warm < WARM

    def start(self) -> None:
        self._start = time.perf_counter()

    def done(self, count: int) -> None:
        """A batch of so many bytes was read since `start`."""
        slow = count < SLOW * (time.perf_counter() - self._start)
        before, self._disk = self._disk, disk_reads()
        self._warm = 0 if slow or self._disk > before else self._warm + 1


def disk_reads() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


class Step(NamedTuple):
    """A batch that raw is to read, its numbers as Python's integers."""

    lengths: Ints | None  # of the texts
    reads: list[list[tuple[int, int, int, int]]]  # a column: (file, offset, bytes, place) of a row
    ranges: list[tuple[int, int, int]]  # (file, offset, bytes) of each hint
    bytes: int


def merged(files: list[int], number: Ints, offset: Ints, size: Ints) -> list[tuple[int, int, int]]:
    """Ranges of files that hold some rows, as the reader of a column joins them for its hints."""
    order = np.lexsort((offset, number))
    found: list[list[int]] = []
    for n, start, count in zip(
        number[order].tolist(), offset[order].tolist(), size[order].tolist(), strict=True
    ):
        if found and found[-1][0] == files[n] and start <= found[-1][2] + HINT_GAP:
            found[-1][2] = start + count
        else:
            found.append([files[n], start, start + count])
    return [(file, start, end - start) for file, start, end in found]


def raw(columns: int) -> Callable[[Path, Samples, str, Ring], Iterator[Batch]]:
    """The limit: the same rows, order, files and hints as this program's, one `preadv` for each
    row of a column into reused memory.
    """

    def open_(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
        row, token = samples.row_bytes(1) // samples.rows, 2 * samples.width
        starts = in_file(samples.lengths)
        files = [
            [os.open(folder / STORE / path / f"{z}/{tail}", os.O_RDONLY) for z in objects(samples)]
            for path, tail in (("latents/moments/c", "0/0/0"), ("text/tokens/c", "0"))[:columns]
        ]
        steps = []
        for rows in rows_of(folder, samples, order):
            lengths = samples.lengths[rows]
            number = rows // ZARR_ROWS
            reads, ranges, total = [], [], 0
            offsets = (
                (rows % ZARR_ROWS * row, np.full(BATCH, row)),
                (
                    starts[rows] * token,
                    lengths * token,
                ),
            )
            for names, (offset, size) in zip(files, offsets, strict=False):
                at = (np.cumsum(size) - size).tolist()
                handles = [names[n] for n in number.tolist()]
                reads.append(list(zip(handles, offset.tolist(), size.tolist(), at, strict=True)))
                ranges += merged(names, number, offset, size)
                total += int(size.sum())
            steps.append(Step(lengths if columns > 1 else None, reads, ranges, total))
        return raw_reads(steps, ring, [file for names in files for file in names])

    return open_


def objects(samples: Samples) -> range:
    """Numbers of the files of a column."""
    return range(-(-samples.rows // ZARR_ROWS))


def raw_reads(steps: list[Step], ring: Ring, files: list[int]) -> Iterator[Batch]:
    hints = Hints()
    for file, offset, size in steps[0].ranges:
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if following and hints.wanted:
            for file, offset, size in following.ranges:
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
        hints.start()
        batch = ring.next(step.lengths)
        for view, reads in zip(map(flat, batch[: len(step.reads)]), step.reads, strict=True):
            for file, offset, size, at in reads:
                if os.preadv(file, (view[at : at + size],), offset) != size:
                    raise OSError("a read came up short")
        hints.done(step.bytes)
        yield batch
    for file in files:
        os.close(file)


class Sequential(Order):
    """Rows as they stand in the files, epoch after epoch; row id = sample."""

    def at(self, samples: Ints) -> tuple[Ints, Ints]:
        return np.zeros_like(samples), samples % self.epoch_samples


def two_columns(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    """This program as a training run uses it: a stream over a join.

    A row is compared with its checksum when it is first read, so the later epochs of a run go over
    a join that stays open, and one that is opened anew compares them all.
    """
    join = opened(folder) if "crc" not in order else opened.__wrapped__(folder)
    kind = Sequential if order == "sequential" else Order
    return streamed(join, kind([join.valid_mask]), samples, later="crc" not in order)


@cache
def opened(folder: Path) -> JoinedColumns:
    return open_join(folder / STORE / "latents", folder / STORE / "text")


def streamed(join: JoinedColumns, order: Order, samples: Samples, later: bool) -> Iterator[Batch]:
    position = order.epoch_samples if later else 0
    with Stream(join, order, position=position, global_batch=BATCH) as stream:
        for batch in islice(stream, samples.rows // BATCH):
            yield Batch(batch.moments, batch.tokens, batch.cu_seqlens)


def one_column(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    """The latents alone, by the reader of a column."""
    column = Column.open(folder / STORE / "latents")
    return column_reads(column, list(rows_of(folder, samples, order)), ring)


def column_reads(column: Column, batches: list[Ints], ring: Ring) -> Iterator[Batch]:
    hints = Hints()
    column.hint(batches[0])
    for rows, following in zip(batches, [*batches[1:], None], strict=True):
        if following is not None and hints.wanted:
            column.hint(following)
        hints.start()
        batch = ring.next()
        column.read_into(rows, batch.moments.numpy())
        hints.done(batch.moments.nbytes)
        yield batch


def zarr_python(folder: Path, samples: Samples, order: str, ring: Ring) -> Iterator[Batch]:
    """Both columns by zarr-python, which knows nothing of us but the names of the arrays."""
    import zarr

    zarr.config.set({"threading.max_workers": 1})
    moments = zarr.open_array(folder / STORE / "latents" / "moments", mode="r")
    tokens = zarr.open_array(folder / STORE / "text" / "tokens", mode="r")
    lengths = np.asarray(zarr.open_array(folder / STORE / "text" / "lengths", mode="r")[:])
    lengths = lengths[: samples.rows].astype(np.int64)
    slots = np.arange(samples.rows) // ZARR_ROWS * ZARR_ROWS * MAX_TOKENS + in_file(lengths)
    batches = list(rows_of(folder, samples, order))
    return zarr_reads(moments, tokens, lengths, slots, batches, order)


def zarr_reads(
    moments: Any, tokens: Any, lengths: Ints, slots: Ints, batches: list[Ints], order: str
) -> Iterator[Batch]:
    for rows in batches:
        cu_seqlens = torch.zeros(BATCH + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.from_numpy(np.cumsum(lengths[rows]))
        if order == "sequential":
            first = int(slots[rows[0]])
            latents = moments[int(rows[0]) : int(rows[-1]) + 1]
            text = tokens[first : first + int(cu_seqlens[-1])]
        else:
            latents = moments.oindex[rows]
            spans = zip(slots[rows].tolist(), lengths[rows].tolist(), strict=True)
            text = np.concatenate([tokens[first : first + count] for first, count in spans])
        yield Batch(
            torch.from_numpy(latents), torch.from_numpy(text).view(torch.bfloat16), cu_seqlens
        )


READERS = {
    "raw": Reader(raw(2), STORE),
    "ours": Reader(two_columns, STORE, 2, ORDERS),
    "raw, latents": Reader(raw(1), STORE, 1),
    "ours, latents": Reader(one_column, STORE, 1),
    "zarr-python": Reader(zarr_python, STORE),
}
WRITERS = {STORE: write_columns}

if __name__ == "__main__":
    main(READERS, WRITERS, sys.argv[1:])
