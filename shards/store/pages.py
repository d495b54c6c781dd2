"""Reading remote objects in place, through pages that are kept on a local disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, finalize

import numpy as np

from ..errors import ShardsError
from .fetchers import Fetchers, fetch_all
from .page_cache import File, OpenPage, PageCache

PAGE = 4 << 20
THREADS = 16
FULL_SHARE = 7 / 8  # of a cache are kept for sure
BESIDE = 4  # pages of one read past the cache that are fetched at once


class Source(Protocol):
    """An open object: `key` names its pages, `fetch` brings bytes of it from afar. `pages` has the file
    of each page that was read, None while it has none; `anew` is set where one that was read
    before is fetched once more, or is in another file. `beside` is 0 where all of a column is read.
    """

    key: str
    size: int
    pages: dict[int, File | None]
    anew: bool
    beside: int

    def fetch(self, start: int, length: int) -> Any: ...


def spread(
    buffers: Sequence[memoryview], offset: int, end: int, page_bytes: int
) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Lays the bytes from `offset` to `end` into buffers: (page, first byte in it, the parts of the
    buffers that it fills), page by page.
    """
    rest = [part for buffer in buffers if (part := memoryview(buffer).cast("B")).nbytes]
    while offset < end:
        page, start = divmod(offset, page_bytes)
        room = min(page_bytes - start, end - offset)
        offset += room
        parts = []
        while room:
            parts.append(rest[0][:room])
            rest[0] = rest[0][room:]
            room -= len(parts[-1])
            if not rest[0]:
                del rest[0]
        yield page, start, parts


def straight(
    source: Source, buffers: Sequence[memoryview], offset: int, page_bytes: int = PAGE
) -> int:
    """Fills buffers as `preadv` does, past all that is kept: piece by piece so that no buffer is large, a
    few at once.
    """
    end = min(source.size, offset + sum(memoryview(buffer).nbytes for buffer in buffers))
    pieces = list(spread(buffers, offset, end, page_bytes))

    def bring(piece: tuple[int, int, list[memoryview]]) -> None:
        page, start, parts = piece
        first, length = page * page_bytes + start, sum(len(part) for part in parts)
        fill(parts, source.fetch(first, length), 0)

    if len(pieces) == 1:
        bring(pieces[0])
    elif pieces:
        with ThreadPoolExecutor(BESIDE) as pool:
            fetch_all(pool, bring, pieces)
    return max(end - offset, 0)


class Coming(Future[Any]):
    """A page that is fetched for a reader of its object."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source


class Pages:
    """Reads through the cache, and ahead of its readers with up to 16 threads.

    A page is fetched once at a time in a process: who comes while it is on its way waits for it. One
    object per process, never used by a fork.
    """

    def __init__(self, cache: PageCache, page_bytes: int = PAGE, threads: int = THREADS) -> None:
        self.cache, self.page_bytes = cache, page_bytes
        self._expected: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._collected = False  # whether a reader was, so that there is more room
        self._make_room()
        self.fetches = 0  # pages that came
        self._lock = threading.Lock()
        self._fetchers = Fetchers(threads, self._next, self._lock)
        self._requested: dict[
            tuple[str, int], Source
        ] = {}  # to be fetched, first come first served
        self._coming: dict[tuple[str, int], Coming] = {}  # being fetched

    def expect(self, reader: Any, size: int) -> None:
        """Says how many bytes a reader, for as long as it lives, will read in any order."""
        with self._lock:
            if reader not in self._expected:
                finalize(reader, self._note_collected).atexit = False
            self._expected[reader] = size
            self._make_room()

    def _note_collected(self) -> None:
        self._collected = True  # no more: it may come at any moment, also while the lock is held

    def _make_room(self) -> None:
        self._collected, limit = False, self.cache.limit
        self._room = int(FULL_SHARE * limit) - sum(self._expected.values()) if limit > 0 else -1

    @property
    def room(self) -> int:
        """Bytes that can be kept beside all that is expected; negative: not even that."""
        if self._collected:
            with self._lock:
                self._make_room()
        return self._room

    @property
    def fits(self) -> bool:
        """Whether all that is expected can be kept."""
        return self.room >= 0

    def _size(self, source: Source, page: int) -> int:
        return min(self.page_bytes, source.size - page * self.page_bytes)

    def preadv(self, source: Source, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an object; returns how many bytes came, fewer only at its end."""
        page, start = divmod(offset, self.page_bytes)
        opened = self.cache.ready(source.key, page)
        if opened and source.pages.get(page) == opened.file:  # most rows, once all are kept
            size = buffers[0].nbytes if len(buffers) == 1 else sum(b.nbytes for b in buffers)
            if (
                start + size <= self.page_bytes
                and os.preadv(opened.descriptor, buffers, start) == size
            ):
                return size
        end = min(source.size, offset + sum(memoryview(buffer).nbytes for buffer in buffers))
        if end <= offset:
            return 0
        if not self.cache.limit:
            return self.straight(source, buffers, offset)
        second = (offset // self.page_bytes + 1) * self.page_bytes
        if end > second:  # the other pages of this read are fetched beside its first
            self.willneed(source, second, end - second)
        for page, start, parts in spread(buffers, offset, end, self.page_bytes):
            self._read(source, page, start, parts)
        return end - offset

    def straight(self, source: Source, buffers: Sequence[memoryview], offset: int) -> int:
        """Reads as `preadv` does, past the cache."""
        return straight(source, buffers, offset, self.page_bytes)

    def read_apart(self, source: Source, buffers: Sequence[memoryview], offset: int) -> int:
        """Reads as `preadv` does, from a range that is fetched and kept by itself: an index at the end of
        an object is some hundredths of the page that it lies in.
        """
        length = min(sum(memoryview(buffer).nbytes for buffer in buffers), source.size - offset)
        if length <= 0:
            return 0
        if not self.cache.limit:
            return self.straight(source, buffers, offset)
        name = f"{offset}-{length}"
        ((_, _, parts),) = spread(buffers, 0, length, length)
        opened = self.cache.open(source.key, name, length)
        if not opened or os.preadv(opened.descriptor, parts, 0) != length:
            data = source.fetch(offset, length)
            self.cache.add(source.key, name, data)
            fill(parts, data, 0)
        return length

    def _read(self, source: Source, page: int, start: int, parts: list[memoryview]) -> None:
        opened = self._opened(source, page)
        if opened:
            if os.preadv(opened.descriptor, parts, start) == sum(len(part) for part in parts):
                return
            self.cache.drop(source.key, page)  # it was cut meanwhile
        fill(parts, self._get(source, page), start)

    def _opened(self, source: Source, page: int) -> OpenPage | None:
        """Returns a page that is kept, open; it may be in another file than when it was read before."""
        opened = self.cache.open(source.key, page, self._size(source, page))
        if opened:
            self._note(source, page, opened.file)
        return opened

    def _note(self, source: Source, page: int, file: File | None) -> None:
        """Notes in which file a page is; None: it has just been fetched, and is in none."""
        with self._lock:
            if page in source.pages:
                source.anew |= file is None or source.pages[page] != file
            source.pages[page] = file

    def take_anew(self, source: Source) -> bool:
        """Returns `anew`, and unsets it."""
        if not source.anew:
            return False
        with self._lock:
            anew, source.anew = source.anew, False
        return anew

    def _get(self, source: Source, page: int) -> Any:
        """Returns a page that the cache lacked, fetched by this thread or by one that is at it."""
        name = (source.key, page)
        with self._lock:
            coming = self._coming.get(name)
            if coming is None:
                self._requested.pop(name, None)  # this thread needs it before its turn
                future = self._coming[name] = Coming(source)
        if coming is None:
            return self._fetch(source, page, future)
        data = coming.result()
        if coming.source is not source:  # another reader of the object
            self._note(source, page, None)
        return data

    def _fetch(self, source: Source, page: int, future: Future[Any]) -> Any:
        """Fetches a page that is this thread's to fetch, hands it to who waits, and keeps it."""
        size = self._size(source, page)
        try:
            opened = self._opened(source, page)
            if opened:  # it came while this thread took its turn
                future.set_result(os.pread(opened.descriptor, size, 0))
            else:
                data = source.fetch(page * self.page_bytes, size)
                self._note(source, page, None)
                future.set_result(data)
                source.pages[page] = self.cache.add(source.key, page, data)
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            raise
        finally:
            with self._lock:
                self.fetches += 1
                del self._coming[source.key, page]
        return future.result()

    def willneed(self, source: Source, offset: int, length: int) -> None:
        """Fetches what the cache lacks of a range, in the background."""
        if not self.cache.limit:
            return
        end, count = min(source.size, offset + length), 0
        for page in range(offset // self.page_bytes, -(-end // self.page_bytes)):
            name = (source.key, page)
            if (
                name in self._requested
                or name in self._coming
                or self.cache.has(source.key, page, self._size(source, page))
            ):
                continue
            with self._lock:
                if name not in self._coming:
                    self._requested[name] = source
                    count += 1
        if count:
            self._fetchers.wake(count)

    def _next(self) -> Callable[[], None] | None:
        """Returns what fetches the page that was requested first."""
        if not self._requested:
            return None
        name = next(iter(self._requested))
        source = self._requested.pop(name)
        self._coming[name] = Coming(source)
        return partial(self._bring, source, name[1], self._coming[name])

    def _bring(self, source: Source, page: int, future: Future[Any]) -> None:
        try:
            self._fetch(source, page, future)
        except (ShardsError, OSError):
            with self._lock:  # the reader will meet the error; the rest would meet it too
                self._requested.clear()

    def cancel(self, source: Source) -> None:
        """Fetches no more ahead of this object."""
        with self._lock:
            for name in [name for name, item in self._requested.items() if item is source]:
                del self._requested[name]

    def forget(self, source: Source, offset: int, length: int) -> None:
        """Drops the pages of a range, and what is kept of the object by itself."""
        if not self.cache.limit:
            return
        self.cache.drop_ranges(source.key)
        for page in range(offset // self.page_bytes, -(-(offset + length) // self.page_bytes)):
            while (source.key, page) in self._coming:  # a thread may still write what it brought
                time.sleep(0.001)
            self.cache.drop(source.key, page)


def fill(parts: list[memoryview], data: Any, start: int) -> None:
    """Copies bytes of a page from `start` on into parts of buffers."""
    view = np.frombuffer(data, np.uint8)[start:]
    for part in parts:
        np.copyto(np.frombuffer(part, np.uint8), view[: len(part)])  # while other threads go on
        view = view[len(part) :]
