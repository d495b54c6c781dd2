"""Open objects of a column, and what is known of its rows: what `Column` keeps between two reads."""

from __future__ import annotations

import errno
import resource
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from ..column.commits import commit_name, own_commit
from ..column.tar_object import starts as tar_starts
from ..column.tar_object import tar_name
from ..column.zarr_object import read_index
from ..errors import CorruptColumn
from ..format.atomic import naming, sha256
from ..format.layout import HAS_VALUES, ZARR_ROWS, ArraySpec
from ..store.base import Handle, Store

if TYPE_CHECKING:
    from .column import Column

OPEN_FILES = 4  # of a column at least; all of a process share half of what it may open
NO_MEMBER = 2**32 - 1  # among `starts`: the row has no member in the tar

Rows = NDArray[np.int64]

_ALIVE: WeakSet[Files] = WeakSet()  # of this process, but for those that were closed


class Files:
    """Open values objects of a column, each checked once; the least recently opened are closed."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.handles: dict[int, Handle] = {}
        self._checked: set[int] = set()
        _ALIVE.add(self)

    @property
    def limit(self) -> int:
        """Files that this column may hold open now."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(OPEN_FILES, min(soft // 2, 1 << 17) // max(1, len(_ALIVE)))

    def path(self, number: int) -> str:
        layout = self.column.layout
        if layout.backend == "webdataset":
            return tar_name(number)
        return f"{layout.kind}/{self.column._arrays[layout.kind].key(number)}"

    def name(self, number: int) -> str:
        """Full name of an object, for messages."""
        return self.column.store.at(self.path(number))

    def length(self, number: int) -> int:
        """Bytes of an object."""
        with naming(self.name(number)):
            return self.column.store.length(self.open(number), self.name(number))

    def open(self, number: int) -> Handle:
        """The handle of an object, opened if it is not."""
        if number in self.handles:
            return self.handles[number]
        store, layout = self.column.store, self.column.layout
        while len(self.handles) >= self.limit:
            self._close(next(iter(self.handles)))
        try:
            handle = self._opened(number)
        except FileNotFoundError:
            raise CorruptColumn(
                f"{self.name(number)}: the object is missing though its shard is committed. "
                "Restore it, or repair the column"
            ) from None
        if number not in self._checked and layout.backend == "zarr":
            try:
                self.index(number, handle)
            except (CorruptColumn, OSError):
                store.close(handle)
                raise
            self._checked.add(number)
        self.handles[number] = handle
        _ALIVE.add(self)  # again, if it was closed
        return handle

    def _opened(self, number: int) -> Handle:
        """Open an object; where this process may open no more files, close half of ours first."""
        try:
            return self.column.store.open(self.path(number))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.handles:
                raise
        for other in list(self.handles)[: -(-len(self.handles) // 2)]:
            self._close(other)
        return self.column.store.open(self.path(number))

    def index(self, number: int, handle: Handle) -> NDArray[np.uint64]:
        """The chunk index of an open object; a remote one that is damaged is fetched once more."""
        store, spec = self.column.store, self.column._arrays[self.column.layout.kind]
        with suppress(CorruptColumn):
            return read_index(store, handle, spec, self.name(number))
        store.forget(handle, 0, store.length(handle, self.name(number)))
        return read_index(store, handle, spec, self.name(number))

    def _close(self, number: int) -> None:
        handle = self.handles.pop(number)
        self.column.store.close(handle)

    def close(self) -> None:
        _ALIVE.discard(self)
        for number in list(self.handles):
            self._close(number)


class Table:
    """What a column knows of its rows, read a shard at a time and kept: `lengths` (2 bytes a row),
    `starts` (4), `crc` (4) and `status` (1). Memory is taken only for shards that were read.
    """

    TYPES = {"lengths": np.uint16, "status": np.uint8, "crc": np.uint32, "starts": np.uint32}
    SMALL = ("lengths/", "status/", "crc/", "empty/")  # objects that are read whole

    def __init__(self, column: Column) -> None:
        self.column = column
        self._rows = np.array(column.snapshot.rows, np.int64)
        self._base = np.concatenate([[0], np.cumsum(self._rows)])
        self._kept: dict[str, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
        self._seen = np.zeros(0, bool)
        self._commits: dict[int, tuple[dict[str, str], Mapping[str, str]]] = {}

    def __call__(self, name: str, rows: Rows) -> NDArray[Any]:
        """Of each row id; IndexError for a row that the snapshot does not hold."""
        shard, place = np.divmod(rows, self.column.layout.shard_rows)
        if len(rows) and (
            rows.min() < 0 or shard.max() >= len(self._rows) or (place >= self._rows[shard]).any()
        ):
            raise IndexError(f"{self.column.path}: no such rows among {rows.tolist()[:8]}")
        if name not in self._kept:  # zeros that nobody touches take no memory
            kept = np.zeros(int(self._base[-1]), self.TYPES[name])
            self._kept[name] = kept, np.zeros(len(self._rows), bool)
        values, read = self._kept[name]
        if not read[shard].all():
            for s in np.unique(shard[~read[shard]]).tolist():
                values[self._base[s] : self._base[s + 1]] = self._read(name, s)
                read[s] = True
        found: NDArray[Any] = values[self._base[shard] + place]
        return found

    def _at(self, rows: Rows) -> Rows:
        """Where rows stand among those of all shards."""
        shard, place = np.divmod(rows, self.column.layout.shard_rows)
        at: Rows = self._base[shard] + place
        return at

    def seen(self, rows: Rows) -> NDArray[np.bool_]:
        """Whether each row was compared with its checksum before, by this column in this process."""
        if not self._seen.size:
            self._seen = np.zeros(int(self._base[-1]), bool)
        return self._seen[self._at(rows)]

    def see(self, rows: Rows) -> None:
        self._seen[self._at(rows)] = True

    def _read(self, name: str, shard: int) -> NDArray[Any]:
        """Of every row of a shard."""
        column, rows = self.column, int(self._rows[shard])
        if name == "starts":
            return self._starts(shard)
        spec = column._arrays[name]
        path = f"{name}/{spec.key(shard)}"
        digest = self.committed(shard).get(path)
        if digest is None:
            raise CorruptColumn(
                f"{column.store.at(commit_name(shard))}: it names no {path}, which a shard of "
                f"{rows} rows has"
            )
        data = read_small(column.store, path, spec, rows, digest)
        if name == "lengths" and data.max(initial=0) > column.layout.row_shape[0]:
            raise CorruptColumn(
                f"{column.store.at(path)}: a row of {data.max()} tokens, at most "
                f"{column.layout.row_shape[0]} expected"
            )
        return data

    def committed(self, shard: int) -> dict[str, str]:
        """sha256 of each small object of a shard, from the commit that the snapshot names."""
        return self._commit(shard)[0]

    def members(self, shard: int) -> Mapping[str, str]:
        """`members` of that commit."""
        return self._commit(shard)[1]

    def _commit(self, shard: int) -> tuple[dict[str, str], Mapping[str, str]]:
        if shard not in self._commits:
            column = self.column
            commit = own_commit(column.store, column.digest, shard)
            if commit.content != column.snapshot.content[shard]:
                raise CorruptColumn(
                    f"{column.store.at(commit_name(shard))}: not the content that the COMPLETE "
                    f"record names. Run `python -m shards verify {column.path}`"
                )
            small = {
                path: digest for path, _, digest in commit.objects if path.startswith(self.SMALL)
            }
            self._commits[shard] = small, commit.members
        return self._commits[shard]

    def _starts(self, shard: int) -> Rows:
        """Where each row of a shard starts in its object: in tokens, or in blocks of a tar."""
        layout = self.column.layout
        ids = shard * layout.shard_rows + np.arange(self._rows[shard])
        lengths = self.column.lengths(ids) if layout.ragged else np.ones(len(ids), np.int64)
        if layout.backend == "webdataset":
            there = np.isin(self("status", ids), HAS_VALUES)
            return np.where(there, tar_starts(layout, lengths, there), NO_MEMBER)
        blocks = np.pad(lengths, (0, -len(ids) % ZARR_ROWS)).reshape(-1, ZARR_ROWS)
        before: Rows = (np.cumsum(blocks, 1) - blocks).ravel()[: len(ids)]
        return before


def read_small(
    store: Store, name: str, spec: ArraySpec, count: int, digest: str | None = None
) -> NDArray[Any]:
    """The first `count` elements of a small object without a codec, whose sha256 is `digest`."""
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise CorruptColumn(
            f"{store.at(name)}: the object is missing though its shard is committed. Restore it, "
            "or repair the column"
        ) from None
    values = count * spec.chunk_bytes // spec.chunk_len
    if len(data) < values or (digest is not None and sha256(data) != digest):
        raise CorruptColumn(
            f"{store.at(name)}: its {len(data)} bytes are not those that were committed. Restore "
            "it, or repair the column"
        )
    return np.frombuffer(bytearray(data[:values]), spec.dtype).reshape(count, *spec.shape[1:])
