"""Columns to batches: an endless stream in the order of samples, read ahead by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import OrderError
from .join import Join
from .order import Order


@dataclass(slots=True)
class Batch:
    """One rank's part of a global batch."""

    position: int  # samples the run had consumed before this batch
    samples: Tensor  # (B,) int64, global sample numbers: the key of all randomness
    rows: Tensor  # (B,) int64, row ids
    moments: Tensor  # (B, 2C, H, W) fp16, raw: before drawing and normalising
    tokens: Tensor  # (sum of lengths, D) bf16, captions back to back
    cu_seqlens: Tensor  # (B + 1,) int32, where each caption starts; the last is the end


def read_rows(
    join: Join, rows: NDArray[np.int64], check: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(moments, tokens, cu_seqlens) of row ids, as in `Batch`. `check` compares every row's crc."""
    lengths = join.text.lengths(rows)
    moments = torch.empty((len(rows), *join.latents.layout.row_shape), dtype=torch.float16)
    tokens = torch.empty((int(lengths.sum()), join.text_width), dtype=torch.bfloat16)
    join.latents.read_into(rows, moments.numpy(), check)
    join.text.read_into(rows, tokens.view(torch.uint16).numpy(), check)
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(np.cumsum(lengths))
    return moments, tokens, cu_seqlens


def empty_caption(join: Join) -> Tensor:
    """The embedding of the empty caption, (n, D) bf16."""
    return torch.from_numpy(join.text.empty()).view(torch.bfloat16)


def pad_text(
    tokens: Tensor, cu_seqlens: Tensor, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Packed captions -> (text (B, L, D) fp32, mask (B, L) int64 of 0/1); L is `length` or the
    longest caption.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    if length is not None and longest > length:
        raise ValueError(f"a caption of {longest} tokens does not fit {length}")
    place = torch.arange(length or longest, device=tokens.device)
    mask = place[None, :] < lengths[:, None]
    text = tokens.new_zeros((*mask.shape, tokens.shape[1]), dtype=torch.float32)
    text[mask] = tokens.float()
    return text, mask.long()


class Stream(Iterator[Batch]):
    """Endless batches of one rank from `position` on. Its whole state is that one integer.

    The first epoch of a run compares every row with its checksum. An error in the reading thread
    is raised from `next`. Raises OrderError before any data is read if position, batch, lanes and
    world do not fit together. Close it, or use it in `with`.
    """

    def __init__(
        self, join: Join, order: Order, *, position: int, global_batch: int,
        world: int = 1, rank: int = 0, prefetch: int = 2,
    ) -> None:  # fmt: skip
        order.check(position, global_batch, world)
        if len(order.sources) != 1:
            raise OrderError("one join holds one source; the order has several")
        self._args = join, order, global_batch, world, rank
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(position,), daemon=True)
        self._thread.start()

    def _read(self, position: int) -> None:
        join, order, batch, world, rank = self._args
        try:
            while not self._stop.is_set():
                _, rows, samples = order(position, batch, world, rank)
                data = read_rows(join, rows, check=position < order.epoch_samples)
                self._put(Batch(position, torch.from_numpy(samples), torch.from_numpy(rows), *data))
                position += batch
        except Exception as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again: the reading thread has ended
            raise item
        return item

    def close(self) -> None:
        """Stop the reading thread."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
