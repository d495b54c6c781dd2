"""How a column is made: sources, shards written by one writer each, commits, the lease."""

from __future__ import annotations

from .commits import (
    TAR_BYTES,
    Commit,
    commit_name,
    committed,
    failure_name,
    own_commit,
    read_failures,
    valid_rows,
)
from .lease import LEASE_SECONDS, Lease, lease_chain, machine, stale
from .members import (
    ABSENT,
    CAPTION_BYTES,
    DIGEST_BYTES,
    OR,
    UNREAD,
    alternatives,
    chosen,
    is_json,
    member_of,
    member_read,
    suffix_read,
)
from .source import ShardIndex, index_name
from .statistics import statistics_bytes
from .tar_object import tar_bytes
from .writer import refuse_other_members
from .zarr_object import chunked, compress, read_into

__all__ = [
    "ABSENT",
    "CAPTION_BYTES",
    "Commit",
    "DIGEST_BYTES",
    "LEASE_SECONDS",
    "Lease",
    "OR",
    "ShardIndex",
    "TAR_BYTES",
    "UNREAD",
    "alternatives",
    "chosen",
    "chunked",
    "commit_name",
    "committed",
    "compress",
    "failure_name",
    "index_name",
    "is_json",
    "lease_chain",
    "machine",
    "member_of",
    "member_read",
    "own_commit",
    "read_failures",
    "read_into",
    "refuse_other_members",
    "stale",
    "statistics_bytes",
    "suffix_read",
    "tar_bytes",
    "valid_rows",
]
