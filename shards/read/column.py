"""Read a column: every row straight from its place in an object into the caller's buffer.

A row is found by arithmetic (and, for ragged kinds, by the lengths of its shard, which are read at
first touch and kept: 6 bytes a row). Then one `preadv` brings it; nothing else is done a row.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..column.commits import (
    READERS,
    Snapshot,
    committed,
    open_complete,
    read_complete,
    snapshot_of_commits,
)
from ..column.tar_object import first_byte
from ..column.zarr_object import crc32c, decode_into, read_into
from ..errors import CorruptColumn, IncompleteColumn, NotAColumn
from ..format.atomic import Json
from ..format.identity import ColumnIdentity
from ..format.int8 import dequantise
from ..format.layout import BLOCK, ZARR_ROWS, ColumnSpec
from ..format.records import ColumnRecord
from ..store.base import Place, Store
from ..store.open import open_store
from .objects import NO_MEMBER, Files, Rows, Table, read_small

INDEX_BYTES = 1 << 26  # of the chunk indexes that are kept of a column with a codec
MOST_COMPRESSED = 256  # lz4 packs no tighter
HINT_GAP = 1 << 16  # ranges closer than this are one to the disk

Check = Literal[False, True, "new"]


def open_spec(store: Store) -> tuple[ColumnSpec, str]:
    """What column.json says, and its digest."""
    if store.folder is not None and not store.folder.is_dir():
        raise NotAColumn(
            f"{store.url}: no such folder. Expected a column, as `python -m encode run` makes"
        )
    name = store.at("column.json")
    record = store.record("column.json", ColumnRecord)
    spec = record.spec()
    if spec.record()["zarr"] != record.zarr:
        raise CorruptColumn(f"{name}: the Zarr metadata that it names is not that of its layout")
    return spec, record.digest


class Column:
    """One column, open for reading. Rows are named by row id, in any order.

    `spec` says what the column is, `snapshot` which rows it holds. Threads that share one take
    turns; a copy made by pickle opens its own files.
    """

    def __init__(self, store: Store, spec: ColumnSpec, digest: str, snapshot: Snapshot) -> None:
        self.store, self.spec, self.digest, self.snapshot = store, spec, digest, snapshot
        self.layout = spec.layout
        rows = snapshot.rows
        if len(rows) != self.layout.shards or max(rows, default=0) > self.layout.shard_rows:
            raise CorruptColumn(
                f"{store.url}: its records speak of {len(rows)} shards of up to "
                f"{max(rows, default=0)} rows, column.json of {self.layout.shards} of at most "
                f"{self.layout.shard_rows}"
            )
        self._arrays = spec.arrays()
        self._files = Files(self)
        self._table = Table(self)
        self._indexes: dict[int, NDArray[np.uint64]] = {}
        self._channel: NDArray[np.float32] | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(cls, url: Place, partial: bool = False, snapshot_id: Json | None = None) -> Column:
        """Open a column by its newest COMPLETE record, or with `partial` by the commits that stand
        now. `snapshot_id` (what `Column.snapshot_id` gave) opens just the snapshot that was seen then.

        Raises NotAColumn, IncompleteColumn, FormatVersion or CorruptColumn.
        """
        store = open_store(url)
        spec, digest = open_spec(store)
        if snapshot_id is not None:
            snapshot = _pinned(store, digest, spec.layout.shards, snapshot_id)
        elif partial:
            standing = committed(store, spec.layout.shards)
            snapshot = snapshot_of_commits(store, digest, spec.layout.shards, standing)
        else:
            snapshot = read_complete(store, digest)
        return cls(store, spec, digest, snapshot)

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.store, self.spec, self.digest, self.snapshot)

    @property
    def path(self) -> str:
        """Where it stands, for messages."""
        return self.store.url

    @property
    def name(self) -> str:
        return self.store.name

    @cached_property
    def identity(self) -> ColumnIdentity:
        """Returns what the column says of its encoder; IdentityMismatch where another program wrote it."""
        return ColumnIdentity.of(self.spec.identity)

    def snapshot_id(self) -> Json:
        """What names this snapshot for ever: its digest, and for a partial one its shards as
        runs of (first, count).
        """
        there = np.array([content is not None for content in self.snapshot.content], np.int8)
        complete = self.store.size(f"complete/{self.snapshot.digest}.json") is not None
        if complete:
            return {"generation": self.snapshot.digest, "shards": None}
        edges = np.flatnonzero(np.diff(there, prepend=0, append=0)).reshape(-1, 2)
        return {
            "generation": self.snapshot.digest,
            "shards": [[int(a), int(b - a)] for a, b in edges],
        }

    def members(self, suffix: str) -> dict[int, str]:
        """Digest of the members with a suffix that each shard was made of, where its commit says
        so; see `members`. All commits are read.
        """
        shards = [s for s, content in enumerate(self.snapshot.content) if content is not None]
        with ThreadPoolExecutor(READERS) as pool:
            found = zip(shards, pool.map(self._table.members, shards), strict=True)
            return {shard: said[suffix] for shard, said in found if suffix in said}

    def valid_mask(self, truncated: bool = False) -> NDArray[np.uint32]:
        """Valid-row bits over all row ids, (shards * shard_rows / 32,) uint32; with status 1
        admitted if asked.
        """
        per_shard = self.layout.shard_rows // BLOCK
        mask = np.zeros(self.layout.shards * per_shard, np.uint32)
        start = 0
        for shard, rows in enumerate(self.snapshot.rows):
            count = -(-rows // BLOCK)
            mask[shard * per_shard :][:count] = self.snapshot.valid_mask[start : start + count]
            start += count
        for shard, first, count in self.snapshot.truncated if truncated else ():
            ids = shard * self.layout.shard_rows + np.arange(first, first + count)
            np.bitwise_or.at(mask, ids // BLOCK, np.uint32(1) << (ids % BLOCK).astype(np.uint32))
        return mask

    # What is known of rows ------------------------------------------------------------------------

    def status(self, rows: Rows) -> NDArray[np.uint8]:
        """Status of each row id."""
        return self._table("status", rows)

    def lengths(self, rows: Rows) -> Rows:
        """Number of tokens of each row id (0 where rows have a fixed shape)."""
        if not self.layout.ragged:
            return np.zeros(len(rows), np.int64)
        return self._table("lengths", rows).astype(np.int64)

    def checksums(self, rows: Rows) -> NDArray[np.uint32]:
        """crc32c of each row id's values as stored."""
        return self._table("crc", rows)

    def row_bytes(self, rows: Rows) -> Rows:
        """Bytes that each row id's values take in a buffer."""
        units = self.lengths(rows) if self.layout.ragged else np.ones(len(rows), np.int64)
        return units * self.layout.unit_bytes

    def places(self, rows: Rows) -> tuple[Rows, Rows, Rows]:
        """(object, byte at which the row starts before any codec, bytes) of each row id.

        Where the backend is webdataset, a row without a member has start -1.
        """
        size = self.row_bytes(rows)
        if self.layout.backend == "webdataset":
            start = self._table("starts", rows).astype(np.int64)
            start = np.where(start == NO_MEMBER, -1, first_byte(start))
            return rows // self.layout.shard_rows, start, size
        first = self._table("starts", rows) if self.layout.ragged else rows % ZARR_ROWS
        return rows // ZARR_ROWS, first.astype(np.int64) * self.layout.unit_bytes, size

    # Values ---------------------------------------------------------------------------------------

    def gather(
        self, rows: Rows, view: memoryview, at: Rows, check: Check = False,
        places: tuple[Rows, Rows, Rows] | None = None,
    ) -> None:  # fmt: skip
        """Read row i's values to `view[at[i]:]`, a flat buffer of bytes; `row_bytes` says how many.

        With `check`, every row's crc32c is compared with the stored one, or with "new" that of rows
        that were not compared before; what came over a network always is. `places`: of these rows,
        if they are known already. Raises CorruptColumn, naming object, shard and row.
        """
        number, start, size = places or self.places(rows)
        with self._lock:
            self._read(view, number, start, size, at)
            if check is True or self.store.folder is None:
                self._check(rows, view, number, start, size, at)
            elif check:
                seen = self._table.seen(rows)
                if not seen.all():
                    new = np.flatnonzero(~seen)
                    self._check(rows[new], view, number[new], start[new], size[new], at[new])
                    self._table.see(rows[new])

    def _read(self, view: memoryview, number: Rows, start: Rows, size: Rows, at: Rows) -> None:
        """The bytes of rows that stand at these places."""
        places = zip(number.tolist(), start.tolist(), size.tolist(), at.tolist(), strict=True)
        handles, preadv = self._files.handles, self.store.preadv
        if self.layout.codec:
            for n, o, s, a in places:
                if s:
                    self._decode(n, view[a : a + s], o)
            places = iter(())  # type: ignore[assignment]  # all done
        try:
            for n, o, s, a in places:
                if s and o >= 0:
                    handle = handles.get(n)
                    if handle is None:
                        handle = self._files.open(n)
                    if preadv(handle, [view[a : a + s]], o) != s:  # once more, or the object's end
                        read_into(self.store, handle, view[a : a + s], o, self._files.name(n))
        except OSError as error:
            if error.errno and not error.filename:
                error.filename = self._files.name(n)
            raise
        if self.layout.backend != "webdataset":
            return
        for i in np.flatnonzero(start < 0):  # no member in the tar: a row without values
            blank = self.layout.blank(int(size[i]) // self.layout.unit_bytes)
            view[int(at[i]) : int(at[i] + size[i])] = blank.tobytes()

    def _edges(self, number: int) -> NDArray[np.uint64]:
        """The chunk index of an object that has a codec."""
        if number not in self._indexes:
            spec = self._arrays[self.layout.kind]
            if len(self._indexes) * 8 * spec.chunks > INDEX_BYTES:
                self._indexes.clear()
            self._indexes[number] = self._files.index(number, self._files.open(number))
        return self._indexes[number]

    def _decode(self, number: int, view: memoryview, offset: int) -> None:
        """Read a row through the codec; `offset` as if there were none."""
        out = np.frombuffer(view, self.layout.dtype).reshape(-1, *self.layout.unit_shape)
        decode_into(
            self.store, self._files.open(number), self._arrays[self.layout.kind],
            self._edges(number), offset // self.layout.unit_bytes, out, self._files.name(number),
        )  # fmt: skip

    def _stored(self, number: Rows, start: Rows, size: Rows) -> tuple[Rows, Rows]:
        """(first byte, bytes) of the chunks that hold rows, where there is a codec."""
        chunk = self._arrays[self.layout.kind].chunk_bytes
        found = np.zeros((len(number), 2), np.int64)
        for i, (n, a, s) in enumerate(
            zip(number.tolist(), start.tolist(), size.tolist(), strict=True)
        ):
            if s:
                first, last = a // chunk, -(-(a + s) // chunk)
                if last >= len(edges := self._edges(n)):
                    raise CorruptColumn(
                        f"{self._files.name(n)}: the object ends before byte {a + s}"
                    )
                found[i] = edges[[first, last]]
        return found[:, 0], found[:, 1] - found[:, 0]

    def _check(
        self, rows: Rows, view: memoryview, number: Rows, start: Rows, size: Rows, at: Rows
    ) -> None:
        """Compare rows that were read with their checksums; a remote one is fetched once more."""
        stored = self.checksums(rows).tolist()
        for i, (a, s) in enumerate(zip(at.tolist(), size.tolist(), strict=True)):
            part = view[a : a + s]
            if crc32c(part) == stored[i]:
                continue
            one = slice(i, i + 1)
            if self._forget(number[one], start[one], size[one]):
                self._read(part, number[one], start[one], size[one], np.zeros(1, np.int64))
                if crc32c(part) == stored[i]:
                    continue
            shard, place = divmod(int(rows[i]), self.layout.shard_rows)
            raise CorruptColumn(
                f"{self.path}: row {place} of shard {shard} (row id {rows[i]}) does not fit its "
                f"checksum. Run `python -m shards verify {self.path}` for all that is damaged, "
                "then `repair` and encode again, or restore it"
            )

    def _forget(self, number: Rows, start: Rows, size: Rows) -> bool:
        """Drop what is cached of a row; False if nothing is ever cached."""
        if start[0] < 0:
            return False
        if self.layout.codec:
            start, size = self._stored(number, start, size)
        handle = self._files.open(int(number[0]))
        return self.store.forget(handle, int(start[0]), int(size[0]))

    def hint(self, rows: Rows, places: tuple[Rows, Rows, Rows] | None = None) -> None:
        """Say that rows will be read soon: the disk reads ahead, a remote object is fetched."""
        if not len(rows):
            return
        with self._lock:
            self._hint(*(places or self.places(rows)))

    def _hint(self, number: Rows, start: Rows, size: Rows) -> None:
        if self.layout.codec:
            start, size = self._stored(number, start, size)
        order = np.lexsort((start, number))
        number, start, end = number[order], start[order], (start + size)[order]
        fresh = np.ones(len(number), bool)
        fresh[1:] = (number[1:] != number[:-1]) | (start[1:] > end[:-1] + HINT_GAP)
        first = np.flatnonzero(fresh)
        last = np.append(first[1:], len(number)) - 1
        willneed = self.store.willneed
        for n, a, b in zip(
            number[first].tolist(), start[first].tolist(), end[last].tolist(), strict=True
        ):
            if b > a >= 0:
                willneed(self._files.open(n), a, b - a)

    def read_into(self, rows: Rows, out: NDArray[Any], check: Check = False) -> None:
        """Read rows end to end into `out`: (B, 2C, H, W) float16, or (sum of lengths, D) bfloat16
        words. `check` as in `gather`.
        """
        size = self.row_bytes(rows)
        if out.size:
            self.gather(rows, out.reshape(-1).view(np.uint8).data, np.cumsum(size) - size, check)

    def read(self, rows: Rows, check: Check = False) -> NDArray[Any]:
        """Rows as a new array of stored words, (B, *row) or (sum of lengths, *unit)."""
        with self._lock:
            self._check_held(rows)
        count = int(self.lengths(rows).sum()) if self.layout.ragged else len(rows)
        out = np.empty((count, *self.layout.unit_shape), self.layout.dtype)
        self.read_into(rows, out, check)
        return out

    def _check_held(self, rows: Rows) -> None:
        """CorruptColumn if objects are too small to hold these rows, before memory is taken for
        them.
        """
        number, start, size = self.places(rows)
        if self.layout.codec:
            short = size > MOST_COMPRESSED * self._stored(number, start, size)[1]
            number = number[short]
        else:
            there = (start >= 0) & (size > 0)
            objects, which = np.unique(number[there], return_inverse=True)
            ends = np.zeros(len(objects), np.int64)
            np.maximum.at(ends, which, (start + size)[there])
            held = np.array([self._files.length(n) for n in objects.tolist()], np.int64)
            number = objects[held < ends]
        if len(number):
            raise CorruptColumn(
                f"{self._files.name(int(number[0]))}: the object is too small for its rows. Restore "
                "it, or repair the column"
            )

    def decoded(self, words: NDArray[Any]) -> NDArray[Any]:
        """Stored words of tokens as bfloat16 bits; others as they are."""
        if not self.layout.quantised:
            return words
        if self._channel is None:
            assert self.spec.quantisation
            self._channel = np.array(self.spec.quantisation["channel"], np.float32)
        return dequantise(words, self._channel)

    def empty(self) -> NDArray[Any]:
        """The empty caption's tokens, (n, D) bfloat16 words or (n,) ids, compared with what a commit
        says of them.
        """
        spec = self._arrays["empty"]
        name = f"empty/{spec.key(0)}"
        there = (s for s, content in enumerate(self.snapshot.content) if content is not None)
        shard = next(there, None)
        digest = None if shard is None else self._table.committed(shard).get(name)
        return read_small(self.store, name, spec, spec.shape[0], digest)

    def close(self) -> None:
        self._files.close()


def _pinned(store: Store, digest: str, shards: int, snapshot_id: Json) -> Snapshot:
    """The snapshot that `snapshot_id` names; IncompleteColumn if it can no longer be had."""
    if snapshot_id["shards"] is None:
        name = f"complete/{snapshot_id['generation']}.json"
        if store.size(name) is None:
            raise IncompleteColumn(
                f"{store.at(name)}: the snapshot that this run has read is gone. Restore it, or "
                "start a new run"
            )
        return open_complete(store, name, digest)
    only = [s for first, count in snapshot_id["shards"] for s in range(first, first + count)]
    try:
        snapshot = snapshot_of_commits(store, digest, shards, only)
    except NotAColumn as error:
        raise IncompleteColumn(f"{error}. This run has read that shard") from None
    if snapshot.digest != snapshot_id["generation"]:
        raise IncompleteColumn(
            f"{store.url}: its shards no longer hold what this run has read. Restore the column, or "
            "start a new run"
        )
    return snapshot
