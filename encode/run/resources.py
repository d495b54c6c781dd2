"""What the shards in flight on one worker share: its encoders' turns, decoding threads, room for
text, and the word to stop.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ..errors import Aborted
from ..meter import Meter

TEXT_BUFFERS = 2  # blocks of encoded captions a worker holds: one being written, one being made


class Turns:
    """A lock that the shard which came first gets first.

    Were the turns shared out evenly, two shards would end at the same moment, and the encoder would
    wait while both are committed and two others are opened. So the second one fills the gaps of the
    first, and is ready when it ends.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._taken = False

    @contextmanager
    def turn(self, place: int) -> Iterator[None]:
        """Wait until nobody has the turn and nobody with a smaller number waits."""
        with self._changed:
            heapq.heappush(self._waiting, place)
            while self._taken or self._waiting[0] != place:
                self._changed.wait()
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


class Workplace:
    """Shared by all shards of a worker. `threads` decode, for whichever shard asks."""

    def __init__(self, threads: int) -> None:
        self.turns = Turns()
        self.decoding = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.texts = threading.Semaphore(TEXT_BUFFERS)
        self.meter = Meter()
        self.stop = threading.Event()
        self._numbers = 0
        self._lock = threading.Lock()

    def number(self) -> int:
        """The place of a new shard in the order of turns."""
        with self._lock:
            self._numbers += 1
            return self._numbers

    def check(self) -> None:
        """Raise Aborted if the worker has been told to stop; asked between batches."""
        if self.stop.is_set():
            raise Aborted("told to stop between two batches; nothing is half-written")
