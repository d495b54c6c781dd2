"""Columns in folders of this machine."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CorruptColumn, StoreError, Unreadable
from ..format.atomic import (
    TEMPORARY,
    WHOLE_BYTES,
    Staged,
    Staging,
    atomic_write,
    fsync_path,
    make_durable,
    naming,
    open_file,
    put_if_absent,
)
from .base import Committed, Handle, Store, too_large

ABSENT_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a name that leads to nothing


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

    def read(self, name: str, most: int = WHOLE_BYTES) -> bytes:
        handle = self.open(name)
        with naming(self.folder / name), open(handle, "rb", buffering=0) as file:
            size = self.length(handle, self.at(name))
            if size > most:
                raise too_large(self.at(name), size, most)
            return file.readall()

    def make_durable(self, name: str) -> None:
        make_durable(self.folder / name)

    def touch(self, name: str) -> None:
        # another user's, or deleted, which the caller will see
        with suppress(PermissionError, FileNotFoundError):
            os.utime(self.folder / name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return put_if_absent(self.folder / name, data)

    def replace(self, name: str, data: bytes) -> None:
        atomic_write(self.folder / name, data)

    def staged(self, name: str) -> Staging:
        return Staged(self.folder / name)

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
        """Yields every file below a folder with its name, also where a link leads to another disk; `above`
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
        """Returns whether a link leads to a folder that it lies in itself, by links or without."""
        below = (os.path.realpath(p) for p in (self.folder, os.path.dirname(entry.path)))
        return real in above or any(Path(folder).is_relative_to(real) for folder in below)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return sorted(
            (name, status.st_size)
            for name, entry in self._files(prefix.rstrip("/"))
            if not entry.name.startswith(TEMPORARY) and (status := status_of(entry))
        )

    def stale_temporaries(self, seconds: float) -> Sequence[str]:
        old = time.time() - seconds
        return sorted(
            name
            for name, entry in self._files("")
            if entry.name.startswith(TEMPORARY)
            and (status := status_of(entry))
            and status.st_mtime <= old
        )

    def age(self, name: str) -> float | None:
        try:
            return time.time() - (self.folder / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        source, target = self.folder / name, self.folder / to
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copy2(source, target)  # a link led to another disk
            fsync_path(target)
            make_durable(target)
            if target.stat().st_size != source.stat().st_size:
                raise StoreError(
                    f"{target}: it changed while {source} was copied to it. Nothing was deleted; run "
                    "again"
                ) from None
            os.unlink(source)

    def open(self, name: str, cached: bool = True, committed: Committed | None = None) -> Handle:
        try:
            return open_file(self.folder / name)
        except Unreadable:
            raise CorruptColumn(
                f"{self.at(name)}: it is no file. Restore it, or encode again"
            ) from None

    def length(self, handle: Handle, name: str) -> int:
        with naming(name):
            return os.fstat(handle).st_size

    def willneed(self, handle: Handle, offset: int, length: int, wanted: int = 0) -> None:
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_WILLNEED)


def status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Returns the status of what a name leads to; None if it went meanwhile, or is a broken link."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in ABSENT_ERRNOS:
            raise
        return None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether a link leads to a folder."""
    status = status_of(entry)
    return status is not None and stat.S_ISDIR(status.st_mode)
