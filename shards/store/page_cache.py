"""Pages of remote objects that are kept on a local disk.

    <cache>/<first 32 hex of a sha256 that names the object>/<page number>    up to 4 MiB each
                                                            /<start>-<bytes>  a range by itself
    <cache>/.lock                                                             held while evicting

All processes of a node share the folder. A page is written under a temporary name and renamed, so
it is whole or absent; two processes that bring the same page do no harm. Nothing is synced: a page
that a crash damaged has the wrong size, or fails its row's checksum, and is fetched again. The time
of access says when a page was used last, that of the change when it was written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..format.atomic import TEMPORARY, pieces
from ..processes import watch_forks
from .fetchers import NO_THREAD

TOUCH = 60  # seconds: a page used within them is not looked up, nor marked as used, again
OPEN_FILES = 1 << 15  # pages that are kept open at most, and a quarter of what a process may open
FULL = (errno.ENOSPC, errno.EDQUOT)
Page = int | str  # its number, or the name of a range by itself
# inode, and when it was written in ns: a file system gives an inode to another file once it is free
File = tuple[int, int]


class OpenPage:
    """The file of a page. It is closed when nobody holds this object any more: a descriptor that a
    thread reads from is never given to another file meanwhile.
    """

    __slots__ = ("descriptor", "file", "until")

    def __init__(self, descriptor: int, file: File, until: float) -> None:
        self.descriptor, self.file, self.until = descriptor, file, until

    def __del__(self, close: Any = os.close) -> None:
        close(self.descriptor)


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
        self._full = False  # and that was said
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        """Closes in a child what its parent has open, whose room would not be given back."""
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Page], OpenPage] = {}  # the one opened last is the last
        self._closing = False  # whether a thread closes what was opened long ago

    def path(self, key: str, page: Page) -> str:
        return f"{self.folder}/{key}/{page}"

    def ready(self, key: str, page: Page) -> OpenPage | None:
        """Returns a page that was looked up not long ago, and is open."""
        opened = self._open.get((key, page))
        return opened if opened is not None and time.monotonic() < opened.until else None

    def has(self, key: str, page: int, size: int) -> bool:
        if self.ready(key, page):
            return True
        with suppress(FileNotFoundError), usable(self.folder):
            return os.stat(self.path(key, page)).st_size == size
        return False

    def open(self, key: str, page: Page, size: int) -> OpenPage | None:
        """Returns a page of `size` bytes, open; None if it is not kept, or is damaged and was dropped."""
        if opened := self.ready(key, page):
            return opened
        with self._lock:
            self._open.pop((key, page), None)
        try:
            with usable(self.folder):
                descriptor = self._open_file(self.path(key, page))
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        opened = OpenPage(descriptor, file_of(status), time.monotonic() + TOUCH)
        if status.st_size != size:
            self.drop(key, page)
            return None
        if time.time() - last_use(status) > TOUCH:
            with suppress(OSError):  # another user's, or of a disk that is only to be read
                os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
        self._hold(key, page, opened)
        return opened

    def _hold(self, key: str, page: Page, opened: OpenPage) -> None:
        """Keeps a page open until a minute or two after its last use."""
        most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, OPEN_FILES)
        with self._lock:
            while len(self._open) >= most > 0:
                del self._open[next(iter(self._open))]
            self._open[key, page] = opened
            start, self._closing = not self._closing, True
        if start:
            thread = threading.Thread(
                target=_close_old, args=(weakref.ref(self),), name="latentbank-close", daemon=True
            )
            try:
                thread.start()
            except NO_THREAD:  # the next page tries again
                self._closing = False

    def close_old(self) -> bool:
        """Closes what was opened long ago; returns whether other pages are open."""
        now = time.monotonic()
        with self._lock:
            for name in [name for name, page in self._open.items() if page.until < now]:
                del self._open[name]
            self._closing = bool(self._open)
            return self._closing

    def _open_file(self, path: str, flags: int = os.O_RDONLY) -> int:
        """Opens a page; where this process may open no more files, the other pages are closed first, and
        threads that write some are waited for.
        """
        flags |= os.O_CLOEXEC
        for _ in range(100):
            try:
                return os.open(path, flags, 0o666)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            self._close_all()
            time.sleep(0.01)
        return os.open(path, flags, 0o666)

    def _close_all(self) -> None:
        with self._lock:
            self._open.clear()

    def add(self, key: str, page: Page, data: Any) -> File | None:
        """Keeps a page, and returns its file; None if there is no room for it even after evicting."""
        size = memoryview(data).nbytes
        if size > self.limit:
            return None
        with usable(self.folder):
            for attempt in range(2):
                try:
                    if attempt:
                        self.evict(full=True)
                    file = self._write(key, page, data)
                    break
                except OSError as error:
                    if error.errno not in FULL:
                        raise
            else:
                self._say_full()
                return None
            with self._lock:
                self._added += size
                due = self._added > self.limit // 64
                self._added *= not due
            if due:
                self.evict()
        return file

    def _say_full(self) -> None:
        """Says once that the disk is full, since reading goes on, more slowly."""
        if not self._full:
            self._full = True
            print(
                f"{self.folder}: no room for the cache of remote columns, even without what it held; "
                "what is read is fetched again each time. Set LATENTBANK_CACHE to another disk",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _write(self, key: str, page: Page, data: Any) -> File | None:
        temporary = f"{self.folder}/{key}/{TEMPORARY}{secrets.token_hex(8)}"
        # the folder may be evicted at any moment while it is empty, so it may take a second try
        for _ in range(8):
            try:
                os.makedirs(f"{self.folder}/{key}", exist_ok=True)
                descriptor = self._open_file(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                opened = OpenPage(descriptor, (0, 0), time.monotonic() + TOUCH)
                for piece in pieces(data):
                    while piece:
                        piece = piece[os.write(descriptor, piece) :]
                opened.file = file_of(os.fstat(descriptor))
                os.rename(temporary, self.path(key, page))
                self._hold(key, page, opened)
                return opened.file
            except (FileNotFoundError, FileExistsError):  # (makedirs: it went while it looked)
                continue
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
        return None

    def drop(self, key: str, page: Page) -> None:
        """Deletes a page if it exists."""
        with self._lock:
            self._open.pop((key, page), None)
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
                        files.append((last_use(status), status.st_size, entry.path))
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
                    self._close_all()  # another process may have deleted what is open here
                    return
                for _, size, path in files:
                    if total <= goal:
                        break
                    with suppress(FileNotFoundError):
                        os.unlink(path)
                    total -= size
                self._close_all()  # what is deleted takes room for as long as it is open
                for emptied in {os.path.dirname(path) for *_, path in files}:
                    with suppress(OSError):  # not empty
                        os.rmdir(emptied)


def file_of(status: os.stat_result) -> File:
    return status.st_ino, status.st_mtime_ns


def last_use(status: os.stat_result) -> float:
    """Returns when a page was used last, in seconds since 1970."""
    return max(status.st_atime, status.st_mtime)


def _close_old(reference: weakref.ref[PageCache]) -> None:
    """Closes the pages of a cache once they were opened long ago, until none is open: what another
    process has deleted takes room for as long as this one, which may read nothing more, has it open.
    """
    while True:
        time.sleep(TOUCH)
        cache = reference()
        if cache is None or not cache.close_old():
            return
        del cache
