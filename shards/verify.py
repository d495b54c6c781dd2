"""Check a column from its records down to every row, and name all that is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .commits import Commit, Generation, committed, own_commit, read_commit, read_failures
from .errors import CorruptColumn, NotAColumn, ShardsError
from .reader import Column, open_spec
from .schema import ZARR_ROWS
from .storage import canonical_json, sha256, sha256_file
from .writer import Values, block_digest
from .zarrfile import crc32c


def logical_digest(path: Path) -> str:
    """One digest of a column's identity, rows, statuses and values, however and wherever it was
    made.

    From the logical digests in the commit records; the data is not read. IncompleteColumn if
    encoding has not finished.
    """
    column = Column.open(path)
    record = column.spec.record()
    shards = [
        read_commit(path, shard).content if content else None
        for shard, content in enumerate(column.generation.content)
    ]
    empty = sha256(column.empty().tobytes()) if column.spec.empty_tokens else None
    return sha256(canonical_json([record["identity"], record["norm"], empty, shards]))


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> list[str]:
    """Every fault found in a column: records, objects (size and sha256), rows (crc), logical
    digests. Empty if sound. Raises NotAColumn or FormatVersion where there is nothing to check.
    """
    try:
        spec, digest = open_spec(path)
    except CorruptColumn as error:
        return [str(error)]
    except NotAColumn as error:
        if not (path / "commits").is_dir():
            raise
        return [str(error)]  # a column that lost its column.json
    commits: list[Commit] = []
    faults: list[str] = []
    for shard in committed(path, spec.layout.shards):
        try:
            commits.append(own_commit(path, digest, shard))
        except ShardsError as error:
            faults.append(str(error))
    try:
        failed = read_failures(path)
    except ShardsError as error:
        failed = {}
        faults.append(str(error))
    column = Column(path, spec, digest, Generation.of(digest, spec.layout.shards, commits, failed))
    faults += _record_faults(column)
    for done, commit in enumerate(commits):
        faults += _shard_faults(column, commit)
        progress(done + 1, len(commits))
    return faults


def _record_faults(column: Column) -> list[str]:
    """Zarr metadata as column.json says; a COMPLETE record that fits the commits."""
    faults = [
        f"{column.path / name}: not the Zarr metadata that column.json names"
        for name, data in column.spec.zarr_json().items()
        if not (column.path / name).is_file() or (column.path / name).read_bytes() != data
    ]
    if any((column.path / "complete").glob("*.json")):
        try:
            complete = Column.open(column.path).generation
        except ShardsError as error:
            return [*faults, str(error)]
        faults += [
            f"{column.path}: shard {shard} is not committed with the content that the COMPLETE "
            "record names"
            for shard, content in enumerate(complete.content)
            if content and content != column.generation.content[shard]
        ]
    return faults


def _shard_faults(column: Column, commit: Commit) -> Iterator[str]:
    for name, size, digest in commit.objects:
        file = column.path / name
        if not file.is_file():
            yield f"{file}: missing, though shard {commit.shard} is committed"
        elif file.stat().st_size != size or sha256_file(file) != digest:
            yield (
                f"{file}: {file.stat().st_size} bytes that are not the {size} of sha256 "
                f"{digest[:12]}... "
                f"which the commit of shard {commit.shard} names"
            )
    first = commit.shard * column.layout.shard_rows
    for block, digest in enumerate(commit.blocks):
        rows = np.arange(block * ZARR_ROWS, min((block + 1) * ZARR_ROWS, commit.rows)) + first
        try:
            values: Values = column.read(rows)
            ragged = column.layout.ragged
            lengths = column.lengths(rows).astype(np.uint16) if ragged else None
            status, stored = column.status(rows), column.checksums(rows)
        except ShardsError as error:
            yield str(error)
            continue
        if lengths is not None:
            values = np.split(values, np.cumsum(lengths, dtype=int)[:-1])
        found = [crc32c(np.ascontiguousarray(row)) for row in values]
        bad = np.flatnonzero(np.array(found) != stored) + block * ZARR_ROWS
        if len(bad):
            yield (
                f"{column.path}: shard {commit.shard}, rows {bad.tolist()} do not fit their "
                "checksums"
            )
        if block_digest(values, lengths, status) != digest:
            yield (
                f"{column.path}: shard {commit.shard}, rows {rows[0] - first}..{rows[-1] - first} "
                "do not fit the logical digest in the commit"
            )
