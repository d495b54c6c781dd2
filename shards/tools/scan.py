"""One pass over a shard: every byte of its objects is read once, and checked on the way against
sha256, row checksums and logical digests.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import Commit, commit_name
from ..column.source import index_name
from ..column.tar_object import first_byte, starts, tar_name
from ..column.zarr_object import crc32c, decode_into, read_elements, read_index
from ..errors import CorruptColumn, FormatVersion, ShardsError, StoreError
from ..format.atomic import Json, sha256
from ..format.layout import HAS_VALUES, ZARR_ROWS, ArraySpec, ColumnSpec, Status
from ..store.base import Store
from .parallel import Report

PIECE = 1 << 24  # bytes read at once
HELD_BYTES = 1 << 32  # more of an object is never held in memory
PACKED_MORE = 64  # bytes by which a codec may lengthen a chunk that it cannot pack
SMALL = ("lengths", "status", "crc")

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something of a column that is damaged.

    `kind`: "column", "metadata", "commit", "failure", "complete", "valid" (bits), "object" (missing,
    cut off or changed), "rows" (do not fit their checksums), "digest" (of up to 1,024 rows), "source"
    or "index" (beside the column), "members" (the tar's are not those that were encoded). `object`
    is a name below the column, `rows` are rows of `shard`.
    """

    kind: str
    message: str
    shard: int | None = None
    rows: tuple[int, ...] = ()
    object: str | None = None

    def __str__(self) -> str:
        return self.message

    def record(self, column: str) -> Json:
        """As a line of JSON has it; rows as runs of (first, count)."""
        return {**asdict(self), "column": column, "rows": [list(run) for run in runs_of(self.rows)]}


def runs_of(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs of (first, count)."""
    numbers = np.array(rows, np.int64)
    cuts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 2) != 1)
    counts = np.diff(np.append(cuts, len(numbers)))
    return [(int(numbers[a]), int(n)) for a, n in zip(cuts, counts, strict=True)]


def spans(rows: Sequence[int]) -> str:
    """Ascending numbers for a message: `[1, 10, 20..31]`."""
    parts = [f"{a}" if n == 1 else f"{a}..{a + n - 1}" for a, n in runs_of(rows)]
    more = [f"and {len(parts) - 40} more runs"] if len(parts) > 40 else []
    return f"[{', '.join(parts[:40] + more)}]"


# what the disk says of bytes that it has lost; other errors say nothing of the object
LOST = {
    errno.EIO,
    errno.EBADMSG,
    errno.EUCLEAN,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
}


def damage_message_or_raise(error: Exception) -> str:
    """What an error says of an object. It is raised again where it says nothing: a network that is
    down, rights or memory that are lacking, or a record of a version that this program does not
    know, are no damage, and nothing must be put aside for them.
    """
    if isinstance(error, StoreError) or (isinstance(error, FormatVersion) and error.sound):
        raise error
    if (
        isinstance(error, OSError)
        and not isinstance(error, ShardsError)
        and error.errno not in LOST
    ):
        raise error
    return str(error)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be read through."""

    store: Store
    spec: ColumnSpec
    commit: Commit
    index: bool  # whether the source stands beside, so that its index is checked too


@dataclass(frozen=True, slots=True)
class ShardScan:
    """What a pass over a shard found: faults, and the logical digest of each block as recomputed
    (None where its rows could not be read).
    """

    faults: list[Fault]
    blocks: tuple[str | None, ...]


class HashingReader:
    """One pass over an object from its first byte to its last, hashed on the way.

    What cannot be read (the object is missing, ends early, or its disk fails) is left out; `error`
    then tells why.
    """

    def __init__(self, store: Store, name: str, report: Report, most: int) -> None:
        """`most` bytes are read: what is longer is not what was committed, and may have no end."""
        self.store, self.name, self.report, self.most = store, name, report, most
        self.size, self.at, self.error = 0, 0, ""
        self.tail = b""
        self._sha = hashlib.sha256()
        self._handle: Any = None
        try:
            self._handle = store.open(name, cached=False)
            self.size = store.length(self._handle, store.at(name))
        except FileNotFoundError:
            self.error = "missing"
        except (OSError, CorruptColumn) as error:
            self.error = f"cannot be opened ({damage_message_or_raise(error)})"

    def take(self, view: memoryview) -> int:
        """Fill a flat buffer with the next bytes; how many came."""
        filled = 0
        while self._handle is not None and not self.error and filled < len(view):
            try:
                got = self.store.preadv(self._handle, [view[filled:]], self.at)
            except OSError as error:
                self.error = f"cannot be read at byte {self.at} ({damage_message_or_raise(error)})"
                break
            if not got:
                break
            self._sha.update(view[filled : filled + got])
            filled, self.at = filled + got, self.at + got
            self.report(got)
        return filled

    def finish(self, buffer: memoryview, tail: int = 0) -> str:
        """Read what is left; the sha256 of all. The last `tail` bytes are kept."""
        kept = bytearray()
        while got := self.take(buffer[: max(0, min(len(buffer), self.most - self.at))]):
            kept += buffer[max(0, got - tail) : got]
            del kept[: max(0, len(kept) - tail)]
        self.tail = bytes(kept)
        return self._sha.hexdigest()

    def whole(self) -> bytes:
        """All of a small object, read at once."""
        data = bytearray(self.size)
        return bytes(data[: self.take(memoryview(data))])

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def close(self) -> None:
        if self._handle is not None:
            self.store.close(self._handle)
            self._handle = None


class InMemoryObject:
    """An object that is in memory, or its last bytes, in place of a store and an open handle."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data, self.size = data, len(data) if size is None else size

    def length(self, handle: Any, name: str) -> int:
        return self.size

    def preadv(self, handle: Any, buffers: Sequence[memoryview], offset: int) -> int:
        start = offset - (self.size - len(self.data))
        part = self.data[start : start + len(buffers[0])] if start >= 0 else b""
        memoryview(buffers[0]).cast("B")[: len(part)] = part
        return len(part)


def objects_of(spec: ColumnSpec, shard: int, rows: int) -> tuple[set[str], set[str]]:
    """Names of the objects that a shard of so many rows must have, and those that it may have."""
    arrays, layout = spec.arrays(), spec.layout
    must = {f"{name}/{arrays[name].key(shard)}" for name in SMALL if rows and name in arrays}
    if "empty" in arrays:
        must.add(f"empty/{arrays['empty'].key(0)}")
    if layout.backend == "webdataset":
        return must | {tar_name(shard)}, set()
    numbers = [shard * layout.blocks_per_shard + i for i in range(-(-rows // ZARR_ROWS))]
    values = {f"{layout.kind}/{arrays[layout.kind].key(number)}" for number in numbers}
    return (must, values) if layout.ragged else (must | values, set())


def commit_error(spec: ColumnSpec, commit: Commit) -> str:
    """Why a commit record, though its digest fits, cannot be of this column; empty if it can.

    A record is data: names in it are compared with those that the layout gives, never followed.
    """
    named = {name for name, _, _ in commit.objects}
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
    wrong = sorted(named - must - may)[:1] + sorted(must - named)[:1]
    if wrong or len(named) != len(commit.objects):
        return f"it names other objects than shard {commit.shard} has ({', '.join(wrong)})"
    return ""


def scan_shard(task: ShardTask, report: Report) -> ShardScan:
    """Read a committed shard through and check all of it."""
    scan = Scan(task, report)
    scan.run()
    return ShardScan(scan.faults, tuple(scan.blocks))


class Scan:
    """The pass over one shard. At most one object is in memory, and that only where it is packed by
    a codec; else 16 MB of it, or one row.
    """

    def __init__(self, task: ShardTask, report: Report) -> None:
        self.store, self.spec, self.commit = task.store, task.spec, task.commit
        self.layout, self.arrays = task.spec.layout, task.spec.arrays()
        self.report, self.index = report, task.index
        self.named = {name: (size, digest) for name, size, digest in task.commit.objects}
        self.faults: list[Fault] = []
        self.bad: set[str] = set()  # objects
        self.blocks: list[str | None] = [None] * len(task.commit.blocks)
        self.status = task.commit.status()
        largest = max((size for size, _ in self.named.values()), default=0)
        self.buffer = memoryview(bytearray(min(PIECE, largest + 1)))
        self.lengths: Rows | None = None
        self.crc: NDArray[np.uint32] | None = None

    def run(self) -> None:
        small = {name: self._small(name) for name in SMALL if name in self.arrays}
        self.crc = small["crc"]
        stored = small["status"]
        if stored is not None and not self._is_bad("status") and (stored != self.status).any():
            rows = np.flatnonzero(stored != self.status).tolist()
            self._fault(
                "object", f"{self.store.at(self._path('status'))}: shard {self.commit.shard}, rows "
                f"{spans(rows)} have other statuses than the commit says", self._path("status"), rows,
            )  # fmt: skip
        count = self.commit.rows
        if not self.layout.ragged:
            self.lengths = np.ones(count, np.int64)
        elif not self._is_bad("lengths") and small["lengths"] is not None:
            lengths = small["lengths"].astype(np.int64)
            if lengths.max(initial=0) <= self.layout.row_shape[0]:
                self.lengths = lengths
            else:
                path = self._path("lengths")
                self._fault(
                    "object", f"{self.store.at(path)}: a row of {lengths.max()} tokens", path
                )
        if self.layout.backend == "webdataset":
            self._tar()
        else:
            for block in range(len(self.commit.blocks)):
                self._zarr(block)
        if self.index:
            self._index()

    # Objects --------------------------------------------------------------------------------------

    def _path(self, array: str) -> str:
        return f"{array}/{self.arrays[array].key(self.commit.shard)}"

    def _is_bad(self, array: str) -> bool:
        return self._path(array) in self.bad

    def _fault(
        self, kind: str, message: str, name: str | None = None, rows: Sequence[int] = ()
    ) -> None:
        self.faults.append(Fault(kind, message, self.commit.shard, tuple(rows), name))
        if kind == "object" and name is not None:
            self.bad.add(name)

    def _settle(self, done: HashingReader, rows: Sequence[int] = ()) -> None:
        """Compare an object that was read to its end with what the commit says of it."""
        size, digest = self.named[done.name]
        file, of = self.store.at(done.name), f" (rows {spans(rows)})" if len(rows) else ""
        if done.error == "missing":
            why = f"{file}: missing, though shard {self.commit.shard} is committed{of}"
        elif done.error:
            why = f"{file}: {done.error}; shard {self.commit.shard}{of}"
        elif done.size != size or done.sha256 != digest:
            why = (
                f"{file}: {done.size} bytes that are not the {size} of sha256 {digest[:12]}... "
                f"which the commit of shard {self.commit.shard} names{of}"
            )
        else:
            return
        self._fault("object", why, done.name, rows)

    def _most(self, name: str, spec: ArraySpec) -> int:
        """Bytes that an object can have: what was committed, and what the layout has room for."""
        room = spec.chunks * (spec.chunk_bytes + PACKED_MORE * (spec.codec is not None) + 16) + 4
        return min(self.named[name][0], room)

    def _whole(self, done: HashingReader) -> bytes:
        """All of an object at once, if it is as large as it was committed, and so no surprise."""
        return done.whole() if done.size <= min(done.most, HELD_BYTES) else b""

    def _small(self, array: str) -> NDArray[Any] | None:
        """One of the arrays with a value a row; None if it cannot be made out."""
        if not self.commit.rows:
            return None
        path, spec = self._path(array), self.arrays[array]
        done = HashingReader(self.store, path, self.report, self._most(path, spec))
        data = self._whole(done)
        done.finish(self.buffer)
        done.close()
        self._settle(done)
        held: Any = InMemoryObject(data)
        try:
            read_index(held, None, spec, self.store.at(path))
            return read_elements(held, None, spec, 0, self.commit.rows, self.store.at(path))
        except CorruptColumn as error:
            if path not in self.bad:
                self._fault("object", str(error), path)
            return None

    def _zarr(self, block: int) -> None:
        """The values of one block, in an object of their own."""
        spec = self.arrays[self.layout.kind]
        first = block * ZARR_ROWS
        rows = np.arange(first, min(first + ZARR_ROWS, self.commit.rows))
        number = self.commit.shard * self.layout.blocks_per_shard + block
        name = f"{self.layout.kind}/{spec.key(number)}"
        if name not in self.named:  # no row has a token
            if self.lengths is None:
                return
            if self.lengths[rows].any():
                why = (
                    f"{self.store.at(name)}: rows {spans(rows.tolist())} have tokens, but no object"
                )
                self._fault("object", why, name, rows.tolist())
            checks = BlockChecks(self, rows)
            for _ in rows:
                checks.row(self.layout.blank(0))
            self._conclude(checks, name)
            return
        done = HashingReader(self.store, name, self.report, self._most(name, spec))
        try:
            if self.lengths is None:
                done.finish(self.buffer)
                self._settle(done, rows.tolist())
                return
            units = self.lengths[rows]
            checks = BlockChecks(self, rows)
            tail = 16 * spec.chunks + 4
            if self.layout.codec:
                data = self._whole(done)
                done.finish(self.buffer)
                self._packed(checks, data, spec, units, name)
                held: Any = InMemoryObject(data)
            else:
                start = np.cumsum(units) - units
                self._plain(checks, done, start * self.layout.unit_bytes, units)
                done.finish(self.buffer, tail)
                held = InMemoryObject(done.tail, done.size)
            self._settle(done, rows.tolist())
            if name not in self.bad:
                try:
                    edges = read_index(held, None, spec, self.store.at(name))
                    if (len(edges) - 1) * spec.chunk_len < int(units.sum()):
                        raise CorruptColumn(
                            f"{self.store.at(name)}: fewer values than its rows have"
                        )
                except CorruptColumn as error:
                    self._fault("object", str(error), name, rows.tolist())
            self._conclude(checks, name)
        finally:
            done.close()

    def _tar(self) -> None:
        """The values of all blocks, in one tar."""
        name = tar_name(self.commit.shard)
        done = HashingReader(self.store, name, self.report, self.named[name][0])
        try:
            pending = []
            if self.lengths is not None:
                there = np.isin(self.status, HAS_VALUES)
                units = self.lengths if self.layout.ragged else np.ones(self.commit.rows, np.int64)
                place = first_byte(starts(self.layout, units, there))
                place = np.where(there, place, -1)
                for first in range(0, self.commit.rows, ZARR_ROWS):
                    rows = np.arange(first, min(first + ZARR_ROWS, self.commit.rows))
                    checks = BlockChecks(self, rows)
                    self._plain(checks, done, place[rows], units[rows])
                    pending.append(checks)
            done.finish(self.buffer)
            self._settle(done)
            for checks in pending:
                self._conclude(checks, name)
        finally:
            done.close()

    def _plain(self, checks: BlockChecks, done: HashingReader, start: Rows, units: Rows) -> None:
        """Rows that stand in the object as they are, at these bytes (-1: nowhere, so blank)."""
        size = units * self.layout.unit_bytes
        end, i = np.where(start < 0, 0, start + size), 0
        while i < len(start):
            if start[i] < 0 or end[i] > done.size or done.error:
                checks.row(self.layout.blank(int(units[i])) if start[i] < 0 else None)
                i += 1
                continue
            here, most = done.at, min(done.at + len(self.buffer), done.size)
            stop = i + max(int((end[i:] <= most).cumprod().sum()), 1)  # one row, however large
            last = int(end[i:stop].max())
            if last - here > len(self.buffer):
                self.buffer = memoryview(bytearray(last - here))
            view = self.buffer[: last - here]
            got = done.take(view)
            for s, e, n in zip(
                start[i:stop].tolist(), end[i:stop].tolist(), units[i:stop].tolist(), strict=True
            ):
                if s < 0:
                    checks.row(self.layout.blank(n))
                else:
                    checks.row(view[s - here : e - here] if e - here <= got else None)
            i = stop

    def _packed(
        self, checks: BlockChecks, data: bytes, spec: ArraySpec, units: Rows, name: str
    ) -> None:
        """Rows that a codec packed."""
        held: Any = InMemoryObject(data)
        full = self.store.at(name)
        try:
            edges = read_index(held, None, spec, full)
        except CorruptColumn:
            edges = None
        at = 0
        for count in units.tolist():
            row = np.empty((count, *self.layout.unit_shape), self.layout.dtype)
            try:
                if edges is None:
                    raise CorruptColumn(full)
                decode_into(held, None, spec, edges, at, row, full)
                checks.row(row)
            except CorruptColumn:
                checks.row(None)
            at += count

    def _conclude(self, checks: BlockChecks, name: str) -> None:
        """Faults of a block's rows, once it is known whether its object is sound."""
        block, shard = int(checks.rows[0]) // ZARR_ROWS, self.commit.shard
        crc = self._path("crc")
        where = name if name in self.bad or crc not in self.bad else crc
        if wrong := checks.wrong():
            self._fault(
                "rows",
                f"{self.store.url}: shard {shard}, rows {spans(wrong)} do not fit their checksums "
                f"({where})",
                where,
                wrong,
            )
        if checks.endless:
            self._fault(
                "rows",
                f"{self.store.url}: shard {shard}, rows {spans(checks.endless)} hold infinities or "
                f"NaNs, though their status says that they have values ({name})",
                name,
                checks.endless,
            )
        self.blocks[block] = checks.digest(self.lengths if self.layout.ragged else None)
        if self.blocks[block] != self.commit.blocks[block]:
            first, last = int(checks.rows[0]), int(checks.rows[-1])
            self._fault(
                "digest",
                f"{self.store.url}: shard {shard}, rows {first}..{last} do not fit the logical "
                "digest in the commit",
                name,
                checks.rows.tolist(),
            )

    def _index(self) -> None:
        """The source's index of this tar, if it stands."""
        folder, name = self.store.parent, index_name(self.commit.shard)
        try:
            data = folder.read(name)
        except FileNotFoundError:
            return
        except (OSError, CorruptColumn) as error:
            data = damage_message_or_raise(error).encode()
        if sha256(data) != self.commit.index:
            self._fault(
                "index",
                f"{folder.at(name)}: not the index that {commit_name(self.commit.shard)} of "
                f"{self.store.url} was made from. If another column of this source says the same, "
                "delete it: the next encode of this tar writes it again",
            )


class BlockChecks:
    """Checksums and digest of the rows of one block, taken row by row."""

    def __init__(self, scan: Scan, rows: Rows) -> None:
        self.scan, self.rows = scan, rows
        self.found: list[int | None] = []
        self.endless: list[int] = []  # rows said to have values, which are not finite
        self._sha = hashlib.sha256()

    def row(self, values: Any) -> None:
        """The next row's values; None if they cannot be read."""
        row, layout = int(self.rows[len(self.found)]), self.scan.layout
        if values is not None and self.scan.status[row] in HAS_VALUES:
            words = np.frombuffer(values, layout.dtype).reshape(-1, *layout.unit_shape)
            if not layout.finite(words):
                self.endless.append(row)
        self.found.append(None if values is None else crc32c(values))
        if values is not None and memoryview(values).nbytes:
            self._sha.update(values)

    def wrong(self) -> list[int]:
        """Rows that cannot be read or do not fit their checksums."""
        stored = self.scan.crc
        return [
            int(row)
            for row, found in zip(self.rows, self.found, strict=True)
            if found is None or (stored is not None and found != stored[row])
        ]

    def digest(self, lengths: Rows | None) -> str | None:
        """The logical digest; see `writer.block_digest`. None if a row is lacking."""
        if None in self.found:
            return None
        if lengths is not None:
            self._sha.update(lengths[self.rows].astype("<u2").data)
        self._sha.update(np.ascontiguousarray(self.scan.status[self.rows]).data)
        return self._sha.hexdigest()
