"""The objects that hold a column's values: opened, each checked once, and read at places that are
known by arithmetic.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from ..column.checksum import crc32c
from ..column.tar_object import tar_name
from ..column.zarr_object import decode_into, read_index, read_into
from ..errors import CorruptColumn
from ..format.atomic import naming
from ..format.layout import ArraySpec, ColumnSpec
from ..store.base import Committed, Handle, Store
from ..store.fetchers import fetch_all

OPEN_FILES = 4  # of a column at least; all of a process share half of what it may open
REMOTE_HANDLES = 1 << 17  # of a column: they hold no descriptor, but half a kilobyte of memory each
INDEX_BYTES = 1 << 26  # of the chunk indexes that are kept of a column with a codec
MOST_COMPRESSED = 256  # lz4 packs no tighter
HINT_GAP = 1 << 16  # ranges closer than this are one to the disk
REMOTE_GAP = 1 << 12  # and than this to a store, or than a twentieth of both
MOST_MERGED = 32 << 20  # bytes; a store's reader asks for no larger range, but for one large row
REQUESTS = 32  # indexes of a store's objects that are on their way at once

Ints = NDArray[np.int64]

# of folders, in this process, but for those that were closed
_ALIVE: WeakSet[ValueObjects] = WeakSet()


class Places(NamedTuple):
    """Where rows are, an array of each."""

    object: Ints  # number of the object
    start: Ints  # byte of it, as if there were no codec; -1: the row has no member in the tar
    size: Ints  # bytes

    def at(self, index: Any) -> Places:
        """Returns the places of some of the rows."""
        return Places(self.object[index], self.start[index], self.size[index])

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Yields (object, start, size) of each row."""
        return zip(self.object.tolist(), self.start.tolist(), self.size.tolist(), strict=True)


class ValueObjects:
    """Open objects of a column, by number; the least recently opened are closed.

    `committed` returns what the commit of a shard says of an object: a store is then not asked for it
    before it is read. The rows of one without a codec need no index: they follow by arithmetic, and
    each has a checksum.
    """

    def __init__(
        self, store: Store, spec: ColumnSpec, committed: Callable[[str, int], Committed]
    ) -> None:
        self.store, self.layout, self._committed = store, spec.layout, committed
        self.handles: dict[int, Handle] = {}
        self._arrays = spec.arrays()
        self._checked: set[int] = set()
        self._edges: dict[int, NDArray[np.uint64]] = {}
        self._beside = 0
        self._count_in()

    def _count_in(self) -> None:
        """Takes a share of the files that this process may open, where files it is."""
        if self.store.folder is not None:
            _ALIVE.add(self)

    # Opening --------------------------------------------------------------------------------------

    @cached_property
    def _array(self) -> ArraySpec:
        """The Zarr array that the objects are of; tars are of none."""
        return self._arrays[self.layout.kind]

    @property
    def limit(self) -> int:
        """Objects that this column may hold open now."""
        if self.store.folder is None:
            return REMOTE_HANDLES
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(OPEN_FILES, min(soft // 2, 1 << 17) // max(1, len(_ALIVE)))

    def path(self, number: int) -> str:
        if self.layout.backend == "webdataset":
            return tar_name(number)
        return f"{self.layout.kind}/{self._array.key(number)}"

    def name(self, number: int) -> str:
        """Full name of an object, for messages."""
        return self.store.at(self.path(number))

    def open(self, number: int) -> Handle:
        """Returns the handle of an object, opened if it is not; CorruptColumn if there is none."""
        if number in self.handles:
            return self.handles[number]
        while len(self.handles) >= self.limit:
            self._close(next(iter(self.handles)))
        try:
            handle = self._open(number)
        except FileNotFoundError:
            raise self._missing(number) from None
        local = self.store.folder is not None  # there an index costs nothing
        if local and number not in self._checked and self.layout.backend == "zarr":
            try:
                self._index(number, handle)
            except (CorruptColumn, OSError):
                self.store.close(handle)
                raise
        if not local and number in self._checked:  # what came meanwhile, nobody knows
            handle.anew = True
        if not local:
            handle.beside = self._beside
        self._checked.add(number)
        self.handles[number] = handle
        self._count_in()  # again, if it was closed
        return handle

    def open_all(self, numbers: Ints) -> None:
        """Opens objects that are not."""
        for number in set(numbers.tolist()).difference(self.handles):
            self.open(number)

    def keep_beside(self, size: int) -> None:
        """Has a store keep what is read only where `size` bytes fit beside what it expects to be read."""
        if size != self._beside:
            self._beside = size
            for handle in self.handles.values():
                handle.beside = size

    def _open(self, number: int) -> Handle:
        """Opens an object; where this process may open no more files, half of ours are closed first."""
        if self.store.folder is None:
            tar = self.layout.backend == "webdataset"
            shard = number if tar else number // self.layout.blocks_per_shard
            path = self.path(number)
            return self.store.open(path, committed=self._committed(path, shard))
        try:
            return self.store.open(self.path(number))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.handles:
                raise
        for other in list(self.handles)[: -(-len(self.handles) // 2)]:
            self._close(other)
        return self.store.open(self.path(number))

    def _missing(self, number: int) -> CorruptColumn:
        return CorruptColumn(
            f"{self.name(number)}: the object is missing though its shard is committed. "
            "Restore it, or repair the column"
        )

    def _index(self, number: int, handle: Handle) -> NDArray[np.uint64]:
        """Returns the chunk index of an open object; a remote one that is damaged is fetched once more."""
        try:
            with suppress(CorruptColumn):
                return read_index(self.store, handle, self._array, self.name(number))
            self.store.forget(handle, 0, self.store.length(handle, self.name(number)))
            return read_index(self.store, handle, self._array, self.name(number))
        except FileNotFoundError:  # a store is asked for an object when it is read
            raise self._missing(number) from None

    def _close(self, number: int) -> None:
        handle = self.handles.pop(number, None)
        if handle is not None:  # else closed by another thread
            self.store.close(handle)

    def close(self) -> None:
        _ALIVE.discard(self)
        for number in list(self.handles):
            self._close(number)

    # Values ---------------------------------------------------------------------------------------

    def read(
        self, places: Places, view: memoryview, at: Ints, checksums: Ints | None = None
    ) -> Ints:
        """Reads the i-th row's bytes to `view[at[i]:]`, with one `preadv` where there is no codec.

        Each row is compared with its crc32c, if one is given that is not negative, as soon as it is
        read, while the processor has it in its cache. Returns the indexes of those that do not fit.
        """
        handles, preadv, codec = self.handles, self.store.preadv, self.layout.codec
        number, unfit = -1, list[int]()
        expected = [-1] * len(at) if checksums is None else checksums.tolist()
        rows = zip(places.rows(), at.tolist(), expected, strict=True)
        try:
            for i, ((number, start, size), to, checksum) in enumerate(rows):
                part = view[to : to + size]
                if start < 0:  # no member in the tar: a row without values
                    part[:] = self.layout.blank(size // self.layout.unit_bytes).tobytes()
                elif size and codec:
                    self._decode(number, start, part)
                elif size:
                    handle = handles.get(number)
                    if handle is None:
                        handle = self.open(number)
                    if preadv(handle, [part], start) != size:  # once more, or the object's end
                        read_into(self.store, handle, part, start, self.name(number))
                if checksum >= 0 and crc32c(part) != checksum:
                    unfit.append(i)
        except FileNotFoundError:  # a store is asked for an object when it is read
            raise self._missing(number) from None
        except OSError as error:
            if error.errno and not error.filename:
                error.filename = self.name(number)
            raise
        return np.array(unfit, np.int64)

    def _decode(self, number: int, start: int, view: memoryview) -> None:
        """Reads a row through the codec; a remote one that cannot be decoded is fetched once more."""
        try:
            self._decode_once(number, start, view)
        except CorruptColumn:
            place = Places(*(np.array([each]) for each in (number, start, len(view))))
            if not self.forget(place):
                raise
            self._decode_once(number, start, view)

    def _decode_once(self, number: int, start: int, view: memoryview) -> None:
        out = np.frombuffer(view, self.layout.dtype).reshape(-1, *self.layout.unit_shape)
        decode_into(
            self.store, self.open(number), self._array, self._chunk_edges(number),
            start // self.layout.unit_bytes, out, self.name(number),
        )  # fmt: skip

    def _chunk_edges(self, number: int) -> NDArray[np.uint64]:
        """Returns the chunk index of an object that has a codec."""
        if number not in self._edges:
            self._keep_edges({number: self._index(number, self.open(number))})
        return self._edges[number]

    def _keep_edges(self, edges: dict[int, NDArray[np.uint64]]) -> None:
        """Keeps chunk indexes, and of those that were loaded before what there is room for."""
        for number in edges:
            self._edges.pop(number, None)
        excess = len(self._edges) + len(edges) - INDEX_BYTES // (8 * self._array.chunks)
        for number in list(self._edges)[: max(0, excess)]:  # the oldest
            del self._edges[number]
        self._edges |= edges

    def load_indexes(self, objects: Ints, lock: Any) -> None:
        """Reads the chunk indexes of objects of a store that have a codec, many at once; `lock` is held
        but for the reading.
        """
        with lock:
            needed = np.unique(objects).tolist()
            loaded = {n: self._edges[n] for n in needed if n in self._edges}
            numbers = [n for n in needed if n not in loaded]
            handles = [self.open(number) for number in numbers]
        if numbers:
            with ThreadPoolExecutor(REQUESTS) as pool:
                opened = zip(numbers, handles, strict=True)
                edges = fetch_all(pool, lambda each: self._index(*each), opened)
            with lock:
                self._keep_edges(loaded | dict(zip(numbers, edges, strict=True)))

    def _stored(self, places: Places) -> Places:
        """Returns where rows are as they are stored: with a codec, the chunks that hold them."""
        if not self.layout.codec:
            return places
        start, size = np.zeros_like(places.start), np.zeros_like(places.size)
        for i, (number, first_byte, count) in enumerate(places.rows()):
            if count:
                end = first_byte + count
                first, last = (
                    first_byte // self._array.chunk_bytes,
                    -(-end // self._array.chunk_bytes),
                )
                if last >= len(edges := self._chunk_edges(number)):
                    raise CorruptColumn(f"{self.name(number)}: the object ends before byte {end}")
                start[i], size[i] = edges[first], edges[last] - edges[first]
        return Places(places.object, start, size)

    def came_anew(self, objects: Ints) -> list[int]:
        """Returns those of some objects whose bytes may have come over a network once more."""
        came_anew, handles = self.store.came_anew, self.handles
        return [n for n in set(objects.tolist()) if n in handles and came_anew(handles[n])]

    def forget(self, place: Places) -> bool:
        """Drops what is cached of a row; False if nothing is ever cached."""
        ((number, start, size),) = self._stored(place).rows()
        return start >= 0 and self.store.forget(self.open(number), start, size)

    def hint(self, places: Places) -> None:
        """Says that rows will be read soon: the disk reads ahead, a remote object is fetched."""
        places = self._stored(places)
        places = places.at((places.start >= 0) & (places.size > 0))  # no range begins with nothing
        places = places.at(np.lexsort((places.start, places.object)))
        end = places.start + places.size
        gap: Any = HINT_GAP
        if self.store.folder is None:  # bytes that nobody reads are paid for
            gap = np.maximum(REMOTE_GAP, (places.size[1:] + places.size[:-1]) // 20)
        apart = np.ones(len(end), bool)
        apart[1:] = places.object[1:] != places.object[:-1]
        apart[1:] |= places.start[1:] > end[:-1] + gap
        first = np.flatnonzero(apart)
        if len(
            end
        ):  # a range that is too large for what may be held would not be fetched ahead at all
            since = places.start - np.repeat(places.start[first], np.diff([*first, len(end)]))
            apart[1:] |= np.diff(since // MOST_MERGED) > 0
            first = np.flatnonzero(apart)
        ends = np.maximum.reduceat(end, first).tolist() if len(end) else []
        wanted = np.add.reduceat(places.size, first).tolist() if len(end) else []
        ranges = zip(places.at(first).rows(), ends, wanted, strict=True)
        for (number, start, _), last, count in ranges:
            self.store.willneed(self.open(number), start, last - start, count)

    def refuse_short(self, places: Places) -> None:
        """Raises CorruptColumn if objects are too small to hold these rows, before memory is taken
        for them.
        """
        if self.layout.codec:
            short = places.object[places.size > MOST_COMPRESSED * self._stored(places).size]
        else:
            places = places.at((places.start >= 0) & (places.size > 0))
            objects, inverse = np.unique(places.object, return_inverse=True)
            ends = np.zeros(len(objects), np.int64)
            np.maximum.at(ends, inverse, places.start + places.size)
            short = objects[np.array([self._length(n) for n in objects.tolist()], np.int64) < ends]
        if len(short):
            raise CorruptColumn(
                f"{self.name(int(short[0]))}: the object is too small for its rows. Restore it, or "
                "repair the column"
            )

    def _length(self, number: int) -> int:
        """Returns the bytes of an object."""
        with naming(self.name(number)):
            return self.store.length(self.open(number), self.name(number))
