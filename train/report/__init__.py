"""What a run says of itself: metrics, loggers, its page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

if TYPE_CHECKING:
    from .page import write_page
    from .records import read_records, validated
else:
    __getattr__ = lazy_getattr(
        __name__, {"page": ("write_page",), "records": ("read_records", "validated")}
    )

__all__ = [
    "read_records",
    "validated",
    "write_page",
]
