"""Measure mean and deviation of a column's latents, over all of its valid rows."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import own_commit
from ..column.statistics import (
    MeasuredNorm,
    Method,
    Sums,
    block_sums,
    latent_shape,
    norm_of,
    put_norm,
    put_statistics,
    read_statistics,
)
from ..console import Bar, say_next
from ..errors import BadStatistics, CorruptColumn
from ..format.layout import ZARR_ROWS, Status
from ..read.column import Column
from ..read.objects import Ints
from ..store.base import Place
from .parallel import SILENT, Progress, Report, processes_for, spread


@dataclass(frozen=True, slots=True)
class NormTask:
    """A shard whose rows are to be added."""

    column: Column
    shard: int


def measure(
    url: Place,
    method: Method = "measured",
    processes: int | None = None,
    progress: Progress = SILENT,
) -> MeasuredNorm:
    """Returns the norm of a complete column, which is then among its norms. Shards that were measured
    already are not read again; `progress` counts rows.

    Raises IncompleteColumn, CorruptColumn, or BadStatistics, with no norm written.
    """
    column = Column.open(url)
    try:
        shape = latent_shape(column.layout)
    except BadStatistics as error:
        raise BadStatistics(f"{column.path}: {error}") from None
    contents = {s: c for s, c in enumerate(column.snapshot.content) if c is not None}
    missing = [
        shard for shard, content in contents.items() if _sums(column, shard, content) is None
    ]
    rows = sum(column.snapshot.rows[shard] for shard in missing)
    progress.begin(rows)
    slim = replace(column.snapshot, valid_mask=np.zeros(0, np.uint32))
    tasks = [
        NormTask(Column(column.store, column.spec, column.digest, slim), shard) for shard in missing
    ]
    count = processes_for(processes, len(tasks), rows * column.layout.unit_bytes)
    for _ in spread(measure_shard, tasks, count, progress.advance):
        pass
    total = Sums.zero(shape)
    for shard, content in contents.items():
        sums = _sums(column, shard, content)
        if sums is None:
            raise CorruptColumn(f"{column.path}: the sums of shard {shard} went away meanwhile")
        total += sums
    norm = norm_of(total, method, column.path)
    try:
        return put_norm(
            column.store, column.digest, column.snapshot.digest, method, total.rows, norm
        )
    finally:
        column.close()


def _sums(column: Column, shard: int, content: str) -> Sums | None:
    """Returns the sums of a shard; None where there are none, or none of what is committed."""
    try:
        record = read_statistics(column.store, column.digest, shard)
    except CorruptColumn:  # derived from the rows, which are read again
        return None
    return record[1] if record is not None and record[0] == content else None


def _read(column: Column, ids: Ints, part: slice) -> NDArray[Any]:
    return column.read(ids[part])


def measure_shard(task: NormTask, report: Report) -> None:
    """Adds the valid rows of a shard in their order, 1,024 at a time, and stores the sums."""
    column, shard = task.column, task.shard
    commit = own_commit(column.store, column.digest, shard)
    valid = np.flatnonzero(commit.status() == Status.OK)
    total = Sums.zero(latent_shape(column.layout))
    for first in range(0, commit.rows, ZARR_ROWS):
        rows = valid[(valid >= first) & (valid < first + ZARR_ROWS)]
        ids = shard * column.layout.shard_rows + rows
        try:
            total += block_sums(column.spec, len(ids), partial(_read, column, ids))
        except BadStatistics as error:
            raise BadStatistics(
                f"{column.path}: shard {shard}: {error}. Run `python -m shards verify {column.path}`"
            ) from None
        report(min(ZARR_ROWS, commit.rows - first))
    put_statistics(column.store, column.digest, shard, commit.content, total)
    column.close()


def run_norm(args: argparse.Namespace) -> int:
    """`python -m shards norm`."""
    method: Method = "measured-per-place" if args.per_place else "measured"
    with Bar("norm", unit="rows") as bar:
        measured = measure(args.column, method, args.processes, bar)
    deviations = 1 / np.abs(measured.norm.arrays[1])
    print(
        f"{args.column}: {method} over {measured.rows:,} rows, deviations {deviations.min():.4g} to "
        f"{deviations.max():.4g}\nnorm {measured.digest}"
    )
    say_next("train", "plan", "CONFIG", f"data.norm={method}")
    return 0
