"""What a batch holds and how it is read: sample numbers -> rows of columns -> one flat buffer.

    samples of many batches -> order -> (source, row id) -> caption chosen -> places    `Planner`
    samples | rows | sources | cu_seqlens | moments | extra columns | tokens            `Frame`
    every row straight to its place in the buffer, one read each                        `Reader`

All that can be found out for many batches at once is: what is left for each batch is to read its
rows. Numpy only: the processes that read for a stream never load torch.
"""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShardsError
from .column import Column
from .join import JoinedColumns
from .order import Ints, Order

ALIGN = 64  # bytes; every part of a buffer starts at a multiple
CHUNK = 4_096  # samples that are planned at once: order and places then cost 1 % of the reading
WARM = 16  # batches without a disk read, after which hints are left out
SLOW = 1e9  # bytes a second; slower, and it is no memory, though the system may not call it a disk
PIECE = 512  # tokens that are dequantised at once: they stay in the processor's cache
TOKENS = "tokens"  # the part that is not of one shape
Places = tuple[Ints, Ints, Ints]  # of rows in a column: object, first byte, bytes
Header = tuple[Any, Any, Any, Any]  # samples, rows, sources (B,) int64, cu_seqlens (B + 1,) int32


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor stands in a buffer."""

    offset: int
    element: str  # as in `schema.ELEMENTS`
    shape: tuple[int, ...]
    row_bytes: int


class Frame:
    """The parts of a batch of `size` samples in one flat buffer; tokens stand last, for only they
    differ in length. `capacity` has room for the longest captions.
    """

    def __init__(self, sources: JoinedColumns, size: int) -> None:
        first = sources.by_source[0]
        self.size, at = size, _aligned(3 * 8 * size + 4 * (size + 1))
        self.parts: dict[str, Part] = {}
        for name, column in {"moments": first.latents, **first.extra}.items():
            layout = column.layout
            self.parts[name] = Part(
                at, layout.element, (size, *layout.row_shape), layout.unit_bytes
            )
            at = _aligned(at + size * layout.unit_bytes)
        self.extra = tuple(first.extra)
        # of a token in the buffer, which is bfloat16 whatever it is stored as; an id is itself
        self.token_element = "int32" if sources.ids else "bfloat16"
        self.token_shape = sources.text.layout.row_shape[1:]
        self.token_bytes = (4 if sources.ids else 2) * math.prod(self.token_shape)
        self.tokens_at = at
        self.capacity = at + size * sources.max_tokens * self.token_bytes

    def start(self, name: str, number: Ints) -> Ints:
        """Where a part has the rows of these samples of the batch, in bytes."""
        part = self.parts[name]
        return part.offset + number * part.row_bytes

    def put_header(self, header: Header, buffer: NDArray[np.uint8]) -> None:
        """Write what is small of a batch to the start of its buffer."""
        ints = buffer[: 24 * self.size].view(np.int64).reshape(3, -1)
        ints[0], ints[1], ints[2] = header[:3]
        buffer[24 * self.size :][: 4 * (self.size + 1)].view(np.int32)[:] = header[3]

    def header(self, buffer: NDArray[np.uint8]) -> Header:
        """The inverse of `put_header`: copies, so that keeping them does not keep the buffer."""
        samples, rows, sources = buffer[: 24 * self.size].view(np.int64).reshape(3, -1).copy()
        ends = buffer[24 * self.size :][: 4 * (self.size + 1)].view(np.int32).copy()
        return samples, rows, sources, ends


@dataclass(frozen=True, slots=True)
class Reads:
    """Rows of one column, and the byte of the buffer that each is to start at."""

    column: Column
    rows: Ints  # row ids
    places: Places  # where the column has them
    at: Ints


@dataclass(frozen=True, slots=True)
class Plan:
    """One rank's part of a global batch, before it is read. The header is of arrays, or of what
    the planner was told to make of them.
    """

    position: int
    header: Header
    reads: list[Reads]
    tokens: int
    bytes: int  # of the buffer that are used


class Planner:
    """The batches of one rank in order, each by its position.

    `rows_of` takes a table of many batches apart, (n, ...) -> n rows: one call for all of them.
    """

    def __init__(
        self, sources: JoinedColumns, order: Order, batch: int, world: int = 1, rank: int = 0,
        rows_of: Callable[[NDArray[Any]], Sequence[Any]] = list,
    ) -> None:  # fmt: skip
        self.sources, self.order, self._rows_of = sources, order, rows_of
        self.places = order.places(batch, world, rank)
        self.frame = Frame(sources, self.places.size)

    def plans(self, position: int, step: int) -> Iterator[Plan]:
        """The batches at `position`, `position + step` and so on, for ever.

        The first is planned alone, for it is waited for; then twice as many at a time, up to 4,096
        samples.
        """
        count, most = 1, max(1, CHUNK // self.places.size)
        while True:
            yield from self._plan(position + step * np.arange(count))
            position += step * count
            count = min(2 * count, most)

    def _plan(self, positions: Ints) -> Iterator[Plan]:
        frame, size = self.frame, self.places.size
        samples = (positions[:, None] + self.places).ravel()
        sources, rows = self.sources.locate(*self.order.at(samples))
        groups = list(self._groups(samples, sources, rows))
        ends = np.zeros((positions.size, size + 1), np.int64)
        lengths = np.zeros(rows.size, np.int64)
        for name, column, mine, (_, _, stored) in groups:
            if name == TOKENS:
                lengths[mine] = stored // column.layout.unit_bytes
        np.cumsum(lengths.reshape(positions.size, size), axis=1, out=ends[:, 1:])
        starts = frame.tokens_at + ends[:, :-1].ravel() * frame.token_bytes
        reads: list[list[Reads]] = [[] for _ in positions]
        for name, column, mine, places in groups:
            fixed = name != TOKENS
            at = frame.start(name, mine % size) if fixed else starts[mine]
            cuts = np.searchsorted(mine, size * np.arange(positions.size + 1)).tolist()
            for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
                if a < b:
                    number, start, stored = (array[a:b] for array in places)
                    reads[i].append(
                        Reads(column, rows[mine[a:b]], (number, start, stored), at[a:b])
                    )
        tables = [array.reshape(positions.size, size) for array in (samples, rows, sources)]
        headers = zip(*map(self._rows_of, [*tables, ends.astype(np.int32)]), strict=True)
        tokens = ends[:, -1].tolist()
        for i, (position, header) in enumerate(zip(positions.tolist(), headers, strict=True)):
            used = frame.tokens_at + tokens[i] * frame.token_bytes
            yield Plan(position, header, reads[i], tokens[i], used)

    def _groups(
        self, samples: Ints, sources: Ints, rows: Ints
    ) -> Iterator[tuple[str, Column, Ints, Places]]:
        """(name of the part, column, which of the samples are read from it, their places in it)."""
        for s, join in enumerate(self.sources.by_source):
            mine = np.flatnonzero(sources == s)
            for name, column in {"moments": join.latents, **join.extra}.items():
                yield name, column, mine, column.places(rows[mine])
            chosen = self.order.choose(samples[mine], join.rates)
            for t, column in enumerate(join.texts):
                at = mine[chosen == t]
                yield TOKENS, column, at, column.places(rows[at])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


class Reader:
    """Reads one rank's planned batches into buffers. Used by one thread."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.frame = self.planner.frame
        self._warm, self._disk_reads = 0, _disk_reads()

    def plans(self, position: int, step: int, ahead: int = 1) -> Iterator[Plan]:
        """The batches at `position`, `position + step` and so on, for ever; each is hinted when
        `ahead` others are to be read before it.
        """
        waiting: deque[Plan] = deque()
        for plan in self.planner.plans(position, step):
            if ahead:
                self.hint(plan)
            waiting.append(plan)
            if len(waiting) > ahead:
                yield waiting.popleft()

    def hint(self, plan: Plan) -> None:
        """Say that a batch will be read soon. Columns in a folder are spared it while all that is
        read comes from memory: a hint costs a tenth of reading the row from there.
        """
        for reads in plan.reads:
            if self._warm < WARM or reads.column.store.folder is None:
                with suppress(ShardsError, OSError):  # reading it will say, when its turn has come
                    reads.column.hint(reads.rows, reads.places)

    def fill(self, plan: Plan, buffer: NDArray[np.uint8]) -> None:
        """Read a batch but for its header. Raises CorruptColumn, naming column, shard and row."""
        start = time.perf_counter()
        for reads in plan.reads:
            if reads.column.layout.quantised:
                self._decoded(reads, plan, buffer)
            else:
                reads.column.gather(reads.rows, buffer.data, reads.at, "new", reads.places)
        slow = plan.bytes < SLOW * (time.perf_counter() - start)
        before, self._disk_reads = self._disk_reads, _disk_reads()
        self._warm = 0 if slow or self._disk_reads > before else self._warm + 1

    def _decoded(self, reads: Reads, plan: Plan, buffer: NDArray[np.uint8]) -> None:
        """Read int8 tokens aside, and write them as bfloat16."""
        column, size = reads.column, reads.places[2]
        stored = np.empty(int(size.sum()), np.uint8)
        if not stored.size:
            return
        column.gather(reads.rows, stored.data, np.cumsum(size) - size, "new", reads.places)
        words = stored.view(column.layout.dtype).reshape(-1, *column.layout.unit_shape)
        start = self.frame.tokens_at
        tokens = buffer[start : plan.bytes].view(np.uint16).reshape(-1, *self.frame.token_shape)
        lengths = size // column.layout.unit_bytes
        first = (reads.at - start) // self.frame.token_bytes
        to = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(words))
        for at in range(0, len(words), PIECE):
            tokens[to[at : at + PIECE]] = column.decoded(words[at : at + PIECE])


def _disk_reads() -> int:
    """Blocks that this thread has had read from a disk so far, by itself or ahead."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
