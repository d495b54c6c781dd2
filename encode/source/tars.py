"""From tars to rows: the place of each sample's members in its tar, in the tar's order.

A sample is a run of members with one key (the name up to the first dot of its last part); a new
one starts when the key changes or a suffix comes again. A tar that is cut off keeps the whole
members before the cut.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from shards import IndexRow, Source, Store, open_store
from shards.column import CAPTION_BYTES
from shards.console import counted
from shards.format import MAX_CAPTIONS
from shards.format.checks import MAX_TEXT
from shards.places import local_path

from ..errors import BadTar, MissingTar, NotASource, TarChanged
from .places import LOOKING, base_name, is_url, listed, split_url

CAPTION = "txt"  # last part of a suffix whose members are captions: txt, short.txt
SUFFIX = 256  # characters; a longer one names nothing that a config could ask for
HEADER_BYTES = 1 << 20  # of a long name or of PAX fields; a larger one is damage
AFTER = 1 << 20  # bytes read at once after the end, where a second tar may follow
PROBES = 32  # sizes that are asked for at once
# what tarfile raises on damaged headers; the last on a chain of long names without a member
DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError)
# by its first bytes, what a file is that is no tar, and what to do about it
UNPACK = "Unpack it with `{}`: samples are read at their places in a tar, which compression hides"
KINDS = {
    b"\x1f\x8b": ("gzip", UNPACK.format("gunzip")),
    b"BZh": ("bzip2", UNPACK.format("bunzip2")),
    b"\xfd7zXZ": ("xz", UNPACK.format("unxz")),
    b"\x28\xb5\x2f\xfd": ("zstd", UNPACK.format("unzstd")),
    b"PK": ("zip", "Unpack it, then `python -m encode pack FOLDER OUT` makes tars"),
    b"<": ("HTML or XML", "A server sent a page in its place: look at it, then fetch it again"),
    b"version https://git-lfs": ("a pointer of Git LFS", "Fetch it with `git lfs pull`"),
}


def make_source(name: str, tars: str | Sequence[str], shard_rows: int) -> tuple[Source, list[str]]:
    """Returns the source that a config names, and its tars' absolute paths and urls.

    Raises MissingTar with the tars that do not exist, and NotASource for two tars of one name, which
    would have one identity.
    """
    places = listed(tars)
    if not places:
        raise NotASource(
            f"source {name!r}: found no tar. Expected paths, urls, brace patterns, *.tar or a folder"
        )
    names = [base_name(place) for place in places]
    _refuse_names(name, names, places)
    folders = {split_url(place)[0] for place in places if is_url(place)}
    stores = {folder: open_store(folder, LOOKING) for folder in folders}
    with ThreadPoolExecutor(PROBES) as pool:
        sizes = list(pool.map(lambda place: _size(place, stores), places))
    missing = [place for place, size in zip(places, sizes, strict=True) if size is None]
    if missing:
        end = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise MissingTar(
            f"source {name!r}: {len(missing)} of {counted(len(places), 'tar')} "
            f"{'is' if len(missing) == 1 else 'are'} not there: "
            f"{', '.join(missing[:20])}{end}. "
            "Check the pattern (relative paths start at the current folder)"
        )
    tar_sizes = tuple((n, size) for n, size in zip(names, sizes, strict=True) if size is not None)
    resolved = [p if is_url(p) else str(local_path(p).resolve()) for p in places]
    return Source(name, tar_sizes, shard_rows), resolved


def _refuse_names(name: str, names: Sequence[str], places: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for tar, place in zip(names, places, strict=True):
        if "\\" in tar or len(tar.encode()) > 255:
            raise NotASource(f"source {name!r}: {place}: no name for a tar. Call it otherwise")
        if tar in first:
            raise NotASource(
                f"source {name!r}: found two tars called {tar}, {first[tar]} and {place}. A source "
                "knows its tars by their names alone: make each folder a source of its own "
                "(training reads several), or give the tars other names"
            )
        first[tar] = place


def _size(place: str, stores: dict[str, Store]) -> int | None:
    """Returns the bytes of a tar; None if it does not exist."""
    if is_url(place):
        folder, name = split_url(place)
        return stores[folder].size(name)
    path = local_path(place)
    return path.stat().st_size if path.is_file() else None


def refuse_size(name: str, size: int, expected: int) -> None:
    """Raises BadTar unless a tar has the size that its source knows."""
    if size != expected:
        raise BadTar(
            f"{name}: found {size} bytes, the source was made of {expected}. Restore the tar, or make "
            "it a new source"
        )


class Tar:
    """A tar that is open for reading, of the size that its source knows, and must not change."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self._size = file, size
        self._time = os.fstat(file.fileno()).st_mtime_ns
        self.check()

    def check(self) -> None:
        """Raises BadTar for another size, TarChanged if the tar was written to since it was opened: half
        of the rows may be of another tar.
        """
        state = os.fstat(self.file.fileno())
        refuse_size(self.file.name, state.st_size, self._size)
        if state.st_mtime_ns != self._time:
            raise TarChanged(
                f"{self.file.name}: it was written to while it was read. Let whatever copies it "
                "finish, then run again"
            )


def read_exactly(file: int, size: int, offset: int) -> bytes:
    """Returns bytes of an open file; TarChanged if it ends before that. One `os.pread` may return
    fewer, as on network file systems.
    """
    data = part = os.pread(file, size, offset)
    while part and len(data) < size:
        part = os.pread(file, size - len(data), offset + len(data))
        data += part
    if len(data) < size:
        raise TarChanged(
            f"the tar ends at byte {os.fstat(file).st_size}, but a member of it ends at byte "
            f"{offset + size}. It was cut off after it was listed: restore it, then run again"
        )
    return data


def split_name(name: str) -> tuple[str, str]:
    """Returns webdataset's key and suffix: `a/b.c.txt` -> (`a/b`, `c.txt`). Either is empty for a name
    that belongs to no sample: `README`, `._a.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", suffix.lower()


class _Headers:
    """A tar open for reading its headers, which are small: a damaged one may claim gigabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def scan_tar(tar: Path | BinaryIO, limit: int) -> tuple[list[IndexRow], str | None]:
    """Returns the rows of a tar, and a note where it is cut off or damaged. Raises BadTar for a file
    that is no tar at all, holds no sample, or has more than `limit` rows.
    """
    rows: list[IndexRow] = []
    with tar.open("rb") if isinstance(tar, Path) else nullcontext(tar) as file:
        size = os.fstat(file.fileno()).st_size
        headers: Any = _Headers(file)  # all that tarfile needs of a file
        try:
            # A name that is not UTF-8 becomes one that JSON can hold.
            members = tarfile.open(  # noqa: SIM115 - closed with `file`
                fileobj=headers, mode="r:", errors="backslashreplace"
            )
        except DAMAGE as error:
            kind, advice = _kind(file) or (error, "Fetch it again")
            raise BadTar(f"{file.name}: not a tar ({kind}, {size} bytes). {advice}") from None
        note = _read_members(members, file, size, rows, limit)
    if not rows:
        raise BadTar(f"{file.name}: no sample in it ({note or 'an empty tar'}). Fetch it again")
    return rows, note


def _read_members(
    tar: tarfile.TarFile, file: BinaryIO, size: int, rows: list[IndexRow], limit: int
) -> str | None:
    """Fills `rows`; returns a note where the tar ends before its end."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # would keep every header
            if member.size < 0 or tar.offset < member.offset_data:  # would go round for ever
                raise tarfile.ReadError(f"a member of {member.size} bytes")
            if not (_is_plain(member) and all(split_name(member.name))):
                continue
            if member.offset_data + member.size > size:
                return f"cut off at byte {size}, inside {member.name[:1000]}"
            _add(rows, member, file)
            if len(rows) > limit:
                raise BadTar(
                    f"{file.name}: more than {limit} rows, which is what a shard has room for. "
                    "Split the tar, or set a larger shard_rows"
                )
    except BadTar:
        raise
    except DAMAGE:
        return f"damaged after {len(rows)} rows"  # the index is the same for every Python
    return _end(tar.offset, file, size)


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Returns whether it is a file stored in the tar as it is, under a name of sane length."""
    long = len(member.name) > SUFFIX and (
        len(member.name) > MAX_TEXT or len(split_name(member.name)[1]) > SUFFIX
    )
    return member.isfile() and not member.issparse() and not long


def _kind(file: BinaryIO) -> tuple[str, str] | None:
    """Returns what a file is that is no tar, by its first bytes, and what to do about it."""
    file.seek(0)
    start = file.read(32).lstrip()
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), None)


def _end(offset: int, file: BinaryIO, size: int) -> str | None:
    """Returns a note if there is no end-of-archive block at `offset`: tarfile would say nothing."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"cut off at byte {size}, before the end of the archive"
    if any(block):
        return f"damaged at byte {offset}: neither a member nor the end"
    while data := file.read(AFTER):
        if data.count(0) < len(data):
            return f"more after the end of the archive at byte {offset}, which is not read"
    return None


def _add(rows: list[IndexRow], member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Puts a member into the last row, or into a new one."""
    key, suffix = split_name(member.name)
    if not rows or rows[-1].key != key or suffix in rows[-1].members:
        rows.append(IndexRow(key, {}, {}))
    elif len(rows[-1].members) >= MAX_CAPTIONS:
        raise BadTar(
            f"{file.name}: more than {MAX_CAPTIONS} members of one sample, {key!r}. A name up to its "
            "first dot is the sample's: write 0001.jpg, not frame.0001.jpg"
        )
    members, captions = dict(rows[-1].members), dict(rows[-1].captions)
    members[suffix] = (member.offset_data, member.size)
    if suffix.rpartition(".")[2] == CAPTION and member.size <= CAPTION_BYTES:
        data = read_exactly(file.fileno(), member.size, member.offset_data)
        captions[suffix] = hashlib.sha256(data).hexdigest()
    rows[-1] = IndexRow(key, members, captions)
