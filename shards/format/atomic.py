"""Objects appear whole or not at all and are never replaced.

    write <dir>/.tmp-<random> -> flush -> fsync -> link to the final name (fails if it exists) ->
    fsync(<dir>), and once the folders above it

The link is what makes a name appear; a crash before it leaves only a `.tmp-` file, which nothing
ever reads. Where a file system has no links (exFAT, SMB), a rename that does not replace takes its
place; where it has neither, StoreError says so at the first object. The last step is also taken
where the name existed already: who made it may have been killed before that step, and what is written
next must never outlive it in a power cut.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Self

from ..errors import CorruptColumn, FormatVersion, NotAColumn, StoreError, Unreadable

TEMPORARY = ".tmp-"
WHOLE_BYTES = 1 << 28  # no file that is read whole comes near; a larger one is not taken in
RECORD_BYTES = 1 << 26  # of a sealed record: parsed, JSON takes up to twenty times as much
LINES_BYTES = 1 << 31  # of a file of JSON lines
# what a link ends with where there are none (EPERM may also be a right: the rename then says so), a
# rename that must not replace where it is not known, and the fsync of a folder likewise
NO_LINKS = (
    errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV,
)  # fmt: skip
NO_RENAMES = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
# bytes written at a time: for more, Linux takes memory in blocks of 2 MiB, which a virtual machine has
# often handed back, and gets again at three times the price of the write
WRITE_BYTES = 1 << 18
Json = dict[str, Any]


def pieces(data: Any) -> Iterator[memoryview]:
    """Yields the bytes of a bytes-like object, WRITE_BYTES at a time."""
    view = memoryview(data).cast("B")
    return (view[start : start + WRITE_BYTES] for start in range(0, view.nbytes, WRITE_BYTES))


def sha256(data: bytes) -> str:
    """Returns the hexadecimal sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file, read in pieces."""
    with open(open_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns the one byte string of a JSON value: sorted keys, no spaces or NaN, a newline at the end."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode() + b"\n"


def open_file(path: Path | str) -> int:
    """Opens a regular file for reading and returns its descriptor. Unreadable where a pipe, a device
    or a folder has its name: reading these may never end, or never begin.
    """
    with naming(path):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Unreadable(f"{path}: it is no file, but a pipe, a device or a folder")
        return handle


def read_file(path: Path | str, limit: int = WHOLE_BYTES) -> bytes:
    """Returns the bytes of a regular file of at most `limit` bytes; Unreadable otherwise."""
    with naming(path), open(open_file(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise Unreadable(f"{path}: {size} bytes, at most {limit} expected")
        return file.readall()


def parse_json(data: bytes | str) -> Any:
    """Returns the value of a JSON text; ValueError where it is none, nests too deep to be read, or
    holds a half of a character, which no file can.
    """
    try:
        value = json.loads(data, parse_constant=_no_number)
        if (b"\\ud" if isinstance(data, bytes) else "\\ud") in data.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path | str) -> Any:
    """Returns the value of a JSON file; OSError or ValueError where there is none."""
    return parse_json(read_file(path))


class Staging(ABC):
    """An object on its way: bytes are written and hashed, then it appears whole or never. Left by
    `with` before `publish`, nothing of it stays.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._sha = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Appends a bytes-like object."""
        view = memoryview(data)
        if view.nbytes:  # an empty array has no flat view
            view = view.cast("B")
            self._sha.update(view)
            self.bytes += view.nbytes
            self._append(view)

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    @abstractmethod
    def _append(self, view: memoryview) -> None: ...

    @abstractmethod
    def publish(self) -> bool:
        """Makes the object appear; False if its name is taken, and then the other stays."""

    @abstractmethod
    def discard(self) -> None:
        """Removes what is not published."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class Staged(Staging):
    """A file being written under a temporary name beside its final one, or in another folder of the
    same file system, hashed on the way.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        super().__init__()
        self.path = path
        self.temporary = (folder or path.parent) / f"{TEMPORARY}{secrets.token_hex(8)}"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.temporary.open("xb")

    def _append(self, view: memoryview) -> None:
        with naming(self.path):
            for piece in pieces(view):
                self._file.write(piece)

    def publish(self) -> bool:
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            try:
                appear(self.temporary, self.path)
                is_new = True
            except FileExistsError:
                is_new = False
            make_durable(self.path)
        return is_new

    def discard(self) -> None:
        with naming(self.path):
            try:
                self._file.close()
            finally:
                self.temporary.unlink(missing_ok=True)


def appear(temporary: Path, path: Path) -> None:
    """Gives a file its final name, at once and whole; FileExistsError if the name is taken.

    StoreError where the file system can do that neither by a link nor by a rename.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        code = _rename_new(temporary, path)
        if code in NO_RENAMES:
            raise StoreError(
                f"{path}: this file system has neither hard links ({error.strerror}) nor renames that "
                "never replace, so two writers could destroy each other's data. Write to a folder of "
                "another one, and copy what is finished here with `cp -r`"
            ) from None
        if code:
            raise OSError(code, os.strerror(code), str(path)) from None


def _rename_new(old: Path, new: Path) -> int:
    """Renames unless the new name is taken, by Linux's renameat2; returns an errno, 0 if it was done."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    folder, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    failed = call(folder, os.fsencode(old), folder, os.fsencode(new), no_replace)
    return ctypes.get_errno() if failed else 0


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Lets an OSError say which object it is about: those of write, fsync and close do not."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:  # a ShardsError, which has no errno, says it already
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or the names in a folder, durable."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_SYNC or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


_durable: set[tuple[int, int]] = set()  # folders whose own names this process has made durable


def make_durable(path: Path) -> None:
    """Makes an object's name durable, and once a process those of the folders above it.

    Stops where the file system ends, or at a folder that this user may not open: we made none above.
    """
    path = path.absolute()
    fsync_path(path.parent)
    status = path.parent.stat()
    for folder in path.parents:
        key, above = (status.st_dev, status.st_ino), folder.parent.stat()
        if key in _durable or above.st_dev != status.st_dev or folder == folder.parent:
            return
        try:
            fsync_path(folder.parent)
        except PermissionError:
            return
        _durable.add(key)
        status = above


def make_readable(path: Path) -> None:
    """Lets others read a file that safetensors made private to the user, where a file has rights."""
    with suppress(PermissionError, NotImplementedError):
        path.chmod(0o644)


def put_if_absent(path: Path, data: bytes, folder: Path | None = None) -> bool:
    """Writes a whole small object; False if one of its name exists, which is then left as it is.
    Unfinished it is in `folder`, if one is named.
    """
    with Staged(path, folder) as file:
        file.write(data)
        return file.publish()


def atomic_write(path: Path, data: bytes, folder: Path | None = None) -> None:
    """Writes or replaces a file that is derived from others (a report), never a data object. Unreadable
    where a pipe or a device has its name, whose place a file would take: /dev/null, for everyone.
    Unfinished it is in `folder`, if one is named.
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.parent == Path("/dev"):  # where links lead to files, too
        raise Unreadable(f"{path}: found a pipe or a device, expected a file or a new name")
    with Staged(path, folder) as file:
        file.write(data)
        with naming(path):
            file._file.flush()
            os.fsync(file._file.fileno())
            os.replace(file.temporary, path)
    make_durable(path)


def seal(record: Json) -> bytes:
    """Returns a JSON record with the digest of its own canonical form in `digest`."""
    return canonical_json({**record, "digest": sha256(canonical_json(record))})


def unseal(path: Path, kind: str, version: int) -> Json:
    """Reads a sealed record from a file; see `unseal_bytes`. NotAColumn if the file is absent."""
    try:
        data = read_file(path, RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise NotAColumn(
            f"{path}: no such file. Expected a {kind} record; check the path, or encode first"
        ) from None
    return unseal_bytes(data, str(path), kind, version)


def unseal_bytes(data: bytes, name: str, kind: str, version: int) -> Json:
    """Returns a sealed record from its bytes; CorruptColumn if it is damaged, FormatVersion if it is
    of another format or version.
    """
    try:
        record = parse_json(data)
        digest = record.pop("digest")
        sound = digest == sha256(canonical_json(record)) and data == seal(record)
        refuse_version(record, name, kind, version)
    except FormatVersion as error:
        error.sound = sound
        raise
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptColumn(f"{name}: not a {kind} record ({error})") from None
    if not sound:
        raise CorruptColumn(
            f"{name}: the record's digest does not fit its content; it was edited or damaged. "
            "Restore it, or delete it and encode again"
        )
    record["digest"] = digest
    return record  # type: ignore[no-any-return]  # json.loads is untyped


def refuse_version(record: Any, name: str, kind: str, version: int) -> None:
    """Raises FormatVersion if a record is of another format, or of a version that this program does
    not read; KeyError or TypeError if it does not say so. `name` is the file, for the message.
    """
    form, number = record["format"], record["version"]
    if (form, number) != (kind, version):
        error = FormatVersion(
            f"{name}: found format {form!r:.80} version {number!r:.80}, this program reads {kind!r} "
            f"version {version}. Use the release that wrote it"
        )
        error.newer = form == kind and type(number) is int and number > version
        raise error
