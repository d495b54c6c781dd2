"""A shard's blocks on their way to disk, in a thread of its own: the encoders do not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import ShardWriter
from shards.format import stored_rows

from ..meter import WRITE, Timer


class Writing:
    """Writes blocks in the order of `put`. At most two blocks of a shard are in memory: one being
    written, one being encoded.
    """

    def __init__(self, writers: Mapping[str, ShardWriter], timer: Timer) -> None:
        self._writers, self._timer = writers, timer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._before: list[Future[None]] = []
        self._now: list[Future[None]] = []
        self._failed = False

    def put(
        self, column: str, values: Any, status: NDArray[np.uint8],
        freed: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """Writes the next block of a column soon; calls `freed` when it is written or dropped."""
        job = self._pool.submit(self._write, column, values, status)
        job.add_done_callback(lambda _: freed())
        self._now.append(job)

    def _write(self, column: str, values: Any, status: NDArray[np.uint8]) -> None:
        # Blocks have no numbers: after one that failed, the next would be written in its place.
        if self._failed:
            return
        try:
            with self._timer(f"write {column}"):
                writer = self._writers[column]
                writer.put_block(stored_rows(writer.spec, values), status)
        except BaseException:
            self._failed = True
            raise
        self._timer.done()

    def end_block(self) -> None:
        """Waits for the block before the one just put. Raises what writing raised."""
        with self._timer.waiting(WRITE):
            for job in self._before:
                job.result()
        self._before, self._now = self._now, []

    def finish(self) -> None:
        """Waits for all blocks."""
        self.end_block()
        self.end_block()

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._failed = True  # what is still queued when it ends early
        self._pool.shutdown(cancel_futures=True)
