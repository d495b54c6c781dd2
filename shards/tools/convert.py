"""The same column stored in another way: backend, codec, or int8."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..column.commits import (
    TAR_BYTES,
    commit_name,
    committed,
    failure_name,
    put_complete,
    read_commit,
    valid_rows,
)
from ..column.writer import ShardWriter, create_column, put_empty
from ..console import Bar, counted, say_next
from ..errors import ConversionFailed, ShardsError
from ..format.atomic import Json
from ..format.int8 import (
    GROUP,
    calibrate,
    calibrate_rows,
    loss_text,
    stored_rows,
    warns,
)
from ..format.layout import ZARR_ROWS, ColumnSpec, Layout, Status
from ..read.column import Column, open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .copy import refuse_nested
from .parallel import SILENT, Progress, Report, processes_for, spread

CALIBRATION_ROWS, CALIBRATION_TOKENS, CALIBRATION_BYTES = 4_096, 1 << 14, 1 << 26


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """A shard to be converted."""

    source: Column
    target: Store
    spec: ColumnSpec
    digest: str
    shard: int
    lossless: bool


def converted_spec(
    source: Column, target: Store, backend: str, codec: str | None, element: str | None
) -> ColumnSpec:
    """Returns what a column becomes: the same but for how it is stored. Scales of int8 that an
    earlier attempt measured are kept. Raises ShardsError if it cannot be converted.
    """
    old = source.spec
    element = element or old.layout.element
    try:
        layout = replace(old.layout, backend=backend, codec=codec, element=element)
    except ValueError as error:
        raise ShardsError(f"{source.path}: cannot be converted: {error}") from None
    if element == old.layout.element:
        return replace(old, layout=layout)
    if old.layout.quantised and not old.layout.ragged and element == "float16":
        # what the encoder gave is not brought back, so this is not its column
        identity = {**old.identity, "dtype": "float16, from int8"}
        return replace(old, identity=identity, layout=layout, quantisation=None)
    if element != "int8":
        raise ShardsError(
            f"{source.path}: {old.layout.kind} of {old.layout.element} cannot become {element}; tokens, "
            "features and latents without posterior can become int8, and of these features and latents "
            "float16 again, without what was lost"
        )
    scales = None if target.size("column.json") is None else open_spec(target)[0].quantisation
    identity = {**old.identity, "dtype": "int8"}
    if not scales:
        scales = _calibration(source) if layout.ragged else _rows_calibration(source, layout)
    return replace(old, identity=identity, layout=layout, quantisation=scales)


def _rows_calibration(source: Column, layout: Layout) -> Json:
    """As `_calibration`, of rows of one shape."""
    ids = valid_rows(source.valid_mask())
    if not len(ids):
        raise ShardsError(f"{source.path}: it has no valid row to measure the scales of int8 on")
    count = min(CALIBRATION_ROWS, len(ids), max(GROUP, CALIBRATION_BYTES // layout.unit_bytes))
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, count).astype(int))]
    source.hint(ids)
    scales = calibrate_rows(source.read(ids, check=True, hinted=True), layout)
    if scales["rows"] < len(ids):
        raise ShardsError(
            f"{source.path}: {len(ids) - scales['rows']} of {len(ids)} rows that were looked at hold "
            "values beyond float16, as which int8 rows are read. Keep it as it is"
        )
    return scales


def _calibration(source: Column) -> Json:
    """Returns channel scales and their measured error, from rows spread over the column; of long
    captions a share of the tokens is enough.
    """
    ids = valid_rows(source.valid_mask())
    if not len(ids):
        raise ShardsError(f"{source.path}: it has no valid row to measure the scales of int8 on")
    ids = ids[np.unique(np.linspace(0, len(ids) - 1, min(CALIBRATION_ROWS, len(ids))).astype(int))]
    if source.store.folder is not None:  # rows of a store are asked for when they are read
        source.hint(ids)
    share = min(1.0, CALIBRATION_TOKENS / max(int(source.lengths(ids).sum()), 1))
    chance, tokens = np.random.default_rng(0), []
    for start in range(0, len(ids), 32):
        values = source.read(ids[start : start + 32], check=True)
        tokens.append(values[chance.random(len(values)) < share])
    scales = calibrate(np.concatenate(tokens), len(ids))
    if not np.isfinite([scales["relative_error"], *scales["channel"]]).all():
        raise ShardsError(
            f"{source.path}: its values are too large for int8 with scales of float32"
        )
    return scales


def convert(
    source: Place,
    target: Place,
    backend: str = "zarr",
    codec: str | None = None,
    element: str | None = None,
    processes: int | None = None,
    progress: Progress = SILENT,
) -> Column:
    """Stores a complete column in another way: same rows, statuses and index digests, and, unless its
    element becomes another one, same logical digests.

    Shards that are committed in the target are not made again. Raises ConversionFailed if a shard's
    digest came out different, CorruptColumn if what is read is damaged.
    """
    column = Column.open(source)
    store = open_store(target)
    refuse_nested(column.store, store)
    spec = converted_spec(column, store, backend, codec, element)
    digest = create_column(store, spec)
    if spec.empty_tokens is not None:
        put_empty(store, spec, column.empty())
    finished = set(committed(store, spec.layout.shards))
    shards = [s for s, content in enumerate(column.snapshot.content) if content is not None]
    lossless = spec.layout.element == column.layout.element
    tasks = [
        ConvertTask(column, store, spec, digest, s, lossless) for s in shards if s not in finished
    ]
    size = sum(_size(column, task.shard) for task in tasks)
    progress.begin(size)
    count = processes_for(processes, len(tasks), size)
    for _ in spread(convert_shard, tasks, count, progress.advance):
        pass
    for shard in shards if lossless else ():
        _compare(column, store, shard)
    for shard, _ in column.snapshot.failed:
        name = failure_name(shard)
        if column.store.size(name) is not None:
            store.replace(name, column.store.read(name))
    put_complete(store, digest, spec.layout.shards, allow_failed=bool(column.snapshot.failed))
    return Column.open(store)


def _size(column: Column, shard: int) -> int:
    """Returns the bytes of the values that are read of a shard."""
    ids = shard * column.layout.shard_rows + np.arange(column.snapshot.rows[shard])
    return int(column.row_bytes(ids).sum())


def convert_shard(task: ConvertTask, report: Report) -> None:
    """Writes one shard block by block and commits it."""
    source, shard, rows = task.source, task.shard, task.source.snapshot.rows[task.shard]
    index = str(source.snapshot.index[shard])
    with ShardWriter(task.target, task.spec, task.digest, shard, rows, index) as writer:
        for first in range(0, rows, ZARR_ROWS):
            ids = shard * source.layout.shard_rows + np.arange(first, min(first + ZARR_ROWS, rows))
            values: Any = source.read(ids, check=True)
            report(values.nbytes)
            if task.spec.layout.element != source.layout.element:
                values = source.decoded(values)
            status = source.status(ids)
            if source.layout.ragged:
                values = np.split(values, np.cumsum(source.lengths(ids))[:-1])
            if not task.lossless:
                values = stored_rows(task.spec, values)
            # A row that is not finite is given as it was to the first writer, which finds it so.
            writer.put_block(values, np.where(status == Status.NON_FINITE, Status.OK, status))
        # a path may be any bytes, a record is text
        path = os.fsencode(source.path).decode(errors="backslashreplace")
        made_of = read_commit(source.store, shard).provenance
        of_tar = {TAR_BYTES: made_of[TAR_BYTES]} if TAR_BYTES in made_of else {}
        writer.commit({"converted": path, **of_tar}, source._tables.members(shard))
    source.close()


def _compare(column: Column, store: Store, shard: int) -> None:
    """Raises ConversionFailed unless a commit has the content of the source's."""
    content, expected = read_commit(store, shard).content, column.snapshot.content[shard]
    if content != expected:
        raise ConversionFailed(
            f"{store.at(commit_name(shard))}: shard {shard} has the digest {content[:12]}..., in "
            f"{column.path} it is {str(expected)[:12]}... The target held other objects before, or "
            "something is wrong; delete the target and convert again"
        )


def run_convert(args: argparse.Namespace) -> int:
    """`python -m shards convert`."""
    codec = None if args.codec == "none" else args.codec
    with Bar("convert", unit="bytes") as bar:
        column = convert(
            args.source, args.target, args.backend, codec, args.element, args.processes, bar
        )
    result = "logical digests equal those of the source"
    if args.element == "float16":
        result = "values as they are read of the source"
    if scales := column.spec.quantisation:
        result = loss_text(scales)
        if warns(scales):
            result += "; WARNING: more than is usual"
    rows = sum(column.snapshot.rows)
    print(f"{args.target}: {counted(rows, 'row')} as {column.layout.record()}; {result}")
    say_next("shards", "verify", args.target)
    return 0
