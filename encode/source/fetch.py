"""Tars from elsewhere, brought whole to a scratch folder before they are read.

    with fetched("https://server/00.tar", scratch, size) as path: ...

A tar is brought in ranges, several at a time, into one file:

    <scratch>/latentbank-<digest of url, version and boot>     bytes of the tar, then a byte a range: 1 if it is there

The last part is cut off once all are there, so a file of the tar's size is whole, and one that is
longer goes on where its writer stopped. Who writes holds an exclusive lock on the file, who reads a
shared one; locks of the dead are free. The last reader removes the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards import open_store
from shards.errors import StoreError
from shards.places import local_path
from shards.store.client import Limits
from shards.store.object_store import NoRanges

from ..errors import FetchFailed
from .tars import is_url, read_exactly, refuse_size, split_url

PREFIX = "latentbank-"  # of every file of ours in a scratch folder
OURS = re.compile(rf"{PREFIX}[0-9a-f]{{24}}-[0-9a-z]{{1,8}}")
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
RANGE = 32 << 20  # bytes of a request; hubs count requests, so not too small
THREADS = 8
LITTER_SECONDS = 3600  # what nobody holds and nobody wrote to for so long was left by the dead
SPARE = 64 << 20  # bytes of the scratch folder that are left free
LIMITS = Limits(request=900, give_up=600, max_backoff=60)


def nothing(amount: int) -> None:
    """A report to nobody."""


@contextmanager
def fetched(
    url: str, scratch: Path, size: int, *, report: Callable[[int], None] = nothing,
    threads: int = THREADS, limits: Limits = LIMITS,
) -> Iterator[Path]:  # fmt: skip
    """A tar as a local path: one of this machine as it is, another one brought to `scratch` and
    removed at the end. `report` hears of every so many bytes that came.

    Raises FetchFailed when it cannot be brought now, BadTar when it is not of `size` bytes, OSError
    (ENOSPC) when there is no room for it.
    """
    if not is_url(url):
        yield local_path(url)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    remote = Remote(url, size, limits)
    path = scratch / f"{PREFIX}{remote.key}"
    sweep(scratch)
    file = _bring(remote, path, threads, report)
    try:
        yield path
    finally:
        _release(file, path)


def _bring(remote: Remote, path: Path, threads: int, report: Callable[[int], None]) -> int:
    """The whole tar at `path`, under a shared lock on the descriptor that is returned.

    Whoever is first fills the file; the others wait for the shared lock, which they get once it is
    whole, or its writer has failed.
    """
    while True:
        file = os.open(path, FLAGS | os.O_CREAT, 0o600)
        try:
            if _lock_now(file):
                if is_at(file, path):  # else it was removed before it was locked
                    fill(file, path, remote, threads, report)
                # for a moment there is no lock: another may take the file away
                fcntl.flock(file, fcntl.LOCK_SH)
            else:
                fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_size == remote.size and is_at(file, path):
                return file
        except BaseException:
            os.close(file)  # what came stays, for the next attempt
            raise
        os.close(file)
        time.sleep(random.uniform(0, 0.05))


def _lock_now(file: int) -> bool:
    """Take the exclusive lock, if nobody has any."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _release(file: int, path: Path) -> None:
    """Remove the file unless somebody else reads it."""
    try:
        if _lock_now(file) and is_at(file, path):
            path.unlink()
    finally:
        os.close(file)


def sweep(scratch: Path, seconds: float = LITTER_SECONDS) -> int:
    """Remove what killed workers left: files that nobody holds and nobody wrote to for so long, or
    that are of an earlier boot. Bytes made free.
    """
    freed = 0
    for path in scratch.glob(f"{PREFIX}*"):
        if not OURS.fullmatch(path.name):
            continue
        try:
            file = os.open(path, FLAGS)
        except (FileNotFoundError, PermissionError):  # swept by another, or another user's
            continue
        try:
            state = os.fstat(file)
            if time.time() - state.st_mtime < seconds and path.name.endswith(boot()):
                continue
            if _lock_now(file) and is_at(file, path):
                path.unlink()
                freed += state.st_blocks * 512
        finally:
            os.close(file)
    return freed


def boot() -> str:
    """A name for the time since the machine started: a power cut may lose bytes that are marked as
    there, a killed process cannot.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "anytime"


class Remote:
    """A tar elsewhere, of the size that the source knows."""

    def __init__(self, url: str, size: int, limits: Limits = LIMITS) -> None:
        folder, name = split_url(url)
        self.url, self.size, store = url, size, open_store(folder, limits)
        try:
            self.opened: Any = store.open(name)
            found = store.length(self.opened, url)
        except FileNotFoundError:
            raise FetchFailed(f"{url}: it is there no more. Restore it") from None
        except StoreError as error:
            raise FetchFailed(str(error)) from None
        refuse_size(url, found, size)
        told = f"{url}\n{size}\n{self.opened.etag}\n{os.getuid()}"  # /tmp is everybody's
        self.key = f"{hashlib.sha256(told.encode()).hexdigest()[:24]}-{boot()}"

    def stream_range(self, start: int, length: int, take: Callable[[int, Any], None]) -> None:
        self.opened.stream_range(start, length, take)

    def stream_whole(self, take: Callable[[int, Any], None]) -> None:
        self.opened.stream_whole(take)


def fill(
    file: int, path: Path, remote: Remote, threads: int, report: Callable[[int], None] = nothing,
    had: Callable[[int], None] = nothing,
) -> None:  # fmt: skip
    """Bring what a file still lacks of a tar; `had` hears of what is there already. Raises
    FetchFailed, or OSError if there is no room.
    """
    ranges = range(0, remote.size, RANGE)
    if os.fstat(file).st_size == remote.size:  # whole, or nothing at all
        return
    _make_room(file, path, remote.size)
    if os.fstat(file).st_size != remote.size + len(ranges):
        os.ftruncate(file, 0)
        os.ftruncate(file, remote.size + len(ranges))
    there = read_exactly(file, len(ranges), remote.size)
    missing = [i for i in range(len(ranges)) if there[i] != 1]
    had(sum(min(RANGE, remote.size - ranges[i]) for i in range(len(ranges)) if there[i] == 1))
    filling = Filling(file, remote, report)
    try:
        filling.run(missing, threads)
    except FileNotFoundError:
        raise FetchFailed(f"{remote.url}: it is there no more. Restore it") from None
    except StoreError as error:
        if filling.broken is None:
            raise FetchFailed(str(error)) from None
        if filling.broken.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise filling.broken from None
        raise no_room(path, remote.size) from None
    os.ftruncate(file, remote.size)


class Filling:
    """Threads that bring ranges into a file, until one fails."""

    def __init__(self, file: int, remote: Remote, report: Callable[[int], None]) -> None:
        self.file, self.remote, self.report = file, remote, report
        self.over = threading.Event()
        self.broken: OSError | None = None  # of the disk, which no repetition of a request helps

    def run(self, missing: list[int], threads: int) -> None:
        with ThreadPoolExecutor(max(1, min(threads, len(missing)))) as pool:
            jobs = [pool.submit(self._bring, i) for i in missing]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # also when a signal ends this thread's waiting
                self.over.set()
                pool.shutdown(wait=True, cancel_futures=True)
        errors = [e for job in jobs if not job.cancelled() and (e := job.exception()) is not None]
        errors = [e for e in errors if not isinstance(e, Over)] or errors
        if any(isinstance(e, NoRanges) for e in errors):
            self.over.clear()
            self.remote.stream_whole(self._take)
            count = len(range(0, self.remote.size, RANGE))
            os.pwrite(self.file, b"\1" * count, self.remote.size)
        elif errors:
            raise errors[0]

    def _bring(self, number: int) -> None:
        start = number * RANGE
        self.remote.stream_range(start, min(RANGE, self.remote.size - start), self._take)
        os.pwrite(self.file, b"\1", self.remote.size + number)

    def _take(self, offset: int, chunk: Any) -> None:
        if self.over.is_set():
            raise Over("another range failed")
        view = memoryview(chunk)
        if offset + len(view) > self.remote.size:
            raise StoreError(f"{self.remote.url}: more than {self.remote.size} bytes came")
        try:
            while len(view):
                written = os.pwrite(self.file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self.broken = error
            self.over.set()
            raise Over(str(error)) from None
        self.report(len(chunk))


class Over(StoreError):
    """The whole has failed, so a part need not go on."""


def _make_room(file: int, path: Path, size: int) -> None:
    """Raise ENOSPC before the first byte comes if the rest has no room, once litter is removed."""
    for clear in (False, True):
        if clear:
            sweep(path.parent, 0)
        found = os.fstatvfs(file)
        lacking = size - os.fstat(file).st_blocks * 512
        if found.f_bavail * found.f_frsize >= lacking + min(SPARE, lacking):
            return
    raise no_room(path, size)


def no_room(path: Path, size: int) -> OSError:
    found = os.statvfs(path.parent)
    free = found.f_bavail * found.f_frsize
    return OSError(
        errno.ENOSPC,
        f"a tar of {size / 1e9:.3f} GB has no room, {free / 1e9:.3f} GB are free; make room, or name "
        "another folder (an encode run's is engine.scratch)",
        str(path.parent),
    )
