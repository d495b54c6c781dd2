"""Columns: their format, how they are written, read, joined and streamed. The only meeting point
of the stages.

Importing this package is cheap; torch is loaded by `shards.read.stream`, `shards.read.latents` and
`shards.read.randomness`.
"""

from __future__ import annotations

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
    NotAColumn,
    OrderError,
    ShardsError,
    SourceChanged,
    SourceMismatch,
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
from .format.layout import ColumnSpec, Layout, Norm, Status
from .read.column import Column
from .read.join import JoinedColumns, open_join, open_sources
from .read.order import Order
from .store.base import Store
from .store.open import open_store

__all__ = [
    "BadRows",
    "Column",
    "ColumnSpec",
    "CorruptColumn",
    "FormatVersion",
    "Snapshot",
    "IdentityMismatch",
    "IncompleteColumn",
    "IndexRow",
    "JoinedColumns",
    "Layout",
    "LeaseHeld",
    "Norm",
    "NotAColumn",
    "Order",
    "OrderError",
    "ShardWriter",
    "ShardsError",
    "Source",
    "SourceChanged",
    "SourceMismatch",
    "JoinedColumns",
    "Status",
    "WorkerDied",
    "Store",
    "atomic_write",
    "canonical_json",
    "check_column",
    "create_column",
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
