"""What is in a column, counted from its records: `describe` serves `info`, `verify`, `copy`, and
the status and report of encode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

from ..column.commits import (
    READERS,
    Commit,
    Snapshot,
    commit_name,
    committed,
    complete_names,
    failure_names,
    lost_objects,
    own_commit,
    read_complete,
)
from ..errors import CorruptColumn, NotAColumn, ShardsError
from ..format.layout import ColumnSpec, Status
from ..format.records import FailureRecord
from ..read.column import open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .faults import commit_error, damage_message_or_raise

READ_AHEAD = 256  # commits


@dataclass
class Description:
    """What a column holds by the records that exist now.

    `complete` names its COMPLETE records, `committed` the shards that have a commit record,
    `failed` those that have a failure record alone, with the reason. `damaged` has the error of each
    commit and failure record that cannot be read, by the record's name; `commits` are the others.
    """

    store: Store
    spec: ColumnSpec
    digest: str  # of column.json
    complete: list[str]
    committed: list[int]
    failed: dict[int, str] = field(default_factory=dict)
    damaged: dict[str, Exception] = field(default_factory=dict)
    commits: dict[int, Commit] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """Shards with neither a commit nor a failure record."""
        absent = set(range(self.spec.layout.shards)) - self.failed.keys()
        return sorted(absent.difference(self.committed))

    @property
    def rows(self) -> int:
        return sum(commit.rows for commit in self.commits.values())

    @property
    def counts(self) -> dict[str, int]:
        """Rows by the name of their status, in the order of the statuses; none that is zero."""
        counts = Counter({Status.OK: self.rows})
        for commit in self.commits.values():
            for _, count, status in commit.not_ok:
                counts[Status.OK] -= count
                counts[Status(status)] += count
        return {status.name.lower(): counts[status] for status in Status if counts[status]}

    @property
    def objects(self) -> dict[str, tuple[int, str]]:
        """(bytes, sha256) of each object that commits name; they share the empty caption's."""
        return {n: (size, sha) for c in self.commits.values() for n, size, sha in c.objects}

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.objects.values())

    def read_commits(self) -> None:
        """Reads the commits, where `describe` left them out."""
        for shard, commit in _read_ahead(self.store, self.spec, self.digest, self.committed):
            if isinstance(commit, Commit):
                self.commits[shard] = commit
            else:
                self.damaged[commit_name(shard)] = commit

    def refuse_damage(self) -> None:
        """Raises the error of the first damaged record, if there is one."""
        for error in self.damaged.values():
            raise error

    @cached_property
    def snapshot(self) -> Snapshot | None:
        """The newest COMPLETE generation, None if there is none; raises CorruptColumn or NotAColumn
        where its records are damaged.
        """
        return read_complete(self.store, self.digest) if self.complete else None

    def lost(self, sizes: bool = True) -> str:
        """Returns in words what is missing though it is committed, empty if nothing is: commits that
        a COMPLETE record names and, with `sizes`, Zarr metadata and objects, by their sizes alone.
        """
        try:
            contents = self.snapshot.content if self.snapshot else ()
        except (NotAColumn, CorruptColumn) as error:
            return str(error)
        shards = {shard for shard, content in enumerate(contents) if content is not None}
        if absent := sorted(shards.difference(self.committed)):
            return (
                f"commits of shards {absent[:8]} are missing ({len(absent)} in all), which a "
                "COMPLETE record names. Copy the rest if it was copied in part, or encode again"
            )
        if not sizes or not self.committed:
            return ""
        metadata = {name: len(data) for name, data in self.spec.zarr_json().items()}
        return lost_objects(
            self.store, metadata | {name: size for name, (size, _) in self.objects.items()}
        )


def describe(
    url: Place, opened: tuple[ColumnSpec, str] | None = None, commits: bool = True
) -> Description:
    """Returns what a column holds; without `commits` none is read, so rows and bytes are zero.

    `opened` is what `open_spec` returned, if it was called. COMPLETE records are listed before the
    commits, so each shard that they name is among these, also while an encode ends. Raises
    NotAColumn, FormatVersion or CorruptColumn of column.json, and what a network raises.
    """
    store = open_store(url)
    spec, digest = opened or open_spec(store)
    complete = complete_names(store)
    column = Description(store, spec, digest, complete, committed(store, spec.layout.shards))
    if commits:
        column.read_commits()
    for name in failure_names(store):
        try:
            record = store.record(name, FailureRecord)
            column.failed[record.shard] = record.reason
        except (OSError, ShardsError) as error:
            damage_message_or_raise(error)
            column.damaged[name] = error
    for shard in column.committed:
        column.failed.pop(shard, None)
    return column


def _read_ahead(
    store: Store, spec: ColumnSpec, digest: str, shards: Sequence[int]
) -> Iterator[tuple[int, Commit | Exception]]:
    """Yields each shard with its commit, or with the error that says how its record is damaged."""

    def read(shard: int) -> Commit | Exception:
        try:
            commit = own_commit(store, digest, shard)
        except (OSError, ShardsError) as error:
            damage_message_or_raise(error)
            return error
        if why := commit_error(spec, commit):
            path = store.at(commit_name(shard))
            return CorruptColumn(f"{path}: no commit of this column: {why}")
        return commit

    if store.folder is not None and store.folder.is_dir():  # faster than handing files to threads
        yield from ((shard, read(shard)) for shard in shards)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(shards), READ_AHEAD):
            window = shards[start : start + READ_AHEAD]
            yield from zip(window, pool.map(read, window), strict=True)
