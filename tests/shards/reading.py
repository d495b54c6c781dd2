"""Read a stream in a process of its own: what tests run in children, under torchrun, and kill.

python -m tests.shards.reading FOLDER WORKERS COUNT [OUT]   # what each batch holds, as JSON
python -m tests.shards.reading FOLDER WORKERS hold          # prints process ids, then waits
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from shards import open_sources
from shards.read.stream import Batch, Stream

SEED, LANES, BATCH = 1, 8, 64


def stream_of(folder: Path, workers: int, position: int = 0) -> Stream:
    sources = open_sources(folder / "vae", folder / "text")
    world, rank = (int(os.environ.get(k, v)) for k, v in (("WORLD_SIZE", "1"), ("RANK", "0")))
    return Stream(
        sources, sources.order(SEED, LANES), position=position, global_batch=BATCH, world=world,
        rank=rank, workers=workers,
    )  # fmt: skip


def said(batch: Batch) -> list[Any]:
    """Position, row ids, and a digest of all tensors."""
    digest = hashlib.sha256()
    tokens = batch.tokens.view(torch.int16)
    for tensor in (batch.samples, batch.sources, batch.moments, tokens, batch.cu_seqlens):
        digest.update(tensor.numpy().tobytes())
    return [batch.position, batch.rows.tolist(), digest.hexdigest()]


def read(folder: Path, workers: int, count: int) -> list[list[Any]]:
    with stream_of(folder, workers) as stream:
        return [said(next(stream)) for _ in range(count)]


def write(folder: Path, workers: int, count: int, out: Path) -> None:
    out.write_text(json.dumps(read(folder, workers, count)))


class Said(IterableDataset):  # type: ignore[type-arg]
    """A stream inside a worker of a DataLoader."""

    def __init__(self, folder: Path, workers: int, count: int) -> None:
        self.folder, self.workers, self.count = folder, workers, count

    def __iter__(self) -> Iterator[str]:
        yield from map(json.dumps, read(self.folder, self.workers, self.count))


def hold(folder: Path, workers: int) -> None:
    """Print the ids of this process's workers, and of a fork of it; then wait to be killed."""
    stream = stream_of(folder, workers)
    next(stream)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    fork = os.fork()  # it holds copies of all sockets
    if fork:
        print(*children, fork, flush=True)
    time.sleep(60)


if __name__ == "__main__":
    place, processes, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if what == "hold":
        hold(place, processes)
    elif len(sys.argv) > 4:
        write(place, processes, int(what), Path(f"{sys.argv[4]}-{os.environ.get('RANK', '0')}"))
