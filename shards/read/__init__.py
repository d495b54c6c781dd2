"""How columns are read: rows into buffers, joins, the order of samples, endless batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_getattr
from .column import open_spec
from .compatible import check_kind
from .prefetch import Prefetcher, map_ahead

if TYPE_CHECKING:
    from .latents import draw, undraw
    from .randomness import normal, uniform
    from .stream import Int8Tokens, empty_caption, read_rows
else:
    __getattr__ = lazy_getattr(
        __name__,
        {
            "latents": ("draw", "undraw"),
            "randomness": ("normal", "uniform"),
            "stream": ("Int8Tokens", "empty_caption", "read_rows"),
        },
    )

__all__ = [
    "Int8Tokens",
    "Prefetcher",
    "check_kind",
    "draw",
    "empty_caption",
    "map_ahead",
    "normal",
    "open_spec",
    "read_rows",
    "undraw",
    "uniform",
]
