"""Columns: their format, how they are written, read, joined and streamed. The only meeting point
of the stages.

Importing this package is cheap: torch is loaded when `Stream` or `Batch` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# isort: split
from . import early  # noqa: F401 - before what takes time to load

# isort: split
from .column.commits import Snapshot, put_complete, read_commit
from .column.source import IndexRow, Source, open_source, put_index, read_index
from .column.writer import ShardWriter, check_column, create_column, put_empty
from .errors import (
    BadRows,
    CorruptColumn,
    FormatVersion,
    IdentityMismatch,
    IncompleteColumn,
    LeaseHeld,
    NoRoom,
    NotAColumn,
    ObjectsMissing,
    OrderError,
    ShardsError,
    SourceChanged,
    SourceMismatch,
    StoreError,
    WorkerDied,
)
from .format.atomic import (
    atomic_write,
    canonical_json,
    put_if_absent,
    seal,
    sha256,
    sha256_file,
    unseal,
)
from .format.layout import ColumnSpec, Layout, Status
from .format.norm import Norm
from .lazy import lazy_getattr
from .read.column import Column
from .read.join import JoinedColumns
from .read.opening import open_join, open_sources
from .read.order import Order
from .store.base import Store
from .store.open import open_store

if TYPE_CHECKING:
    from .read.stream import Batch, Stream
    from .tools.describe import describe
else:
    __getattr__ = lazy_getattr(
        __name__, {"read.stream": ("Batch", "Stream"), "tools.describe": ("describe",)}
    )

__all__ = [
    "BadRows",
    "Batch",
    "Column",
    "ColumnSpec",
    "CorruptColumn",
    "FormatVersion",
    "IdentityMismatch",
    "IncompleteColumn",
    "IndexRow",
    "JoinedColumns",
    "Layout",
    "LeaseHeld",
    "NoRoom",
    "Norm",
    "NotAColumn",
    "ObjectsMissing",
    "Order",
    "OrderError",
    "ShardWriter",
    "ShardsError",
    "Snapshot",
    "Source",
    "SourceChanged",
    "SourceMismatch",
    "Status",
    "Store",
    "StoreError",
    "Stream",
    "WorkerDied",
    "atomic_write",
    "canonical_json",
    "check_column",
    "create_column",
    "describe",
    "open_join",
    "open_source",
    "open_sources",
    "open_store",
    "put_complete",
    "put_empty",
    "put_if_absent",
    "put_index",
    "read_commit",
    "read_index",
    "seal",
    "sha256",
    "sha256_file",
    "unseal",
]
