"""Check a column from its records down to every row, and name all that is bad."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ..column.commits import (
    READERS,
    Commit,
    Snapshot,
    commit_name,
    failure_name,
    open_complete,
)
from ..column.members import member_read, members_digest
from ..column.source import open_source, read_index
from ..column.statistics import damaged_statistics, norm_names, statistics_name
from ..column.values import sha256_of
from ..console import Bar, counted
from ..errors import CorruptColumn, NotAColumn, ShardsError, SourceMismatch
from ..exits import failed
from ..format.atomic import canonical_json, sha256
from ..format.records import CompleteRecord
from ..read.column import Column, open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .describe import Description, describe
from .faults import Fault, damage_message_or_raise, objects_of
from .parallel import SILENT, Progress, processes_for, spread
from .scan import ShardTask, scan_shard

QUARANTINE, LEASES = "quarantine/", "lease"
MEMBERS, TAR = "members", "tar"  # kinds of faults that lie in the tars, not in the column
SHOWN = 8  # shards that a sentence names


@dataclass(slots=True)
class Examination:
    """What `examine` found.

    `column` is None where column.json itself is damaged; its commits are sound. `unfinished` are
    (name, bytes) of objects that belong to no commit, which is no damage; `blocks` the logical
    digests of each shard as recomputed, None where rows could not be read.
    """

    store: Store
    column: Description | None = None
    faults: list[Fault] = field(default_factory=list)
    unfinished: list[tuple[str, int]] = field(default_factory=list)
    blocks: dict[int, tuple[str | None, ...]] = field(default_factory=dict)

    def fault(self, kind: str, message: str, name: str | None, shard: int | None = None) -> None:
        self.faults.append(Fault(kind, message, shard, (), name))

    def sentences(self) -> list[str]:
        """Returns in words what is unfinished."""
        if self.column is None:
            return []
        url, column, lines = self.store.url, self.column, []
        if missing := column.missing:
            shards = f"shards {missing[:SHOWN]}{' and more' if len(missing) > SHOWN else ''}"
            lines.append(
                f"{url}: unfinished, {len(missing)} of "
                f"{counted(column.spec.layout.shards, 'shard')} not committed ({shards}). "
                "`python -m encode run` goes on"
            )
        lines += [
            f"{url}: shard {s} failed: {why}" for s, why in list(column.failed.items())[:SHOWN]
        ]
        if not (missing or column.complete or column.failed):
            lines.append(f"{url}: all shards are committed, but no COMPLETE record says so")
        if self.unfinished:
            size = sum(size for _, size in self.unfinished)
            lines.append(
                f"{url}: {counted(len(self.unfinished), 'object')} ({size:,} bytes) of no commit yet, "
                f"{self.unfinished[0][0]} the first: an encode that runs or was interrupted"
            )
        return lines


def verify(url: Place, progress: Progress = SILENT, processes: int | None = None) -> list[Fault]:
    """Returns every fault of a column, none if it is sound; see `examine`."""
    return examine(url, processes, progress).faults


def examine(
    url: Place, processes: int | None = None, progress: Progress = SILENT, deep: bool = True,
    shards: Collection[int | None] | None = None,
) -> Examination:  # fmt: skip
    """Checks records, Zarr metadata, COMPLETE records and, if `deep`, every byte of every object,
    once, by all cores; `progress` counts these bytes. `shards`: of which alone the objects are read.

    Raises NotAColumn or FormatVersion where there is nothing to check.
    """
    store = open_store(url)
    examination = Examination(store)
    try:
        opened = open_spec(store)
    except (CorruptColumn, NotAColumn) as error:
        if isinstance(error, NotAColumn) and not store.list("commits"):
            raise
        examination.fault("column", str(error), "column.json")
        return examination
    column = examination.column = describe(store, opened)
    for name, data in column.spec.zarr_json().items():
        if not holds(store, name, data):
            message = f"{store.at(name)}: not the Zarr metadata that column.json names"
            examination.fault("metadata", message, name)
    commits = {commit_name(shard): shard for shard in column.committed}
    for name, damage in column.damaged.items():
        kind = "commit" if name in commits else "failure"
        examination.fault(kind, str(damage), name, commits.get(name))
    for name in column.complete:
        _check_complete(examination, column, name)
    for name, message in damaged_statistics(store, column.digest, column.spec.layout.shards):
        examination.fault("statistics", message, name)
    examination.unfinished = _unfinished(column)
    progress.begin(column.bytes)
    if deep:
        has_source = _has_source(examination, column)
        _check_empty(examination, column)
        tasks = [
            ShardTask(store, column.spec, commit, has_source)
            for shard, commit in column.commits.items()
            if shards is None or shard in shards
        ]
        count = processes_for(processes, len(tasks), column.bytes)
        scans = {
            task.commit.shard: scan
            for task, scan in spread(scan_shard, tasks, count, progress.advance)
        }
        for shard, scan in sorted(scans.items()):
            examination.blocks[shard] = scan.blocks
            examination.faults += scan.faults
    return examination


def require_column(store: Store) -> None:
    """Raises NotAColumn if there is no column, damaged or not; writes nothing."""
    if store.size("column.json") is None and not store.list("commits"):
        open_spec(store)


# Records ------------------------------------------------------------------------------------------


def holds(store: Store, name: str, data: bytes) -> bool:
    """Whether an object has just these bytes."""
    try:
        return store.size(name) == len(data) and store.read(name) == data
    except (OSError, CorruptColumn) as error:
        damage_message_or_raise(error)
        return False


def _check_complete(examination: Examination, column: Description, name: str) -> None:
    """Compares a COMPLETE record and its valid-row bits with the commits."""
    store = column.store
    try:
        record = store.record(name, CompleteRecord)
        if record.column != column.digest or len(record.shards) != column.spec.layout.shards:
            raise CorruptColumn(f"{store.at(name)}: this record belongs to another column.json")
    except (OSError, ShardsError) as error:
        return examination.fault("complete", damage_message_or_raise(error), name)
    differing = [
        shard
        for shard, (_, content, _) in enumerate(record.shards)
        if content and (shard not in column.commits or column.commits[shard].content != content)
    ]
    for shard in differing:
        examination.fault(
            "complete",
            f"{store.url}: shard {shard} is not committed with the content that the COMPLETE record "
            f"{name} names",
            name,
            shard,
        )
    try:
        open_complete(store, name, column.digest)
    except (OSError, ShardsError) as error:
        valid = name.removesuffix(".json") + ".valid"
        examination.fault("valid", damage_message_or_raise(error), valid)
    if not differing:
        expected = snapshot_of(column, record)
        if expected.digest != record.digest or name != f"complete/{expected.digest}.json":
            message = f"{store.at(name)}: not what the commits that it names make up"
            examination.fault("complete", message, name)
    return None


def snapshot_of(column: Description, record: CompleteRecord) -> Snapshot:
    """Returns the snapshot that a COMPLETE record should describe, from the commits it names."""
    commits = [column.commits[s] for s, (_, content, _) in enumerate(record.shards) if content]
    failed = {int(s): str(why) for s, why in record.failed}
    return Snapshot.of(column.digest, column.spec.layout.shards, commits, failed)


def _unfinished(column: Description) -> list[tuple[str, int]]:
    """Returns (name, bytes) of what belongs to no commit, nor to the records of a column."""
    spec = column.spec
    shards = range(spec.layout.shards)
    expected = {
        "column.json", *spec.zarr_json(), *map(commit_name, shards), *map(failure_name, shards),
        *column.objects, *map(statistics_name, shards), *norm_names(column.store),
    }  # fmt: skip
    for shard in set(column.committed) - column.commits.keys():  # a damaged commit may name these
        expected |= set.union(*objects_of(spec, shard, spec.layout.shard_rows))
    arrays = spec.arrays()
    if "empty" in arrays:
        expected.add(f"empty/{arrays['empty'].key(0)}")
    listing = column.store.list()
    names = {name for name, _ in listing}

    def is_complete(name: str) -> bool:
        """Whether it is a COMPLETE record, or the valid-row bits of one."""
        record = name.removesuffix(".valid") + ".json"
        return name.startswith("complete/") and (name.endswith(".json") or record in names)

    return [
        (name, size)
        for name, size in listing
        if not is_complete(name)
        and name not in expected
        and not name.startswith((QUARANTINE, LEASES))
    ]


def _has_source(examination: Examination, column: Description) -> bool:
    """Whether the column's source is beside it, so that the indexes are to be checked."""
    try:
        return open_source(column.store.parent).fingerprint == column.spec.identity.get("source")
    except NotAColumn:
        return False
    except (OSError, ShardsError) as error:
        examination.fault("source", damage_message_or_raise(error), None)
        return False


def _check_empty(examination: Examination, column: Description) -> None:
    """Compares the empty caption's object with what every commit says of it."""
    arrays = column.spec.arrays()
    if "empty" not in arrays or not column.commits:
        return
    name = f"empty/{arrays['empty'].key(0)}"
    try:
        size, digest = sha256_of(column.store, name)
        how = f"{size} other bytes than"
    except (OSError, CorruptColumn) as error:
        damage_message_or_raise(error)
        size, digest, how = 0, "", "missing or unreadable"
    differing = [s for s, c in column.commits.items() if (name, size, digest) not in c.objects]
    if differing:
        message = f"{column.store.at(name)}: {how} the commits of shards {differing[:SHOWN]} name"
        examination.fault("object", message, name)


# Tars ---------------------------------------------------------------------------------------------


def check_source(examination: Examination, folders: Sequence[Place]) -> int:
    """Compares what the column was made of with the tars, which are in one of the folders; returns
    how many shards were compared: not those without a tar there, nor those whose commits, of older
    releases, do not say what they were made of.
    """
    column = examination.column
    assert column is not None
    suffix, captions = str(member_read(column.spec.identity)), column.spec.layout.ragged
    parent = column.store.parent
    source = open_source(parent)
    if source.fingerprint != column.spec.identity.get("source"):
        raise SourceMismatch(
            f"{column.store.url}: made from another source than source.json beside it names. Restore "
            "source.json"
        )
    stores = [open_store(folder) for folder in folders]

    def check(commit: Commit) -> Fault | None:
        """Returns what is wrong with the tar of a shard."""
        name, expected = source.tars[commit.shard]
        expected = commit.tar_bytes(expected)
        kind = MEMBERS
        try:
            sizes = {store: size for store in stores if (size := store.size(name)) is not None}
            store, size = next(iter(sizes.items()), (stores[0], None))
            if size != expected:
                kind, amount = (TAR, "no such file") if size is None else (MEMBERS, f"{size} bytes")
                message = (
                    f"{store.at(name)}: found {amount}, the source was made of {expected} bytes"
                )
            elif digest_of(commit, store, name) == commit.members[suffix]:
                return None
            else:
                message = (
                    f"{column.store.url}: shard {commit.shard} was made of other {suffix} members than "
                    f"{name} holds now. Restore the tar, or make it a new source"
                )
        except (OSError, ShardsError) as error:
            message = damage_message_or_raise(error)
        return Fault(kind, message, commit.shard)

    def digest_of(commit: Commit, store: Store, name: str) -> str:
        """Returns the digest of the members that a tar holds now."""
        rows = read_index(parent, commit.shard).rows
        tar = store.open(name, cached=False)
        try:
            return members_digest(store, tar, store.at(name), rows, suffix, captions)
        finally:
            store.close(tar)

    commits = [commit for commit in column.commits.values() if suffix in commit.members]
    with ThreadPoolExecutor(READERS) as pool:
        faults = [fault for fault in pool.map(check, commits) if fault is not None]
    examination.faults += faults
    return len(commits) - sum(fault.kind == TAR for fault in faults)


# Digests ------------------------------------------------------------------------------------------


def logical_digest(path: Place) -> str:
    """Returns one digest of a column's identity, rows, statuses and values, however and wherever it
    was made.

    It is made from the logical digests of the shards, which the COMPLETE record names; the data is
    not read. Raises IncompleteColumn if encoding has not finished.
    """
    column = Column.open(path)
    return _digest(column, column.snapshot.content)


def deep_digest(
    path: Place, processes: int | None = None, progress: Progress = SILENT
) -> tuple[str, list[Fault]]:
    """Returns the logical digest, recomputed from the data, and all that is not as the records say."""
    column = Column.open(path)
    examination = examine(path, processes, progress)
    contents: list[str | None] = [None] * len(column.snapshot.content)
    for shard, blocks in examination.blocks.items():
        if column.snapshot.content[shard] is not None and examination.column is not None:
            commit = examination.column.commits[shard]
            contents[shard] = replace(commit, blocks=tuple(b or "" for b in blocks)).content
    try:
        return _digest(column, contents), examination.faults
    except ShardsError as error:  # the empty caption cannot be read
        if not examination.faults:
            raise
        return f"none ({error})", examination.faults


def _digest(column: Column, contents: Sequence[str | None]) -> str:
    record = column.spec.record()
    empty = sha256(column.empty().tobytes()) if column.spec.empty_tokens else None
    parts = [record["identity"], record["norm"], empty, list(contents)]
    if column.spec.quantisation:
        parts.append(record["quantisation"])
    return sha256(canonical_json(parts))


# Commands -----------------------------------------------------------------------------------------


def run_verify(args: argparse.Namespace) -> int:
    """`python -m shards verify`: 2 if one of the columns is none, else 1 if anything is damaged, or 0."""
    code = 0
    for url in args.column:
        try:
            with Bar("verify", unit="bytes") as bar:
                examination = examine(url, args.processes, bar)
            column, compared = examination.column, 0
            if args.source and column is not None:
                compared = check_source(examination, args.source)
        except ShardsError as error:
            code = failed(error)
            continue
        code = max(code, int(bool(examination.faults)))
        for fault in examination.faults:
            print(json.dumps(fault.record(examination.store.url)) if args.json else fault)
        if args.json:
            continue
        if args.source and column is not None:
            print(_comparison(url, len(column.commits), compared, examination.faults))
        print("\n".join([*examination.sentences(), *_verdict(url, examination.faults)]))
    return code


def _comparison(url: str, shards: int, compared: int, faults: Sequence[Fault]) -> str:
    """Returns how many shards were compared with the tars, and why the others were not."""
    missing = sum(fault.kind == TAR for fault in faults)
    unrecorded = shards - compared - missing
    return (
        f"{url}: {compared} of {counted(shards, 'shard')} compared with the tars"
        + f"; of {missing} the tar is missing" * bool(missing)
        + f"; of {unrecorded} the commit, of an older release, does not say what it was made of"
        * bool(unrecorded)
    )


def _verdict(url: str, faults: Sequence[Fault]) -> list[str]:
    if not faults:
        return [f"{url}: sound"]
    lines = []
    if changed := {fault.shard for fault in faults if fault.kind == MEMBERS}:
        lines.append(
            f"{url}: the tars do not match {counted(len(changed), 'shard')}. The column itself is not damaged by "
            "that, and `repair` does not change it"
        )
    if missing := sum(fault.kind == TAR for fault in faults):
        lines.append(
            f"{url}: {counted(missing, 'tar')} of its source not found. Name a further folder with --source, "
            "or restore what is missing"
        )
    if damage := [fault for fault in faults if fault.kind not in (MEMBERS, TAR)]:
        shards = {fault.shard for fault in damage if fault.shard is not None}
        lines.append(
            f"{url}: DAMAGED, {counted(len(damage), 'fault')}, {counted(len(shards), 'shard')}. See "
            f"what `python -m shards repair {url}` would do"
        )
    return lines


def run_digest(args: argparse.Namespace) -> int:
    """`python -m shards digest`: 1 if `--deep` found data to be other than the records say. Of
    several columns each digest has its column beside it.
    """
    damaged = False
    for url in args.column:
        if args.deep:
            with Bar("digest", unit="bytes") as bar:
                digest, faults = deep_digest(url, args.processes, bar)
        else:
            digest, faults = logical_digest(url), []
        print(digest if len(args.column) == 1 else f"{digest}  {url}", flush=True)
        for fault in faults:
            print(fault, file=sys.stderr)
        damaged |= bool(faults)
    return int(damaged)
