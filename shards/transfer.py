"""Columns from one place, backend or codec to another: copy, stage and convert.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .commits import (
    Commit,
    commit_name,
    committed,
    failure_name,
    own_commit,
    put_complete,
    read_commit,
    valid_rows,
)
from .errors import ConversionFailed, CorruptColumn, IdentityMismatch, NoRoom, ShardsError
from .parallel import Bar, Report, processes_for, silent, spread
from .quantise import WARN_ABOVE, calibrate, stored_rows
from .reader import Column, open_spec
from .scan import PIECE, nonsense
from .schema import ZARR_ROWS, ColumnSpec, Status
from .source import index_name
from .storage import Json, sha256
from .store import Place, Store, open_store
from .writer import ShardWriter, create_column, put_empty, sha256_of
from .zarrfile import read_into

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
    """What a column holds now. COMPLETE records are listed first, so every shard they name is
    among the commits.
    """
    spec, digest = open_spec(source)
    names = [name for name, _ in source.list("complete")]
    records = [n for n in names if n.endswith(".json")]
    bits = [n.removesuffix(".json") + ".valid" for n in records]
    failures = [name for name, _ in source.list("failures")]
    standing = committed(source, spec.layout.shards)
    with ThreadPoolExecutor(THREADS) as pool:
        commits = list(pool.map(lambda shard: own_commit(source, digest, shard), standing))
    for commit in commits:
        if why := nonsense(spec, commit):
            raise CorruptColumn(f"{source.at(commit_name(commit.shard))}: {why}")
    return Shipment(spec, {c.shard: c for c in commits}, bits + records, failures)


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
    goods = shipment(source)
    objects = goods.objects
    begin(goods.bytes)
    _same(source, target, "column.json")
    for name in goods.spec.zarr_json():
        _same(source, target, name)
    done = {shard for shard in committed(target, goods.spec.layout.shards)}
    left: dict[str, set[int]] = {}  # object -> shards that wait for it (the empty caption: all)
    for shard, commit in goods.commits.items():
        if shard in done and read_commit(target, shard).objects != commit.objects:
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
                    if not waits[shard]:
                        _same(source, target, commit_name(shard))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for shard in goods.commits:
        if not goods.commits[shard].objects:
            _same(source, target, commit_name(shard))
    for name in goods.failures:
        target.replace(name, source.read(name))
    for name in goods.complete:
        _same(source, target, name)
    if with_source:
        _copy_source(source.parent, target.parent, goods)
    return goods


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
        handle = source.open(name)
    except FileNotFoundError:
        raise CorruptColumn(
            f"{source.at(name)}: the object is missing though its shard is committed. Run `python "
            f"-m shards repair {source.url}`"
        ) from None
    try:
        found = source.length(handle)
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


# Convert ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """One shard on its way."""

    source: Column
    target: Store
    spec: ColumnSpec
    digest: str
    shard: int
    lossless: bool


def converted_spec(
    source: Column, backend: str, codec: str | None, element: str | None
) -> ColumnSpec:
    """What a column becomes: the same but for how it is stored. ShardsError if it cannot be."""
    old = source.spec
    element = element or old.layout.element
    try:
        layout = replace(old.layout, backend=backend, codec=codec, element=element)
    except ValueError as error:
        raise ShardsError(f"{source.path}: cannot be converted: {error}") from None
    if element == old.layout.element:
        return replace(old, layout=layout)
    if (old.layout.element, element) != ("bfloat16", "int8") or old.layout.kind != "tokens":
        raise ShardsError(
            f"{source.path}: {old.layout.kind} of {old.layout.element} cannot become {element}; only "
            "tokens of bfloat16 can become int8, and the way back would not bring back what was lost"
        )
    identity = {**old.identity, "dtype": "int8"}
    return replace(old, identity=identity, layout=layout, quantisation=_calibration(source))


def _calibration(source: Column) -> Json:
    """Channel scales and measured error, from rows spread over the column; of long captions a
    share of the tokens is enough.
    """
    ids = valid_rows(source.words())
    if not len(ids):
        raise ShardsError(f"{source.path}: it has no valid row to measure the scales of int8 on")
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(CALIBRATION_ROWS, len(ids))).astype(int))]
    source.hint(ids)
    share = min(1.0, CALIBRATION_TOKENS / max(int(source.lengths(ids).sum()), 1))
    chance, tokens = np.random.default_rng(0), []
    for start in range(0, len(ids), 32):
        words = source.read(ids[start : start + 32], check=True)
        tokens.append(words[chance.random(len(words)) < share])
    measured = calibrate(np.concatenate(tokens), len(ids))
    if not np.isfinite([measured["relative_error"], *measured["channel"]]).all():
        raise ShardsError(
            f"{source.path}: its values are too large for int8 with scales of float32"
        )
    return measured


def convert(
    source: Place,
    target: Place,
    backend: str = "zarr",
    codec: str | None = None,
    element: str | None = None,
    processes: int | None = None,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> Column:
    """Store a complete column in another way: same rows, statuses and index digests, and, unless it
    becomes int8, same logical digests.

    Shards that are committed in the target are not made again. Raises ConversionFailed if a shard's
    digest came out different, CorruptColumn if what is read is damaged.
    """
    column = Column.open(source)
    store = open_store(target)
    spec, digest = _target(column, store, backend, codec, element)
    if spec.empty_tokens is not None:
        put_empty(store, spec, column.empty())
    done = set(committed(store, spec.layout.shards))
    shards = [s for s, content in enumerate(column.generation.content) if content is not None]
    lossless = spec.layout.element == column.layout.element
    tasks = [ConvertTask(column, store, spec, digest, s, lossless) for s in shards if s not in done]
    sizes = [_size(column, task.shard) for task in tasks]
    begin(sum(sizes))
    count = processes_for(processes, len(tasks), sum(sizes))
    for _ in spread(convert_shard, tasks, count, report):
        pass
    for shard in shards if lossless else ():
        _compare(column, store, shard)
    for shard, _ in column.generation.failed:
        name = failure_name(shard)
        if column.store.size(name) is not None:
            store.replace(name, column.store.read(name))
    put_complete(store, digest, spec.layout.shards, allow_failed=bool(column.generation.failed))
    return Column.open(store)


def _target(
    column: Column, store: Store, backend: str, codec: str | None, element: str | None
) -> tuple[ColumnSpec, str]:
    """What the target is, claimed; its scales are kept where an earlier attempt measured them."""
    if store.size("column.json") is not None and element == "int8":
        standing, _ = open_spec(store)
        layout = replace(column.layout, backend=backend, codec=codec, element="int8")
        spec = replace(
            column.spec, layout=layout, identity={**column.spec.identity, "dtype": "int8"},
            quantisation=standing.quantisation or _calibration(column),
        )  # fmt: skip
    else:
        spec = converted_spec(column, backend, codec, element)
    return spec, create_column(store, spec)


def _only(column: Column, shard: int) -> Column:
    """The column with one shard, so that little goes to the process that converts it."""
    whole, count = column.generation, len(column.generation.rows)

    def at(values: Sequence[Any], nothing: Any) -> tuple[Any, ...]:
        return tuple(values[s] if s == shard else nothing for s in range(count))

    one = replace(
        whole, rows=at(whole.rows, 0), content=at(whole.content, None), truncated=(),
        index=at(whole.index, None), words=np.zeros(0, np.uint32),
    )  # fmt: skip
    return Column(column.store, column.spec, column.digest, one)


def _size(column: Column, shard: int) -> int:
    """Bytes of the values that are read of a shard."""
    ids = shard * column.layout.shard_rows + np.arange(column.generation.rows[shard])
    return int(column.row_bytes(ids).sum())


def convert_shard(task: ConvertTask, report: Report) -> None:
    """Write one shard block by block and commit it."""
    source, shard, rows = task.source, task.shard, task.source.generation.rows[task.shard]
    index = str(source.generation.index[shard])
    with ShardWriter(task.target, task.spec, task.digest, shard, rows, index) as writer:
        for first in range(0, rows, ZARR_ROWS):
            places = np.arange(first, min(first + ZARR_ROWS, rows))
            ids = shard * source.layout.shard_rows + places
            values: Any = source.read(ids, check=True)
            report(values.nbytes)
            status = source.status(ids)
            if source.layout.ragged:
                values = np.split(values, np.cumsum(source.lengths(ids))[:-1])
            if not task.lossless:
                values = stored_rows(task.spec, values)
            # A row that is not finite is given as it was to the first writer, which finds it so.
            writer.put_block(values, np.where(status == Status.NON_FINITE, Status.OK, status))
        writer.commit({"converted": source.path})
    source.close()


def _compare(column: Column, store: Store, shard: int) -> None:
    """The commit that stands has the content of the source's."""
    found, expected = read_commit(store, shard).content, column.generation.content[shard]
    if found != expected:
        raise ConversionFailed(
            f"{store.at(commit_name(shard))}: shard {shard} has the digest {found[:12]}..., in "
            f"{column.path} it is {str(expected)[:12]}... The target held other objects before, or "
            "something is wrong; delete the target and convert again"
        )


# Commands -----------------------------------------------------------------------------------------


def run_copy(source: str, target: str, with_source: bool, threads: int) -> int:
    with Bar("copy") as shown:
        goods = copy(source, target, with_source, threads, shown.begin, shown.report)
    what = "COMPLETE" if goods.complete else "unfinished, as it is there"
    print(
        f"{target}: {len(goods.commits)} shards of {source}, {len(goods.objects)} objects, "
        f"{goods.bytes:,} bytes ({what})"
    )
    return 0


def run_stage(sources: Sequence[str], folder: Path, threads: int) -> int:
    """Prints what to put on the command line of `train` instead of the columns' own paths."""
    with Bar("stage") as shown:
        places = stage(sources, folder, threads, shown.begin, shown.report)
    names = {"moments": "latents", "latents": "latents", "tokens": "text"}
    by_name: dict[str, list[str]] = {}
    for place in places:
        kind = open_spec(open_store(place))[0].layout.kind
        by_name.setdefault(names.get(kind, "also"), []).append(str(place))
    for name, paths in by_name.items():
        plain = len(paths) == 1 and name != "also"
        print(f"data.{name}={paths[0] if plain else '[' + ', '.join(paths) + ']'}")
    return 0


def run_convert(
    source: str, target: str, backend: str, codec: str | None, element: str | None,
    processes: int | None,
) -> int:  # fmt: skip
    with Bar("convert") as shown:
        column = convert(
            source, target, backend, codec, element, processes, shown.begin, shown.report
        )
    spec = column.spec
    same = "logical digests equal those of the source" if not spec.quantisation else ""
    if spec.quantisation:
        error = spec.quantisation["relative_error"]
        same = f"relative error {100 * error:.2f} % over {spec.quantisation['rows']} rows"
        if error > WARN_ABOVE:
            same += f"; WARNING: more than the {100 * WARN_ABOVE:.0f} % that is usual"
    print(f"{target}: {sum(column.generation.rows):,} rows as {spec.layout.record()}; {same}")
    return 0
