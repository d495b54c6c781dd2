"""Reading remote objects in place where nothing of them is kept: exactly the ranges that are asked for,
many at once and before their turn, in memory until they are read.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..errors import ShardsError
from .fetchers import Fetchers
from .pages import PAGE, Source, fill, spread, straight

THREADS = 32
HELD = 512 << 20  # bytes that are ready or on their way at most
LONG = 60  # seconds: what was asked for so much before others that were read, nobody will read


class Piece:
    """A part of a range that one request brings; the thread that claims it makes that request."""

    __slots__ = ("claimed", "data", "length", "source", "start")

    def __init__(self, source: Source, start: int, length: int) -> None:
        self.source, self.start, self.length = source, start, length
        self.data: Future[Any] = Future()
        self.claimed = False

    def fetch(self) -> None:
        try:
            self.data.set_result(self.source.fetch(self.start, self.length))
        except BaseException as error:
            self.data.set_exception(error)


class Range:
    """Bytes `start` to `end` of an object; it is let go once `wanted` bytes of it were read. It has no
    pieces while it waits for room.
    """

    __slots__ = ("asked", "end", "pieces", "start", "wanted")

    def __init__(self, start: int, end: int, wanted: int) -> None:
        self.start, self.end, self.wanted, self.asked = start, end, wanted, time.monotonic()
        self.pieces: list[Piece] = []

    def divide(self, source: Source) -> None:
        self.pieces = [
            Piece(source, at, min(PAGE, self.end - at)) for at in range(self.start, self.end, PAGE)
        ]  # no buffer is large


class Ranges:
    """Reads ahead of its readers with up to 32 threads. Whoever needs a piece that no thread has begun
    with fetches it; what was not asked for is fetched when it is read. Ranges for which there is no
    room wait for it, in turn, or for their reader. One object per process, never used by a fork.
    """

    def __init__(self, threads: int = THREADS, held: int = HELD) -> None:
        self.most = held
        self._lock = threading.Lock()
        self._fetchers = Fetchers(threads, self._next, self._lock)
        self._queue: deque[Piece] = deque()
        self._ranges: dict[Source, list[Range]] = {}  # of each open object
        self._waiting: dict[Range, Source] = {}  # for room, what was asked for first first
        # when the latest range that was read was asked for, among readers of the same kind
        self._reached: dict[bool, float] = {}
        self._oldest = -math.inf  # no range that is there was asked for before
        self._held = 0

    def willneed(self, source: Source, offset: int, length: int, wanted: int = 0) -> None:
        """Fetches a range in the background, as soon as there is room for it."""
        end = min(source.size, offset + length)
        if end <= offset or end - offset > self.most:
            return
        with self._lock:
            new = Range(offset, end, wanted or length)
            self._ranges.setdefault(source, []).append(new)
            self._waiting[new] = source
            if self._held + end - offset > self.most:
                self._let_old_go()
            count = self._admit_waiting()
        self._wake(count)

    def preadv(self, source: Source, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an object; returns how many bytes came, fewer only at its end."""
        end = min(source.size, offset + sum(memoryview(buffer).nbytes for buffer in buffers))
        if end <= offset:
            return 0
        with self._lock:
            asked, count = self._take(source, offset, end)
            count += self._admit_waiting()
        self._wake(count)
        if asked is None:
            return straight(source, buffers, offset)
        first = asked.start
        for number, start, parts in spread(buffers, offset - first, end - first, PAGE):
            piece = asked.pieces[number]
            if self._claim(piece):
                piece.fetch()
            elif piece.data.done() and piece.data.exception() is not None:  # maybe long ago
                piece = asked.pieces[number] = Piece(source, piece.start, piece.length)
                piece.claimed = True
                piece.fetch()
            fill(parts, piece.data.result(), start)
        return end - offset

    def _take(self, source: Source, start: int, end: int) -> tuple[Range | None, int]:
        """Returns the range that has these bytes, let go if they are the last that are wanted, and the
        number of its pieces if it waited: for its reader there is always room.
        """
        for asked in self._ranges.get(source, ()):
            if asked.start <= start and end <= asked.end:
                kind = source.beside > 0
                self._reached[kind] = max(asked.asked, self._reached.get(kind, asked.asked))
                count = self._admit(asked) if asked in self._waiting else 0
                asked.wanted -= end - start
                if asked.wanted <= 0:
                    self._let_go(source, asked)
                return asked, count
        return None, 0

    def _admit(self, asked: Range) -> int:
        """Has a range fetched; returns the number of its pieces."""
        asked.divide(self._waiting.pop(asked))
        self._held += asked.end - asked.start
        self._queue.extend(asked.pieces)
        return len(asked.pieces)

    def _admit_waiting(self) -> int:
        """Has those ranges fetched for which there is room; returns the number of their pieces."""
        count = 0
        while self._waiting:
            first = next(iter(self._waiting))
            if self._held + first.end - first.start > self.most:
                break
            count += self._admit(first)
        return count

    def _let_go(self, source: Source, asked: Range) -> None:
        if self._waiting.pop(asked, None) is None:
            self._held -= asked.end - asked.start
        self._ranges[source].remove(asked)
        if not self._ranges[source]:
            del self._ranges[source]

    def _let_old_go(self) -> None:
        """Lets ranges go that were passed over: their reader will not come.

        A reader takes ranges in the order in which it asks for them, but for those of a batch. So
        what counts is not how long ago a range was asked for, which is long after any pause, but
        whether others were read that were asked for long after it. Rows that are read now and then
        (`beside`) pass none of a stream over, which pauses meanwhile.
        """
        if max(self._reached.values(), default=-math.inf) - LONG <= self._oldest:
            return
        for source, asked in list(self._ranges.items()):
            before = self._reached.get(source.beside > 0, -math.inf) - LONG
            for old in [each for each in asked if each.asked < before]:
                self._give_up(source, old)
        remaining = (each.asked for asked in self._ranges.values() for each in asked)
        self._oldest = min(remaining, default=self._oldest)

    def _give_up(self, source: Source, asked: Range) -> None:
        for piece in asked.pieces:
            if not piece.claimed and piece in self._queue:
                self._queue.remove(piece)
        self._let_go(source, asked)

    def _claim(self, piece: Piece) -> bool:
        with self._lock:
            claimed, piece.claimed = piece.claimed, True
        return not claimed

    def _next(self) -> Callable[[], None] | None:
        """Returns what fetches the next piece that nobody has begun with."""
        while self._queue:
            piece = self._queue.popleft()
            if not piece.claimed:
                piece.claimed = True
                return partial(self._bring, piece)
        return None

    def _bring(self, piece: Piece) -> None:
        piece.fetch()
        if isinstance(piece.data.exception(), (ShardsError, OSError)):
            with self._lock:  # the reader will meet the error; the rest would meet it too
                self._queue.clear()

    def forget(self, source: Source) -> None:
        """Drops all that was fetched or asked for of an object."""
        with self._lock:
            for asked in list(self._ranges.get(source, ())):
                self._give_up(source, asked)
            count = self._admit_waiting()
        self._wake(count)

    def _wake(self, count: int) -> None:
        if count:
            self._fetchers.wake(count)
