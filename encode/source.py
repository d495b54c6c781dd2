"""Tars to rows: where each sample's members stand in its tar, in the tar's order.

A sample is a run of members with one key (the name up to the first dot of its last part); a new
one starts when the key changes or a suffix comes again. A tar that is cut off keeps the whole
members before the cut.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from shards import IndexRow, Source

from .errors import BadTar, MissingTar

CAPTION = "txt"  # last part of a suffix whose members are captions: txt, short.txt
CAPTION_BYTES = 1 << 20  # a longer one is no caption


def expand(tars: str | Sequence[str]) -> list[Path]:
    """Paths of a source's tars in order, from brace patterns such as `data/{000..009}.tar`."""
    patterns = [tars] if isinstance(tars, str) else list(tars)
    return [Path(path) for pattern in patterns for path in braceexpand(pattern)]


def make_source(name: str, tars: str | Sequence[str], shard_rows: int) -> tuple[Source, list[Path]]:
    """The source that a config names, and where its tars are; MissingTar lists what is not
    there.
    """
    paths = expand(tars)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise MissingTar(
            f"source {name!r}: {len(missing)} of {len(paths)} tars are not there, {missing[:3]} "
            "among them. "
            "Check the pattern (relative paths start at the current folder)"
        )
    sizes = tuple((path.name, path.stat().st_size) for path in paths)
    return Source(name, sizes, shard_rows), [path.resolve() for path in paths]


def split_name(name: str) -> tuple[str, str]:
    """`a/b.c.txt` -> (`a/b`, `c.txt`): webdataset's key and suffix.

    Either is empty for a name that belongs to no sample: `README`, `._a.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", suffix.lower()


def scan_tar(path: Path, limit: int) -> tuple[list[IndexRow], str | None]:
    """Rows of a tar, and a note where it is cut off or damaged.

    Raises BadTar for a file that is no tar at all, holds no sample, or has more than `limit` rows.
    """
    size = path.stat().st_size
    rows: list[IndexRow] = []
    note = None
    with path.open("rb") as file:
        try:
            # A name that is not UTF-8 becomes one that JSON can hold.
            tar = tarfile.open(  # noqa: SIM115 - closed with `file`
                fileobj=file, mode="r:", errors="backslashreplace"
            )
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise BadTar(f"{path}: not a tar ({error}, {size} bytes). Fetch it again") from None
        try:
            for member in tar:
                if member.size < 0 or tar.offset < member.offset_data:  # would go round for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                if not (member.isfile() and all(split_name(member.name))):
                    continue
                if member.offset_data + member.size > size:
                    note = f"cut off at byte {size}, inside {member.name}"
                    break
                _add(rows, member, file)
            else:
                note = _end(tar.offset, file, size)
        except (tarfile.TarError, ValueError, OverflowError):
            note = f"damaged after {len(rows)} rows"  # the index is the same for every Python
    if not rows:
        raise BadTar(f"{path}: no sample in it ({note or 'an empty tar'}). Fetch it again")
    if len(rows) > limit:
        raise BadTar(f"{path}: {len(rows)} rows, a shard has room for {limit}. Split the tar")
    return rows, note


def _end(offset: int, file: BinaryIO, size: int) -> str | None:
    """A note if there is no end-of-archive block at `offset`: there tarfile stops without a word
    too.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"cut off at byte {size}, before the end of the archive"
    return f"damaged at byte {offset}: neither a member nor the end" if any(block) else None


def _add(rows: list[IndexRow], member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Put a member into the last row, or into a new one."""
    key, suffix = split_name(member.name)
    if not rows or rows[-1].key != key or suffix in rows[-1].members:
        rows.append(IndexRow(key, {}, {}))
    members, captions = dict(rows[-1].members), dict(rows[-1].captions)
    members[suffix] = (member.offset_data, member.size)
    if suffix.rpartition(".")[2] == CAPTION and member.size <= CAPTION_BYTES:
        at = file.tell()
        file.seek(member.offset_data)
        captions[suffix] = hashlib.sha256(file.read(member.size)).hexdigest()
        file.seek(at)
    rows[-1] = IndexRow(key, members, captions)
