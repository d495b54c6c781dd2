"""What the shards in flight on one worker share: the encoders' lock, decoding threads, room for
text, and the event that stops them.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ..errors import Aborted
from ..meter import Meter

TEXT_BUFFERS = 2  # blocks of encoded captions a worker holds: one being written, one being made


class PriorityLock:
    """A lock that the waiting shard with the smallest number gets first.

    Were the lock shared out evenly, two shards would end at the same moment, and the encoder would
    wait while both are committed and two others are opened. So the second one fills the gaps of the
    first, and is ready when it ends.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._taken = False

    @contextmanager
    def held(self, priority: int) -> Iterator[None]:
        """Waits until nobody holds the lock and nobody with a smaller number waits."""
        with self._changed:
            heapq.heappush(self._waiting, priority)
            while self._taken or self._waiting[0] != priority:
                self._changed.wait()
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


class WorkerResources:
    """Shared by all shards of a worker. `threads` decode, for whichever shard asks."""

    def __init__(self, threads: int) -> None:
        self.lock = PriorityLock()
        self.decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.text_buffers = threading.Semaphore(TEXT_BUFFERS)
        self.meter = Meter()
        self.stop = threading.Event()
        self._priorities = itertools.count(1)

    def next_priority(self) -> int:
        """Returns the number of a new shard: the earlier one goes first."""
        return next(self._priorities)  # atomic in CPython

    def check(self) -> None:
        """Raises Aborted if the worker is to stop; called between batches."""
        if self.stop.is_set():
            raise Aborted("told to stop between two batches; nothing is half-written")
