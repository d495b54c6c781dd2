"""Reads a stream in a process of its own: what tests run in children and under torchrun.

python -m tests.shards.reading FOLDER COUNT OUT   # what each batch holds, as JSON in OUT-RANK
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from shards import open_sources
from shards.read.stream import Batch, Stream

SEED, LANES, BATCH = 1, 8, 64


def stream_of(folder: Path, position: int = 0) -> Stream:
    sources = open_sources(folder / "vae", folder / "text")
    world, rank = (int(os.environ.get(k, v)) for k, v in (("WORLD_SIZE", "1"), ("RANK", "0")))
    return Stream(
        sources, sources.order(SEED, LANES), position=position, global_batch=BATCH, world=world,
        rank=rank,
    )  # fmt: skip


def said(batch: Batch) -> list[Any]:
    """Position, row ids, and a digest of all tensors."""
    digest = hashlib.sha256()
    tokens = batch.tokens.view(torch.int16)
    for tensor in (batch.samples, batch.sources, batch.moments, tokens, batch.cu_seqlens):
        digest.update(tensor.numpy().tobytes())
    return [batch.position, batch.rows.tolist(), digest.hexdigest()]


def read(folder: Path, count: int) -> list[list[Any]]:
    with stream_of(folder) as stream:
        return [said(next(stream)) for _ in range(count)]


def write(folder: Path, count: int, out: Path) -> None:
    out.write_text(json.dumps(read(folder, count)))


class Said(IterableDataset):  # type: ignore[type-arg]
    """A stream inside a worker of a DataLoader."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __iter__(self) -> Iterator[str]:
        yield from map(json.dumps, read(self.folder, self.count))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), Path(f"{sys.argv[3]}-{os.environ.get('RANK', '0')}"))
