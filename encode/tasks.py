"""A shard to encode, and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shards import ColumnSpec, Store


@dataclass(frozen=True, slots=True)
class Target:
    """A column that a shard is to be written to."""

    store: Store
    digest: str  # of its column.json
    spec: ColumnSpec


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One tar and the columns it still lacks. `number` is its shard, `folder` that of the source.
    `remote`: pictures are decoded on another node. `peers`: columns of the source on disk, by the
    suffix that they read. `fetched_again`: `size` is not the one of the source, see
    `source.fetched_again`.
    """

    source: str
    fingerprint: str
    folder: Store
    tar: str  # an absolute path, or an url
    size: int
    number: int
    shard_rows: int
    targets: Mapping[str, Target]  # by name of the column in the config
    remote: bool = False
    peers: Mapping[str, Sequence[Target]] = field(default_factory=dict)
    fetched_again: bool = False

    @property
    def name(self) -> str:
        return f"{self.source}/{self.number:05d}"


@dataclass(slots=True)
class ShardResult:
    """The result of a shard: rows, and rows by status of each column. Columns that another run
    committed meanwhile are not among `counts`.
    """

    rows: int
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    note: str | None = None
