"""Reading remote objects in place, through pages that are kept on a local disk.

    <cache>/<first 32 hex of a sha256 that names the object>/<page number>    up to 4 MiB each
                                                            /<start>-<bytes>  a range by itself
    <cache>/.lock                                                             held while evicting

All processes of a node share the folder. A page is written under a temporary name and renamed, so
it is whole or absent; two processes that bring the same page do no harm. Nothing is synced: a page
that a crash damaged has the wrong size, or fails its row's checksum, and is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import ShardsError, StoreError
from ..format.atomic import TEMPORARY

PAGE = 4 << 20
THREADS = 16
BESIDE = 4  # pages of one read past the cache that are fetched at once
TOUCH = 60  # seconds: a page used within them is not marked as used again
FULL = (errno.ENOSPC, errno.EDQUOT)
Page = int | str  # its number, or the name of a range by itself


class Source(Protocol):
    """An open object: `key` names its pages, `fetch` brings bytes of it from afar."""

    key: str
    size: int

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


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Raises StoreError in place of what the cache's own disk refuses; what is absent is just absent."""
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        raise StoreError(
            f"{folder}: the cache of remote columns cannot be used ({error}). Set LATENTBANK_CACHE "
            "to a folder on a local disk, or LATENTBANK_CACHE_GB=0 to read without one"
        ) from error


class PageCache:
    """The pages on disk, `limit` bytes at most: what was used longest ago goes first.

    Nobody counts them all the time. Each process looks through the folder when it has added a 64th
    of the limit, and evicts down to 3/4 if it finds more than 7/8, so that eight processes of a
    node stay within the limit together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._added = 0
        self._lock = threading.Lock()

    def path(self, key: str, page: Page) -> str:
        return f"{self.folder}/{key}/{page}"

    def has(self, key: str, page: int, size: int) -> bool:
        with suppress(FileNotFoundError), usable(self.folder):
            return os.stat(self.path(key, page)).st_size == size
        return False

    def open(self, key: str, page: Page, size: int) -> int | None:
        """Returns a descriptor of a page of `size` bytes, to be closed by the caller; None if it is not
        kept, or is damaged and was dropped.
        """
        try:
            with usable(self.folder):
                descriptor = os.open(self.path(key, page), os.O_RDONLY)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if status.st_size != size:
            os.close(descriptor)
            self.drop(key, page)
            return None
        if time.time() - status.st_mtime > TOUCH:
            with suppress(PermissionError):  # another user's: may be read, and that is all
                os.utime(descriptor)
        return descriptor

    def add(self, key: str, page: Page, data: Any) -> bool:
        """Keeps a page; False if there is no room for it even after evicting."""
        size = memoryview(data).nbytes
        if size > self.limit:
            return False
        with usable(self.folder):
            for attempt in range(2):
                try:
                    if attempt:
                        self.evict(full=True)
                    self._write(key, page, data)
                    break
                except OSError as error:
                    if error.errno not in FULL:
                        raise
            else:
                return False
            with self._lock:
                self._added += size
                due = self._added > self.limit // 64
                self._added *= not due
            if due:
                self.evict()
        return True

    def _write(self, key: str, page: Page, data: Any) -> None:
        temporary = f"{self.folder}/{key}/{TEMPORARY}{secrets.token_hex(8)}"
        # the folder may be evicted at any moment while it is empty, so it may take a second try
        for _ in range(8):
            try:
                os.makedirs(f"{self.folder}/{key}", exist_ok=True)
                with open(temporary, "xb") as file:
                    file.write(data)
                os.rename(temporary, self.path(key, page))
                return
            except (FileNotFoundError, FileExistsError):  # (makedirs: it went while it looked)
                continue
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise

    def drop(self, key: str, page: Page) -> None:
        """Deletes a page if it exists."""
        with suppress(FileNotFoundError), usable(self.folder):
            os.unlink(self.path(key, page))

    def drop_ranges(self, key: str) -> None:
        """Deletes what is kept of an object by itself."""
        with suppress(FileNotFoundError), usable(self.folder):
            for name in os.listdir(f"{self.folder}/{key}"):
                if "-" in name.removeprefix(TEMPORARY):
                    self.drop(key, name)

    def _files(self) -> list[tuple[float, int, str]]:
        """Returns (time of last use, bytes, path) of every page, and of what killed writers left."""
        files = []
        for folder in os.scandir(self.folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            with suppress(FileNotFoundError):  # evicted by the last holder of the lock
                for entry in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        files.append((status.st_mtime, status.st_size, entry.path))
        return sorted(files)

    def evict(self, full: bool = False) -> None:
        """Deletes what was used longest ago, down to 3/4 of the limit if there is more than 7/8 of
        it; down to 3/4 of what there is if the disk is `full`.
        """
        with usable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when it closes
                files = self._files()
                total = sum(size for _, size, _ in files)
                goal = (min(total, self.limit) if full else self.limit) * 3 // 4
                if not full and total <= self.limit * 7 // 8:
                    return
                for _, size, path in files:
                    if total <= goal:
                        break
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size
                for emptied in {os.path.dirname(path) for *_, path in files}:
                    with suppress(OSError):  # not empty
                        os.rmdir(emptied)


class Pages:
    """Reads through the cache, and ahead of its readers with up to 16 threads.

    A page is fetched once at a time in a process: who comes while it is on its way waits for it.
    Threads end when nothing is left to fetch or the program ends; they are not daemons, since those
    may be stopped inside the client's code at exit. One object per process, never used by a fork.
    """

    def __init__(self, cache: PageCache, page_bytes: int = PAGE, threads: int = THREADS) -> None:
        self.cache, self.page_bytes, self.threads = cache, page_bytes, threads
        self._lock = threading.Lock()
        self._requested: dict[
            tuple[str, int], Source
        ] = {}  # to be fetched, first come first served
        self._coming: dict[tuple[str, int], Future[Any]] = {}  # being fetched
        self._workers = 0

    def _size(self, source: Source, page: int) -> int:
        return min(self.page_bytes, source.size - page * self.page_bytes)

    def preadv(self, source: Source, buffers: Sequence[memoryview], offset: int) -> int:
        """Fills buffers from an object; returns how many bytes came, fewer only at its end."""
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
        """Reads as `preadv` does, past the cache, page by page so that no buffer is large, a few at once."""
        end = min(source.size, offset + sum(memoryview(buffer).nbytes for buffer in buffers))
        pieces = list(spread(buffers, offset, end, self.page_bytes))

        def bring(piece: tuple[int, int, list[memoryview]]) -> None:
            page, start, parts = piece
            first, length = page * self.page_bytes + start, sum(len(part) for part in parts)
            fill(parts, source.fetch(first, length), 0)

        if len(pieces) == 1:
            bring(pieces[0])
        elif pieces:
            with ThreadPoolExecutor(BESIDE) as pool:
                list(pool.map(bring, pieces))
        return max(end - offset, 0)

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
        descriptor = self.cache.open(source.key, name, length)
        if descriptor is not None:
            with open(descriptor, "rb") as file:
                data = file.read()
        else:
            data = source.fetch(offset, length)
            self.cache.add(source.key, name, data)
        fill(parts, data, 0)
        return length

    def _read(self, source: Source, page: int, start: int, parts: list[memoryview]) -> None:
        descriptor = self.cache.open(source.key, page, self._size(source, page))
        if descriptor is not None:
            try:
                if os.preadv(descriptor, parts, start) == sum(len(part) for part in parts):
                    return
            finally:
                os.close(descriptor)
        fill(parts, self._get(source, page), start)

    def _get(self, source: Source, page: int) -> Any:
        """Returns a page that the cache lacked, fetched by this thread or by one that is at it."""
        name = (source.key, page)
        with self._lock:
            coming = self._coming.get(name)
            if coming is None:
                self._requested.pop(name, None)  # this thread needs it before its turn
                future = self._coming[name] = Future[Any]()
        return coming.result() if coming is not None else self._fetch(source, page, future)

    def _fetch(self, source: Source, page: int, future: Future[Any]) -> Any:
        """Fetches a page that is this thread's to fetch, hands it to who waits, and keeps it."""
        size = self._size(source, page)
        try:
            descriptor = self.cache.open(source.key, page, size)
            if descriptor is not None:  # it came while this thread took its turn
                with open(descriptor, "rb") as file:
                    future.set_result(file.read())
            else:
                future.set_result(source.fetch(page * self.page_bytes, size))
                self.cache.add(source.key, page, future.result())
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._coming[source.key, page]
        return future.result()

    def willneed(self, source: Source, offset: int, length: int) -> None:
        """Fetches what the cache lacks of a range, in the background."""
        if not self.cache.limit:
            return
        end = min(source.size, offset + length)
        for page in range(offset // self.page_bytes, -(-end // self.page_bytes)):
            name = (source.key, page)
            if (
                name in self._requested
                or name in self._coming
                or self.cache.has(source.key, page, self._size(source, page))
            ):
                continue
            with self._lock:
                if name in self._coming:
                    continue
                self._requested[name] = source
                start = self._workers < self.threads
                self._workers += start
            if start:
                threading.Thread(target=self._work, name="latentbank-fetch").start()

    def _work(self) -> None:
        """Fetches what is requested, until nothing is."""
        while True:
            with self._lock:
                if not self._requested or not threading.main_thread().is_alive():
                    self._workers -= 1
                    return
                name = next(iter(self._requested))
                source = self._requested.pop(name)
                future = self._coming[name] = Future[Any]()
            try:
                self._fetch(source, name[1], future)
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
        self.cache.drop_ranges(source.key)
        for page in range(offset // self.page_bytes, -(-(offset + length) // self.page_bytes)):
            self.cache.drop(source.key, page)


def fill(parts: list[memoryview], data: Any, start: int) -> None:
    """Copies bytes of a page from `start` on into parts of buffers."""
    view = memoryview(data).cast("B")[start:]
    for part in parts:
        part[:] = view[: len(part)]
        view = view[len(part) :]
