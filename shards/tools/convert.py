"""The same column stored in another way: backend, codec, or int8 captions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..column.commits import (
    commit_name,
    committed,
    failure_name,
    put_complete,
    read_commit,
    valid_rows,
)
from ..column.writer import ShardWriter, create_column, put_empty
from ..console import Bar
from ..errors import ConversionFailed, ShardsError
from ..format.atomic import Json
from ..format.int8 import WARN_ABOVE, calibrate, stored_rows
from ..format.layout import ZARR_ROWS, ColumnSpec, Status
from ..read.column import Column, open_spec
from ..store.base import Place, Store
from ..store.open import open_store
from .copy import refuse_nested
from .parallel import Report, processes_for, silent, spread

CALIBRATION_ROWS, CALIBRATION_TOKENS = 4_096, 1 << 14


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
    ids = valid_rows(source.valid_mask())
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
    refuse_nested(column.store, store)
    spec, digest = _target(column, store, backend, codec, element)
    if spec.empty_tokens is not None:
        put_empty(store, spec, column.empty())
    done = set(committed(store, spec.layout.shards))
    shards = [s for s, content in enumerate(column.snapshot.content) if content is not None]
    lossless = spec.layout.element == column.layout.element
    tasks = [ConvertTask(column, store, spec, digest, s, lossless) for s in shards if s not in done]
    sizes = [_size(column, task.shard) for task in tasks]
    begin(sum(sizes))
    count = processes_for(processes, len(tasks), sum(sizes))
    for _ in spread(convert_shard, tasks, count, report):
        pass
    for shard in shards if lossless else ():
        _compare(column, store, shard)
    for shard, _ in column.snapshot.failed:
        name = failure_name(shard)
        if column.store.size(name) is not None:
            store.replace(name, column.store.read(name))
    put_complete(store, digest, spec.layout.shards, allow_failed=bool(column.snapshot.failed))
    return Column.open(store)


def _target(
    column: Column, store: Store, backend: str, codec: str | None, element: str | None
) -> tuple[ColumnSpec, str]:
    """What the target is, claimed; its scales are kept where an earlier attempt measured them.
    (Those of a source that is int8 already go with its words.)
    """
    measured = element == "int8" and column.layout.element != "int8"
    if measured and store.size("column.json") is not None:
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
    whole, count = column.snapshot, len(column.snapshot.rows)

    def at(values: Sequence[Any], nothing: Any) -> tuple[Any, ...]:
        return tuple(values[s] if s == shard else nothing for s in range(count))

    one = replace(
        whole, rows=at(whole.rows, 0), content=at(whole.content, None), truncated=(),
        index=at(whole.index, None), valid_mask=np.zeros(0, np.uint32),
    )  # fmt: skip
    return Column(column.store, column.spec, column.digest, one)


def _size(column: Column, shard: int) -> int:
    """Bytes of the values that are read of a shard."""
    ids = shard * column.layout.shard_rows + np.arange(column.snapshot.rows[shard])
    return int(column.row_bytes(ids).sum())


def convert_shard(task: ConvertTask, report: Report) -> None:
    """Write one shard block by block and commit it."""
    source, shard, rows = task.source, task.shard, task.source.snapshot.rows[task.shard]
    index = str(source.snapshot.index[shard])
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
        # a path may be any bytes, a record is text
        where = os.fsencode(source.path).decode(errors="backslashreplace")
        writer.commit({"converted": where}, source._table.members(shard))
    source.close()


def _compare(column: Column, store: Store, shard: int) -> None:
    """The commit that stands has the content of the source's."""
    found, expected = read_commit(store, shard).content, column.snapshot.content[shard]
    if found != expected:
        raise ConversionFailed(
            f"{store.at(commit_name(shard))}: shard {shard} has the digest {found[:12]}..., in "
            f"{column.path} it is {str(expected)[:12]}... The target held other objects before, or "
            "something is wrong; delete the target and convert again"
        )


def run_convert(
    source: str, target: str, backend: str, codec: str | None, element: str | None,
    processes: int | None,
) -> int:  # fmt: skip
    with Bar("convert", None, "bytes") as shown:
        column = convert(
            source, target, backend, codec, element, processes, shown.begin, shown.advance
        )
    spec = column.spec
    same = "logical digests equal those of the source" if not spec.quantisation else ""
    if spec.quantisation:
        error = spec.quantisation["relative_error"]
        same = f"relative error {100 * error:.2f} % over {spec.quantisation['rows']} rows"
        if error > WARN_ABOVE:
            same += f"; WARNING: more than the {100 * WARN_ABOVE:.0f} % that is usual"
    print(f"{target}: {sum(column.snapshot.rows):,} rows as {spec.layout.record()}; {same}")
    return 0
