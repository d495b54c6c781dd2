"""Columns from one place to another: copy and stage.

Each goes on where an earlier attempt stopped. What is written has been checked on its way, and
records come after what they speak of, so a reader at the other end never sees half a shard.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from ..column.commits import commit_name, committed, failure_name, open_complete, read_commit
from ..column.source import index_name
from ..column.statistics import norm_names, put_statistics, read_statistics
from ..column.values import sha256_of
from ..column.zarr_object import read_into
from ..console import Bar, counted, say_next
from ..errors import CorruptColumn, IdentityMismatch, NoRoom, NotAColumn
from ..format.atomic import sha256
from ..read.column import open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .describe import Description, describe
from .parallel import SILENT, Progress
from .scan import PIECE
from .verify import holds

THREADS = 8
EMPTY = "empty/"  # the empty caption
SPARE = 1 << 26  # bytes of a disk that staging leaves free

# Copy ---------------------------------------------------------------------------------------------


def copy_manifest(source: Store) -> Description:
    """Returns what a column holds now; raises CorruptColumn unless all its records are what the
    commits and column.json make them, since they are copied as they are.
    """
    column = describe(source)
    column.refuse_damage()
    remedy = f"Nothing was copied; run `python -m shards repair {source.url}`, then copy again"
    for name, data in column.spec.zarr_json().items():
        if not holds(source, name, data):
            raise CorruptColumn(
                f"{source.at(name)}: not the Zarr metadata that column.json names. {remedy}"
            )
    contents = {shard: commit.content for shard, commit in column.commits.items()}
    for name in column.complete:
        try:
            snapshot = open_complete(source, name, column.digest)
        except (CorruptColumn, NotAColumn) as error:
            raise CorruptColumn(f"{error}. {remedy}") from None
        lost = [s for s, c in enumerate(snapshot.content) if c and contents.get(s) != c]
        if lost:
            raise CorruptColumn(
                f"{source.at(name)}: it names shard {lost[0]}, which is not committed with that "
                f"content. {remedy}"
            )
    return column


def copy(
    source: Place,
    target: Place,
    with_source: bool = False,
    threads: int = THREADS,
    progress: Progress = SILENT,
) -> Description:
    """Copies a column, of a finished or an unfinished one what is committed; returns what it was.

    Each object is compared with the sha256 of its commit while it streams, and appears only if it
    fits; commits follow their objects, COMPLETE records come last. An object that exists is kept if
    it has size and sha256 of the commit; of a shard that is committed there, the sizes alone are
    looked at. Raises CorruptColumn or IdentityMismatch, naming the object.
    """
    source, target = open_store(source), open_store(target)
    refuse_nested(source, target)
    manifest = copy_manifest(source)
    if with_source:
        _check_source(source.parent, manifest)
    progress.begin(manifest.bytes)
    _copy_column(manifest, target, threads, progress)
    if with_source:
        _copy_source(source.parent, target.parent, manifest)
    return manifest


def _copy_column(manifest: Description, target: Store, threads: int, progress: Progress) -> None:
    source, commits, objects = manifest.store, manifest.commits, manifest.objects
    for name in ("column.json", *manifest.spec.zarr_json()):
        _copy_record(source, target, name)
    finished = commits.keys() & committed(target, manifest.spec.layout.shards)
    for shard in finished:
        commit, copied = commits[shard], read_commit(target, shard)
        if (copied.objects, copied.content) != (commit.objects, commit.content):
            raise IdentityMismatch(
                f"{target.at(commit_name(shard))}: another shard {shard} than that of {source.url} "
                "exists here. Nothing of it was changed; copy into another place"
            )

    def copy_object(name: str, trusted: bool) -> None:
        _copy_object(source, target, name, *objects[name], trusted, progress)

    def copy_commit(shard: int) -> None:
        if shard not in finished:
            _copy_record(source, target, commit_name(shard))

    for name in objects:
        if name.startswith(EMPTY):  # all commits name it
            copy_object(name, len(finished) == len(commits))
    own = {
        shard: [name for name, _, _ in commit.objects if not name.startswith(EMPTY)]
        for shard, commit in commits.items()
    }
    missing = {shard: len(names) for shard, names in own.items()}
    with ThreadPoolExecutor(threads) as pool:  # a job is one object, so that a stop waits for few
        jobs = {
            pool.submit(copy_object, name, shard in finished): shard
            for shard, names in own.items()
            for name in names
        }
        try:
            last = [pool.submit(copy_commit, shard) for shard, names in own.items() if not names]
            for job in as_completed(jobs):
                job.result()
                shard = jobs[job]
                missing[shard] -= 1
                if not missing[shard]:
                    last.append(pool.submit(copy_commit, shard))
            for job in last:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for shard in manifest.failed:
        target.replace(failure_name(shard), source.read(failure_name(shard)))
    for shard in commits:
        if (sums := read_statistics(source, manifest.digest, shard)) is not None:
            put_statistics(target, manifest.digest, shard, *sums)
    for name in norm_names(source):
        _copy_record(source, target, name)
    for suffix in (".valid", ".json"):  # the bits come before the record that speaks of them
        for name in manifest.complete:
            _copy_record(source, target, name.removesuffix(".json") + suffix)


def refuse_nested(source: Store, target: Store) -> None:
    """Refuses a place inside the column, or one that the column is inside of."""
    outer, inner = (
        f"{store.url if store.folder is None else store.folder.resolve()}/"
        for store in (source, target)
    )
    if outer != inner and (outer.startswith(inner) or inner.startswith(outer)):
        raise IdentityMismatch(
            f"{target.url}: one of it and {source.url} lies inside the other. Nothing was written; "
            "give another place"
        )


def _copy_record(source: Store, target: Store, name: str) -> None:
    """Copies a record, or checks that just this one exists."""
    data = source.read(name)
    if not target.put_if_absent(name, data) and target.read(name) != data:
        raise IdentityMismatch(
            f"{target.at(name)}: another record than that of {source.url} exists here. It was left "
            "as it is; copy into another place"
        )


_local = threading.local()


def _copy_object(
    source: Store, target: Store, name: str, size: int, digest: str, trusted: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Copies one object unless it exists. `trusted`: its shard is committed there, so its size will
    do.
    """
    if not trusted:
        target.touch(name)
    old = target.size(name)
    if old is not None:
        if old != size or not (trusted or sha256_of(target, name)[1] == digest):
            raise CorruptColumn(
                f"{target.at(name)}: found {old} bytes that are not those of {source.url} ({size}). "
                f"Run `python -m shards repair {target.url}`, or delete it, and copy again"
            )
        progress.advance(size)
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
        if source.length(handle, source.at(name)) != size:
            raise CorruptColumn(_damaged(source, name, size, digest))
        with target.staged(name) as file:
            for start in range(0, size, PIECE):
                piece = _local.buffer[: min(PIECE, size - start)]
                read_into(source, handle, piece, start, source.at(name))
                file.write(piece)
                progress.advance(len(piece))
            if file.sha256 != digest:
                raise CorruptColumn(_damaged(source, name, size, digest))
            new = file.publish()
    finally:
        source.close(handle)
    if not new:  # another copy was faster
        _copy_object(source, target, name, size, digest, trusted, SILENT)


def _damaged(store: Store, name: str, size: int, digest: str) -> str:
    return (
        f"{store.at(name)}: not the {size} bytes of sha256 {digest[:12]}... that its commit names; "
        f"it was not copied. Run `python -m shards repair {store.url}`, encode again, copy again"
    )


def _check_source(source: Store, manifest: Description) -> None:
    """Raises NotAColumn unless source.json and the indexes of all shards exist."""
    indexes = {index_name(shard) for shard in manifest.commits}
    missing = sorted(indexes.difference(name for name, _ in source.list("index")))
    if source.size("source.json") is None:
        missing = ["source.json", *missing]
    if missing:
        raise NotAColumn(
            f"{source.at(missing[0])}: no such file ({len(missing)} are missing), so the source cannot "
            "be copied with its column. Nothing was written; restore it, or leave out --with-source"
        )


def _copy_source(source: Store, target: Store, manifest: Description) -> None:
    """Copies source.json and the indexes of the shards, each as its commit knows it."""
    _copy_record(source, target, "source.json")
    for shard, commit in manifest.commits.items():
        name = index_name(shard)
        if sha256(source.read(name)) != commit.index:
            raise CorruptColumn(
                f"{source.at(name)}: not the index that the commit of shard {shard} was made from"
            )
        _copy_record(source, target, name)


# Stage --------------------------------------------------------------------------------------------


def stage(
    sources: Sequence[Place], folder: Path, threads: int = THREADS, progress: Progress = SILENT
) -> list[Path]:
    """Copies columns to a local disk as `folder/<source>/<column>`; returns where they are then.

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
        copies = [(copy_manifest(a), open_store(b)) for a, b in zip(stores, targets, strict=True)]
        needed = sum(
            size
            for manifest, target in copies
            for name, (size, _) in manifest.objects.items()
            if target.size(name) != size
        )
        free = shutil.disk_usage(folder).free
        if needed and needed + SPARE > free:
            raise NoRoom(
                f"{folder}: {needed:,} bytes are to be copied and {free:,} are free ({SPARE:,} are "
                "left as they are). Nothing was copied; make room, or stage fewer columns"
            )
        progress.begin(sum(manifest.bytes for manifest, _ in copies))
        for manifest, target in copies:
            refuse_nested(manifest.store, target)
            _copy_column(manifest, target, threads, progress)
    return targets


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process of this node stages into the folder."""
    descriptor = os.open(folder / ".stage-lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# Commands -----------------------------------------------------------------------------------------


def run_copy(args: argparse.Namespace) -> int:
    with Bar("copy", unit="bytes") as bar:
        manifest = copy(args.source, args.target, args.with_source, args.threads, bar)
    state = "COMPLETE" if manifest.complete else "unfinished, as it is there"
    print(
        f"{args.target}: {counted(len(manifest.commits), 'shard')} of {args.source}, "
        f"{counted(len(manifest.objects), 'object')}, {counted(manifest.bytes, 'byte')} ({state})"
    )
    say_next("shards", "verify", args.target)
    return 0


def _as_yaml(path: str) -> str:
    """Returns a path as a config's override reads it: in quotes where YAML might see more in it."""
    return path if re.fullmatch(r"[\w./+-]+", path) else json.dumps(path, ensure_ascii=False)


def run_stage(args: argparse.Namespace) -> int:
    """Prints what to put on the command line of `train` instead of the columns' own paths."""
    folder = open_store(args.folder).folder
    if folder is None:
        raise NotAColumn(
            f"{args.folder}: found an object store, expected a folder of this machine. `python -m "
            "shards copy` copies to a store"
        )
    with Bar("stage", unit="bytes") as bar:
        columns = stage(args.source, folder, args.threads, bar)
    options = {"moments": "latents", "latents": "latents", "tokens": "text", "ids": "text"}
    paths: dict[str, list[str]] = {}
    for column in columns:
        kind = open_spec(open_store(column))[0].layout.kind
        paths.setdefault(options.get(kind, "also"), []).append(_as_yaml(str(column)))
    for option, values in paths.items():
        plain = len(values) == 1 and option != "also"
        print(shlex.quote(f"data.{option}={values[0] if plain else '[' + ','.join(values) + ']'}"))
    return 0
