"""Tars that failed and are of another size since: fetched again, or unpacked.

A source is known by the names and sizes that its tars had first. Of a tar whose shard failed no
column was made, so it may be of another size when it is tried again; the commits that are then made
of it say which (`tar_bytes`), and it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from shards import CorruptColumn, FormatVersion, NotAColumn, Source, Store, open_source
from shards.column import TAR_BYTES, commit_name, failure_name, own_commit
from shards.read import open_spec


def recorded_source(source: Source, folder: Store) -> tuple[Source, Mapping[int, int]]:
    """Returns a source as it is recorded in its folder, and the bytes of those tars, by shard, that
    failed and are of another size now. Raises what `Source.check` raises where any other differs.
    """
    if folder.size("source.json") is not None:
        recorded = open_source(folder)
        pairs = zip(source.tars, recorded.tars, strict=False)
        sizes = {s: new[1] for s, (new, old) in enumerate(pairs) if new != old}
        if sizes and _but_for_sizes(source) == _but_for_sizes(recorded):
            columns = list(_columns(folder, recorded.fingerprint))
            if all(_may_differ(columns, shard, size) for shard, size in sizes.items()):
                return recorded, sizes
    source.check(folder)
    return source, {}


def _but_for_sizes(source: Source) -> tuple[object, ...]:
    return source.name, source.shard_rows, [name for name, _ in source.tars]


def _columns(folder: Store, fingerprint: str) -> Iterator[tuple[Store, str]]:
    """Yields the columns of a source that are on disk, with the digest of their column.json."""
    for name in folder.folders():
        with suppress(NotAColumn, CorruptColumn, FormatVersion):
            spec, digest = open_spec(folder.child(name))
            if spec.identity.get("source") == fingerprint:
                yield folder.child(name), digest


def _may_differ(columns: list[tuple[Store, str]], shard: int, size: int) -> bool:
    """Returns whether a shard has failed, and every column that has it since was made of this size."""
    known = False
    for column, digest in columns:
        if column.size(commit_name(shard)) is not None:
            if own_commit(column, digest, shard).provenance.get(TAR_BYTES) != size:
                return False
            known = True
        known = known or column.size(failure_name(shard)) is not None
    return known
