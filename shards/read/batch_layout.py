"""What a batch holds and how it is read: sample numbers -> rows of columns -> one flat buffer.

    samples of many batches -> order -> (source, row id) -> caption chosen -> places    `Planner`
    moments | extra columns | tokens                                                    `BatchLayout`
    every row straight to its place in the buffer, one read each                        `Reader`

What can be computed for many batches at once is; what is left for each batch is to read its rows.
"""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShardsError
from ..store.fetchers import fetch_all
from .column import Column
from .join import JoinedColumns
from .objects import Places
from .order import Ints, Order
from .prefetch import Prefetcher

ALIGN = 64  # bytes; every part of a buffer starts at a multiple
CHUNK = 4_096  # samples that are planned at once: order and places then cost 1 % of the reading
REMOTE_CHUNK = 512  # of columns in a store, whose shards are asked for what places follow from
COLUMNS = 16  # that a store is asked about at once
PLANNED = 16  # batches of such columns that are planned, and fetched if they are kept, ahead
WARM = 16  # batches without a disk read or a fetch, after which hints are left out
SLOW = 1e9  # bytes a second; slower, and it is no memory, though the system may not call it a disk
# samples, rows, sources, number of the text column (B,) int64, cu_seqlens (B + 1,) int32
Header = tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor of a batch lies in its buffer."""

    offset: int
    element: str  # one of `format.layout.ELEMENTS`
    shape: tuple[int, ...]
    row_bytes: int


class BatchLayout:
    """The parts of a batch of `size` samples in one flat buffer. Tokens come last, for only they
    differ in length; `capacity` has room for the longest captions.

    Tokens are as they are stored, int8 with their scales too, unless some text columns are of int8
    and others of bfloat16: then all are bfloat16. Rows of one shape that are stored as int8 are
    float16.
    """

    def __init__(self, columns: JoinedColumns, size: int) -> None:
        first = columns.by_source[0]
        self.size, offset = size, 0
        self.parts: dict[str, Part] = {}
        for name, column in {"moments": first.latents, **first.extra}.items():
            layout = column.layout.as_read
            shape = (size, *layout.row_shape)
            self.parts[name] = Part(offset, layout.element, shape, layout.unit_bytes)
            offset = -(-(offset + size * layout.unit_bytes) // ALIGN) * ALIGN
        layouts = [column.layout for column in columns.texts]
        layout = next((each for each in layouts if not each.quantised), layouts[0])
        self.token_element, self.token_shape = layout.element, layout.unit_shape
        self.token_bytes = layout.unit_bytes
        self.tokens_at = offset
        self.capacity = offset + size * columns.max_tokens * self.token_bytes


@dataclass(frozen=True, slots=True)
class ReadOp:
    """Rows of one column, and the byte of the buffer that each is to start at."""

    column: Column
    rows: Ints  # row ids
    places: Places  # where the column has them
    at: Ints


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One rank's part of a global batch, before it is read."""

    position: int
    header: Header
    reads: list[ReadOp]
    tokens: int
    bytes: int  # of the buffer that are used


class Planner:
    """The batches of one rank in order, each by its position."""

    def __init__(
        self, columns: JoinedColumns, order: Order, batch: int, world: int = 1, rank: int = 0
    ) -> None:
        self.columns, self.order = columns, order
        self.places = order.places(batch, world, rank)
        self.layout = BatchLayout(columns, self.places.size)
        each = [column for source in columns.by_source for column in source.columns.values()]
        self.remote = [column.store for column in each if column.store.folder is None]

    def plans(self, position: int, step: int) -> Iterator[BatchPlan]:
        """Yields the batches at `position`, `position + step` and so on, for ever.

        The first is planned alone, for it is waited for; then twice as many at a time, up to 4,096
        samples, or 512 of columns in a store.
        """
        chunk = REMOTE_CHUNK if self.remote else CHUNK
        count, most = 1, max(1, chunk // self.places.size)
        while True:
            yield from self._plan(position + step * np.arange(count))
            position += step * count
            count = min(2 * count, most)

    def _plan(self, positions: Ints) -> Iterator[BatchPlan]:
        layout, size = self.layout, self.places.size
        samples = (positions[:, None] + self.places).ravel()
        sources, rows = self.columns.locate(*self.order.at(samples))
        groups = self._groups(samples, sources, rows)
        texts, lengths = np.zeros(rows.size, np.int64), np.zeros(rows.size, np.int64)
        for part, text, column, samples_of, places in groups:
            if part is None:
                texts[samples_of] = text
                lengths[samples_of] = places.size // column.layout.unit_bytes
        ends = np.zeros((positions.size, size + 1), np.int64)
        np.cumsum(lengths.reshape(positions.size, size), axis=1, out=ends[:, 1:])
        token_starts = layout.tokens_at + ends[:, :-1].ravel() * layout.token_bytes
        reads: list[list[ReadOp]] = [[] for _ in positions]
        for part, _, column, samples_of, places in groups:
            row_starts = part.offset + samples_of % size * part.row_bytes if part else None
            at = token_starts[samples_of] if row_starts is None else row_starts
            cuts = np.searchsorted(samples_of, size * np.arange(positions.size + 1)).tolist()
            for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
                if a < b:
                    part_places = places.at(slice(a, b))
                    reads[i].append(ReadOp(column, rows[samples_of[a:b]], part_places, at[a:b]))
        tables = [array.reshape(positions.size, size) for array in (samples, rows, sources, texts)]
        tokens = ends[:, -1].tolist()
        for i, header in enumerate(zip(*tables, ends.astype(np.int32), strict=True)):
            end = layout.tokens_at + tokens[i] * layout.token_bytes
            yield BatchPlan(int(positions[i]), header, reads[i], tokens[i], end)

    def _groups(
        self, samples: Ints, sources: Ints, rows: Ints
    ) -> list[tuple[Part | None, int, Column, Ints, Places]]:
        """Returns (part, or None for tokens; number of the text column; column; which samples are
        read from it; their places in it). What a store is asked for the places is asked for all
        columns at once.
        """
        groups: list[tuple[Part | None, int, Column, Ints]] = []
        text = 0
        for s, source in enumerate(self.columns.by_source):
            of_source = np.flatnonzero(sources == s)
            for name, column in {"moments": source.latents, **source.extra}.items():
                groups.append((self.layout.parts[name], 0, column, of_source))
            choice = self.order.choose(samples[of_source], source.rates)
            for t, column in enumerate(source.texts):
                groups.append((None, text, column, of_source[choice == t]))
                text += 1

        def places(group: tuple[Part | None, int, Column, Ints]) -> Places:
            return group[2].places(rows[group[3]], whole=True)

        if not any(column.asks_for_places(rows[these]) for _, _, column, these in groups):
            return [(*group, places(group)) for group in groups]
        with ThreadPoolExecutor(COLUMNS) as pool:
            all_places = fetch_all(pool, places, groups)
        return [(*group, each) for group, each in zip(groups, all_places, strict=True)]


class Reader:
    """Reads one rank's planned batches into buffers. Used by one thread."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.layout = planner, planner.layout
        self._warm, self._reads = 0, self._count_reads()
        self._hinted = False  # whether batches are, before they are read

    def plans(self, position: int, step: int, ahead: int = 1) -> Iterator[BatchPlan]:
        """Yields the batches at `position`, `position + step` and so on, for ever; each is hinted
        when `ahead` others are to be read before it. Those of columns in a store are planned by a
        thread, which waits for what the store knows of their shards.
        """
        waiting: deque[BatchPlan] = deque()
        self._hinted = ahead > 0
        with ExitStack() as stack:
            plans = self.planner.plans(position, step)
            planned: Prefetcher[BatchPlan] | None = None
            if self.planner.remote:
                plans = planned = Prefetcher(self._fetched_early(plans), PLANNED, "plan")
                stack.callback(planned.close)
            while True:
                while not waiting or (len(waiting) <= ahead and (not planned or planned.wait(0))):
                    plan = next(plans, None)
                    if plan is None:  # closed by another thread
                        return
                    if ahead:
                        self.hint(plan)
                    waiting.append(plan)
                yield waiting.popleft()

    def _fetched_early(self, plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
        """Yields batches, hinted as soon as they are planned where what is fetched is kept: so many
        requests are always on their way.
        """
        for plan in plans:
            if self._hinted:
                self.hint(plan, early=True)
            yield plan

    def hint(self, plan: BatchPlan, early: bool = False) -> None:
        """Says that a batch will be read soon, or `early` to the stores that keep what they fetch. It is
        left out while nothing is read from a disk or fetched: a hint costs a tenth of reading the row
        from memory.
        """
        cold = self._warm < WARM
        for op in plan.reads:
            store = op.column.store
            due = cold and store.keeps if early else cold or not (store.folder or store.keeps)
            if due:
                with suppress(ShardsError, OSError):  # reading it will say, when its turn has come
                    op.column.hint(op.rows, op.places)

    def fill(self, plan: BatchPlan, buffer: NDArray[np.uint8]) -> None:
        """Reads a batch but for its header. Raises CorruptColumn, naming column, shard and row."""
        start = time.perf_counter()
        for op in plan.reads:
            layout = op.column.layout
            if layout.quantised and not (layout.ragged and self.layout.token_element == "int8"):
                self._dequantise(op, buffer)
            else:
                op.column.gather(op.rows, buffer.data, op.at, "new", op.places)
        slow = plan.bytes < SLOW * (time.perf_counter() - start)
        before, self._reads = self._reads, self._count_reads()
        self._warm = 0 if slow or self._reads > before else self._warm + 1

    def _dequantise(self, op: ReadOp, buffer: NDArray[np.uint8]) -> None:
        """Reads int8 rows, or int8 tokens for a batch that has bfloat16 ones too, and writes them as
        16-bit numbers.
        """
        values = op.column.decoded(op.column.read(op.rows, "new", self._hinted))
        ends = np.cumsum(op.column.lengths(op.rows))
        rows = np.split(values, ends[:-1]) if op.column.layout.ragged else values
        for at, row in zip(op.at.tolist(), rows, strict=True):
            buffer[at : at + row.nbytes] = row.reshape(-1).view(np.uint8)

    def _count_reads(self) -> int:
        """Returns the blocks that this thread has had read from a disk so far, by itself or ahead, and what
        the stores have fetched.
        """
        blocks = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        return blocks + sum(store.fetches for store in self.planner.remote)
