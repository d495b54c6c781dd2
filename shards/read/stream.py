"""Columns to batches: an endless stream in the order of samples, read ahead by a thread.

Buffers are used again: fresh memory would double the price of a read, for the kernel has to clear
it page by page. A buffer is taken again only when no tensor lies over it, so a batch, or a part of
it, may be kept for as long as one likes.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import OrderError
from ..format.layout import SCALE_BYTES
from ..processes import allow_open_files
from .batch_layout import BatchPlan, Planner, Reader
from .join import JoinedColumns
from .order import Order
from .prefetch import Prefetcher
from .row_tables import row_ids

MOST_READY = 256  # batches; more would be memory for nothing
TILE = 128  # tokens whose fp32 stays in a CPU's cache; whole captions take it ten times as long


@dataclass(frozen=True, slots=True)
class Int8Tokens:
    """T tokens of int8 captions as they are stored, back to back, to be multiplied on the device
    that uses them; see `format.int8`.
    """

    stored: Tensor  # (T, D + 4) int8: values, then the bytes of the token's float32 scale
    channels: Tensor  # (K, D) float32, the channel scales of each text column
    column: Tensor  # (T,) int64, the text column of each token

    def dequantised(self) -> Tensor:
        """Returns (T, D) bf16, value * token scale * channel scale in fp32, rounded to nearest even:
        the same bits on every device, and as `format.int8.dequantise`.
        """
        count, width = self.stored.shape
        tokens = self.stored.new_empty((count, width - SCALE_BYTES), dtype=torch.bfloat16)
        scale = self.stored[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        tile = TILE if tokens.device.type == "cpu" else max(count, 1)
        for part in map(slice, range(0, count, tile), range(tile, count + tile, tile)):
            channel = self.channels[self.column[part]] if len(self.channels) > 1 else self.channels
            values = self.stored[part, :-SCALE_BYTES] * scale[part].view(torch.float32)
            tokens[part] = values.mul_(channel)
        return tokens

    def __getitem__(self, tokens: slice) -> Int8Tokens:
        return Int8Tokens(self.stored[tokens], self.channels, self.column[tokens])

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def each(self, act: Callable[[Tensor], Tensor]) -> Int8Tokens:
        """Returns the same with each tensor replaced, as by its copy on a device."""
        return Int8Tokens(act(self.stored), act(self.channels), act(self.column))


@dataclass(slots=True)
class Batch:
    """One rank's part of a global batch. Pinned memory where the stream was asked for it."""

    position: int  # samples the run had consumed before this batch
    samples: Tensor  # (B,) int64, global sample numbers: the key of all randomness
    rows: Tensor  # (B,) int64, row ids in their sources
    moments: Tensor  # (B, 2C, H, W) fp16, not normalised yet; (B, C, H, W) where they are latents
    text: Tensor | Int8Tokens  # captions back to back, `tokens` or what they are made of
    cu_seqlens: Tensor  # (B + 1,) int32, where each caption starts; the last is the end
    sources: Tensor = None  # type: ignore[assignment]  # (B,) int64, which source; None: all 0
    extra: dict[str, Tensor] = field(default_factory=dict)  # further columns, (B, *row)

    def __post_init__(self) -> None:
        if self.sources is None:
            self.sources = torch.zeros_like(self.rows)

    @property
    def tokens(self) -> Tensor:
        """(sum of lengths, D) bf16, captions back to back, made anew of int8; (sum of lengths,)
        int32 of ids.
        """
        return self.text if isinstance(self.text, Tensor) else self.text.dequantised()

    @property
    def lengths(self) -> Tensor:
        """(B,) int32, tokens of each caption."""
        return self.cu_seqlens.diff()


def read_rows(
    join: JoinedColumns, rows: ArrayLike, check: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (moments, tokens, cu_seqlens) of row ids, as in `Batch`, with the captions of the first
    text column. `check` compares every row's crc.
    """
    rows = row_ids(rows)
    moments = torch.from_numpy(join.latents.decoded(join.latents.read(rows, check)))
    words = join.text.decoded(join.text.read(rows, check))
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(np.cumsum(join.text.lengths(rows)))
    return moments, _as_tokens(words), cu_seqlens


def empty_caption(join: JoinedColumns) -> Tensor:
    """The empty caption: its embedding (n, D) bf16, or its ids (n,) int32."""
    return _as_tokens(join.text.empty())


def _as_tokens(words: NDArray[Any]) -> Tensor:
    """Returns a text column's values as their tensor: bfloat16 bits as such, ids as they are."""
    tokens = torch.from_numpy(words)
    return tokens if tokens.dtype == torch.int32 else tokens.view(torch.bfloat16)


def pad_text(
    tokens: Tensor, cu_seqlens: Tensor, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns packed captions as (text (B, L, D) fp32, mask (B, L) int64 of 0/1); L is `length` or
    the longest caption, 1 at least.
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

    `prefetch`: batches that a thread has ready ahead; `ahead`: batches before its turn that each is
    hinted to the disk or fetched from a store, at least (0: never). `pin`: page-locked memory, for
    copies to a GPU that do not wait.

    A row is compared with its checksum when this process first reads it. What goes wrong while
    reading is raised from `next`. Raises OrderError before any data is read if position, batch,
    lanes and world do not fit together. Close it, or use it in `with`. A stream belongs to the
    process that made it: make it after a fork, or in the worker of a DataLoader. It raises the
    process's limit of open files as far as it may.
    """

    def __init__(
        self, columns: JoinedColumns, order: Order, *, position: int, global_batch: int,
        world: int = 1, rank: int = 0, prefetch: int = 2, ahead: int = 1, pin: bool = False,
    ) -> None:  # fmt: skip
        order.check(position, global_batch, world)
        allow_open_files()
        if len(order.sources) != len(columns.valid_masks):
            raise OrderError(
                f"an order of {len(order.sources)} source{'s' * (len(order.sources) > 1)} for "
                f"columns of {len(columns.valid_masks)}: make it by `JoinedColumns.order`"
            )
        pairs = zip(order.sources, columns.valid_masks, strict=True)
        if beyond := sum(source.rows_beyond(mask) for source, mask in pairs):
            raise OrderError(
                f"the order has {beyond:,} rows that are not valid in all of these columns. Make it by "
                "their own `JoinedColumns.order`; for the same rows of several joins, open each with "
                "`also` the columns of the others"
            )
        if not 1 <= prefetch <= MOST_READY or ahead < 0:
            raise OrderError(
                f"prefetch {prefetch} from 1 to {MOST_READY} and ahead {ahead} >= 0 expected"
            )
        self.position, self._batch, self._owner = position, global_batch, os.getpid()
        self._closed = False
        reader = Reader(Planner(columns, order, global_batch, world, rank))
        scales = [c.spec.quantisation["channel"] for c in columns.texts if c.spec.quantisation]
        channels = torch.tensor(scales, dtype=torch.float32)
        buffers = _Buffers(prefetch + 2)  # with one being read and one in use
        plans = reader.plans(position, global_batch, ahead)
        batches = (_read_batch(reader, plan, channels, buffers, pin) for plan in plans)
        self._batches = Prefetcher(batches, prefetch, "stream")

    def __next__(self) -> Batch:
        if os.getpid() != self._owner:
            raise RuntimeError(
                "this stream was made in another process, from which this one was forked. Make a "
                "stream of its own here"
            )
        if self._closed:
            raise StopIteration
        batch = next(self._batches)
        assert batch.position == self.position
        self.position += self._batch
        return batch

    def close(self) -> None:
        """Stops reading. Batches that were handed out stay as they are."""
        self._closed = True
        if os.getpid() == self._owner:
            self._batches.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_batch(
    reader: Reader, plan: BatchPlan, channels: Tensor, buffers: _Buffers, pin: bool
) -> Batch:
    """Reads a planned batch into a flat buffer of bytes, over which its large tensors lie: the buffer
    lives as long as one of them.
    """
    layout = reader.layout
    if pin:  # torch keeps such memory, and hands it out again when no copy to the GPU uses it
        memory = torch.empty(plan.bytes, dtype=torch.uint8, pin_memory=True)
    else:
        memory = torch.from_numpy(buffers.take(layout.capacity))
    reader.fill(plan, memory.numpy())

    def tensor(offset: int, element: str, shape: tuple[int, ...]) -> Tensor:
        dtype: torch.dtype = getattr(torch, element)
        end = offset + dtype.itemsize * math.prod(shape)
        return memory[offset:end].view(dtype).view(shape)

    samples, rows, sources, texts, ends = map(torch.from_numpy, plan.header)
    extra = {name: tensor(p.offset, p.element, p.shape) for name, p in layout.parts.items()}
    moments = extra.pop("moments")
    stored = tensor(layout.tokens_at, layout.token_element, (plan.tokens, *layout.token_shape))
    text: Tensor | Int8Tokens = stored
    if stored.dtype == torch.int8:
        text = Int8Tokens(stored, channels, texts.repeat_interleave(ends.diff()))
    return Batch(plan.position, samples, rows, moments, text, ends, sources, extra)


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
