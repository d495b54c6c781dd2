"""A column, open for reading: every row straight from its place in an object into the caller's buffer.

A row's place follows by arithmetic (and, for ragged kinds, from the lengths of its shard, which are
read at first touch and kept: 6 bytes a row). Then one `preadv` brings it; nothing else is done a row.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..column.checksum import crc32c
from ..column.commits import (
    READERS,
    Snapshot,
    committed,
    open_complete,
    read_complete,
    snapshot_of_commits,
    spread_words,
)
from ..column.tar_object import first_byte
from ..console import size_text
from ..errors import CorruptColumn, IncompleteColumn, NotAColumn
from ..format.atomic import Json
from ..format.identity import ColumnIdentity
from ..format.int8 import read_rows
from ..format.layout import BLOCK, ZARR_ROWS, ColumnSpec
from ..format.records import ColumnRecord
from ..processes import watch_forks
from ..store.base import Place, Store
from ..store.open import open_store
from .objects import Ints, Places, ValueObjects
from .row_tables import NO_MEMBER, RowTables, row_ids

Check = Literal[False, True, "new"]


def open_spec(store: Store) -> tuple[ColumnSpec, str]:
    """Returns what column.json says, and its digest."""
    if store.folder is not None and not store.folder.is_dir():
        kind = "is a file" if store.folder.exists() else "no such folder"
        raise NotAColumn(
            f"{store.url}: {kind}. Expected the folder of a column, as `python -m encode run` makes"
        )
    name = store.at("column.json")
    record = store.record("column.json", ColumnRecord)
    spec = record.spec()
    if spec.record()["zarr"] != record.zarr:
        raise CorruptColumn(f"{name}: the Zarr metadata that it names is not that of its layout")
    return spec, record.digest


class Column:
    """One column, open for reading. Rows are named by row id, in any order, in an array, list or tensor.

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
        self._tables = RowTables(store, spec, digest, snapshot)
        self._objects = ValueObjects(store, spec, self._tables.committed)
        self.after_fork()
        watch_forks(self)
        self._value_bytes: int | None = None

    def after_fork(self) -> None:
        """Makes the lock of a child: a thread of its parent may have held that of the parent. The store of
        a child knows nothing of what will be read.
        """
        self._lock = threading.RLock()
        self._expected = False  # whether the store knows how much of it will be read

    @classmethod
    def open(cls, url: Place, partial: bool = False, snapshot_id: Json | None = None) -> Column:
        """Opens a column by its newest COMPLETE record, or with `partial` by the commits that exist
        now. `snapshot_id` (what `Column.snapshot_id` returned) opens the snapshot of then.

        Raises NotAColumn, IncompleteColumn, FormatVersion or CorruptColumn.
        """
        store = open_store(url)
        spec, digest = open_spec(store)
        if snapshot_id is not None:
            snapshot = _pinned(store, digest, spec.layout.shards, snapshot_id)
        elif partial:
            shards = committed(store, spec.layout.shards)
            snapshot = snapshot_of_commits(store, digest, spec.layout.shards, shards)
        else:
            snapshot = read_complete(store, digest)
        return cls(store, spec, digest, snapshot)

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.store, self.spec, self.digest, self.snapshot)

    @property
    def path(self) -> str:
        """Folder or url, for messages."""
        return self.store.url

    @property
    def name(self) -> str:
        return self.store.name

    @cached_property
    def identity(self) -> ColumnIdentity:
        """Returns what the column says of its encoder; IdentityMismatch where another program wrote it."""
        return ColumnIdentity.of(self.spec.identity)

    def snapshot_id(self) -> Json:
        """Returns what names this snapshot for ever: its digest, and for a partial one its shards as
        runs of (first, count).
        """
        runs = None
        if self.store.size(f"complete/{self.snapshot.digest}.json") is None:
            present = np.array([c is not None for c in self.snapshot.content], np.int8)
            edges = np.flatnonzero(np.diff(present, prepend=0, append=0)).reshape(-1, 2)
            runs = [[int(first), int(end - first)] for first, end in edges]
        return {"generation": self.snapshot.digest, "shards": runs}

    def members(self, suffix: str) -> dict[int, str]:
        """Returns the digest of the members with a suffix that each shard was made of, where its commit says
        so; see `members`. All commits are read.
        """
        shards = [s for s, content in enumerate(self.snapshot.content) if content is not None]
        with ThreadPoolExecutor(READERS) as pool:
            members = zip(shards, pool.map(self._tables.members, shards), strict=True)
            return {shard: digests[suffix] for shard, digests in members if suffix in digests}

    def valid_mask(self, truncated: bool = False) -> NDArray[np.uint32]:
        """Returns the valid-row bits of all row ids, (shards * shard_rows / 32,) uint32; with status 1
        admitted if asked.
        """
        mask = spread_words(self.snapshot.valid_mask, self.snapshot.rows, self.layout.shard_rows)
        for shard, first, count in self.snapshot.truncated if truncated else ():
            ids = shard * self.layout.shard_rows + np.arange(first, first + count)
            np.bitwise_or.at(mask, ids // BLOCK, np.uint32(1) << (ids % BLOCK).astype(np.uint32))
        return mask

    @property
    def value_bytes(self) -> int:
        """The bytes of all values as stored; where only commits know, by the mean of some of them."""
        if self._value_bytes is None:  # (a `cached_property` holds a lock, which a fork would keep)
            self._value_bytes = self._count_bytes()
        return self._value_bytes

    def _count_bytes(self) -> int:
        rows = sum(self.snapshot.rows)
        if not (self.layout.ragged or self.layout.codec or self.layout.backend == "webdataset"):
            return rows * self.layout.unit_bytes
        return int(rows * self._tables.bytes_a_row())

    def _expect(self, whole: bool = True) -> None:
        """Says that the whole column will be read. Where only some rows are, they are kept if the column
        fits beside those that are expected, and the way that these are read stays.
        """
        if whole and not self._expected:
            self.store.expect(self, self.value_bytes)
            self._expected = True
        with self._lock:
            self._objects.keep_beside(0 if self._expected else self.value_bytes)

    @property
    def storage_note(self) -> str:
        """How values in a store are read, for people; empty of a folder."""
        if self.store.folder is not None:
            return ""
        self._expect()
        return f"{self.path}: {size_text(self.value_bytes)} of values, read {self.store.way}"

    # What is known of rows ------------------------------------------------------------------------

    def status(self, rows: ArrayLike) -> NDArray[np.uint8]:
        """Returns the status of each row id."""
        return self._tables("status", row_ids(rows))

    def lengths(self, rows: ArrayLike) -> Ints:
        """Returns the number of tokens of each row id (0 where rows have a fixed shape)."""
        rows = row_ids(rows)
        if not self.layout.ragged:
            return np.zeros(len(rows), np.int64)
        return self._tables("lengths", rows).astype(np.int64)

    def checksums(self, rows: ArrayLike) -> NDArray[np.uint32]:
        """Returns the crc32c of each row id's values as stored."""
        return self._tables("crc", row_ids(rows))

    def row_bytes(self, rows: ArrayLike) -> Ints:
        """Returns the bytes that each row id's values take in a buffer."""
        rows = row_ids(rows)
        units = self.lengths(rows) if self.layout.ragged else np.ones(len(rows), np.int64)
        return units * self.layout.unit_bytes

    @property
    def _tables_of_places(self) -> list[str]:
        """The tables that are read before rows of a store are."""
        placed = self.layout.ragged or self.layout.backend == "webdataset"
        return ["crc", "starts"] if placed else ["crc"]

    def asks_for_places(self, rows: Ints) -> bool:
        """Returns whether a store may be asked before it is known where rows are."""
        if self.store.folder is not None:
            return False
        return self.layout.codec is not None or not self._tables.knows(self._tables_of_places, rows)

    def places(self, rows: ArrayLike, whole: bool = False) -> Places:
        """Returns where each row id's values are. Of a store, all that is to be known before they are read
        is fetched for them: checksums, and the indexes of objects that have a codec. `whole`: all other
        rows will be read, too, in any order until the column is closed. IndexError for a row that the
        snapshot lacks.
        """
        rows = row_ids(rows)
        self._tables.split(rows)
        remote = self.store.folder is None
        if remote:
            self._tables.load(self._tables_of_places, rows)
            self._expect(whole)
        size = self.row_bytes(rows)
        if self.layout.backend == "webdataset":
            start = self._tables("starts", rows).astype(np.int64)
            start = np.where(start == NO_MEMBER, -1, first_byte(start))
            return Places(rows // self.layout.shard_rows, start, size)
        if remote and self.layout.codec:
            self._objects.load_indexes(rows[size > 0] // ZARR_ROWS, self._lock)
        first = self._tables("starts", rows) if self.layout.ragged else rows % ZARR_ROWS
        return Places(rows // ZARR_ROWS, first.astype(np.int64) * self.layout.unit_bytes, size)

    # Values ---------------------------------------------------------------------------------------

    def gather(
        self, rows: ArrayLike, view: memoryview, at: Ints, check: Check = False,
        places: Places | None = None,
    ) -> None:  # fmt: skip
        """Reads row i's values to `view[at[i]:]`, a flat buffer of bytes; `row_bytes` says how many.

        With `check`, every row's crc32c is compared with the stored one, or with "new" that of rows
        that were not compared before, as always where they come over a network: once more if they
        come once more. `places`: of these rows, if they are known already. Raises CorruptColumn,
        naming object, shard and row.
        """
        rows = row_ids(rows)
        places = places or self.places(rows)
        remote = self.store.folder is None
        once = check == "new" or (remote and not check)  # a row is compared once in this process
        due = np.zeros(len(rows), bool) if once else np.full(len(rows), check is True)
        if once:
            due[self._tables.not_compared(rows)] = True
        checksums = None
        if due.any():
            checksums = np.where(due, self.checksums(rows).astype(np.int64), -1)
        with ExitStack() as held:
            held.enter_context(self._lock)
            if remote and not self.layout.codec:
                self._objects.open_all(places.object)
                held.close()  # a network takes its time: others plan and ask for rows meanwhile
            unfit = self._objects.read(places, view, at, checksums)
        with self._lock:
            if remote:
                self._forget_compared(places)
            if once and checksums is not None:
                due[unfit] = False
                self._tables.mark_compared(rows[due])
            if once and (checksums is not None or remote):
                unfit = self._tables.not_compared(rows)
            if len(unfit):
                self._compare(rows[unfit], places.at(unfit), view, at[unfit])
                if once:
                    self._tables.mark_compared(rows[unfit])

    def _forget_compared(self, places: Places) -> None:
        """Takes back that rows were compared, of objects of which bytes came anew."""
        per_object = self.layout.shard_rows
        if self.layout.backend == "zarr":
            per_object = ZARR_ROWS
        for number in self._objects.came_anew(places.object):
            shard, row = divmod(number * per_object, self.layout.shard_rows)
            rows = row + np.arange(min(per_object, self.snapshot.rows[shard] - row))
            self._tables.mark_compared(shard * self.layout.shard_rows + rows, False)

    def _compare(self, rows: Ints, places: Places, view: memoryview, at: Ints) -> None:
        """Compares rows that were read with their checksums; a remote one is fetched once more."""
        sizes = zip(at.tolist(), places.size.tolist(), self.checksums(rows).tolist(), strict=True)
        for i, (start, size, checksum) in enumerate(sizes):
            part = view[start : start + size]
            if crc32c(part) == checksum:
                continue
            place = places.at(slice(i, i + 1))
            if self._objects.forget(place):
                self._objects.read(place, part, np.zeros(1, np.int64))
                if crc32c(part) == checksum:
                    continue
            shard, row = divmod(int(rows[i]), self.layout.shard_rows)
            raise CorruptColumn(
                f"{self.path}: row {row} of shard {shard} (row id {rows[i]}) does not fit its "
                f"checksum. Run `python -m shards verify {self.path}` for all that is damaged, "
                "then `repair` and encode again, or restore it"
            )

    def hint(self, rows: ArrayLike, places: Places | None = None) -> None:
        """Says that rows will be read soon: the disk reads ahead, a remote object is fetched."""
        if len(rows := row_ids(rows)):
            with self._lock:
                self._objects.hint(places or self.places(rows))

    def read_into(
        self, rows: ArrayLike, out: NDArray[Any], check: Check = False, hinted: bool = False
    ) -> None:
        """Reads rows end to end into `out`: (B, 2C, H, W) float16, or (sum of lengths, D) bfloat16
        bits. `check` as in `gather`; `hinted`: `hint` was called with just these rows.
        """
        rows = row_ids(rows)
        if out.size:
            places = self.places(rows)
            if self.store.folder is None and not hinted:  # many requests at once
                self.hint(rows, places)
            view = out.reshape(-1).view(np.uint8).data
            self.gather(rows, view, np.cumsum(places.size) - places.size, check, places)

    def read(self, rows: ArrayLike, check: Check = False, hinted: bool = False) -> NDArray[Any]:
        """Returns rows as a new array as stored, (B, *row) or (sum of lengths, *unit); see `read_into`."""
        rows = row_ids(rows)
        with self._lock:
            self._objects.refuse_short(self.places(rows))
        count = int(self.lengths(rows).sum()) if self.layout.ragged else len(rows)
        out = np.empty((count, *self.layout.unit_shape), self.layout.dtype)
        self.read_into(rows, out, check, hinted)
        return out

    def decoded(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Returns stored tokens as bfloat16 bits, and int8 rows of one shape as float16; others as they
        are.
        """
        return read_rows(self.spec, stored)

    def empty(self) -> NDArray[Any]:
        """Returns the empty caption's tokens, (n, D) bfloat16 bits or (n,) ids, compared with what a
        commit says of them.
        """
        return self._tables.empty()

    def close(self) -> None:
        self._objects.close()
        if self._expected:
            self.store.expect(self, 0)
            self._expected = False


def _pinned(store: Store, digest: str, shards: int, snapshot_id: Json) -> Snapshot:
    """Returns the snapshot that `snapshot_id` names; IncompleteColumn if it can no longer be had."""
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
