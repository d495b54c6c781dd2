"""Columns to batches: an endless stream in the order of samples, read ahead by a thread or by
processes.

Buffers are used again: fresh memory would double the price of a read, for the kernel has to clear
it page by page. One is taken again only when no tensor lies over it, so a batch, or a part of it,
may be kept for as long as one likes.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import OrderError
from .batch_layout import Frame, Header, Plan, Planner, Reader
from .join import JoinedColumns
from .order import Order
from .prefetch import Prefetcher
from .workers import Task, Workers

MOST_READY = 256  # batches; more would be memory for nothing
TYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}


@dataclass(slots=True)
class Batch:
    """One rank's part of a global batch. Pinned memory where the stream was asked for it."""

    position: int  # samples the run had consumed before this batch
    samples: Tensor  # (B,) int64, global sample numbers: the key of all randomness
    rows: Tensor  # (B,) int64, row ids in their sources
    moments: Tensor  # (B, 2C, H, W) fp16, not normalised yet; (B, C, H, W) where they are latents
    tokens: (
        Tensor  # (sum of lengths, D) bf16, captions back to back; (sum of lengths,) int32 of ids
    )
    cu_seqlens: Tensor  # (B + 1,) int32, where each caption starts; the last is the end
    sources: Tensor = None  # type: ignore[assignment]  # (B,) int64, which source; None: all 0
    extra: dict[str, Tensor] = field(default_factory=dict)  # further columns, (B, *row)

    def __post_init__(self) -> None:
        if self.sources is None:
            self.sources = torch.zeros_like(self.rows)

    @property
    def lengths(self) -> Tensor:
        """(B,) int32, tokens of each caption."""
        return self.cu_seqlens.diff()


def batch_of(
    frame: Frame, position: int, header: Header, count: int, memory: NDArray[np.uint8] | Tensor
) -> Batch:
    """A batch of `count` tokens that was read into a flat buffer of bytes; `header`: its small
    tensors. The large ones lie over the buffer, and it lives as long as one of them.
    """

    def over(offset: int, element: str, shape: tuple[int, ...]) -> Tensor:
        dtype, count = TYPES[element], math.prod(shape)
        if isinstance(memory, Tensor):  # pinned: its storage must stay the one that torch knows
            return memory[offset : offset + dtype.itemsize * count].view(dtype).view(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    samples, rows, sources, ends = header
    parts = {name: over(p.offset, p.element, p.shape) for name, p in frame.parts.items()}
    tokens = over(frame.tokens_at, frame.token_element, (count, *frame.token_shape))
    return Batch(position, samples, rows, parts.pop("moments"), tokens, ends, sources, parts)


def read_rows(
    join: JoinedColumns, rows: NDArray[np.int64], check: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(moments, tokens, cu_seqlens) of row ids, as in `Batch`, with the captions of the first text
    column. `check` compares every row's crc.
    """
    lengths = join.text.lengths(rows)
    moments = torch.empty((len(rows), *join.latents.layout.row_shape), dtype=torch.float16)
    join.latents.read_into(rows, moments.numpy(), check)
    words = join.text.decoded(join.text.read(rows, check))
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(np.cumsum(lengths))
    return moments, _as_tokens(words), cu_seqlens


def empty_caption(join: JoinedColumns) -> Tensor:
    """The empty caption: its embedding (n, D) bf16, or its ids (n,) int32."""
    return _as_tokens(join.text.empty())


def _as_tokens(words: NDArray[Any]) -> Tensor:
    """Words of a text column as its tensor: bfloat16 bits as such, ids as they are."""
    tokens = torch.from_numpy(words)
    return tokens if tokens.dtype == torch.int32 else tokens.view(torch.bfloat16)


def pad_text(
    tokens: Tensor, cu_seqlens: Tensor, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Packed captions -> (text (B, L, D) fp32, mask (B, L) int64 of 0/1); L is `length` or the
    longest caption, 1 at least.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    if length is not None and longest > length:
        raise ValueError(f"a caption of {longest} tokens does not fit {length}")
    place = torch.arange(length or max(longest, 1), device=tokens.device)
    mask = place[None, :] < lengths[:, None]
    text = tokens.new_zeros((*mask.shape, tokens.shape[1]), dtype=torch.float32)
    text[mask] = tokens.float()
    return text, mask.long()


class Stream(Iterator[Batch]):
    """Endless batches of one rank from `position` on. Its whole state is that one integer:
    `stream.position` is that of the next batch.

    `workers`: 0 reads in a thread, N in as many processes; the batches are the same. `prefetch`:
    batches that are ready ahead; `ahead`: batches before its turn that each is hinted to the disk
    or fetched into the cache (0: never). `pin`: page-locked memory, for copies to a GPU that do not
    wait.

    A row is compared with its checksum when this process, or the worker, first reads it. What goes
    wrong while reading is raised from `next`; WorkerDied if a process was killed. Raises OrderError before any data is
    read if position, batch, lanes and world do not fit together. Close it, or use it in `with`. A
    stream belongs to the process that made it: make it after a fork, or in the worker of a
    DataLoader.
    """

    def __init__(
        self, join: JoinedColumns, order: Order, *, position: int, global_batch: int,
        world: int = 1, rank: int = 0, prefetch: int = 2, workers: int = 0, ahead: int = 1,
        pin: bool = False,
    ) -> None:  # fmt: skip
        order.check(position, global_batch, world)
        if len(order.sources) != len(join.valid_masks):
            raise OrderError(
                f"an order of {len(order.sources)} source{'s' * (len(order.sources) > 1)} for "
                f"columns of {len(join.valid_masks)}: make it by `JoinedColumns.order`"
            )
        if not 1 <= prefetch <= MOST_READY or workers < 0 or ahead < 0:
            raise OrderError(
                f"prefetch {prefetch} from 1 to {MOST_READY}, workers {workers} >= 0 and ahead "
                f"{ahead} >= 0 expected"
            )
        self.position, self._batch, self._owner = position, global_batch, os.getpid()
        self._reading: _Thread | _Processes
        if workers:
            task = Task(join, order, global_batch, world, rank, position, global_batch, ahead)
            self._reading = _Processes(task, workers, prefetch, pin)
        else:
            planner = Planner(join, order, global_batch, world, rank, _rows_of)
            self._reading = _Thread(Reader(planner), position, global_batch, prefetch, ahead, pin)
        self._error: BaseException | None = None
        self._closed = False

    def __next__(self) -> Batch:
        if os.getpid() != self._owner:
            raise RuntimeError(
                "this stream was made in another process, from which this one was forked. Make a "
                "stream of its own here"
            )
        if self._closed:
            raise StopIteration
        if self._error is not None:
            raise self._error
        try:
            batch = self._reading.take(self.position)
        except Exception as error:
            self._error = error  # for whoever asks again: nobody reads any more
            raise
        self.position += self._batch
        return batch

    def close(self) -> None:
        """Stop reading. Batches that were handed out stay as they are."""
        self._closed = True
        if os.getpid() == self._owner:
            self._reading.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Buffers:
    """Memory for batches, taken again when the last tensor over it is gone."""

    def __init__(self, spare: int) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=spare)

    def take(self, size: int) -> NDArray[np.uint8]:
        """A buffer of `size` bytes with room in it; only pages that are written take memory."""
        try:
            memory = self._free.pop()  # the one used last is in the cache
        except IndexError:
            memory = _aligned(size)
        buffer = memory[:]  # an object of its own: it dies with the last tensor over it
        weakref.finalize(buffer, self._free.append, memory).atexit = False
        return buffer


def _aligned(size: int) -> NDArray[np.uint8]:
    """Memory at a multiple of 64 bytes.

    numpy's starts 16 bytes into a page and rows of a column at the start of one; copies between
    such places run at 0.4 of the speed on some AMD processors.
    """
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


class _Thread:
    """A thread that reads batches ahead."""

    def __init__(
        self, reader: Reader, position: int, step: int, prefetch: int, ahead: int, pin: bool
    ) -> None:
        buffers = _Buffers(prefetch + 2)  # with one being read and one in use
        plans = reader.plans(position, step, ahead)
        made = (_batch(reader, plan, buffers, pin) for plan in plans)
        self._batches = Prefetcher(made, prefetch, "stream")
        self.close = self._batches.close

    def take(self, position: int) -> Batch:
        batch = next(self._batches)
        assert batch.position == position
        return batch


def _rows_of(table: NDArray[Any]) -> Sequence[Tensor]:
    """(n, ...) -> n tensors, far cheaper together than one by one."""
    return torch.from_numpy(table).unbind()


def _batch(reader: Reader, plan: Plan, buffers: _Buffers, pin: bool) -> Batch:
    if pin:  # torch keeps such memory, and hands it out again when no copy to the GPU uses it
        pinned = torch.empty(plan.bytes, dtype=torch.uint8, pin_memory=True)
        reader.fill(plan, pinned.numpy())
        return batch_of(reader.frame, plan.position, plan.header, plan.tokens, pinned)
    memory = buffers.take(reader.frame.capacity)
    reader.fill(plan, memory)
    return batch_of(reader.frame, plan.position, plan.header, plan.tokens, memory)


class _Processes:
    """Worker processes, and their batches as tensors."""

    def __init__(self, task: Task, workers: int, prefetch: int, pin: bool) -> None:
        size = task.order.places(task.global_batch, task.world, task.rank).size
        self._frame, self._pin = Frame(task.sources, size), pin
        self._workers = Workers(task, workers, self._frame.capacity, prefetch)
        self.close = self._workers.close

    def take(self, position: int) -> Batch:
        memory = self._workers.take()
        arrays = self._frame.header(memory)
        header: Any = tuple(map(torch.from_numpy, arrays))
        batch = batch_of(self._frame, position, header, int(arrays[3][-1]), memory)
        if self._pin:
            batch.moments, batch.tokens = batch.moments.pin_memory(), batch.tokens.pin_memory()
            batch.extra = {name: values.pin_memory() for name, values in batch.extra.items()}
        return batch
