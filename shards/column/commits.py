"""Commit records say that a shard is whole; COMPLETE records say that a column is. Readers trust
these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn, IncompleteColumn, NotAColumn, ObjectsMissing
from ..format.atomic import Json, canonical_json, sha256
from ..format.layout import BLOCK, COMMIT, COMPLETE, VERSION, Status
from ..format.records import CommitRecord, CompleteRecord, FailureRecord, sealed
from ..store.base import Place, Store
from ..store.open import open_store

Run = tuple[int, int, int]  # (first row of the shard, count, status)
READERS = 16  # records read at once: of an object store each takes a round trip


@dataclass(frozen=True, slots=True)
class Commit:
    """What a committed shard holds. Everything but `objects` and `provenance` is the same however
    it was made; commits of older releases have no `members`.
    """

    shard: int
    rows: int
    not_ok: tuple[Run, ...]
    objects: tuple[tuple[str, int, str], ...]  # (path below the column, bytes, sha256)
    blocks: tuple[str, ...]  # logical digest of each 1,024 rows
    index: str  # digest of the source index that was read
    column: str  # digest of column.json
    provenance: Json
    members: Mapping[str, str] = field(default_factory=dict)  # what was read of the tar, by suffix

    @property
    def content(self) -> str:
        """Digest of the shard's logical content."""
        return sha256(canonical_json([self.shard, self.rows, self.not_ok, self.blocks, self.index]))

    def record(self) -> Json:
        return {
            "format": COMMIT,
            "version": VERSION,
            "shard": self.shard,
            "rows": self.rows,
            "not_ok": [list(run) for run in self.not_ok],
            "objects": [list(item) for item in self.objects],
            "blocks": list(self.blocks),
            "index": self.index,
            "column": self.column,
            "content": self.content,
            "provenance": self.provenance,
        } | ({"members": dict(self.members)} if self.members else {})

    def status(self) -> NDArray[np.uint8]:
        """The status of each row."""
        status = np.zeros(self.rows, np.uint8)
        for first, count, value in self.not_ok:
            status[first : first + count] = value
        return status


def commit_name(shard: int) -> str:
    return f"commits/{shard:05d}.json"


def failure_name(shard: int) -> str:
    return f"failures/{shard:05d}.json"


def read_commit(column: Place, shard: int) -> Commit:
    """The commit of a shard; NotAColumn if there is none, CorruptColumn if it is damaged."""
    column = open_store(column)
    record = column.record(commit_name(shard), CommitRecord)
    commit = Commit(
        record.shard, record.rows, tuple(record.not_ok), tuple(record.objects),
        tuple(record.blocks), record.index, record.column, record.provenance, record.members or {},
    )  # fmt: skip
    if commit.content != record.content or commit.shard != shard:
        raise CorruptColumn(
            f"{column.at(commit_name(shard))}: this is the record of another shard, or its content digest is wrong"
        )
    return commit


def own_commit(column: Store, column_digest: str, shard: int) -> Commit:
    """The commit of a shard, which must have been made under this column.json."""
    commit = read_commit(column, shard)
    if commit.column != column_digest:
        raise CorruptColumn(
            f"{column.at(commit_name(shard))}: this commit belongs to another column.json"
        )
    return commit


def committed(column: Store, shards: int) -> list[int]:
    """Shards that have a commit record."""
    standing = {name for name, _ in column.list("commits")}
    return [shard for shard in range(shards) if commit_name(shard) in standing]


def valid_mask_of(status: NDArray[np.uint8], admitted: Sequence[int]) -> NDArray[np.uint32]:
    """Valid-row bits: word b holds rows 32b .. 32b+31, lowest bit first; (ceil(rows / 32),)
    uint32.
    """
    good = np.isin(status, admitted)
    bits = np.packbits(np.pad(good, (0, -good.size % BLOCK)), bitorder="little")
    return bits.view("<u4").astype(np.uint32)


def valid_rows(valid_mask: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Numbers of the set bits, ascending: the inverse of `valid_mask_of`."""
    blocks = np.flatnonzero(valid_mask)
    octets = valid_mask[blocks].astype("<u4").view(np.uint8).reshape(-1, 4)
    block, bit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
    rows: NDArray[np.int64] = blocks[block] * BLOCK + bit
    return rows


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a reader needs to know of a column: per shard its rows, content and index digests,
    and the valid rows.

    `valid_mask` has the bits of the rows with status 0, ceil(rows / 32) words a shard, laid end to end;
    `truncated` lists the (shard, first row, count) of rows with status 1. A shard that is missing
    or failed has `rows[s] == 0` and no content. `digest` pins all of it.
    """

    rows: tuple[int, ...]
    content: tuple[str | None, ...]
    index: tuple[str | None, ...]
    failed: tuple[tuple[int, str], ...]
    truncated: tuple[tuple[int, int, int], ...]
    counts: dict[str, int]  # rows by status
    valid_mask: NDArray[np.uint32]
    digest: str

    @classmethod
    def of(
        cls, column_digest: str, shards: int, commits: Sequence[Commit], failed: dict[int, str]
    ) -> Snapshot:
        by_shard = {commit.shard: commit for commit in commits}
        get = [by_shard.get(shard) for shard in range(shards)]
        counts: dict[str, int] = {}
        for commit in commits:
            for value, count in zip(*np.unique(commit.status(), return_counts=True), strict=True):
                name = Status(int(value)).name.lower()
                counts[name] = counts.get(name, 0) + int(count)
        bits = [valid_mask_of(commit.status(), (Status.OK,)) for commit in commits]
        valid_mask = np.concatenate(bits) if bits else np.zeros(0, np.uint32)
        partial = cls(
            tuple(c.rows if c else 0 for c in get),
            tuple(c.content if c else None for c in get),
            tuple(c.index if c else None for c in get),
            # the kind of error only: its text may hold paths, and equal columns have equal records
            tuple(sorted((shard, why.partition(":")[0]) for shard, why in failed.items())),
            tuple(
                (c.shard, first, count)
                for c in commits
                for first, count, status in c.not_ok
                if status == Status.TRUNCATED
            ),
            counts,
            valid_mask,
            "",
        )
        digest = sha256(canonical_json(partial.record(column_digest)))
        return replace(partial, digest=digest)

    def record(self, column_digest: str) -> Json:
        """The COMPLETE record before sealing. Without time or place, so equal columns have equal
        records.
        """
        return {
            "format": COMPLETE,
            "version": VERSION,
            "column": column_digest,
            "shards": [list(s) for s in zip(self.rows, self.content, self.index, strict=True)],
            "failed": [list(f) for f in self.failed],
            "truncated": [list(t) for t in self.truncated],
            "counts": self.counts,
            "valid": {
                "words": int(self.valid_mask.size),
                "sha256": sha256(self.valid_mask.astype("<u4").tobytes()),
            },
        }


def failure_names(column: Store) -> list[str]:
    """Names of the failure records."""
    return [name for name, _ in column.list("failures") if name.endswith(".json")]


def complete_names(column: Store) -> list[str]:
    """Names of the COMPLETE records. Whoever compares them with the commits lists them first: a
    shard that one of them names is committed already.
    """
    return [name for name, _ in column.list("complete") if name.endswith(".json")]


def read_failures(column: Store) -> dict[int, str]:
    """Shards that could not be committed, and why."""
    failures = {}
    for name in failure_names(column):
        record = column.record(name, FailureRecord)
        failures[record.shard] = record.reason
    return failures


def snapshot_of_commits(
    column: Store, column_digest: str, shards: int, only: Sequence[int] | None = None
) -> Snapshot:
    """The snapshot that the commits standing now make up, complete or not.

    With `only`, of these shards and without a word on failures: a function of the commits alone,
    so the same at any later time.
    """
    wanted = committed(column, shards) if only is None else only
    commits = read_commits(column, column_digest, wanted)
    return _snapshot(column, column_digest, shards, commits, only is None)


def read_commits(column: Store, column_digest: str, shards: Sequence[int]) -> list[Commit]:
    """The commits of some shards."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda shard: own_commit(column, column_digest, shard), shards))


def _snapshot(
    column: Store, column_digest: str, shards: int, commits: Sequence[Commit], failures: bool
) -> Snapshot:
    done = {commit.shard for commit in commits}
    reasons = read_failures(column) if failures else {}
    failed = {s: why for s, why in reasons.items() if s not in done}
    return Snapshot.of(column_digest, shards, commits, failed)


def put_complete(column: Place, column_digest: str, shards: int, allow_failed: bool) -> Snapshot:
    """Write a COMPLETE snapshot; IncompleteColumn if a shard is neither committed nor an allowed
    failure, ObjectsMissing if what is committed is not there.
    """
    column = open_store(column)
    commits = read_commits(column, column_digest, committed(column, shards))
    snapshot = _snapshot(column, column_digest, shards, commits, True)
    missing = [s for s, content in enumerate(snapshot.content) if content is None]
    failed = dict(snapshot.failed)
    unexplained = [s for s in missing if not (allow_failed and s in failed)]
    if unexplained:
        reasons = read_failures(column)
        why = "; ".join(f"shard {s}: {reasons.get(s, 'not encoded yet')}" for s in unexplained[:5])
        raise IncompleteColumn(
            f"{column.url}: {len(unexplained)} of {shards} shards are not committed ({why}). Run "
            "encode again"
        )
    lost = lost_objects(column, {name: n for c in commits for name, n, _ in c.objects})
    if lost:
        raise ObjectsMissing(f"{column.url}: {lost}")
    name = f"complete/{snapshot.digest}"
    record = sealed(snapshot.record(column_digest), CompleteRecord, column.at(f"{name}.json"))
    column.put_if_absent(f"{name}.valid", snapshot.valid_mask.astype("<u4").tobytes())
    column.put_if_absent(f"{name}.json", record)
    return snapshot


def lost_objects(column: Store, committed: Mapping[str, int]) -> str:
    """What is wrong where objects are not of the size that commits say, in words with what to do;
    empty if all are. Of an object store this is one listing of each array.
    """
    sizes = column.sizes(list(committed))
    wrong = [
        f"{name}: {'nothing' if found is None else f'{found} bytes'}, {size} bytes are committed"
        for (name, size), found in zip(committed.items(), sizes, strict=True)
        if found != size
    ]
    if not wrong:
        return ""
    return (
        f"{len(wrong)} of {len(committed)} objects are missing or of another size, though their "
        f"shards are committed ({'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}). Copy the "
        "rest if it was copied in part; else see `python -m shards verify`, put the damage aside "
        "with `python -m shards repair`, and encode again"
    )


def read_complete(column: Store, column_digest: str) -> Snapshot:
    """The newest COMPLETE snapshot: the one with the most shards committed. Two objects are
    read.

    Several of the same shards differ in why the others failed; the first of them then serves.
    """
    names = complete_names(column)
    if not names:
        raise IncompleteColumn(
            f"{column.url}: no COMPLETE record, so encoding has not finished. Run `python -m encode "
            "run` again"
        )
    found = [open_complete(column, name, column_digest) for name in names]
    sizes = [sum(content is not None for content in g.content) for g in found]
    newest = [(name, g) for name, g, n in zip(names, found, sizes, strict=True) if n == max(sizes)]
    if any(g.content != newest[0][1].content for _, g in newest):
        raise CorruptColumn(
            f"{column.url}: {[name for name, _ in newest]} all claim to be the newest complete "
            "snapshot. Delete the one that `python -m shards verify` refuses"
        )
    return newest[0][1]


def open_complete(column: Store, name: str, column_digest: str) -> Snapshot:
    """Read one COMPLETE record and its valid-row bits."""
    path = column.at(name)
    record = column.record(name, CompleteRecord)
    beside = name.removesuffix(".json") + ".valid"
    size = column.size(beside)
    if size is None:
        raise NotAColumn(f"{column.at(beside)}: the valid-row bits are missing")
    bits = column.read(beside) if size == 4 * record.valid.words else None
    if bits is None or sha256(bits) != record.valid.sha256:
        raise CorruptColumn(f"{column.at(beside)}: the valid-row bits do not fit the record")
    if record.column != column_digest:
        raise CorruptColumn(f"{path}: this record belongs to another column.json")
    return Snapshot(
        tuple(n for n, _, _ in record.shards),
        tuple(content for _, content, _ in record.shards),
        tuple(index for _, _, index in record.shards),
        tuple(record.failed),
        tuple(record.truncated),
        record.counts,
        np.frombuffer(bits, "<u4").astype(np.uint32),
        record.digest,
    )
