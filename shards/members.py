"""What a column has read of a tar: the members with one suffix, as one digest.

It is the sha256 of 32 bytes for each row, in the rows' order: the sha256 of the row's member,
zeros where the row has none, ones where it is too large to be read. Columns of one source that
read the same suffix have the same digest, whatever their encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from .source import IndexRow
from .storage import Json
from .store import Handle, Store
from .zarrfile import read_into

CAPTION_BYTES = 1 << 20  # a longer one is no caption
DIGEST_BYTES = 32  # of a row
ABSENT = bytes(DIGEST_BYTES)
UNREAD = b"\xff" * DIGEST_BYTES


def member_of(suffix: str) -> str:
    """The suffix of the member alone: `json` of `json:caption`."""
    member = suffix.partition(":")[0]
    return member if is_json(member) else suffix


def is_json(member: str) -> bool:
    return member.rpartition(".")[2] == "json"


def member_read(identity: Json) -> str | None:
    """The suffix of the members that a column was made of, captions or pictures, as its identity
    says; None if it says nothing.
    """
    how = identity.get("preprocess")
    suffix = (how.get("caption") or how.get("image")) if isinstance(how, dict) else None
    return member_of(suffix) if isinstance(suffix, str) else None


def members_digest(
    store: Store, tar: Handle, name: str, rows: Sequence[IndexRow], suffix: str, captions: bool
) -> str:
    """The digest of the members that an open tar holds now where its index says so. Raises
    CorruptColumn if the tar ends before that.
    """
    digest: Any = hashlib.sha256()
    for row in rows:
        offset, size = row.members.get(suffix, (0, None))
        if size is None:
            digest.update(ABSENT)
        elif captions and size > CAPTION_BYTES:
            digest.update(UNREAD)
        else:
            data = bytearray(size)
            read_into(store, tar, data, offset, name)
            digest.update(hashlib.sha256(data).digest())
    return str(digest.hexdigest())
