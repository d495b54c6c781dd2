"""What a column has read of a tar: the members with one suffix, as one digest.

It is the sha256 of 32 bytes for each row, in the rows' order: the sha256 of the row's member,
zeros where the row has none, ones where it is too large to be read. Columns of one source that
read the same suffix have the same digest, whatever their encoders.

A column may read the first of several suffixes that a row has: `jpg|png`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Container, Iterator, Sequence
from typing import Any

from ..format.atomic import Json
from ..format.identity import preprocess_of
from ..store.base import Handle, Store
from .source import IndexRow
from .zarr_object import read_into

CAPTION_BYTES = 1 << 20  # a longer one is no caption
DIGEST_BYTES = 32  # of a row
ABSENT = bytes(DIGEST_BYTES)
UNREAD = b"\xff" * DIGEST_BYTES
OR = "|"  # between suffixes, the first of which that a row has is read
AT_ONCE, GAP = 1 << 24, 1 << 20  # bytes of a read, and between two members that are read together


def member_of(suffix: str) -> str:
    """Returns the suffixes of the members alone: `json` of `json:caption`, `txt|json` of
    `txt|json:caption`.
    """
    return OR.join(dict.fromkeys(member for member, _ in alternatives(suffix)))


def alternatives(suffix: str) -> list[tuple[str, str]]:
    """Returns (member, field) of each suffix, in their order; the field is empty but of JSON."""
    pairs = []
    for part in suffix.split(OR):
        member, _, field = part.partition(":")
        pairs.append((member, field) if is_json(member) else (part, ""))
    return pairs


def chosen(members: Container[str], suffix: str) -> str | None:
    """Returns which of a row's members a column reads; None where the row has none of them."""
    return next((member for member, _ in alternatives(suffix) if member in members), None)


def is_json(member: str) -> bool:
    return member.rpartition(".")[2] == "json"


def suffix_read(identity: Json) -> str | None:
    """Returns what a column was made of, captions or pictures, by its suffix, as its identity says; None if
    it says nothing.
    """
    preprocess = preprocess_of(identity) or {}
    suffix = preprocess.get("caption") or preprocess.get("image")
    return suffix if isinstance(suffix, str) else None


def member_read(identity: Json) -> str | None:
    """Does so without the fields of JSON: the members alone."""
    suffix = suffix_read(identity)
    return None if suffix is None else member_of(suffix)


def members_digest(
    store: Store, tar: Handle, name: str, rows: Sequence[IndexRow], suffix: str, captions: bool
) -> str:
    """Returns the digest of the members that an open tar holds now where its index says so. Raises
    CorruptColumn if the tar ends before that.
    """
    digest: Any = hashlib.sha256()
    places = [row.members.get(chosen(row.members, suffix) or "") for row in rows]
    large = CAPTION_BYTES if captions else sys.maxsize
    readable = [place for place in places if place is not None and place[1] <= large]
    members = _read(store, tar, name, readable)
    for place in places:
        if place is None:
            digest.update(ABSENT)
        elif place[1] > large:
            digest.update(UNREAD)
        else:
            digest.update(hashlib.sha256(next(members)).digest())
    return str(digest.hexdigest())


def _read(
    store: Store, tar: Handle, name: str, places: Sequence[tuple[int, int]]
) -> Iterator[memoryview]:
    """Yields the bytes at each (offset, size); places that are close together are read at once."""
    for run in _runs(places):
        first = run[0][0]
        data = memoryview(bytearray(run[-1][0] + run[-1][1] - first))
        read_into(store, tar, data, first, name)
        yield from (data[offset - first :][:size] for offset, size in run)


def _runs(places: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yields the places, in their order, by what is read at once."""
    run: list[tuple[int, int]] = []
    for offset, size in places:
        if run:
            end = sum(run[-1])
            if not (end <= offset <= end + GAP and offset + size - run[0][0] <= AT_ONCE):
                yield run
                run = []
        run.append((offset, size))
    if run:
        yield run
