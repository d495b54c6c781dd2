"""In what two columns differ: identity, storage, rows, statuses and values, whatever they are
stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import Commit, own_commit
from ..column.members import member_read
from ..console import Bar
from ..format.int8 import to_floats
from ..format.layout import HAS_VALUES, ZARR_ROWS, Status, differences
from ..read.column import Column
from ..store.base import Place, Store
from .parallel import Report, processes_for, silent, spread
from .scan import spans

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
        """L2 norm of the differences over that of the values, over the rows that differ."""
        of = sum(s.of for s in self.shards)
        return float(np.sqrt(sum(s.square for s in self.shards) / of)) if of else 0.0


@dataclass(frozen=True, slots=True)
class DiffTask:
    """A shard of both columns; None where it is not committed."""

    a: Column
    b: Column
    shard: int


def diff(
    a: Place,
    b: Place,
    processes: int | None = None,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> Difference:
    """Compare two columns by what is committed of each.

    Logical digests come first: only blocks whose digests differ are read, unless one column is
    quantised and the other is not, where all are.
    """
    one, two = (Column.open(url, partial=True) for url in (a, b))
    found = Difference()
    first, second = one.spec.record(), two.spec.record()
    for part in ("identity", "norm", "empty_tokens"):
        found.fields += differences(first[part], second[part], part)
    for line in differences(asdict(one.layout), asdict(two.layout), "layout"):
        storage = line.split(":")[0] in ("layout.backend", "layout.codec")
        (found.stored if storage else found.fields).append(line)
    found.fields += differences(_scales(one), _scales(two), "quantisation")
    same = ("kind", "row_shape", "shards", "shard_rows")
    found.comparable = all(getattr(one.layout, k) == getattr(two.layout, k) for k in same)
    if not found.comparable:
        return found
    has_empty = one.spec.empty_tokens and one.spec.empty_tokens == two.spec.empty_tokens
    if has_empty and not np.array_equal(one.empty(), two.empty()):
        found.fields.append("empty caption: other tokens")
    alike = one.layout.element == two.layout.element and _scales(one) == _scales(two)
    pairs = zip(one.snapshot.content, two.snapshot.content, strict=True)
    shards = [s for s, (x, y) in enumerate(pairs) if x != y or (x and not alike)]
    suffix = member_read(one.spec.identity)
    if suffix is not None and suffix == member_read(two.spec.identity):
        found.members = _other_members(one, two, suffix)
    tasks = [DiffTask(_slim(one), _slim(two), shard) for shard in shards]
    size = sum(one.snapshot.rows[s] for s in shards)
    begin(size)
    count = processes_for(processes, len(tasks), size * one.layout.unit_bytes)
    results = [result for _, result in spread(diff_shard, tasks, count, report)]
    found.shards = sorted((r for r in results if r), key=lambda r: r.shard)
    return found


def _other_members(a: Column, b: Column, suffix: str) -> list[int]:
    """Shards that were made of other members of the tar, where both commits say of which."""
    first, second = a.members(suffix), b.members(suffix)
    return [s for s in sorted(first.keys() & second.keys()) if first[s] != second[s]]


def _scales(column: Column) -> Any:
    return column.spec.quantisation and column.spec.quantisation["channel"]


def _slim(column: Column) -> Column:
    """Without the valid-row bits, which another process does not need."""
    snapshot = replace(column.snapshot, valid_mask=np.zeros(0, np.uint32))
    return Column(column.store, column.spec, column.digest, snapshot)


def diff_shard(task: DiffTask, report: Report) -> ShardDifference:
    """How one shard differs: records first, then digests, then checksums, then values."""
    a, b, shard = task.a, task.b, task.shard
    found = ShardDifference(shard)
    held = [c.snapshot.content[shard] is not None for c in (a, b)]
    if not all(held):
        found.notes.append(f"committed in {a.path if held[0] else b.path} only")
        return found
    x, y = (_commit(c.store, c.digest, shard) for c in (a, b))
    if x.rows != y.rows:
        found.notes.append(f"{x.rows} rows and {y.rows}")
    if x.index != y.index:
        found.notes.append("made from other readings of the tar")
    rows = min(x.rows, y.rows)
    others = np.flatnonzero(x.status()[:rows] != y.status()[:rows])
    if len(others):
        one, two = (Status(int(c.status()[others[0]])).name.lower() for c in (x, y))
        found.notes.append(
            f"{len(others)} rows of other status, {spans(others[:SHOWN].tolist())} first: {one} and "
            f"{two}"
        )
    alike = a.layout.element == b.layout.element and _scales(a) == _scales(b)
    there = np.isin(x.status()[:rows], HAS_VALUES) & np.isin(y.status()[:rows], HAS_VALUES)
    for block in range(-(-rows // ZARR_ROWS)):
        first, end = block * ZARR_ROWS, min((block + 1) * ZARR_ROWS, rows)
        if not alike or x.blocks[block] != y.blocks[block]:
            ids = shard * a.layout.shard_rows + first + np.flatnonzero(there[first:end])
            _compare(found, a, b, ids, alike)
        report(end - first)
    a.close()
    b.close()
    return found


def _commit(store: Store, digest: str, shard: int) -> Commit:
    return own_commit(store, digest, shard)


def _compare(
    found: ShardDifference, a: Column, b: Column, ids: NDArray[np.int64], alike: bool
) -> None:
    """Add what differs in some rows that have values in both columns."""
    if a.layout.ragged:
        same = a.lengths(ids) == b.lengths(ids)
        found.lengths += (ids[~same] % a.layout.shard_rows).tolist()
        ids = ids[same]
    if alike:
        ids = ids[a.checksums(ids) != b.checksums(ids)]
    for start in range(0, len(ids), GROUP):
        part = ids[start : start + GROUP]
        x, y = _values(a, part), _values(b, part)
        gap = x - y
        found.largest = max(found.largest, float(np.abs(gap).max(initial=0.0)))
        found.square += float(np.square(gap).sum())
        found.of += float(np.square(y).sum())
        units = a.lengths(part) if a.layout.ragged else np.ones(len(part), np.int64)
        changed = np.unique(
            np.repeat(np.arange(len(part)), units)[(gap != 0).reshape(len(gap), -1).any(1)]
        )
        found.rows += ((part if alike else part[changed]) % a.layout.shard_rows).tolist()


def _values(column: Column, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Stored values as numbers."""
    words = column.decoded(column.read(ids))
    tokens = column.layout.element in ("bfloat16", "int8")
    return (to_floats(words) if tokens else words).astype(np.float64)


def first(rows: list[int]) -> str:
    """The first of some rows."""
    return spans(rows[:SHOWN]) + (" first" if len(rows) > SHOWN else "")


def lines_of(found: Difference, a: str, b: str) -> list[str]:
    """What `diff` prints; no more than some dozens of lines, however much differs."""
    lines = [f"stored otherwise: {line}" for line in found.stored[:SHOWN]]
    lines += [f"{line:.300}" for line in found.fields[: 3 * SHOWN]]
    if len(found.fields) > 3 * SHOWN:
        lines.append(f"... and {len(found.fields) - 3 * SHOWN} more fields")
    if not found.comparable:
        return [*lines, "rows cannot be compared: these columns have other shapes or shards"]
    for shard in found.shards[:SHOWN]:
        notes = list(shard.notes)
        if shard.lengths:
            notes.append(f"{len(shard.lengths)} rows of other length, {first(shard.lengths)}")
        if shard.rows:
            notes.append(f"{len(shard.rows)} rows of other values, {first(shard.rows)}")
        lines.append(f"shard {shard.shard}: " + "; ".join(notes))
    if len(found.shards) > SHOWN:
        lines.append(f"... and {len(found.shards) - SHOWN} more shards")
    if found.members:
        lines.append(
            f"shards {spans(found.members)}: made of other captions or pictures, as the tars were then"
        )
    rows = sum(len(s.rows) for s in found.shards)
    if rows:
        largest = max(s.largest for s in found.shards)
        lines.append(
            f"values: {rows:,} rows differ, by at most {largest:.6g}; relative error "
            f"{found.relative:.3g} (L2, over these rows)"
        )
    if not found:
        lines.append(
            f"{a} and {b} have the same content by their commits; `verify` looks whether the data do"
        )
    return lines


def run_diff(a: str, b: str, processes: int | None) -> int:
    """`python -m shards diff`: 0 if the content is the same, else 1."""
    with Bar("diff", None, "bytes") as shown:
        found = diff(a, b, processes, shown.begin, shown.advance)
    print("\n".join(lines_of(found, a, b)))
    return 1 if found else 0
