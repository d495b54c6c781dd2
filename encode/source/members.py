"""Which member of a sample a column reads: its suffix, and in JSON the field.

image: jpg            the picture (also written .jpg, *.JPG)
image: [jpg, png]     the first of these that a sample has; jpg|png in records
caption: txt          the whole member
caption: json:meta.en the text of this field
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import IndexRow, Status
from shards.column import ABSENT, CAPTION_BYTES, OR, UNREAD, alternatives, chosen, is_json

from ..errors import TarChanged
from .tars import read_exactly, split_name

# suffixes of pictures; those that nearly all are of come first
PICTURES = "jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "heic", "jp2", "jxl", "tif", "tiff"
SHOWN = 20  # suffixes of a shard that are counted by name


def normal_suffix(text: str) -> str:
    """Returns a suffix as `split_name` does, however it is written; ValueError if it is none."""
    suffix = split_name(f"x.{text.strip().removeprefix('*').lstrip('.').strip()}")[1]
    if not suffix:
        raise ValueError("no suffix of a member. Write it as in jpg, txt or seg.png")
    return suffix


def normal_caption(text: str) -> str:
    """Does so for captions, where a field of JSON may follow: `.JSON: caption` is `json:caption`."""
    member, _, field = text.partition(":")
    member = normal_suffix(member)
    if not is_json(member):
        return normal_suffix(text)
    names = [name.strip() for name in field.split(".")]
    if not all(names):
        raise ValueError(
            f"JSON is no caption as it is. Name the field that is one, as in {member}:caption or "
            f"{member}:meta.caption"
        )
    return f"{member}:{'.'.join(names)}"


def in_order(normal: Callable[[str], str]) -> Callable[[Any], Any]:
    """Returns how a config's suffix, or list of suffixes, becomes one text: `jpg|png` of `[jpg, PNG]`."""

    def joined(value: Any) -> Any:
        parts = value.split(OR) if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError(
                "expected a suffix, or a list of them. Write it as in jpg, or [jpg, png]"
            )
        if not parts:
            raise ValueError("no suffix at all. Write one, or some, as in [jpg, png]")
        return OR.join(dict.fromkeys(normal(part) for part in parts))

    return joined


def caption_in(data: bytes, suffix: str) -> tuple[str | None, Status]:
    """Returns the caption in a member's bytes, and OK, CAPTION_MISSING (JSON without the field) or
    CAPTION_UNDECODABLE (not UTF-8, not JSON, or the field holds no text).
    """
    try:
        value: Any = data.decode()
        ((_, field),) = alternatives(suffix)
        if field:
            value = json.loads(value)
            for name in field.split("."):
                if not isinstance(value, dict) or name not in value:
                    return None, Status.CAPTION_MISSING
                value = value[name]
            if not isinstance(value, str):
                return None, Status.CAPTION_UNDECODABLE
            value.encode()  # JSON can spell half a surrogate
    except (ValueError, RecursionError):
        return None, Status.CAPTION_UNDECODABLE
    return value.strip(), Status.OK


def caption_of(data: bytes, member: str, suffix: str) -> tuple[str | None, Status]:
    """Returns the caption in the member that a column reads of a row; of several fields of one JSON the
    first that holds a text, else what is wrong with the first.
    """
    fields = [field for name, field in alternatives(suffix) if name == member]
    captions = (caption_in(data, f"{member}:{field}" if field else member) for field in fields)
    first, *others = captions
    return next((caption for caption in (first, *others) if caption[0] is not None), first)


def passed_over(rows: Iterable[IndexRow], suffix: str, pictures: bool) -> dict[str, int]:
    """Returns the number of rows that lack a column's member and have other pictures (or other members,
    for a column of captions), by the suffix of those.
    """
    counts = Counter(
        member
        for row in rows
        if chosen(row.members, suffix) is None
        for member in row.members
        if (member.rpartition(".")[2] in PICTURES) == pictures
    )
    return dict(counts.most_common(SHOWN))


def read_captions(
    block: Sequence[IndexRow], tar: int, suffix: str,
    digested: Callable[[bytes], object] = lambda digest: None,
) -> tuple[list[str | None], NDArray[np.uint8]]:  # fmt: skip
    """Returns the captions of rows and their status: OK, CAPTION_MISSING or CAPTION_UNDECODABLE (over a
    megabyte, or see `caption_in`). `digested` is called with each row's 32 bytes of
    `shards.column.members`. Raises TarChanged if a caption is not the one of the index.
    """
    captions: list[str | None] = []
    status = np.zeros(len(block), np.uint8)
    for i, row in enumerate(block):
        caption = None
        member = chosen(row.members, suffix)
        if member is None:
            status[i] = Status.CAPTION_MISSING
            digested(ABSENT)
        elif row.members[member][1] > CAPTION_BYTES:
            status[i] = Status.CAPTION_UNDECODABLE
            digested(UNREAD)
        else:
            offset, size = row.members[member]
            data = read_exactly(tar, size, offset)
            digest = hashlib.sha256(data)
            if row.captions.get(member, digest.hexdigest()) != digest.hexdigest():
                raise TarChanged(
                    f"the {member} of {row.key!r} is not the one that the tar held when it was "
                    "listed. Restore the tar, then run again"
                )
            digested(digest.digest())
            caption, status[i] = caption_of(data, member, suffix)
        captions.append(caption)
    return captions, status
