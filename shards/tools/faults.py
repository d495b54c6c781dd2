"""What can be damaged in a column, which errors say so, and which objects a shard must have."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..column.commits import Commit
from ..column.tar_object import tar_name
from ..errors import FormatVersion, ShardsError, StoreError
from ..format.atomic import Json
from ..format.layout import ZARR_ROWS, ColumnSpec, Status

SMALL = ("lengths", "status", "crc")  # arrays with a value a row
SPANS = 40  # runs that a message names

# what the disk says of bytes that it has lost; other errors say nothing of the object
LOST = {
    errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """Something of a column that is damaged.

    `kind`: "column", "metadata", "commit", "failure", "complete", "valid" (bits), "object" (missing,
    cut off or changed), "rows" (do not fit their checksums), "digest" (of up to 1,024 rows), "source"
    or "index" (beside the column), "members" (the tar's are not those that were encoded), "tar"
    (there is none). `object` is a name below the column, `rows` are rows of `shard`.
    """

    kind: str
    message: str
    shard: int | None = None
    rows: tuple[int, ...] = ()
    object: str | None = None

    def __str__(self) -> str:
        return self.message

    def record(self, column: str) -> Json:
        """Returns a line of JSON; rows as runs of (first, count)."""
        return {**asdict(self), "column": column, "rows": [list(run) for run in runs_of(self.rows)]}


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Returns ascending numbers as runs of (first, count)."""
    numbers = np.array(rows, np.int64)
    cuts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 2) != 1)
    counts = np.diff(np.append(cuts, len(numbers)))
    return [(int(numbers[a]), int(n)) for a, n in zip(cuts, counts, strict=True)]


def spans(rows: Sequence[int]) -> str:
    """Returns ascending numbers for a message: `[1, 10, 20..31]`."""
    parts = [f"{a}" if n == 1 else f"{a}..{a + n - 1}" for a, n in runs_of(rows)]
    rest = [f"and {len(parts) - SPANS} more runs"] if len(parts) > SPANS else []
    return f"[{', '.join(parts[:SPANS] + rest)}]"


def damage_message_or_raise(error: Exception) -> str:
    """Returns what an error says of an object, or raises it again where it says nothing: a network
    that is down, rights or memory that are lacking, or a record of a version that this program does
    not know, are no damage, and nothing must be put aside for them.
    """
    if isinstance(error, StoreError) or (isinstance(error, FormatVersion) and error.sound):
        raise error
    if isinstance(error, ShardsError) or not isinstance(error, OSError) or error.errno in LOST:
        return str(error)
    raise error


def objects_of(spec: ColumnSpec, shard: int, rows: int) -> tuple[set[str], set[str]]:
    """Returns the names of the objects that a shard of so many rows must have, and may have."""
    arrays, layout = spec.arrays(), spec.layout
    must = {f"{name}/{arrays[name].key(shard)}" for name in SMALL if rows and name in arrays}
    if "empty" in arrays:
        must.add(f"empty/{arrays['empty'].key(0)}")
    if layout.backend == "webdataset":
        return must | {tar_name(shard)}, set()
    first = shard * layout.blocks_per_shard
    numbers = range(first, first + -(-rows // ZARR_ROWS))
    values = {f"{layout.kind}/{arrays[layout.kind].key(number)}" for number in numbers}
    return (must, values) if layout.ragged else (must | values, set())


def commit_error(spec: ColumnSpec, commit: Commit) -> str:
    """Returns why a commit record, though its digest fits, cannot be of this column; empty if it can.

    A record is data: names in it are compared with those that the layout gives, never followed.
    """
    names = {name for name, _, _ in commit.objects}
    if not 0 <= commit.rows <= spec.layout.shard_rows:
        return f"{commit.rows} rows in a shard of at most {spec.layout.shard_rows}"
    if len(commit.blocks) != -(-commit.rows // ZARR_ROWS):
        return f"{len(commit.blocks)} logical digests for {commit.rows} rows"
    end = 0
    for first, count, status in commit.not_ok:
        if first < end or count < 1 or first + count > commit.rows or status not in list(Status):
            return f"a run of {count} rows of status {status} from row {first} on"
        end = first + count
    must, may = objects_of(spec, commit.shard, commit.rows)
    strangers = sorted(names - must - may)[:1] + sorted(must - names)[:1]
    if strangers or len(names) != len(commit.objects):
        return f"it names other objects than shard {commit.shard} has ({', '.join(strangers)})"
    return ""
