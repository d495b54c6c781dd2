"""One pass over a shard: every byte of its objects is read once, and checked on the way against
sha256, row checksums and logical digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.checksum import crc32c
from ..column.commits import Commit, commit_name
from ..column.source import index_name
from ..column.tar_object import first_byte, starts, tar_name
from ..column.zarr_object import decode_into, read_elements, read_index
from ..errors import CorruptColumn
from ..format.atomic import sha256
from ..format.layout import HAS_VALUES, ZARR_ROWS, ArraySpec, ColumnSpec
from ..store.base import Store
from .faults import SMALL, Fault, damage_message_or_raise, spans
from .parallel import Report

PIECE = 1 << 24  # bytes read at once
HELD_BYTES = 1 << 32  # more of an object is never held in memory
PACKED_MORE = 64  # bytes by which a codec may lengthen a chunk that it cannot pack

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be read through; `index`: its source is beside the column, whose index is checked."""

    store: Store
    spec: ColumnSpec
    commit: Commit
    index: bool


@dataclass(frozen=True, slots=True)
class ShardScan:
    """The faults of a shard, and the logical digest of each block as recomputed (None where its rows
    could not be read).
    """

    faults: list[Fault]
    blocks: tuple[str | None, ...]


class HashingReader:
    """One pass over an object from its first byte to its last, hashed on the way; 16 MB of it are in
    memory, or what one `take` asks for.

    What cannot be read (the object is missing, ends early, or its disk fails) is left out; `error`
    then says why.
    """

    def __init__(self, store: Store, name: str, report: Report, most: int) -> None:
        """`most` bytes are read: what is longer is not what was committed, and may have no end."""
        self.store, self.name, self.report, self.most = store, name, report, most
        self.size, self.error = 0, ""
        self._sha = hashlib.sha256()
        self._buffer = memoryview(b"")  # bytes `_start` to `_end` of the object
        self._start = self._end = 0
        self._handle: Any = None
        try:
            self._handle = store.open(name, cached=False)
            self.size = store.length(self._handle, store.at(name))
        except FileNotFoundError:
            self.error = "missing"
        except (OSError, CorruptColumn) as error:
            self.error = f"cannot be opened ({damage_message_or_raise(error)})"

    def _read(self, view: memoryview) -> int:
        """Fills a flat buffer with the next bytes; returns how many there were."""
        filled = 0
        while self._handle is not None and not self.error and filled < len(view):
            try:
                count = self.store.preadv(self._handle, [view[filled:]], self._end)
            except OSError as error:
                why = damage_message_or_raise(error)
                self.error = f"cannot be read at byte {self._end} ({why})"
                break
            if not count:
                break
            self._sha.update(view[filled : filled + count])
            filled, self._end = filled + count, self._end + count
            self.report(count)
        return filled

    def take(self, start: int, end: int) -> memoryview | None:
        """Returns these bytes, valid until the next call, or None if they cannot be read; `start`
        never goes back.
        """
        if end > self.size:
            return None
        if end > self._end:
            first = min(start, self._end)
            rest = bytes(self._buffer[first - self._start : self._end - self._start])
            size = min(max(PIECE, end - first), max(end, min(self.size, self.most)) - first)
            if len(self._buffer) < size:
                self._buffer = memoryview(bytearray(size))
            self._buffer[: len(rest)] = rest
            self._start = first
            self._read(self._buffer[len(rest) : size])
        if end > self._end:
            return None
        return self._buffer[start - self._start : end - self._start]

    def whole(self) -> memoryview:
        """Returns all of an object if it is as large as it was committed, and so no surprise."""
        data = self.take(0, self.size) if self.size <= min(self.most, HELD_BYTES) else None
        return memoryview(b"") if data is None else data

    def finish(self, tail: int = 0) -> bytes:
        """Reads what is left; returns the last `tail` bytes."""
        last = bytes(self._buffer[: self._end - self._start][-tail:]) if tail else b""
        while (left := self.most - self._end) > 0:
            piece = memoryview(bytearray(min(PIECE, left)))
            if not (count := self._read(piece)):
                break
            last = (last + bytes(piece[:count]))[-tail:] if tail else b""
        return last

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def __enter__(self) -> HashingReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self.store.close(self._handle)
            self._handle = None


class InMemoryObject:
    """An object that is in memory, or its last bytes, in place of a store and an open handle."""

    def __init__(self, data: bytes | memoryview, size: int | None = None) -> None:
        self.data, self.size = data, len(data) if size is None else size

    def length(self, handle: Any, name: str) -> int:
        return self.size

    def preadv(self, handle: Any, buffers: Sequence[memoryview], offset: int) -> int:
        start = offset - (self.size - len(self.data))
        part = self.data[start : start + len(buffers[0])] if start >= 0 else b""
        memoryview(buffers[0]).cast("B")[: len(part)] = part
        return len(part)

    read_apart = preadv


def scan_shard(task: ShardTask, report: Report) -> ShardScan:
    """Reads a committed shard through and checks all of it."""
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
        self.objects = {name: (size, digest) for name, size, digest in task.commit.objects}
        self.faults: list[Fault] = []
        self.bad: set[str] = set()  # objects
        self.blocks: list[str | None] = [None] * len(task.commit.blocks)
        self.status = task.commit.status()
        self.lengths: Rows | None = None  # tokens of each row; None if they cannot be read
        self.crc: NDArray[np.uint32] | None = None

    def run(self) -> None:
        rows = self.commit.rows
        small = {name: self._small(name) for name in SMALL if name in self.arrays}
        self.crc = small["crc"]
        status, path = small["status"], self._path("status")
        if status is not None and path not in self.bad and (status != self.status).any():
            rows_differing = np.flatnonzero(status != self.status).tolist()
            message = f"rows {spans(rows_differing)} have other statuses than the commit says"
            message = f"{self.store.at(path)}: shard {self.commit.shard}, {message}"
            self._fault("object", message, path, rows_differing)
        if not self.layout.ragged:
            self.lengths = np.ones(rows, np.int64)
        elif small["lengths"] is not None and (path := self._path("lengths")) not in self.bad:
            lengths = small["lengths"].astype(np.int64)
            if lengths.max(initial=0) <= self.layout.row_shape[0]:
                self.lengths = lengths
            else:
                message = f"{self.store.at(path)}: a row of {lengths.max()} tokens"
                self._fault("object", message, path)
        if self.layout.backend == "webdataset":
            self._tar()
        else:
            for block in range(len(self.commit.blocks)):
                self._zarr(self._block_rows(block))
        if self.index:
            self._index()

    # Objects --------------------------------------------------------------------------------------

    def _path(self, array: str) -> str:
        return f"{array}/{self.arrays[array].key(self.commit.shard)}"

    def _block_rows(self, block: int) -> Rows:
        return np.arange(block * ZARR_ROWS, min((block + 1) * ZARR_ROWS, self.commit.rows))

    def _fault(self, kind: str, message: str, name: str, rows: Sequence[int] = ()) -> None:
        self.faults.append(Fault(kind, message, self.commit.shard, tuple(rows), name))
        if kind == "object":
            self.bad.add(name)

    def _open(self, name: str, spec: ArraySpec | None = None) -> HashingReader:
        """Opens an object; of no array more is read than its layout has room for."""
        most, _ = self.objects[name]
        if spec is not None:
            chunk_bytes = spec.chunk_bytes + PACKED_MORE * (spec.codec is not None) + 16
            most = min(most, spec.chunks * chunk_bytes + 4)
        return HashingReader(self.store, name, self.report, most)

    def _compare(self, reader: HashingReader, rows: Sequence[int] = ()) -> None:
        """Compares an object that was read to its end with what the commit says of it."""
        size, digest = self.objects[reader.name]
        path, shard = self.store.at(reader.name), self.commit.shard
        of = f" (rows {spans(rows)})" if len(rows) else ""
        if reader.error == "missing":
            message = f"{path}: missing, though shard {shard} is committed{of}"
        elif reader.error:
            message = f"{path}: {reader.error}; shard {shard}{of}"
        elif reader.size != size or reader.sha256 != digest:
            message = (
                f"{path}: {reader.size} bytes that are not the {size} of sha256 {digest[:12]}... "
                f"which the commit of shard {shard} names{of}"
            )
        else:
            return
        self._fault("object", message, reader.name, rows)

    def _small(self, array: str) -> NDArray[Any] | None:
        """Returns an array with a value a row; None if it cannot be made out."""
        if not self.commit.rows:
            return None
        name, spec = self._path(array), self.arrays[array]
        with self._open(name, spec) as reader:
            data: Any = InMemoryObject(reader.whole())
            reader.finish()
        self._compare(reader)
        try:
            read_index(data, None, spec, self.store.at(name))
            return read_elements(data, None, spec, 0, self.commit.rows, self.store.at(name))
        except CorruptColumn as error:
            if name not in self.bad:
                self._fault("object", str(error), name)
            return None

    def _zarr(self, rows: Rows) -> None:
        """Checks the values of one block, which are an object of their own."""
        spec = self.arrays[self.layout.kind]
        number = self.commit.shard * self.layout.blocks_per_shard + int(rows[0]) // ZARR_ROWS
        name, numbers = f"{self.layout.kind}/{spec.key(number)}", rows.tolist()
        path = self.store.at(name)
        units = self.lengths[rows] if self.lengths is not None else None
        checks = BlockChecks(self, rows)
        if name not in self.objects:  # no row has a token
            if units is None:
                return
            if units.any():
                message = f"{path}: rows {spans(numbers)} have tokens, but no object"
                self._fault("object", message, name, numbers)
            for _ in rows:
                checks.row(self.layout.blank(0))
            self._conclude(checks, name)
            return
        with self._open(name, spec) as reader:
            if units is None:
                reader.finish()
                self._compare(reader, numbers)
                return
            if self.layout.codec:
                data: Any = InMemoryObject(reader.whole())
                reader.finish()
                self._packed(checks, data, spec, units, path)
            else:
                start = (np.cumsum(units) - units) * self.layout.unit_bytes
                self._plain(checks, reader, start, units)
                data = InMemoryObject(reader.finish(16 * spec.chunks + 4), reader.size)
        self._compare(reader, numbers)
        if name not in self.bad:
            try:
                edges = read_index(data, None, spec, path)
                if (len(edges) - 1) * spec.chunk_len < int(units.sum()):
                    raise CorruptColumn(f"{path}: fewer values than its rows have")
            except CorruptColumn as error:
                self._fault("object", str(error), name, numbers)
        self._conclude(checks, name)

    def _tar(self) -> None:
        """Checks the values of all blocks, which are in one tar."""
        name = tar_name(self.commit.shard)
        pending = []
        with self._open(name) as reader:
            if self.lengths is not None:
                has_values = np.isin(self.status, HAS_VALUES)
                start = first_byte(starts(self.layout, self.lengths, has_values))
                start = np.where(has_values, start, -1)
                for block in range(len(self.commit.blocks)):
                    checks = BlockChecks(self, rows := self._block_rows(block))
                    self._plain(checks, reader, start[rows], self.lengths[rows])
                    pending.append(checks)
            reader.finish()
        self._compare(reader)
        for checks in pending:
            self._conclude(checks, name)

    def _plain(self, checks: BlockChecks, reader: HashingReader, start: Rows, units: Rows) -> None:
        """Reads rows that are in the object as they are, from these bytes on (-1: blank rows)."""
        end = start + units * self.layout.unit_bytes
        for first, last, count in zip(start.tolist(), end.tolist(), units.tolist(), strict=True):
            checks.row(self.layout.blank(count) if first < 0 else reader.take(first, last))

    def _packed(
        self, checks: BlockChecks, data: Any, spec: ArraySpec, units: Rows, path: str
    ) -> None:
        """Reads rows that a codec packed."""
        try:
            edges = read_index(data, None, spec, path)
        except CorruptColumn:
            for _ in units:
                checks.row(None)
            return
        first = 0
        for count in units.tolist():
            row = np.empty((count, *self.layout.unit_shape), self.layout.dtype)
            try:
                decode_into(data, None, spec, edges, first, row, path)
                checks.row(row)
            except CorruptColumn:
                checks.row(None)
            first += count

    def _conclude(self, checks: BlockChecks, name: str) -> None:
        """Adds the faults of a block's rows, once it is known whether its object is sound."""
        rows, crc = checks.rows.tolist(), self._path("crc")
        prefix = f"{self.store.url}: shard {self.commit.shard}, rows"
        source = name if name in self.bad or crc not in self.bad else crc
        if failing := checks.wrong():
            message = f"{prefix} {spans(failing)} do not fit their checksums ({source})"
            self._fault("rows", message, source, failing)
        if checks.endless:
            message = (
                f"{prefix} {spans(checks.endless)} hold infinities or NaNs, though their status says "
                f"that they have values ({name})"
            )
            self._fault("rows", message, name, checks.endless)
        block = rows[0] // ZARR_ROWS
        self.blocks[block] = checks.digest()
        if self.blocks[block] != self.commit.blocks[block]:
            message = f"{prefix} {rows[0]}..{rows[-1]} do not fit the logical digest in the commit"
            self._fault("digest", message, name, rows)

    def _index(self) -> None:
        """Compares the source's index of this tar, if there is one."""
        folder, name = self.store.parent, index_name(self.commit.shard)
        try:
            data = folder.read(name)
        except FileNotFoundError:
            return
        except (OSError, CorruptColumn) as error:
            data = damage_message_or_raise(error).encode()
        if sha256(data) != self.commit.index:
            message = (
                f"{folder.at(name)}: not the index that {commit_name(self.commit.shard)} of "
                f"{self.store.url} was made from. If another column of this source says the same, "
                "delete it: the next `encode run` writes it again"
            )
            self.faults.append(Fault("index", message, self.commit.shard))


class BlockChecks:
    """Checksums and digest of the rows of one block, taken row by row."""

    def __init__(self, scan: Scan, rows: Rows) -> None:
        self.scan, self.rows = scan, rows
        self.checksums: list[int | None] = []  # None of a row that cannot be read
        self.endless: list[int] = []  # rows that have values by their status, which are not finite
        self._sha = hashlib.sha256()

    def row(self, values: Any) -> None:
        """Takes the next row's values; None if they cannot be read."""
        row, layout = int(self.rows[len(self.checksums)]), self.scan.layout
        self.checksums.append(None if values is None else crc32c(values))
        if values is None:
            return
        if self.scan.status[row] in HAS_VALUES:
            row_values = np.frombuffer(values, layout.dtype).reshape(-1, *layout.unit_shape)
            if not layout.finite(row_values):
                self.endless.append(row)
        if memoryview(values).nbytes:
            self._sha.update(values)

    def wrong(self) -> list[int]:
        """Returns the rows that cannot be read or do not fit their checksums."""
        crc = self.scan.crc
        return [
            int(row)
            for row, checksum in zip(self.rows, self.checksums, strict=True)
            if checksum is None or (crc is not None and checksum != crc[row])
        ]

    def digest(self) -> str | None:
        """Returns the logical digest, as `writer.block_digest` does; None if a row is lacking."""
        if None in self.checksums:
            return None
        if self.scan.layout.ragged and self.scan.lengths is not None:
            self._sha.update(self.scan.lengths[self.rows].astype("<u2").data)
        self._sha.update(np.ascontiguousarray(self.scan.status[self.rows]).data)
        return self._sha.hexdigest()
