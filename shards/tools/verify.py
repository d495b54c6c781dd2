"""Check a column from its records down to every row, and name all that is bad."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..column.commits import (
    FAILURE,
    READERS,
    Commit,
    Snapshot,
    commit_name,
    committed,
    complete_names,
    failure_name,
    failure_names,
    open_complete,
    own_commit,
    read_commit,
)
from ..column.members import member_read, members_digest
from ..column.source import open_source, read_index
from ..column.writer import sha256_of
from ..console import Bar
from ..errors import CorruptColumn, NotAColumn, ShardsError, SourceMismatch
from ..format.atomic import Json, canonical_json, sha256
from ..format.layout import COMPLETE, VERSION, ColumnSpec
from ..format.records import CompleteRecord, FailureRecord, parse
from ..read.column import Column, open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .parallel import Report, processes_for, silent, spread
from .scan import (
    Fault,
    ShardScan,
    ShardTask,
    commit_error,
    damage_message_or_raise,
    objects_of,
    scan_shard,
)

QUARANTINE, LEASES = "quarantine/", "lease"
MEMBERS = "members"  # the kind of a fault that lies in the tars, not in the column


@dataclass(slots=True)
class Examination:
    """What `examine` found. `commits` are the sound commit records by shard; `unfinished` names
    objects that belong to no commit, which is no damage; `generations` the COMPLETE records that
    stood before the commits were listed; `blocks` the recomputed logical digests.
    """

    store: Store
    spec: ColumnSpec | None = None
    digest: str = ""
    faults: list[Fault] = field(default_factory=list)
    commits: dict[int, Commit] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    unfinished: list[tuple[str, int]] = field(default_factory=list)
    generations: list[str] = field(default_factory=list)
    blocks: dict[int, tuple[str | None, ...]] = field(default_factory=dict)

    def fault(self, kind: str, message: str, name: str | None, shard: int | None = None) -> None:
        self.faults.append(Fault(kind, message, shard, (), name))

    @property
    def complete(self) -> bool:
        return bool(self.generations)

    @property
    def bytes(self) -> int:
        return sum(size for commit in self.commits.values() for _, size, _ in commit.objects)

    def sentences(self) -> list[str]:
        """What is unfinished, in words."""
        if self.spec is None:
            return []
        url, lines = self.store.url, []
        if self.missing:
            some = f"shards {self.missing[:8]}{' and more' if len(self.missing) > 8 else ''}"
            lines.append(
                f"{url}: unfinished, {len(self.missing)} of {self.spec.layout.shards} shards are not "
                f"committed ({some}). `python -m encode run` goes on"
            )
        lines += [f"{url}: shard {s} failed: {why}" for s, why in list(self.failed.items())[:8]]
        if not self.missing and not self.complete and not self.failed:
            lines.append(f"{url}: all shards are committed, but no COMPLETE record says so")
        if self.unfinished:
            size = sum(size for _, size in self.unfinished)
            lines.append(
                f"{url}: {len(self.unfinished)} objects ({size:,} bytes) belong to no commit yet, "
                f"{self.unfinished[0][0]} the first: an encode that runs or was interrupted"
            )
        return lines


def verify(url: Place, report: Report = silent, processes: int | None = None) -> list[Fault]:
    """Every fault found in a column; see `examine`. Empty if sound."""
    return examine(url, processes, silent, report).faults


def examine(
    url: Place,
    processes: int | None = None,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
    deep: bool = True,
) -> Examination:
    """Check records, Zarr metadata, COMPLETE generations and, if `deep`, every byte of every object:
    each is read once, by all cores. `begin` is told how many bytes there are, `report` how many
    were read.

    Raises NotAColumn or FormatVersion where there is nothing to check.
    """
    store = open_store(url)
    found = Examination(store)
    try:
        found.spec, found.digest = open_spec(store)
    except CorruptColumn as error:
        found.fault("column", str(error), "column.json")
        return found
    except NotAColumn as error:
        if not store.list("commits"):
            raise
        found.fault("column", str(error), "column.json")
        return found
    found.generations = complete_names(store)  # before the commits: an encode may end meanwhile
    _records(found)
    for name in found.generations:
        _snapshot(found, name)
    _strays(found)
    begin(found.bytes)
    if deep:
        index = _source_stands(found)
        _empty(found)
        tasks = [ShardTask(store, found.spec, c, index) for c in found.commits.values()]
        count = processes_for(processes, len(tasks), found.bytes)
        scans: list[tuple[int, ShardScan]] = []
        for task, scan in spread(scan_shard, tasks, count, report):
            scans.append((task.commit.shard, scan))
            found.blocks[task.commit.shard] = scan.blocks
        for _, scan in sorted(scans, key=lambda pair: pair[0]):
            found.faults += scan.faults
    return found


def check_source(found: Examination, folders: Sequence[Place]) -> int:
    """Compare what the column was made of with the tars, which are in one of the folders; how many
    shards could be compared. Commits of older releases do not say what they were made of.
    """
    assert found.spec
    suffix, captions = member_read(found.spec.identity), found.spec.layout.ragged
    source = open_source(found.store.parent)
    if source.fingerprint != found.spec.identity.get("source"):
        raise SourceMismatch(
            f"{found.store.url}: made from another source than source.json beside it names. Restore "
            "source.json"
        )
    stores = [open_store(folder) for folder in folders]

    def digest_of(commit: Commit) -> str:
        """Of the members that the tar holds now; a ShardsError says why there is none."""
        name, size = source.tars[commit.shard]
        sizes = [(store, store.size(name)) for store in stores]
        store, held = next((pair for pair in sizes if pair[1] is not None), sizes[0])
        if held != size:
            amount = "no such file" if held is None else f"{held} bytes"
            raise NotAColumn(
                f"{store.at(name)}: found {amount}, the source was made of {size} bytes"
            )
        rows = read_index(found.store.parent, commit.shard).rows
        tar = store.open(name, cached=False)
        try:
            return members_digest(store, tar, store.at(name), rows, str(suffix), captions)
        finally:
            store.close(tar)

    def check(commit: Commit) -> str | None:
        try:
            if digest_of(commit) == commit.members[str(suffix)]:
                return None
        except (OSError, ShardsError) as error:
            return damage_message_or_raise(error)
        return (
            f"{found.store.url}: shard {commit.shard} was made of other {suffix} members than "
            f"{source.tars[commit.shard][0]} holds now. Restore the tar, or make it a new source"
        )

    some = [commit for commit in found.commits.values() if suffix in commit.members]
    with ThreadPoolExecutor(READERS) as pool:
        for commit, message in zip(some, pool.map(check, some), strict=True):
            if message is not None:
                found.fault(MEMBERS, message, None, commit.shard)
    return len(some)


def check_stands(store: Store) -> None:
    """Raise NotAColumn if there is no column, damaged or not; writes nothing."""
    if store.size("column.json") is None and not store.list("commits"):
        open_spec(store)


def _records(found: Examination) -> None:
    """Metadata, commit and failure records."""
    store, spec = found.store, found.spec
    assert spec
    for name, data in spec.zarr_json().items():
        if not _reads(store, name, data):
            message = f"{store.at(name)}: not the Zarr metadata that column.json names"
            found.fault("metadata", message, name)
    standing = committed(store, spec.layout.shards)
    with ThreadPoolExecutor(READERS) as pool:
        commits = list(pool.map(lambda shard: _commit(store, found.digest, shard), standing))
    for shard, commit in zip(standing, commits, strict=True):
        name = commit_name(shard)
        if isinstance(commit, str):
            found.fault("commit", commit, name, shard)
        elif why := commit_error(spec, commit):
            message = f"{store.at(name)}: no commit of this column: {why}"
            found.fault("commit", message, name, shard)
        else:
            found.commits[shard] = commit
    for name in failure_names(store):
        try:
            record = parse(store.unseal(name, FAILURE, VERSION), FailureRecord, store.at(name))
            if record["shard"] not in standing:
                found.failed[record["shard"]] = record["reason"]
        except (OSError, ShardsError) as error:
            found.fault("failure", damage_message_or_raise(error), name)
    there = {*standing, *found.failed}
    found.missing = [shard for shard in range(spec.layout.shards) if shard not in there]


def _reads(store: Store, name: str, data: bytes) -> bool:
    """Whether an object stands and has just these bytes."""
    try:
        return store.size(name) == len(data) and store.read(name) == data
    except (OSError, CorruptColumn) as error:
        damage_message_or_raise(error)
        return False


def _commit(store: Store, digest: str, shard: int) -> Commit | str:
    try:
        return own_commit(store, digest, shard)
    except (OSError, ShardsError) as error:
        return damage_message_or_raise(error)


def _snapshot(found: Examination, name: str) -> None:
    """A COMPLETE record and its valid-row bits, recomputed from the commits."""
    store, spec = found.store, found.spec
    assert spec
    beside = name.removesuffix(".json") + ".valid"
    try:
        record = parse(store.unseal(name, COMPLETE, VERSION), CompleteRecord, store.at(name))
        if record["column"] != found.digest or len(record["shards"]) != spec.layout.shards:
            raise CorruptColumn(f"{store.at(name)}: this record belongs to another column.json")
    except (OSError, ShardsError) as error:
        return found.fault("complete", damage_message_or_raise(error), name)
    wrong = [
        shard
        for shard, (_, content, _) in enumerate(record["shards"])
        if content and (shard not in found.commits or found.commits[shard].content != content)
    ]
    for shard in wrong:
        found.fault(
            "complete",
            f"{store.url}: shard {shard} is not committed with the content that the COMPLETE record "
            f"{name} names",
            name,
            shard,
        )
    try:
        open_complete(store, name, found.digest)
    except (OSError, ShardsError) as error:
        found.fault("valid", damage_message_or_raise(error), beside)
    if wrong:
        return None
    expected = snapshot_of(found, record)
    if expected.digest != record["digest"] or name != f"complete/{expected.digest}.json":
        message = f"{store.at(name)}: not what the commits that it names make up"
        found.fault("complete", message, name)
    return None


def snapshot_of(found: Examination, record: Json) -> Snapshot:
    """The snapshot that a COMPLETE record should describe, from the commits it names."""
    assert found.spec
    named = [s for s, (_, content, _) in enumerate(record["shards"]) if content]
    failed = {int(s): str(why) for s, why in record["failed"]}
    commits = [found.commits[s] for s in named]
    return Snapshot.of(found.digest, found.spec.layout.shards, commits, failed)


def _strays(found: Examination) -> None:
    """Objects that belong to no commit, nor to the records of a column."""
    spec = found.spec
    assert spec
    shards = range(spec.layout.shards)
    known = {
        "column.json",
        *spec.zarr_json(),
        *map(commit_name, shards),
        *map(failure_name, shards),
    }
    for commit in found.commits.values():
        known.update(name for name, _, _ in commit.objects)
    for fault in found.faults:  # what a damaged commit may have named is no stray
        if fault.kind == "commit" and fault.shard is not None:
            known |= set.union(*objects_of(spec, fault.shard, spec.layout.shard_rows))
    arrays = spec.arrays()
    if "empty" in arrays:
        known.add(f"empty/{arrays['empty'].key(0)}")
    standing = found.store.list()
    names = {name for name, _ in standing}
    for name, size in standing:
        record = name.removesuffix(".valid") + ".json"
        finished = name.startswith("complete/") and (name.endswith(".json") or record in names)
        if not finished and name not in known and not name.startswith((QUARANTINE, LEASES)):
            found.unfinished.append((name, size))


def _source_stands(found: Examination) -> bool:
    """Whether the column's source stands beside it, so that the indexes are to be checked."""
    assert found.spec
    folder = found.store.parent
    try:
        return open_source(folder).fingerprint == found.spec.identity.get("source")
    except NotAColumn:
        return False
    except (OSError, ShardsError) as error:
        found.fault("source", damage_message_or_raise(error), None)
        return False


def _empty(found: Examination) -> None:
    """The empty caption's object, which every commit names."""
    assert found.spec
    arrays = found.spec.arrays()
    if "empty" not in arrays or not found.commits:
        return
    name = f"empty/{arrays['empty'].key(0)}"
    try:
        standing: tuple[int, str] | None = sha256_of(found.store, name)
    except (OSError, CorruptColumn) as error:
        damage_message_or_raise(error)
        standing = None
    wrong = [
        shard
        for shard, commit in found.commits.items()
        if (name, *(standing or (0, ""))) not in commit.objects
    ]
    if wrong:
        how = "missing or unreadable" if standing is None else f"{standing[0]} other bytes than"
        found.fault(
            "object",
            f"{found.store.at(name)}: {how} the commits of shards {wrong[:8]} name",
            name,
        )


# Digests ------------------------------------------------------------------------------------------


def logical_digest(path: Place) -> str:
    """One digest of a column's identity, rows, statuses and values, however and wherever it was
    made.

    From the logical digests in the commit records; the data is not read. IncompleteColumn if
    encoding has not finished.
    """
    column = Column.open(path)
    contents = [
        read_commit(path, shard).content if content else None
        for shard, content in enumerate(column.snapshot.content)
    ]
    return _digest(column, contents)


def deep_digest(
    path: Place,
    processes: int | None = None,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> tuple[str, list[Fault]]:
    """The logical digest, recomputed from the data; and all that is not as the records say."""
    column = Column.open(path)
    found = examine(path, processes, begin, report)
    contents: list[str | None] = []
    for shard, content in enumerate(column.snapshot.content):
        commit = found.commits.get(shard)
        if content is None or commit is None:
            contents.append(None)
            continue
        blocks = tuple(block or "" for block in found.blocks[shard])
        again = Commit(
            commit.shard, commit.rows, commit.not_ok, commit.objects, blocks, commit.index,
            commit.column, commit.provenance,
        )  # fmt: skip
        contents.append(again.content)
    try:
        return _digest(column, contents), found.faults
    except ShardsError as error:  # the empty caption cannot be read
        if not found.faults:
            raise
        return f"none ({error})", found.faults


def _digest(column: Column, contents: Sequence[str | None]) -> str:
    record = column.spec.record()
    empty = sha256(column.empty().tobytes()) if column.spec.empty_tokens else None
    parts = [record["identity"], record["norm"], empty, list(contents)]
    if column.spec.quantisation:
        parts.append(record["quantisation"])
    return sha256(canonical_json(parts))


# Commands -----------------------------------------------------------------------------------------


def run_verify(
    urls: Sequence[str], processes: int | None, as_json: bool, tars: Sequence[str] = ()
) -> int:
    """`python -m shards verify`: 2 if one of them is no column, else 1 if anything is damaged, or 0.
    `tars`: folders of the source's tars, which are compared then.
    """
    code = 0
    for url in urls:
        try:
            with Bar("verify", None, "bytes") as shown:
                found = examine(url, processes, shown.begin, shown.advance)
            compared = check_source(found, tars) if tars and found.spec else 0
        except ShardsError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
            continue
        code = max(code, int(bool(found.faults)))
        for line in [
            json.dumps(fault.record(found.store.url)) if as_json else str(fault)
            for fault in found.faults
        ]:
            print(line)
        if not as_json:
            if tars:
                total = len(found.commits)
                rest = (
                    ""
                    if compared == total
                    else (
                        "; the commits of the others, from an older release, do not say what they were made of"
                    )
                )
                print(f"{url}: {compared} of {total} shards compared with the tars{rest}")
            print("\n".join([*found.sentences(), _verdict(url, found.faults)]))
    return code


def _verdict(url: str, faults: Sequence[Fault]) -> str:
    if not faults:
        return f"{url}: sound"
    lines = []
    if changed := {fault.shard for fault in faults if fault.kind == MEMBERS}:
        lines.append(
            f"{url}: {len(changed)} shards do not match the tars. The column itself is not damaged by "
            "that, and `repair` does not change it"
        )
    faults = [fault for fault in faults if fault.kind != MEMBERS]
    shards = {fault.shard for fault in faults if fault.shard is not None}
    if faults:
        lines.append(
            f"{url}: DAMAGED, {len(faults)} faults, {len(shards)} shards. See what `python -m shards "
            f"repair {url}` would do"
        )
    return "\n".join(lines)


def run_digest(urls: Sequence[str], deep: bool, processes: int | None) -> int:
    """`python -m shards digest`: 1 if `--deep` found data to be other than the records say. Of several columns
    each digest has its column beside it.
    """
    damaged = False
    for url in urls:
        if deep:
            with Bar("digest", None, "bytes") as shown:
                digest, faults = deep_digest(url, processes, shown.begin, shown.advance)
        else:
            digest, faults = logical_digest(url), []
        print(digest if len(urls) == 1 else f"{digest}  {url}", flush=True)
        for fault in faults:
            print(fault, file=sys.stderr)
        damaged |= bool(faults)
    return int(damaged)
