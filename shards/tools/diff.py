"""In what two columns differ: identity, storage, rows, statuses and values, whatever they are
stored in.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import own_commit
from ..column.members import member_read
from ..console import Bar, counted
from ..format.int8 import to_floats
from ..format.layout import HAS_VALUES, ZARR_ROWS, Status, differences
from ..read.column import Column
from ..store.base import Place
from .faults import spans
from .parallel import SILENT, Progress, Report, processes_for, spread

GROUP = 64  # rows compared at once
SHOWN = 10  # shards, and fields, that are printed


@dataclass(slots=True)
class ShardDifference:
    """How a shard differs; `rows` are those of other values, `lengths` those of other lengths."""

    shard: int
    notes: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    largest: float = 0.0  # absolute difference
    square: float = 0.0  # sum of squared differences
    of: float = 0.0  # sum of squared values of the second column

    def __bool__(self) -> bool:
        return bool(self.notes or self.rows or self.lengths)


@dataclass(slots=True)
class Difference:
    """How two columns differ. `stored` is about backend and codec, which is no other content."""

    fields: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)
    shards: list[ShardDifference] = field(default_factory=list)
    members: list[int] = field(default_factory=list)  # shards made of other captions or pictures
    comparable: bool = True

    def __bool__(self) -> bool:
        return bool(self.fields or self.shards or self.members)

    @property
    def relative(self) -> float:
        """The L2 norm of the differences over that of the values, over the rows that differ."""
        of = sum(s.of for s in self.shards)
        return float(np.sqrt(sum(s.square for s in self.shards) / of)) if of else 0.0


@dataclass(frozen=True, slots=True)
class DiffTask:
    """A shard of both columns; None where it is not committed."""

    a: Column
    b: Column
    shard: int


def diff(
    a: Place, b: Place, processes: int | None = None, progress: Progress = SILENT
) -> Difference:
    """Compares two columns by what is committed of each; `progress` counts rows.

    Logical digests come first: only blocks whose digests differ are read, unless one column is
    quantised and the other is not, where all are.
    """
    difference = Difference()
    first, second = (Column.open(url, partial=True) for url in (a, b))
    x, y = first.spec.record(), second.spec.record()
    for part in ("identity", "norm", "empty_tokens"):
        difference.fields += differences(x[part], y[part], part)
    for line in differences(asdict(first.layout), asdict(second.layout), "layout"):
        storage = line.split(":")[0] in ("layout.backend", "layout.codec")
        (difference.stored if storage else difference.fields).append(line)
    difference.fields += differences(_scales(first), _scales(second), "quantisation")
    fields = ("kind", "row_shape", "shards", "shard_rows")
    difference.comparable = all(
        getattr(first.layout, k) == getattr(second.layout, k) for k in fields
    )
    if not difference.comparable:
        return difference
    has_empty = first.spec.empty_tokens and first.spec.empty_tokens == second.spec.empty_tokens
    if has_empty and not np.array_equal(first.empty(), second.empty()):
        difference.fields.append("empty caption: other tokens")
    suffix = member_read(first.spec.identity)
    if suffix is not None and suffix == member_read(second.spec.identity):
        digests, others = first.members(suffix), second.members(suffix)
        common = sorted(digests.keys() & others.keys())
        difference.members = [s for s in common if digests[s] != others[s]]
    equal_bytes = _has_equal_bytes(first, second)
    pairs = enumerate(zip(first.snapshot.content, second.snapshot.content, strict=True))
    shards = [shard for shard, (x, y) in pairs if x != y or (x and not equal_bytes)]
    tasks = [DiffTask(_slim(first), _slim(second), shard) for shard in shards]
    rows = sum(first.snapshot.rows[s] for s in shards)
    progress.begin(rows)
    count = processes_for(processes, len(tasks), rows * first.layout.unit_bytes)
    results = [result for _, result in spread(diff_shard, tasks, count, progress.advance)]
    difference.shards = sorted((r for r in results if r), key=lambda r: r.shard)
    return difference


def _scales(column: Column) -> Any:
    return column.spec.quantisation and column.spec.quantisation["channel"]


def _has_equal_bytes(a: Column, b: Column) -> bool:
    """Whether equal values are equal bytes in both."""
    return a.layout.element == b.layout.element and bool(_scales(a) == _scales(b))


def _slim(column: Column) -> Column:
    """Returns the column without valid-row bits, which another process does not need."""
    snapshot = replace(column.snapshot, valid_mask=np.zeros(0, np.uint32))
    return Column(column.store, column.spec, column.digest, snapshot)


def diff_shard(task: DiffTask, report: Report) -> ShardDifference:
    """Compares one shard: records first, then digests, then checksums, then values."""
    a, b, shard = task.a, task.b, task.shard
    difference = ShardDifference(shard)
    has_commit = [c.snapshot.content[shard] is not None for c in (a, b)]
    if not all(has_commit):
        difference.notes.append(f"committed in {a.path if has_commit[0] else b.path} only")
        return difference
    x, y = (own_commit(c.store, c.digest, shard) for c in (a, b))
    if x.rows != y.rows:
        difference.notes.append(f"{x.rows} rows and {y.rows}")
    if x.index != y.index:
        difference.notes.append("made from other readings of the tar")
    rows = min(x.rows, y.rows)
    statuses = [commit.status()[:rows] for commit in (x, y)]
    changed = np.flatnonzero(statuses[0] != statuses[1])
    if len(changed):
        names = " and ".join(Status(int(status[changed[0]])).name.lower() for status in statuses)
        difference.notes.append(
            f"{counted(len(changed), 'row')} of other status, {spans(changed[:SHOWN].tolist())} first: {names}"
        )
    equal_bytes = _has_equal_bytes(a, b)
    comparable = np.isin(statuses[0], HAS_VALUES) & np.isin(statuses[1], HAS_VALUES)
    for block in range(-(-rows // ZARR_ROWS)):
        first, end = block * ZARR_ROWS, min((block + 1) * ZARR_ROWS, rows)
        if not equal_bytes or x.blocks[block] != y.blocks[block]:
            ids = shard * a.layout.shard_rows + first + np.flatnonzero(comparable[first:end])
            _compare(difference, a, b, ids, equal_bytes)
        report(end - first)
    a.close()
    b.close()
    return difference


def _compare(
    difference: ShardDifference, a: Column, b: Column, ids: NDArray[np.int64], equal_bytes: bool
) -> None:
    """Adds what differs in some rows that have values in both columns."""
    if a.layout.ragged:
        equal = a.lengths(ids) == b.lengths(ids)
        difference.lengths += (ids[~equal] % a.layout.shard_rows).tolist()
        ids = ids[equal]
    if equal_bytes:
        ids = ids[a.checksums(ids) != b.checksums(ids)]
    for start in range(0, len(ids), GROUP):
        part = ids[start : start + GROUP]
        x, y = _values(a, part), _values(b, part)
        gap = x - y
        difference.largest = max(difference.largest, float(np.abs(gap).max(initial=0.0)))
        difference.square += float(np.square(gap).sum())
        difference.of += float(np.square(y).sum())
        units = a.lengths(part) if a.layout.ragged else np.ones(len(part), np.int64)
        changed = np.unique(
            np.repeat(np.arange(len(part)), units)[(gap != 0).reshape(len(gap), -1).any(1)]
        )
        difference.rows += ((part if equal_bytes else part[changed]) % a.layout.shard_rows).tolist()


def _values(column: Column, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns stored values as numbers."""
    values = column.decoded(column.read(ids))
    return (to_floats(values) if values.dtype == np.uint16 else values).astype(np.float64)


def _first(rows: list[int]) -> str:
    return spans(rows[:SHOWN]) + (" first" if len(rows) > SHOWN else "")


def lines_of(difference: Difference, a: str, b: str) -> list[str]:
    """Returns what `diff` prints; no more than some dozens of lines, however much differs."""
    lines = [f"stored otherwise: {line}" for line in difference.stored[:SHOWN]]
    lines += [f"{line:.300}" for line in difference.fields[: 3 * SHOWN]]
    if len(difference.fields) > 3 * SHOWN:
        lines.append(f"... and {len(difference.fields) - 3 * SHOWN} more fields")
    if not difference.comparable:
        return [*lines, "rows cannot be compared: these columns have other shapes or shards"]
    for shard in difference.shards[:SHOWN]:
        notes = list(shard.notes)
        if shard.lengths:
            notes.append(
                f"{counted(len(shard.lengths), 'row')} of other length, {_first(shard.lengths)}"
            )
        if shard.rows:
            notes.append(f"{counted(len(shard.rows), 'row')} of other values, {_first(shard.rows)}")
        lines.append(f"shard {shard.shard}: " + "; ".join(notes))
    if len(difference.shards) > SHOWN:
        lines.append(f"... and {len(difference.shards) - SHOWN} more shards")
    if difference.members:
        lines.append(
            f"shards {spans(difference.members)}: made of other captions or pictures, as the tars were "
            "then"
        )
    if rows := sum(len(s.rows) for s in difference.shards):
        largest = max(s.largest for s in difference.shards)
        lines.append(
            f"values: {rows:,} rows differ, by at most {largest:.6g}; relative error "
            f"{difference.relative:.3g} (L2, over these rows)"
        )
    if not difference:
        lines.append(
            f"{a} and {b} have the same content by their commits; `verify` looks whether the data do"
        )
    return lines


def run_diff(args: argparse.Namespace) -> int:
    """`python -m shards diff`: 0 if the content is the same, else 1."""
    with Bar("diff", unit="rows") as bar:
        difference = diff(args.a, args.b, args.processes, bar)
    print("\n".join(lines_of(difference, args.a, args.b)))
    return 1 if difference else 0
