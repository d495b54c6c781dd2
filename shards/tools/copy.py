"""Columns from one place to another: copy and stage.

Each goes on where an earlier attempt stopped. What is written has been checked on its way, and
records come after what they speak of, so a reader at the other end never sees half a shard.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..column.commits import (
    Commit,
    commit_name,
    committed,
    complete_names,
    failure_names,
    open_complete,
    own_commit,
    read_commit,
    read_failures,
)
from ..column.source import index_name
from ..column.writer import sha256_of
from ..column.zarr_object import read_into
from ..console import Bar
from ..errors import CorruptColumn, IdentityMismatch, NoRoom, NotAColumn
from ..format.atomic import sha256
from ..format.layout import ColumnSpec
from ..read.column import open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .parallel import Report, silent
from .scan import PIECE, commit_error

THREADS = 8
SPARE = 1 << 26  # bytes of a disk that staging leaves free
CALIBRATION_ROWS, CALIBRATION_TOKENS = 4_096, 1 << 14

# Copy ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shipment:
    """What a copy has to bring: commits by shard, and the records that follow them."""

    spec: ColumnSpec
    commits: dict[int, Commit]
    complete: list[str]  # names, valid-row bits before the records that speak of them
    failures: list[str]

    @property
    def objects(self) -> dict[str, tuple[int, str]]:
        return {name: (n, sha) for c in self.commits.values() for name, n, sha in c.objects}

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.objects.values())


def shipment(source: Store) -> Shipment:
    """What a column holds now, its records checked: they are copied as they are. COMPLETE records
    are listed first, so every shard they name is among the commits.
    """
    spec, digest = open_spec(source)
    records = complete_names(source)
    bits = [n.removesuffix(".json") + ".valid" for n in records]
    failures = failure_names(source)
    standing = committed(source, spec.layout.shards)
    with ThreadPoolExecutor(THREADS) as pool:
        commits = list(pool.map(lambda shard: own_commit(source, digest, shard), standing))
    for commit in commits:
        if why := commit_error(spec, commit):
            raise CorruptColumn(f"{source.at(commit_name(commit.shard))}: {why}")
    goods = Shipment(spec, {c.shard: c for c in commits}, bits + records, failures)
    _check_records(source, digest, goods, records)
    return goods


def _check_records(source: Store, digest: str, goods: Shipment, records: Sequence[str]) -> None:
    """CorruptColumn unless metadata, failure and COMPLETE records are what the commits and
    column.json make them.
    """
    remedy = f"Nothing was copied; run `python -m shards repair {source.url}`, then copy again"
    for name, data in goods.spec.zarr_json().items():
        if source.size(name) != len(data) or source.read(name) != data:
            raise CorruptColumn(
                f"{source.at(name)}: not the Zarr metadata that column.json names. {remedy}"
            )
    read_failures(source)
    for name in records:
        try:
            named = open_complete(source, name, digest)
        except (CorruptColumn, NotAColumn) as error:
            raise CorruptColumn(f"{error}. {remedy}") from None
        held = {s: c.content for s, c in goods.commits.items()}
        lost = [s for s, c in enumerate(named.content) if c and held.get(s) != c]
        if lost:
            raise CorruptColumn(
                f"{source.at(name)}: it names shard {lost[0]}, which is not committed with that "
                f"content. {remedy}"
            )


def copy(
    source: Place,
    target: Place,
    with_source: bool = False,
    threads: int = THREADS,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> Shipment:
    """Copy a column, of a finished or an unfinished one what is committed.

    Each object is compared with the sha256 of its commit while it streams, and appears only if it
    fits; commits follow their objects, COMPLETE records come last. An object that stands is kept if
    it has size and sha256 of the commit; of a shard that is committed there, the sizes alone are
    looked at. Raises CorruptColumn or IdentityMismatch, naming the object.
    """
    source, target = open_store(source), open_store(target)
    refuse_nested(source, target)
    goods = shipment(source)
    if with_source:
        _check_source(source.parent, goods)
    objects = goods.objects
    begin(goods.bytes)
    _same(source, target, "column.json")
    for name in goods.spec.zarr_json():
        _same(source, target, name)
    done = {shard for shard in committed(target, goods.spec.layout.shards)}
    left: dict[str, set[int]] = {}  # object -> shards that wait for it (the empty caption: all)
    for shard, commit in goods.commits.items():
        if shard in done and not _alike(read_commit(target, shard), commit):
            raise IdentityMismatch(
                f"{target.at(commit_name(shard))}: another shard {shard} than that of {source.url} "
                "stands here. Nothing of it was changed; copy into another place"
            )
        for name, _, _ in commit.objects:
            left.setdefault(name, set()).add(shard)
    waits = {shard: {name for name, _, _ in c.objects} for shard, c in goods.commits.items()}
    with ThreadPoolExecutor(threads) as pool:
        jobs = {
            pool.submit(_bring, source, target, name, *objects[name], owners <= done, report): name
            for name, owners in left.items()
        }
        try:
            for job in as_completed(jobs):
                job.result()
                name = jobs[job]
                for shard in left[name]:
                    waits[shard].discard(name)
                    if not waits[shard] and shard not in done:
                        _same(source, target, commit_name(shard))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for shard in goods.commits.keys() - done:
        if not goods.commits[shard].objects:
            _same(source, target, commit_name(shard))
    for name in goods.failures:
        target.replace(name, source.read(name))
    for name in goods.complete:
        _same(source, target, name)
    if with_source:
        _copy_source(source.parent, target.parent, goods)
    return goods


def refuse_nested(source: Store, target: Store) -> None:
    """Refuse a place inside the column, or one that the column is inside of."""
    here, there = (
        f"{store.url if store.folder is None else store.folder.resolve()}/"
        for store in (source, target)
    )
    if here != there and (here.startswith(there) or there.startswith(here)):
        raise IdentityMismatch(
            f"{target.url}: one of it and {source.url} lies inside the other. Nothing was written; "
            "give another place"
        )


def _alike(a: Commit, b: Commit) -> bool:
    """Whether two commits are of one content in the same objects, wherever they were made."""
    return a.objects == b.objects and a.content == b.content


def _same(source: Store, target: Store, name: str) -> None:
    """Bring a record, or check that just this one stands."""
    data = source.read(name)
    if not target.put_if_absent(name, data) and target.read(name) != data:
        raise IdentityMismatch(
            f"{target.at(name)}: another record than that of {source.url} stands here. It was left "
            "as it is; copy into another place"
        )


_local = threading.local()


def _bring(
    source: Store, target: Store, name: str, size: int, digest: str, trusted: bool, report: Report
) -> None:
    """Copy one object unless it stands. `trusted`: its shard is committed there, so its size will
    do.
    """
    if not trusted:
        target.touch(name)
    standing = target.size(name)
    if standing is not None:
        if standing != size or not (trusted or sha256_of(target, name)[1] == digest):
            raise CorruptColumn(
                f"{target.at(name)}: {standing} bytes stand here that are not the {size} which "
                f"{source.url} has. Run `python -m shards repair {target.url}`, or delete it, and "
                "copy again"
            )
        report(size)
        return
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(PIECE))
    try:
        handle = source.open(name, cached=False)
    except FileNotFoundError:
        raise CorruptColumn(
            f"{source.at(name)}: the object is missing though its shard is committed. Run `python "
            f"-m shards repair {source.url}`"
        ) from None
    try:
        found = source.length(handle, source.at(name))
        if found != size:
            raise CorruptColumn(_damaged(source, name, size, digest))
        with target.staged(name) as file:
            for start in range(0, size, PIECE):
                piece = _local.buffer[: min(PIECE, size - start)]
                read_into(source, handle, piece, start, source.at(name))
                file.write(piece)
                report(len(piece))
            if file.sha256 != digest:
                raise CorruptColumn(_damaged(source, name, size, digest))
            new = file.publish()
    finally:
        source.close(handle)
    if not new:  # another copy was faster
        _bring(source, target, name, size, digest, trusted, silent)


def _damaged(store: Store, name: str, size: int, digest: str) -> str:
    return (
        f"{store.at(name)}: not the {size} bytes of sha256 {digest[:12]}... that its commit names; "
        f"it was not copied. Run `python -m shards repair {store.url}`, encode again, copy again"
    )


def _check_source(source: Store, goods: Shipment) -> None:
    """NotAColumn unless source.json and the indexes of all shards stand."""
    standing = {name for name, _ in source.list("index")}
    wanted = {index_name(shard) for shard in goods.commits}
    missing = sorted(wanted - standing)
    if source.size("source.json") is None:
        missing = ["source.json", *missing]
    if missing:
        raise NotAColumn(
            f"{source.at(missing[0])}: no such file ({len(missing)} are missing), so the source cannot "
            "be copied with its column. Nothing was written; restore it, or leave out --with-source"
        )


def _copy_source(source: Store, target: Store, goods: Shipment) -> None:
    """source.json and the indexes of the shards that were copied, each as its commit knows it."""
    _same(source, target, "source.json")
    for shard, commit in goods.commits.items():
        name = index_name(shard)
        data = source.read(name)
        if sha256(data) != commit.index:
            raise CorruptColumn(
                f"{source.at(name)}: not the index that the commit of shard {shard} was made from"
            )
        _same(source, target, name)


# Stage --------------------------------------------------------------------------------------------


def stage(
    sources: Sequence[Place],
    folder: Path,
    threads: int = THREADS,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> list[Path]:
    """Copy columns to a local disk as `folder/<source>/<column>`; where they stand then.

    Where several processes of a node call this at once, one copies and the others wait for it.
    Raises NoRoom before anything is copied.
    """
    stores = [open_store(source) for source in sources]
    targets = [folder / store.parent.name / store.name for store in stores]
    if len(set(targets)) < len(targets):
        raise IdentityMismatch(
            f"two of these columns have the same name: {[str(t) for t in targets]}"
        )
    for store in stores:  # a wrong path makes no folder
        open_spec(store)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        loads = [shipment(store) for store in stores]
        needed = 0
        for goods, target in zip(loads, targets, strict=True):
            there = open_store(target)
            needed += sum(n for name, (n, _) in goods.objects.items() if there.size(name) != n)
        free = shutil.disk_usage(folder).free
        if needed and needed + SPARE > free:
            raise NoRoom(
                f"{folder}: {needed:,} bytes are to be copied and {free:,} are free ({SPARE:,} are "
                "left as they are). Nothing was copied; make room, or stage fewer columns"
            )
        begin(sum(goods.bytes for goods in loads))
        for store, target in zip(stores, targets, strict=True):
            copy(store, target, False, threads, silent, report)
    return targets


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this node stages into the folder."""
    descriptor = os.open(folder / ".stage-lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# Commands -----------------------------------------------------------------------------------------


def run_copy(source: str, target: str, with_source: bool, threads: int) -> int:
    with Bar("copy", None, "bytes") as shown:
        goods = copy(source, target, with_source, threads, shown.begin, shown.advance)
    what = "COMPLETE" if goods.complete else "unfinished, as it is there"
    print(
        f"{target}: {len(goods.commits)} shards of {source}, {len(goods.objects)} objects, "
        f"{goods.bytes:,} bytes ({what})"
    )
    return 0


def run_stage(sources: Sequence[str], target: str, threads: int) -> int:
    """Prints what to put on the command line of `train` instead of the columns' own paths."""
    folder = open_store(target).folder
    if folder is None:
        raise NotAColumn(
            f"{target}: found an object store, expected a folder of this machine. `python -m shards "
            "copy` copies to a store"
        )
    with Bar("stage", None, "bytes") as shown:
        places = stage(sources, folder, threads, shown.begin, shown.advance)
    names = {"moments": "latents", "latents": "latents", "tokens": "text", "ids": "text"}
    by_name: dict[str, list[str]] = {}
    for place in places:
        kind = open_spec(open_store(place))[0].layout.kind
        by_name.setdefault(names.get(kind, "also"), []).append(str(place))
    for name, paths in by_name.items():
        plain = len(paths) == 1 and name != "also"
        print(f"data.{name}={paths[0] if plain else '[' + ', '.join(paths) + ']'}")
    return 0
