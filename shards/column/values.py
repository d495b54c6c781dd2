"""The values of one shard as objects: written, or adopted where they exist already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn
from ..format.atomic import Staging
from ..format.layout import HAS_VALUES, ZARR_ROWS, ArraySpec, Layout
from ..store.base import Store
from .tar_object import END, scan, tar_name, write_row
from .zarr_object import pack, read_elements, read_index, read_into

Values = NDArray[Any] | Sequence[NDArray[Any]]  # rows of one shape, or of any length
PIECE = 1 << 24  # bytes read at once where an object is hashed


class ZarrValues:
    """Values as Zarr objects, one a block of 1,024 rows, each published when it is written."""

    def __init__(self, store: Store, layout: Layout, shard: int) -> None:
        self.store, self.layout, self.shard = store, layout, shard
        self.array = layout.arrays()[layout.kind]
        self.objects: list[tuple[str, int, str]] = []
        self._new: list[str] = []

    def put(
        self, start: int, values: Values, lengths: NDArray[Any], status: NDArray[np.uint8]
    ) -> Values:
        """Writes one values object, or adopts the one of its name; returns the values in it."""
        ragged = self.layout.ragged
        count = int(lengths.sum()) if ragged else len(values)
        if not count:
            return values
        number = self.shard * self.layout.blocks_per_shard + start // ZARR_ROWS
        path = f"{self.layout.kind}/{self.array.key(number)}"
        parts = [values] if isinstance(values, np.ndarray) else list(values)
        new, size, digest = put_object(self.store, path, self.array, parts)
        self.objects.append((path, size, digest))
        if new:
            self._new.append(path)
            return values
        adopted = read_object(self.store, path, self.array, count)
        return np.split(adopted, np.cumsum(lengths)[:-1]) if ragged else adopted

    def finish(self) -> bool:
        return True

    def withdraw(self) -> None:
        for path in self._new:
            self.store.delete(path)

    def close(self) -> None:
        pass


class TarValues:
    """Values as one tar of `.npy` members, published by `finish`; a tar that exists is adopted."""

    def __init__(self, store: Store, layout: Layout, shard: int) -> None:
        self.store, self.layout, self.path = store, layout, tar_name(shard)
        self.objects: list[tuple[str, int, str]] = []
        self._open = ExitStack()
        self._file: Staging | None = None
        if store.size(self.path) is None:
            self._file = self._open.enter_context(store.staged(self.path))
            return
        store.make_durable(self.path)
        store.touch(self.path)
        self._handle = store.open(self.path)
        self._open.callback(store.close, self._handle)
        size = store.length(self._handle, store.at(self.path))
        store.forget(self._handle, 0, size)  # pages of it may be damaged
        members = scan(store, self._handle, layout, store.at(self.path))
        self._members = {row: (start, size) for row, start, size in members}
        self.objects.append((self.path, *sha256_of(store, self.path)))

    def put(
        self, start: int, values: Values, lengths: NDArray[Any], status: NDArray[np.uint8]
    ) -> Values:
        """Appends rows that have values; returns the values in the tar."""
        if self._file is None:
            return self.existing(start, lengths, status)
        for i in np.flatnonzero(
            np.isin(status, HAS_VALUES) & finite_rows(self.layout, values)
        ).tolist():
            write_row(self._file, start + i, values[i])
        return values

    def existing(self, start: int, lengths: NDArray[Any], status: NDArray[np.uint8]) -> Values:
        """Returns some rows of the adopted tar; a row that it lacks is blank."""
        layout, name = self.layout, self.store.at(self.path)
        rows = []
        for i, present in enumerate(np.isin(status, HAS_VALUES)):
            row = layout.blank(int(lengths[i]) if layout.ragged else 1)
            if start + i in self._members:
                first_byte, size = self._members[start + i]
                if not present or size != row.nbytes:
                    raise CorruptColumn(
                        f"{name}: row {start + i} has {size} bytes, {row.nbytes * present} were "
                        "to be written. The tar is of no commit: delete it and encode again"
                    )
                if row.nbytes:
                    view = row.reshape(-1).view(np.uint8).data
                    read_into(self.store, self._handle, view, first_byte, name)
            rows.append(row if layout.ragged else row[0])
        return rows if layout.ragged else np.stack(rows)

    def finish(self) -> bool:
        """Publishes the tar; False if another writer was first."""
        if self._file is None:
            return True
        self._file.write(END)
        new = self._file.publish()
        if new:
            self.objects.append((self.path, self._file.bytes, self._file.sha256))
        return new

    def withdraw(self) -> None:
        self.close()  # nothing is published before the commit

    def close(self) -> None:
        self._open.close()


def put_object(
    store: Store, path: str, spec: ArraySpec, parts: Sequence[NDArray[Any]]
) -> tuple[bool, int, str]:
    """Writes an object whole, if absent; returns whether it is new, and its size and sha256."""
    with store.staged(path) as file:
        pack(file, spec, parts)
        if file.publish():
            return True, file.bytes, file.sha256
    store.touch(path)
    return (False, *sha256_of(store, path))


def read_object(store: Store, path: str, spec: ArraySpec, count: int) -> NDArray[Any]:
    """Returns the `count` elements of an object, which must hold exactly so many."""
    name, handle = store.at(path), store.open(path, cached=False)
    try:
        elements = (len(read_index(store, handle, spec, name)) - 1) * spec.chunk_len
        if elements != count + -count % spec.chunk_len:
            raise CorruptColumn(
                f"{name}: found an object of {elements} elements where {count} were to be written. "
                "It is of no commit: delete it and encode again"
            )
        return read_elements(store, handle, spec, 0, count, name)
    finally:
        store.close(handle)


def sha256_of(store: Store, name: str) -> tuple[int, str]:
    """Returns bytes and sha256 of an object."""
    handle = store.open(name, cached=False)
    try:
        digest, size = hashlib.sha256(), store.length(handle, store.at(name))
        buffer = memoryview(bytearray(min(PIECE, size)))
        for start in range(0, size, PIECE):
            piece = buffer[: min(PIECE, size - start)]
            read_into(store, handle, piece, start, store.at(name))
            digest.update(piece)
    finally:
        store.close(handle)
    return size, digest.hexdigest()


def finite_rows(layout: Layout, values: Values) -> NDArray[np.bool_]:
    """Returns which rows hold finite numbers only, (rows,)."""
    return np.array([layout.finite(row) for row in values], bool)
