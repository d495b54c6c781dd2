"""Objects appear whole or not at all and are never replaced.

    write <dir>/.tmp-<random> -> flush -> fsync -> link to the final name (fails if it exists) ->
    fsync(<dir>)

The link is what makes a name appear; a crash before it leaves only a `.tmp-` file, which nothing
ever reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CorruptColumn, FormatVersion, NotAColumn

TEMPORARY = ".tmp-"
Json = dict[str, Any]


def sha256(data: bytes) -> str:
    """Hexadecimal sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN, a newline at the end."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode() + b"\n"


class Staged:
    """A file being written under a temporary name beside its final one, hashed on the way."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        self.bytes = 0
        self._sha = hashlib.sha256()
        self._file = self.temporary.open("xb")

    def write(self, data: Any) -> None:
        """Append a bytes-like object."""
        view = memoryview(data)
        if not view.nbytes:  # an empty array has no flat view
            return
        view = view.cast("B")
        self._file.write(view)
        self._sha.update(view)
        self.bytes += view.nbytes

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def publish(self) -> bool:
        """Make the file appear under its final name; False if that name is taken (and stays as it
        was).
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            os.link(self.temporary, self.path)
        except FileExistsError:
            return False
        fsync_path(self.path.parent)
        return True

    def discard(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self.temporary.unlink()


@contextmanager
def staged(path: Path) -> Iterator[Staged]:
    """Write a new object: `with staged(path) as f: f.write(...); f.publish()`."""
    file = Staged(path)
    try:
        yield file
    finally:
        file.discard()


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_if_absent(path: Path, data: bytes) -> bool:
    """Write a whole small object; False if one stands there already, which is then left as it
    is.
    """
    with staged(path) as file:
        file.write(data)
        return file.publish()


def atomic_write(path: Path, data: bytes) -> None:
    """Write or replace a file that is derived from others (a pointer, a report), never a data
    object.
    """
    with staged(path) as file:
        file.write(data)
        file._file.flush()
        os.fsync(file._file.fileno())
        os.replace(file.temporary, path)
    fsync_path(path.parent)


def seal(record: Json) -> bytes:
    """A JSON record with the digest of its own canonical form in `digest`."""
    return canonical_json({**record, "digest": sha256(canonical_json(record))})


def unseal(path: Path, kind: str, version: int) -> Json:
    """Read a sealed record and check its digest, its kind and its version.

    Raises NotAColumn if the file is absent, CorruptColumn if it is damaged, FormatVersion if it is
    something else.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotAColumn(
            f"{path}: no such file. Expected a {kind} record; check the path, or encode first"
        ) from None
    try:
        record = json.loads(data)
        digest = record.pop("digest")
        found, standing = record["format"], record["version"]
        sound = digest == sha256(canonical_json(record)) and data == seal(record)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CorruptColumn(f"{path}: not a {kind} record ({error})") from None
    if found != kind or standing != version:
        raise FormatVersion(
            f"{path}: found format {found!r} version {standing!r}, this program reads "
            f"{kind!r} version {version}. Use the release that wrote it, or encode again"
        )
    if not sound:
        raise CorruptColumn(
            f"{path}: the record's digest does not fit its content; it was edited or damaged. "
            "Restore it, or delete it and encode again"
        )
    record["digest"] = digest
    return record  # type: ignore[no-any-return]  # json.loads is untyped
