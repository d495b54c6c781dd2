"""Commit records say that a shard is whole; COMPLETE records say that a column is. Readers trust
these alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn, IncompleteColumn, NotAColumn, ObjectsMissing
from ..format.atomic import Json, canonical_json, sha256
from ..format.layout import BLOCK, COMMIT, COMPLETE, VERSION, Status
from ..format.records import CommitRecord, CompleteRecord, FailureRecord, sealed
from ..store.base import Place, Store
from ..store.open import open_store

Run = tuple[int, int, int]  # (first row of the shard, count, status)
TAR_BYTES = "tar_bytes"  # in a commit's provenance, of a tar that is not of its source's size
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
    members: Mapping[str, str] = field(default_factory=dict)  # digest of what was read, by suffix

    @property
    def content(self) -> str:
        """Returns the digest of the shard's logical content."""
        return sha256(canonical_json([self.shard, self.rows, self.not_ok, self.blocks, self.index]))

    def tar_bytes(self, of_source: int) -> int:
        """Returns the bytes of the tar that was read: those that its source names, unless it had failed
        before and was fetched again.
        """
        return int(self.provenance.get(TAR_BYTES, of_source))

    def record(self) -> Json:
        """Returns the commit record before sealing."""
        record = {"format": COMMIT, "version": VERSION, **asdict(self), "content": self.content}
        return record if self.members else {k: v for k, v in record.items() if k != "members"}

    def status(self) -> NDArray[np.uint8]:
        """Returns the status of each row, (rows,)."""
        status = np.zeros(self.rows, np.uint8)
        for first, count, value in self.not_ok:
            status[first : first + count] = value
        return status


def commit_name(shard: int) -> str:
    return f"commits/{shard:05d}.json"


def failure_name(shard: int) -> str:
    return f"failures/{shard:05d}.json"


def read_commit(column: Place, shard: int) -> Commit:
    """Returns the commit of a shard; NotAColumn if there is none, CorruptColumn if it is damaged."""
    column = open_store(column)
    record = column.record(commit_name(shard), CommitRecord)
    values = {name: getattr(record, name) for name in Commit.__slots__}
    commit = Commit(**values | {"members": record.members or {}})
    if commit.content != record.content or commit.shard != shard:
        raise CorruptColumn(
            f"{column.at(commit_name(shard))}: this is the record of another shard, or its content "
            "digest is wrong"
        )
    return commit


def own_commit(column: Store, column_digest: str, shard: int) -> Commit:
    """Returns the commit of a shard, which must have been made under this column.json."""
    commit = read_commit(column, shard)
    if commit.column != column_digest:
        raise CorruptColumn(
            f"{column.at(commit_name(shard))}: this commit belongs to another column.json"
        )
    return commit


def committed(column: Store, shards: int) -> list[int]:
    """Returns the shards that have a commit record."""
    names = {name for name, _ in column.list("commits")}
    return [shard for shard in range(shards) if commit_name(shard) in names]


def valid_mask_of(status: NDArray[np.uint8], admitted: Sequence[int]) -> NDArray[np.uint32]:
    """Returns the valid-row bits, (ceil(rows / 32),): word b holds rows 32b .. 32b+31, the lowest bit
    first.
    """
    valid = np.isin(status, admitted)
    bits = np.packbits(np.pad(valid, (0, -valid.size % BLOCK)), bitorder="little")
    return bits.view("<u4").astype(np.uint32)


def valid_rows(mask: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Returns the numbers of the set bits, ascending: the inverse of `valid_mask_of`."""
    blocks = np.flatnonzero(mask)
    octets = mask[blocks].astype("<u4").view(np.uint8).reshape(-1, 4)
    block, bit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
    rows: NDArray[np.int64] = blocks[block] * BLOCK + bit
    return rows


def spread_words(
    words: NDArray[np.uint32], rows: Sequence[int], shard_rows: int
) -> NDArray[np.uint32]:
    """Returns one bit for each row id, (shards * shard_rows / 32,), from the words of shards of so many
    rows, laid end to end.
    """
    per_shard = shard_rows // BLOCK
    mask = np.zeros(len(rows) * per_shard, np.uint32)
    start = 0
    for shard, count in enumerate(rows):
        size = -(-count // BLOCK)
        mask[shard * per_shard :][:size] = words[start : start + size]
        start += size
    return mask


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a reader needs to know of a column: per shard its rows, content and index digests,
    and the valid rows.

    `valid_mask` has the bits of the rows with status 0, ceil(rows / 32) words a shard, laid end to
    end; `truncated` lists the (shard, first row, count) of rows with status 1. A shard that is
    missing or failed has `rows[s] == 0` and no content. `digest` is of all of it.
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
        each = [by_shard.get(shard) for shard in range(shards)]
        counts: dict[str, int] = {}
        masks = [np.zeros(0, np.uint32)]
        for commit in commits:
            status = commit.status()
            masks.append(valid_mask_of(status, (Status.OK,)))
            for value, count in zip(*np.unique(status, return_counts=True), strict=True):
                name = Status(int(value)).name.lower()
                counts[name] = counts.get(name, 0) + int(count)
        snapshot = cls(
            tuple(c.rows if c else 0 for c in each),
            tuple(c.content if c else None for c in each),
            tuple(c.index if c else None for c in each),
            # the kind of error only: its text may hold paths, and equal columns have equal records
            tuple(sorted((shard, why.partition(":")[0]) for shard, why in failed.items())),
            tuple(
                (c.shard, first, count)
                for c in commits
                for first, count, status in c.not_ok
                if status == Status.TRUNCATED
            ),
            counts,
            np.concatenate(masks),
            "",
        )
        return replace(snapshot, digest=sha256(canonical_json(snapshot.record(column_digest))))

    def record(self, column_digest: str) -> Json:
        """Returns the COMPLETE record before sealing. It has no time or place, so equal columns have
        equal records.
        """
        valid = {"words": self.valid_mask.size, "sha256": sha256(self.mask_bytes())}
        return {
            "format": COMPLETE, "version": VERSION, "column": column_digest,
            "shards": list(zip(self.rows, self.content, self.index, strict=True)),
            "failed": self.failed, "truncated": self.truncated, "counts": self.counts, "valid": valid,
        }  # fmt: skip

    def mask_bytes(self) -> bytes:
        """Returns the valid-row bits as they are stored beside the record."""
        return self.valid_mask.astype("<u4").tobytes()


def failure_names(column: Store) -> list[str]:
    """Returns the names of the failure records."""
    return [name for name, _ in column.list("failures") if name.endswith(".json")]


def complete_names(column: Store) -> list[str]:
    """Returns the names of the COMPLETE records. Whoever compares them with the commits lists them
    first: a shard that one of them names is committed already.
    """
    return [name for name, _ in column.list("complete") if name.endswith(".json")]


def read_failures(column: Store) -> dict[int, str]:
    """Returns the shards that could not be committed, and why."""
    records = [column.record(name, FailureRecord) for name in failure_names(column)]
    return {record.shard: record.reason for record in records}


def snapshot_of_commits(
    column: Store, column_digest: str, shards: int, only: Sequence[int] | None = None
) -> Snapshot:
    """Returns the snapshot that the commits of now make up, complete or not.

    With `only`, of these shards and without a word on failures: a function of the commits alone,
    so the same at any later time.
    """
    numbers = committed(column, shards) if only is None else only
    commits = read_commits(column, column_digest, numbers)
    failures = read_failures(column) if only is None else {}
    return _snapshot(column_digest, shards, commits, failures)


def read_commits(column: Store, column_digest: str, shards: Sequence[int]) -> list[Commit]:
    """Returns the commits of some shards."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda shard: own_commit(column, column_digest, shard), shards))


def _snapshot(
    column_digest: str, shards: int, commits: Sequence[Commit], failures: dict[int, str]
) -> Snapshot:
    """Returns the snapshot of commits, and of failures of shards that were not committed later."""
    numbers = {commit.shard for commit in commits}
    failed = {shard: why for shard, why in failures.items() if shard not in numbers}
    return Snapshot.of(column_digest, shards, commits, failed)


def put_complete(column: Place, column_digest: str, shards: int, allow_failed: bool) -> Snapshot:
    """Writes a COMPLETE record; IncompleteColumn if a shard is neither committed nor an allowed
    failure, ObjectsMissing if what is committed is not there.
    """
    column = open_store(column)
    commits = read_commits(column, column_digest, committed(column, shards))
    reasons = read_failures(column)
    snapshot = _snapshot(column_digest, shards, commits, reasons)
    missing = [s for s, content in enumerate(snapshot.content) if content is None]
    unexplained = [s for s in missing if not (allow_failed and s in reasons)]
    if unexplained:
        why = "; ".join(f"shard {s}: {reasons.get(s, 'not encoded yet')}" for s in unexplained[:5])
        raise IncompleteColumn(
            f"{column.url}: {len(unexplained)} of {shards} shards are not committed ({why}). Run "
            "encode again"
        )
    if loss := lost_objects(column, {name: n for c in commits for name, n, _ in c.objects}):
        raise ObjectsMissing(f"{column.url}: {loss}")
    name = f"complete/{snapshot.digest}"
    record = sealed(snapshot.record(column_digest), CompleteRecord, column.at(f"{name}.json"))
    column.put_if_absent(f"{name}.valid", snapshot.mask_bytes())
    column.put_if_absent(f"{name}.json", record)
    return snapshot


def lost_objects(column: Store, committed: Mapping[str, int]) -> str:
    """Returns what is wrong where objects are not of the size that commits say, with what to do;
    empty if all are. Of an object store this is one listing of each array.
    """
    sizes = column.sizes(list(committed))
    faults = [
        f"{name}: {'nothing' if size is None else f'{size} bytes'}, {expected} bytes are committed"
        for (name, expected), size in zip(committed.items(), sizes, strict=True)
        if size != expected
    ]
    if not faults:
        return ""
    return (
        f"{len(faults)} of {len(committed)} objects are missing or of another size, though their "
        f"shards are committed ({'; '.join(faults[:3])}{'; ...' if len(faults) > 3 else ''}). Copy "
        "the rest if it was copied in part; else see `python -m shards verify`, put the damage aside "
        "with `python -m shards repair`, and encode again"
    )


def read_complete(column: Store, column_digest: str) -> Snapshot:
    """Returns the newest complete snapshot: the one with the most shards committed. Two objects are
    read.

    Several of the same shards differ in why the others failed; the first of them then serves.
    """
    names = complete_names(column)
    if not names:
        raise IncompleteColumn(
            f"{column.url}: no COMPLETE record, so encoding has not finished. Run `python -m encode "
            "run` again"
        )
    snapshots = {name: open_complete(column, name, column_digest) for name in names}
    sizes = {n: sum(content is not None for content in s.content) for n, s in snapshots.items()}
    newest = [name for name in names if sizes[name] == max(sizes.values())]
    first = snapshots[newest[0]]
    if any(snapshots[name].content != first.content for name in newest):
        raise CorruptColumn(
            f"{column.url}: {newest} all claim to be the newest complete snapshot. Delete the one "
            "that `python -m shards verify` refuses"
        )
    return first


def open_complete(column: Store, name: str, column_digest: str) -> Snapshot:
    """Returns the snapshot of one COMPLETE record and its valid-row bits."""
    record = column.record(name, CompleteRecord)
    valid = name.removesuffix(".json") + ".valid"
    try:
        bits = column.read(valid, 4 * record.valid.words)
    except FileNotFoundError:
        raise NotAColumn(f"{column.at(valid)}: the valid-row bits are missing") from None
    if sha256(bits) != record.valid.sha256:
        raise CorruptColumn(f"{column.at(valid)}: the valid-row bits do not fit the record")
    if record.column != column_digest:
        raise CorruptColumn(f"{column.at(name)}: this record belongs to another column.json")
    return Snapshot(
        tuple(rows for rows, _, _ in record.shards),
        tuple(content for _, content, _ in record.shards),
        tuple(index for _, _, index in record.shards),
        tuple(record.failed),
        tuple(record.truncated),
        record.counts,
        np.frombuffer(bits, "<u4").astype(np.uint32),
        record.digest,
    )
