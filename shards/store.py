"""Where a column stands: a folder, or a prefix in an object store, behind one seam.

A store is a small file system of objects. Names are relative, parted by `/`. Objects appear whole
or not at all and are never replaced; what is large is streamed in, and read in place by `preadv`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from .client import Limits
from .errors import CorruptColumn, NotAColumn, Unreadable
from .places import local_path, path_of
from .schema import COLUMN, COMMIT, COMPLETE, SOURCE
from .storage import (
    TEMPORARY,
    WHOLE_BYTES,
    Json,
    atomic_write,
    make_durable,
    naming,
    open_file,
    put_if_absent,
    staged,
    unseal_bytes,
)

REMOTE = ("s3", "gs", "az")
WEB = ("http", "https")  # to be read only
# of a sealed record by kind; parsed, JSON takes up to twenty times as much
RECORD_BYTES = {COLUMN: 1 << 22, COMMIT: 1 << 24, COMPLETE: 1 << 26, SOURCE: 1 << 26}
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a name that leads to nothing
SOME, READERS = 256, 16  # sizes that a thread asks for, one after the other, and threads
Handle = Any  # of an open object: a file descriptor, or what the store makes of one


class Staging(Protocol):
    """An object on its way: bytes are written and hashed, then it appears whole or never."""

    bytes: int

    @property
    def sha256(self) -> str: ...

    def write(self, data: Any) -> None:
        """Append a bytes-like object."""

    def publish(self) -> bool:
        """Make the object appear; False if its name is taken, and then what stands stays."""


class Store(ABC):
    """A folder of objects. Pickles; a copy in another process opens its own files."""

    url: str  # without a slash at the end
    folder: Path | None = None  # of a local store

    def at(self, name: str) -> str:
        """The object's full name, for messages."""
        return f"{self.url}/{name}"

    @property
    def name(self) -> str:
        """The last part of the url: how people call a column."""
        return self.url.rstrip("/").rpartition("/")[2]

    @abstractmethod
    def child(self, name: str) -> Store:
        """The store of all names below `name`."""

    @property
    def parent(self) -> Store:
        """The store that this one is a child of: of a column, its source."""
        return open_store(self.url.rpartition("/")[0])

    # Whole objects --------------------------------------------------------------------------------

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole small object; FileNotFoundError if it is absent."""

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create a small object; False if the name is taken, and then what stands stays."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write or replace an object that is derived from others, never a data object."""

    @abstractmethod
    def staged(self, name: str) -> AbstractContextManager[Staging]:
        """Create a large object: `with store.staged(name) as f: f.write(...); f.publish()`."""

    def settle(self, name: str) -> None:  # noqa: B027  # an object store keeps what it shows
        """Make a name that stands outlive a power cut: its writer may have died just before that."""

    def touch(self, name: str) -> None:  # noqa: B027  # an object store can only write it again
        """Make an object young again that is of no commit, but will be: `gc` then leaves it."""

    def unseal(self, name: str, kind: str, version: int) -> Json:
        """Read a sealed record; see `storage.unseal_bytes`. NotAColumn if it is absent."""
        size = self.size(name)
        if size is not None and size > RECORD_BYTES.get(kind, 1 << 20):
            raise CorruptColumn(
                f"{self.at(name)}: {size} bytes are no {kind} record. Restore it, or delete it and "
                "encode again"
            )
        try:
            data = self.read(name)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAColumn(
                f"{self.at(name)}: no such file. Expected a {kind} record; check the path, or "
                "encode first"
            ) from None
        return unseal_bytes(data, self.at(name), kind, version)

    # Names ----------------------------------------------------------------------------------------

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of an object; None if it is absent."""

    def sizes(self, names: Sequence[str]) -> Sequence[int | None]:
        """The size of each of many objects."""
        parts = [names[i : i + SOME] for i in range(0, len(names), SOME)]
        with ThreadPoolExecutor(READERS) as pool:  # a network's file system takes its time for each
            found = pool.map(lambda part: [self.size(name) for name in part], parts)
            return [size for part in found for size in part]

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """Names of the folders that are direct children."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of every object below a folder, sorted, without what is being staged."""

    @abstractmethod
    def litter(self, seconds: float) -> Sequence[str]:
        """Names that interrupted writers left behind at least so long ago."""

    @abstractmethod
    def age(self, name: str) -> float | None:
        """Seconds since an object was written; None if it is absent."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object, if it is there. For `repair` and `gc` alone, under the lease."""

    @abstractmethod
    def move(self, name: str, to: str) -> None:
        """Give an object another name. For `repair` alone."""

    # Reading in place -----------------------------------------------------------------------------

    @abstractmethod
    def open(self, name: str, cached: bool = True) -> Handle:
        """Open an object for `preadv`; FileNotFoundError if it is absent. Without `cached` its bytes
        come from the store itself, past anything that is kept of it elsewhere.
        """

    @abstractmethod
    def length(self, handle: Handle, name: str) -> int:
        """Bytes of an open object; an error says its `name`."""

    @abstractmethod
    def preadv(self, handle: Handle, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers from an open object as `os.preadv` does; how many bytes came."""

    @abstractmethod
    def willneed(self, handle: Handle, offset: int, length: int) -> None:
        """Say that a range will be read soon. Returns at once."""

    @abstractmethod
    def close(self, handle: Handle) -> None:
        """Close an open object."""

    def forget(self, handle: Handle, offset: int, length: int) -> bool:
        """Drop what is cached of a range, so that it is fetched again; False if nothing is ever
        cached.
        """
        return False


Place = Store | Path | str  # what a store may be named by


class LocalStore(Store):
    """A folder. Handles are file descriptors."""

    preadv = staticmethod(os.preadv)  # type: ignore[assignment]  # the same call, with no layer between
    close = staticmethod(os.close)  # type: ignore[assignment]

    def __init__(self, folder: Path | str) -> None:
        self.folder: Path = Path(folder)
        self.url = str(self.folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.folder,)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def child(self, name: str) -> Store:
        return LocalStore(self.folder / name)

    @property
    def parent(self) -> Store:
        return LocalStore(Path(os.path.normpath(self.folder.absolute())).parent)

    def read(self, name: str) -> bytes:
        handle = self.open(name)
        with naming(self.folder / name), open(handle, "rb", buffering=0) as file:
            size = self.length(handle, self.at(name))
            if size > WHOLE_BYTES:
                raise CorruptColumn(
                    f"{self.at(name)}: {size} bytes, at most {WHOLE_BYTES} expected. Restore it, or "
                    "encode again"
                )
            return file.readall()

    def settle(self, name: str) -> None:
        make_durable(self.folder / name)

    def touch(self, name: str) -> None:
        # another user's, or gone, as whoever asked will see
        with suppress(PermissionError, FileNotFoundError):
            os.utime(self.folder / name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return put_if_absent(self.folder / name, data)

    def replace(self, name: str, data: bytes) -> None:
        atomic_write(self.folder / name, data)

    def staged(self, name: str) -> AbstractContextManager[Staging]:
        return staged(self.folder / name)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(os.path.join(self.folder, name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def folders(self) -> Sequence[str]:
        try:
            entries = list(os.scandir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) or is_folder(e))

    def _files(
        self, prefix: str, above: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file below a folder with its name, also where a link leads to another disk; `above`
        are the links that were followed to come here.
        """
        try:
            entries = list(os.scandir(self.folder / prefix))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._files(name, above)
            elif not entry.is_symlink() or not is_folder(entry):
                yield name, entry
            elif not self._leads_up(entry, real := os.path.realpath(entry.path), above):
                yield from self._files(name, (*above, real))

    def _leads_up(self, entry: os.DirEntry[str], real: str, above: tuple[str, ...]) -> bool:
        """Whether a link leads to a folder that it lies in itself, by links or without."""
        below = (os.path.realpath(p) for p in (self.folder, os.path.dirname(entry.path)))
        return real in above or any(Path(folder).is_relative_to(real) for folder in below)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return sorted(
            (name, found.st_size)
            for name, entry in self._files(prefix.rstrip("/"))
            if not entry.name.startswith(TEMPORARY) and (found := status_of(entry))
        )

    def litter(self, seconds: float) -> Sequence[str]:
        old = time.time() - seconds
        return sorted(
            name
            for name, entry in self._files("")
            if entry.name.startswith(TEMPORARY)
            and (found := status_of(entry))
            and found.st_mtime <= old
        )

    def age(self, name: str) -> float | None:
        try:
            return time.time() - (self.folder / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        (self.folder / to).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(self.folder / name, self.folder / to)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copy2(self.folder / name, self.folder / to)  # a link led to another disk
            os.unlink(self.folder / name)

    def open(self, name: str, cached: bool = True) -> Handle:
        try:
            return open_file(self.folder / name)
        except Unreadable:
            raise CorruptColumn(
                f"{self.at(name)}: it is no file. Restore it, or encode again"
            ) from None

    def length(self, handle: Handle, name: str) -> int:
        with naming(name):
            return os.fstat(handle).st_size

    def willneed(self, handle: Handle, offset: int, length: int) -> None:
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """What a name leads to; None if that is nothing: it went meanwhile, or is a link to nowhere."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder."""
    found = status_of(entry)
    return found is not None and stat.S_ISDIR(found.st_mode)


def open_store(url: Place, limits: Limits | None = None) -> Store:
    """The store at a path or url: a folder, `file://`, `s3://`, `gs://`, `az://`, or, to read single
    files, `http://` or `https://`. `limits` of waiting hold for what is remote.
    """
    if isinstance(url, Store):
        return url
    scheme = str(url).partition("://")[0] if "://" in str(url) else ""
    if scheme in REMOTE:
        from .remote import RemoteStore

        return RemoteStore(str(url), limits)
    if scheme in WEB:
        from .web import WebStore

        return WebStore(str(url), limits)
    if scheme == "file":
        return LocalStore(path_of(str(url)))
    if scheme:
        raise NotAColumn(
            f"{url}: found the scheme {scheme!r}, expected a path or one of file://, "
            + ", ".join(f"{name}://" for name in (*REMOTE, *WEB))
        )
    return LocalStore(local_path(url))
