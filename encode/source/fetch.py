"""Remote tars, downloaded whole to a scratch folder before they are read.

    with fetched("https://server/00.tar", scratch, size) as path: ...

A tar comes in ranges, several at a time, into one file:

    <scratch>/latentbank-<digest of url, version and boot>     bytes of the tar, then a byte a range: 1 once it came

The last part is cut off once every range came, so a file of the tar's size is whole, and a longer one
goes on where its writer stopped. A writer holds an exclusive lock on the file, a reader a shared one;
locks of the dead are free. The last reader removes the file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards import StoreError, open_store
from shards.console import size_text
from shards.places import local_path
from shards.store import Limits, NoRanges

from ..errors import FetchFailed
from .places import is_url, split_url
from .tars import read_exactly, refuse_size

PREFIX = "latentbank-"  # of every file of ours in a scratch folder
OURS = re.compile(rf"{PREFIX}[0-9a-f]{{24}}-[0-9a-z]{{1,8}}")
FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
RANGE = 32 << 20  # bytes of a request; servers count requests, so not too small
THREADS = 8
STALE_SECONDS = 3600  # a file without a lock that is older was left by a process that died
SPARE = 64 << 20  # bytes of the scratch folder that are left free
LIMITS = Limits(request=900, give_up=600, max_backoff=60)


@contextmanager
def fetched(
    url: str, scratch: Path, size: int, *, report: Callable[[int], None] = lambda count: None,
    limits: Limits = LIMITS,
) -> Iterator[Path]:  # fmt: skip
    """Yields the path of a tar: of this machine as it is, or downloaded to `scratch` and removed at
    the end. `report` is called with the bytes of each piece that arrives.

    Raises FetchFailed when it cannot be fetched now, BadTar when it is not of `size` bytes, OSError
    (ENOSPC) when there is no room for it.
    """
    if not is_url(url):
        yield local_path(url)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    download = Download(url, size, limits, report)
    path = scratch / f"{PREFIX}{download.key}"
    sweep(scratch)
    file = _whole(download, path)
    try:
        yield path
    finally:
        try:
            if _lock_now(file) and _is_at(file, path):  # nobody else reads it
                path.unlink()
        finally:
            os.close(file)


def _whole(download: Download, path: Path) -> int:
    """Returns the descriptor of the whole tar at `path`, with a shared lock.

    Whoever is first fills the file; the others wait for the shared lock, which they get once it is
    whole, or its writer has failed.
    """
    while True:
        file = os.open(path, FLAGS | os.O_CREAT, 0o600)
        try:
            if _lock_now(file) and _is_at(file, path):  # else it was removed before it was locked
                download.fill(file, path)
            # between the two locks there is none: another process may take the file away
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file).st_size == download.size and _is_at(file, path):
                return file
        except BaseException:
            os.close(file)  # its bytes stay for the next attempt
            raise
        os.close(file)
        time.sleep(random.uniform(0, 0.05))


def _lock_now(file: int) -> bool:
    """Takes the exclusive lock, if nobody has any; returns whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Returns whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def sweep(scratch: Path, seconds: float = STALE_SECONDS) -> int:
    """Removes what killed workers left: files without a lock that nobody wrote to for `seconds`, or
    that are of an earlier boot. Returns the bytes that became free.
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
            if _lock_now(file) and _is_at(file, path):
                path.unlink()
                freed += state.st_blocks * 512
        finally:
            os.close(file)
    return freed


def boot() -> str:
    """Returns a name for the time since the machine started: a power cut may lose bytes that are
    marked as there, a killed process cannot.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "anytime"


class Download:
    """A tar elsewhere, of the size that the source knows, and the threads that bring its ranges into
    a file until one fails.
    """

    def __init__(self, url: str, size: int, limits: Limits, report: Callable[[int], None]) -> None:
        folder, name = split_url(url)
        self.url, self.size, self.report, store = url, size, report, open_store(folder, limits)
        try:
            self._remote: Any = store.open(name)
            length = store.length(self._remote, url)
        except FileNotFoundError:
            raise self._gone() from None
        except StoreError as error:
            raise FetchFailed(str(error)) from None
        refuse_size(url, length, size)
        version = f"{url}\n{size}\n{self._remote.etag}\n{os.getuid()}"  # /tmp is everybody's
        self.key = f"{hashlib.sha256(version.encode()).hexdigest()[:24]}-{boot()}"
        self._stop = threading.Event()
        self._disk_error: OSError | None = None  # which no repetition of a request helps

    def _gone(self) -> FetchFailed:
        return FetchFailed(f"{self.url}: it no longer exists. Restore it")

    def fill(self, file: int, path: Path) -> None:
        """Downloads what a file lacks of the tar. Raises FetchFailed, or OSError of the disk."""
        if os.fstat(file).st_size == self.size:
            return
        _make_room(file, path, self.size)
        count = len(range(0, self.size, RANGE))
        if os.fstat(file).st_size != self.size + count:
            os.ftruncate(file, 0)
            os.ftruncate(file, self.size + count)
        flags = read_exactly(file, count, self.size)
        self._stop.clear()
        try:
            self._run(file, [i for i in range(count) if flags[i] != 1])
        except FileNotFoundError:
            raise self._gone() from None
        except (StoreError, CancelledError) as error:
            if self._disk_error is None:
                raise FetchFailed(str(error)) from None
            if self._disk_error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_error from None
            raise no_room(path, self.size) from None
        os.ftruncate(file, self.size)

    def _run(self, file: int, missing: list[int]) -> None:
        def write(offset: int, chunk: Any) -> None:
            if self._stop.is_set():
                raise CancelledError
            if offset + len(chunk) > self.size:
                raise StoreError(f"{self.url}: more than {self.size} bytes came")
            view = memoryview(chunk)
            try:
                while len(view):
                    count = os.pwrite(file, view, offset)
                    view, offset = view[count:], offset + count
            except OSError as error:
                self._disk_error = error
                self._stop.set()
                raise CancelledError from None
            self.report(len(chunk))

        def fetch(number: int) -> None:
            start = number * RANGE
            self._remote.stream_range(start, min(RANGE, self.size - start), write)
            os.pwrite(file, b"\1", self.size + number)

        with ThreadPoolExecutor(max(1, min(THREADS, len(missing)))) as pool:
            jobs = [pool.submit(fetch, number) for number in missing]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:  # also when a signal ends this thread's waiting
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        errors = [e for job in jobs if not job.cancelled() and (e := job.exception()) is not None]
        if any(isinstance(error, NoRanges) for error in errors):
            self._stop.clear()
            self._remote.stream_whole(write)
        elif errors:
            raise min(errors, key=lambda error: isinstance(error, CancelledError))


def _make_room(file: int, path: Path, size: int) -> None:
    """Raises ENOSPC before the first byte comes if the rest has no room, once old files are swept."""
    needed = size - os.fstat(file).st_blocks * 512
    needed += min(SPARE, needed)
    if _free(path) < needed:
        sweep(path.parent, 0)
        if _free(path) < needed:
            raise no_room(path, size)


def _free(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def no_room(path: Path, size: int) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"a tar of {size_text(size)} has no room, {size_text(_free(path))} are free; make room, or name "
        "another folder (an encode run's is engine.scratch)",
        str(path.parent),
    )
