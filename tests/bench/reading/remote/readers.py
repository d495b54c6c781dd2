"""This program and plain requests of its client, reading two columns of an object store.

python -m tests.bench.reading.remote.readers cache URL FOLDER SAMPLES '[[1, true]]' False
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shards import open_join
from shards.format.atomic import pieces as written_pieces
from shards.read.join import JoinedColumns
from shards.read.stream import Batch, Stream
from shards.tools.copy import stage

from ..samples import BATCH, Samples
from .passes import Answers, serve

PAGE, PLAIN, ROWS = 4 << 20, 16, 32  # bytes of a plain request; requests at once
Piece = tuple[Any, int, int]  # open object, first byte, bytes


class Epochs:
    """A stream over a join of both columns, epoch after epoch."""

    def __init__(self, url: str, samples: Samples) -> None:
        self._join = open_join(f"{url}/latents", f"{url}/text")
        self._order, self._batches = self._join.order(), samples.rows // BATCH
        self._stream = self._start(0)

    def _start(self, position: int) -> Stream:
        return Stream(self._join, self._order, position=position, global_batch=BATCH)

    def __call__(self, fresh: bool) -> Iterator[Batch]:
        if fresh and self._stream.position:
            self._stream.close()
            self._stream = self._start(self._stream.position)
        return islice(self._stream, self._batches)


def staged(url: str, folder: Path, samples: Samples) -> Epochs:
    """The same, of copies in a folder, which are made first."""
    latents, _ = stage([f"{url}/latents", f"{url}/text"], folder)
    return Epochs(str(latents.parent), samples)


def whole_objects(join: JoinedColumns, samples: Samples) -> list[Piece]:
    """All objects in pieces of 4 MiB."""
    pieces = []
    for column in (join.latents, join.text):
        objects = column.places(np.arange(samples.rows)).object
        for handle in map(column._objects.open, np.unique(objects).tolist()):
            pieces += [
                (handle, at, min(PAGE, handle.size - at)) for at in range(0, handle.size, PAGE)
            ]
    return pieces


def rows_in_order(join: JoinedColumns, samples: Samples) -> list[Piece]:
    """Both values of each row, in the order of the first epoch."""
    ids = join.order().at(np.arange(samples.rows))[1]
    columns = [
        [(column._objects.open(n), start, size) for n, start, size in column.places(ids).rows()]
        for column in (join.latents, join.text)
    ]
    return [piece for pair in zip(*columns, strict=True) for piece in pair if piece[2]]


def plain_requests(way: str, url: str, folder: Path, samples: Samples, answers: Answers) -> None:
    """Fetches everything by requests of 4 MiB, which with "kept" are written to files of a folder, or
    the rows of an epoch one by one. What is to be fetched is known before the clock starts.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def bring(piece: Piece) -> int:
        handle, first, count = piece
        data = handle.fetch(first, count)
        if way == "kept":
            with open(folder / f"{handle.key}-{first}", "xb") as file:
                for part in written_pieces(data):
                    file.write(part)
        return len(data)

    with closing(open_join(f"{url}/latents", f"{url}/text")) as join:
        by_row = way == "rows"
        pieces = rows_in_order(join, samples) if by_row else whole_objects(join, samples)
        batch = 2 * BATCH if by_row else 1
        answers.wait()
        start, cpu, size = time.perf_counter(), time.process_time(), 0
        with ThreadPoolExecutor(ROWS if by_row else PLAIN) as pool:
            for i, data in enumerate(pool.map(bring, pieces), 1):
                size += data
                if i == batch:
                    answers.say(first=time.perf_counter() - start, first_bytes=size)
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
    answers.say(opening=0.0, seconds=seconds, cpu=used, bytes=size)


def read(way: str, url: str, folder: str, record: str, plan: str, check: str) -> None:
    """Reads in one way; see `run.WAYS`."""
    answers, samples = Answers(), Samples(**json.loads(record))
    if way in ("plain", "kept", "rows"):
        plain_requests(way, url, Path(folder), samples, answers)
        return

    def open_() -> Epochs:
        return staged(url, Path(folder), samples) if way == "staged" else Epochs(url, samples)

    serve(open_, json.loads(plan), samples, check == "True", answers)


if __name__ == "__main__":
    read(*sys.argv[1:])
