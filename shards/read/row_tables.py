"""What a column knows of its rows: lengths, statuses, checksums and where each starts, read a shard at
a time at first touch, and kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..column.commits import Snapshot, commit_name, own_commit
from ..column.tar_object import starts as tar_starts
from ..errors import CorruptColumn
from ..format.atomic import sha256
from ..format.layout import HAS_VALUES, ZARR_ROWS, ColumnSpec
from ..processes import watch_forks
from ..store.base import Committed, Store
from ..store.fetchers import fetch_all
from .objects import Ints

NO_MEMBER = 2**32 - 1  # among `starts`: the row has no member in the tar
TYPES = {"lengths": np.uint16, "status": np.uint8, "crc": np.uint32, "starts": np.uint32}
REQUESTS = 32  # small objects of a store that are on their way at once


def row_ids(rows: ArrayLike) -> Ints:
    """Returns row ids as int64, of a list, a tensor or integers of another width; TypeError for what is
    none. Bools are not: as integers they would be the rows 0 and 1.
    """
    ids = np.asarray(rows)
    if ids.dtype == np.int64 and ids.ndim == 1:
        return ids
    if ids.shape == (0,):
        return np.zeros(0, np.int64)
    if ids.ndim == 1 and ids.dtype.kind in "iu":
        return ids.astype(np.int64)
    raise TypeError(
        f"rows: found {ids.dtype} of shape {ids.shape}, expected row ids, integers along one axis. Give "
        "one row as [row], and a mask as np.flatnonzero(mask)"
    )


class RowTables:
    """Tables over the rows of a snapshot: `lengths` (2 bytes a row), `starts` (4), `crc` (4) and
    `status` (1). Memory is taken only for shards that were read. Threads may share them.
    """

    def __init__(self, store: Store, spec: ColumnSpec, digest: str, snapshot: Snapshot) -> None:
        self.store, self.layout, self.digest, self.snapshot = store, spec.layout, digest, snapshot
        self._arrays = spec.arrays()
        self._rows = np.array(snapshot.rows, np.int64)
        self._base = np.concatenate([[0], np.cumsum(self._rows)])
        self._tables: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
        self._compared = np.zeros(int(self._base[-1]), bool)  # takes no memory until it is used
        self._commits: dict[int, tuple[dict[str, Committed], Mapping[str, str]]] = {}
        self.after_fork()
        watch_forks(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()  # held while tables are read, not while they are looked up

    def __call__(self, name: str, rows: Ints) -> NDArray[Any]:
        """Returns the table's value of each row id; IndexError for a row that the snapshot lacks."""
        shard, place = self.split(rows)
        values, read = self._table(name)
        if not read[shard].all():
            self.load([name], rows)
        result: NDArray[Any] = values[self._base[shard] + place]
        return result

    def split(self, rows: Ints) -> tuple[Ints, Ints]:
        """Returns the shard of each row id, and its row there; IndexError for one that there is not."""
        shard, place = np.divmod(rows, self.layout.shard_rows)
        if len(rows) and (
            rows.min() < 0 or shard.max() >= len(self._rows) or (place >= self._rows[shard]).any()
        ):
            raise IndexError(
                f"{self.store.url}: no such rows among {rows.tolist()[:8]}. A row id is shard * "
                f"{self.layout.shard_rows} + row, and shards have up to {self._rows.max(initial=0)} rows"
            )
        return shard, place

    def _table(self, name: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Returns a table and which shards of it were read."""
        if name not in self._tables:
            with self._lock:  # zeros that nobody touches take no memory
                table = np.zeros(int(self._base[-1]), TYPES[name])
                self._tables.setdefault(name, (table, np.zeros(len(self._rows), bool)))
        return self._tables[name]

    def knows(self, names: Sequence[str], rows: Ints) -> bool:
        """Returns whether all of these tables were read of the shards of some rows."""
        shards = np.unique(self.split(rows)[0])
        return all(self._table(name)[1][shards].all() for name in names)

    def load(self, names: Sequence[str], rows: Ints) -> None:
        """Reads what was not read yet of tables of the shards of some rows; from a store, many objects at
        once.
        """
        if self.knows(names, rows):
            return
        shards = np.unique(self.split(rows)[0])
        with self._lock:
            stored = [name for name in names if name != "starts"]
            if "starts" in names:
                stored += ["lengths"] * self.layout.ragged
                stored += ["status"] * (self.layout.backend == "webdataset")
            lacking = [
                (name, s)
                for name in dict.fromkeys(stored)
                for s in shards[~self._table(name)[1][shards]].tolist()
            ]
            for (name, s), part in zip(lacking, self._read_many(lacking), strict=True):
                self._keep(name, s, part)
            if "starts" in names:
                for s in shards[~self._table("starts")[1][shards]].tolist():
                    self._keep("starts", s, self._starts(s))

    def _keep(self, name: str, shard: int, part: NDArray[Any]) -> None:
        values, read = self._table(name)
        values[self._base[shard] : self._base[shard + 1]] = part
        read[shard] = True

    def _read_many(self, parts: Sequence[tuple[str, int]]) -> list[NDArray[Any]]:
        """Returns the tables' parts of shards, (name, shard) each."""
        if self.store.folder is not None:
            return [self._table_of(*part, self._data(self._path(*part))) for part in parts]
        shards = [s for s in dict.fromkeys(s for _, s in parts) if s not in self._commits]
        requests: list[Callable[[], Any]] = [partial(self._commit, shard) for shard in shards]
        requests += [partial(self._data, self._path(*part)) for part in parts]
        # what commits say of the other objects is compared once all are here
        with ThreadPoolExecutor(REQUESTS) as pool:
            data = fetch_all(pool, lambda request: request(), requests)[len(shards) :]
        return [self._table_of(*part, each) for part, each in zip(parts, data, strict=True)]

    def not_compared(self, rows: Ints) -> Ints:
        """Returns the indexes of rows that were not compared with their checksums before, by this
        column in this process.
        """
        return np.flatnonzero(~self._compared[self._index(rows)])

    def mark_compared(self, rows: Ints, compared: bool = True) -> None:
        self._compared[self._index(rows)] = compared

    def _index(self, rows: Ints) -> Ints:
        """Index of row ids in a table."""
        shard, place = np.divmod(rows, self.layout.shard_rows)
        index: Ints = self._base[shard] + place
        return index

    def _path(self, name: str, shard: int) -> str:
        return f"{name}/{self._arrays[name].key(shard)}"

    def _table_of(self, name: str, shard: int, data: bytes | None) -> NDArray[Any]:
        """Returns the table's part of a shard from its object."""
        rows, path = int(self._rows[shard]), self._path(name, shard)
        table = self._checked(name, path, rows, self.committed(path, shard)[1], data)
        if name == "lengths" and table.max(initial=0) > self.layout.row_shape[0]:
            raise CorruptColumn(
                f"{self.store.at(path)}: a row of {table.max()} tokens, at most "
                f"{self.layout.row_shape[0]} expected"
            )
        return table

    def _starts(self, shard: int) -> Ints:
        """Where each row of a shard starts in its object: in tokens, or in blocks of a tar."""
        ids = shard * self.layout.shard_rows + np.arange(self._rows[shard])
        lengths = np.ones(len(ids), np.int64)
        if self.layout.ragged:
            lengths = self("lengths", ids).astype(np.int64)
        if self.layout.backend == "webdataset":
            present = np.isin(self("status", ids), HAS_VALUES)
            return np.where(present, tar_starts(self.layout, lengths, present), NO_MEMBER)
        blocks = np.pad(lengths, (0, -len(ids) % ZARR_ROWS)).reshape(-1, ZARR_ROWS)
        before: Ints = (np.cumsum(blocks, 1) - blocks).ravel()[: len(ids)]
        return before

    def committed(self, path: str, shard: int) -> Committed:
        """Returns bytes and sha256 of an object of a shard; CorruptColumn if its commit names none."""
        committed = self._commit(shard)[0].get(path)
        if committed is None:
            raise CorruptColumn(
                f"{self.store.at(commit_name(shard))}: it names no {path}, which a shard of "
                f"{int(self._rows[shard])} rows has"
            )
        return committed

    def bytes_a_row(self) -> float:
        """Returns the mean bytes of values of a row, by the commits that were read, or else by up to 16
        of shards evenly apart.
        """
        present = np.flatnonzero(self._rows)
        some = present[np.linspace(0, len(present) - 1, min(len(present), 16)).astype(int)].tolist()
        some = list(self._commits) or some
        with ThreadPoolExecutor(REQUESTS) as pool:
            commits = fetch_all(pool, self._commit, some)
        values = (f"{self.layout.kind}/", "tar/")
        size = sum(n for c, _ in commits for path, (n, _) in c.items() if path.startswith(values))
        return size / max(1, int(self._rows[some].sum()))

    def members(self, shard: int) -> Mapping[str, str]:
        """Returns `members` of a shard's commit."""
        return self._commit(shard)[1]

    def empty(self) -> NDArray[Any]:
        """Returns the empty caption's tokens, compared with what the first commit says of them."""
        spec = self._arrays["empty"]
        path = self._path("empty", 0)
        shards = (s for s, content in enumerate(self.snapshot.content) if content is not None)
        shard = next(shards, None)
        committed = None if shard is None else self._commit(shard)[0].get(path)
        digest = committed and committed[1]
        return self._checked("empty", path, spec.shape[0], digest, self._data(path))

    def _commit(self, shard: int) -> tuple[dict[str, Committed], Mapping[str, str]]:
        """(bytes and sha256 of each object, `members`) of a shard, from the commit that the snapshot names."""
        if shard not in self._commits:
            commit = own_commit(self.store, self.digest, shard)
            if commit.content != self.snapshot.content[shard]:
                raise CorruptColumn(
                    f"{self.store.at(commit_name(shard))}: not the content that the COMPLETE "
                    f"record names. Run `python -m shards verify {self.store.url}`"
                )
            objects = {path: (size, digest) for path, size, digest in commit.objects}
            self._commits[shard] = objects, commit.members
        return self._commits[shard]

    def _data(self, path: str) -> bytes | None:
        """Returns a small object; None where there is none."""
        try:
            return self.store.read(path)
        except FileNotFoundError:
            return None

    def _checked(
        self, name: str, path: str, count: int, digest: str | None, data: bytes | None
    ) -> NDArray[Any]:
        """Returns the first `count` elements of a small object, without a codec, of this sha256."""
        spec = self._arrays[name]
        if data is None:
            raise CorruptColumn(
                f"{self.store.at(path)}: the object is missing though its shard is committed. "
                "Restore it, or repair the column"
            )
        size = count * spec.chunk_bytes // spec.chunk_len
        if len(data) < size or (digest is not None and sha256(data) != digest):
            raise CorruptColumn(
                f"{self.store.at(path)}: its {len(data)} bytes are not those that were committed. "
                "Restore it, or repair the column"
            )
        return np.frombuffer(bytearray(data[:size]), spec.dtype).reshape(count, *spec.shape[1:])
