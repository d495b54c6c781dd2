"""The samples that every reader of the bench is given, and the batch that every reader must make.

A sample is 0.5 MB: a 32 x 32 x 32 float16 row of moments and 1 to 256 tokens (116 on average) of
2,048 bfloat16 words. Each follows from (seed, row) alone, so any environment can make it again.

Needs numpy and torch only: the peers' environment runs this file too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH = 64
BUFFERS = 4  # batches that stand in memory at once: one read, two ready, one in use
MAX_TOKENS = 256

Array = NDArray[Any]


class Batch(NamedTuple):
    """A ready batch in memory that the reader owns; the text is None where one column is read."""

    moments: Tensor  # (B, 2C, H, W) fp16
    tokens: Tensor | None = None  # (sum of lengths, D) bf16, captions back to back
    cu_seqlens: Tensor | None = None  # (B + 1,) int32


class Samples:
    """What stands in the stores: `rows` samples of a shape. Tests make them smaller."""

    def __init__(
        self, rows: int, shape: Sequence[int] = (32, 32, 32), width: int = 2048, seed: int = 0
    ) -> None:
        if rows < BATCH or rows % BATCH:
            raise ValueError(f"{rows} rows: a multiple of {BATCH} expected")
        self.rows, self.shape, self.width, self.seed = rows, tuple(shape), width, seed
        share = np.random.default_rng([seed, rows]).beta(2.4, 2.9, rows)  # mean 0.453
        self.lengths = np.clip(np.rint(share * MAX_TOKENS), 1, MAX_TOKENS).astype(np.int64)

    def record(self) -> dict[str, Any]:
        """The parameters, as JSON; `Samples(**record)` is the same set."""
        return {
            "rows": self.rows,
            "shape": list(self.shape),
            "width": self.width,
            "seed": self.seed,
        }

    def __getitem__(self, row: int) -> tuple[Array, Array]:
        """(moments (2C, H, W) float16, tokens (length, D) bfloat16 as uint16) of a row.

        Random signs and mantissas, magnitudes of 1/8 to 2: finite, and no codec's easy prey.
        """
        generator = np.random.default_rng([self.seed, row])
        size, length = int(np.prod(self.shape)), int(self.lengths[row])
        words = generator.integers(0, 2**16, size + length * self.width, np.uint16)
        moments = ((words[:size] & 0x8FFF) | 0x3000).view(np.float16).reshape(self.shape)
        return moments, ((words[size:] & 0x81FF) | 0x3E00).reshape(length, self.width)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        return (self[row] for row in range(self.rows))

    def row_bytes(self, columns: int) -> int:
        """Payload of all rows, of the moments alone or of both columns."""
        moments = 2 * int(np.prod(self.shape)) * self.rows
        return moments + (2 * self.width * int(self.lengths.sum()) if columns > 1 else 0)


def aligned(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory for 2-byte values of this shape, flat, at a multiple of 64 bytes.

    By numpy, which asks the kernel for huge pages as torch does not (15 % of a copy of cached
    pages); but its memory starts 16 bytes into a page, where copies from the start of a page run at
    0.4 of the speed on some AMD processors.
    """
    size = 2 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    return torch.from_numpy(memory[-memory.ctypes.data % 64 :][:size])


class Ring:
    """Reused memory for the batches of a reader that hands over rows; a batch stands until
    `BUFFERS` more were made.
    """

    def __init__(self, samples: Samples, columns: int) -> None:
        longest = int(np.sort(samples.lengths)[-BATCH:].sum()) if columns > 1 else 0
        moments, tokens = (BATCH, *samples.shape), (longest, samples.width)
        self._memory = [
            (
                aligned(moments).view(torch.float16).view(moments),
                aligned(tokens).view(torch.bfloat16).view(tokens),
                torch.zeros(BATCH + 1, dtype=torch.int32),
            )
            for _ in range(BUFFERS)
        ]
        self._columns, self._turn = columns, 0

    def next(self, lengths: Array | None = None) -> Batch:
        """The next place, for texts of these lengths (B,)."""
        moments, tokens, cu_seqlens = self._memory[self._turn]
        self._turn = (self._turn + 1) % BUFFERS
        if lengths is None:
            return Batch(moments)
        np.cumsum(lengths, out=cu_seqlens.numpy()[1:])
        return Batch(moments, tokens[: int(cu_seqlens[-1])], cu_seqlens)

    def pack(self, rows: Iterable[tuple[Array, Array]]) -> Iterator[Batch]:
        """Collate (moments, tokens as 16-bit words) pairs into batches: one copy of each."""
        moments, texts = [], []
        for row, text in rows:
            moments.append(row)
            texts.append(text.view(np.uint16))
            if len(moments) == BATCH:
                batch = self.next(np.array([len(text) for text in texts]))
                assert batch.tokens is not None
                np.stack(moments, out=batch.moments.numpy())
                np.concatenate(texts, out=batch.tokens.view(torch.uint16).numpy())
                moments, texts = [], []
                yield batch


def row_digest(moments: Any, tokens: Any) -> str:
    """sha256 of the bytes of a row; `tokens` is None where one column is read."""
    digest = hashlib.sha256(np.ascontiguousarray(moments).data)
    if tokens is not None:
        digest.update(np.ascontiguousarray(tokens).data)
    return digest.hexdigest()


def digests(batch: Batch) -> list[str]:
    """The digest of each row of a batch."""
    moments = batch.moments.numpy()
    if batch.tokens is None or batch.cu_seqlens is None:
        return [row_digest(row, None) for row in moments]
    spans = pairwise(batch.cu_seqlens.tolist())
    words = batch.tokens.view(torch.uint16).numpy()
    return [row_digest(row, words[a:b]) for row, (a, b) in zip(moments, spans, strict=True)]


def digest_of_all(rows: Iterable[str]) -> str:
    """One digest of a pass over rows in any order: a row lost, doubled or changed changes it."""
    return hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()
