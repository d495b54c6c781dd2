"""What is encoded: tars, their rows, pictures decoded ahead, tars downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

if TYPE_CHECKING:
    from .images import decode, transform
    from .members import caption_of
    from .tars import read_exactly
else:
    __getattr__ = lazy_getattr(
        __name__,
        {"images": ("decode", "transform"), "members": ("caption_of",), "tars": ("read_exactly",)},
    )

__all__ = [
    "caption_of",
    "decode",
    "read_exactly",
    "transform",
]
