"""The WebDataset backend: the values of one shard as a tar of `.npy` members, named by row.

    <column>/tar/<shard>.tar      00000000.npy, 00000002.npy, ...   a member a row that has values

webdataset reads it as samples of one array each; its key is the row. Because every member's size
follows from its shape, so does its place: this program reads values in place, as from Zarr objects.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn
from ..format.atomic import Staging
from ..format.layout import Layout
from ..store.base import Handle, Store
from .zarr_object import read_into

BLOCK = 512  # of a tar
NPY_HEADER = 128  # of a .npy file of any shape that a row has
HEADER = BLOCK + NPY_HEADER  # before a row's values
END = bytes(2 * BLOCK)

Array = NDArray[Any]


def tar_name(shard: int) -> str:
    """Returns the path of a shard's tar below the column."""
    return f"tar/{shard:05d}.tar"


def member_blocks(values: NDArray[np.int64] | int) -> Any:
    """Returns the tar blocks that a row of so many bytes of values takes."""
    return 1 + (NPY_HEADER + values + BLOCK - 1) // BLOCK


def tar_bytes(values: NDArray[np.int64]) -> int:
    """Returns the bytes of a tar of rows with so many bytes of values each, (rows,)."""
    return BLOCK * int(member_blocks(values).sum()) + len(END)


def write_row(file: Staging, row: int, values: Array) -> None:
    """Appends a row's member."""
    header = io.BytesIO()
    described = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(values))
    np.lib.format.write_array_header_1_0(header, described)
    info = tarfile.TarInfo(f"{row:08d}.npy")
    info.size = NPY_HEADER + values.nbytes
    if len(header.getvalue()) != NPY_HEADER:
        raise ValueError(f"a .npy header of {len(header.getvalue())} bytes for {values.shape}")
    file.write(info.tobuf(tarfile.USTAR_FORMAT) + header.getvalue())
    file.write(np.ascontiguousarray(values))
    file.write(bytes(-info.size % BLOCK))


def scan(store: Store, handle: Handle, layout: Layout, name: str) -> Iterator[tuple[int, int, int]]:
    """Yields (row, byte at which its values start, bytes of them) of each member, in order.

    Raises CorruptColumn for anything but what `write_row` writes.
    """
    size, at, last = store.length(handle, name), 0, -1
    while at + len(END) < size:
        block = bytearray(HEADER)
        read_into(store, handle, block, at, name)
        try:
            info = tarfile.TarInfo.frombuf(bytes(block[:BLOCK]), "ascii", "strict")
            row = int(info.name.removesuffix(".npy"))
            header = io.BytesIO(block[BLOCK:])
            np.lib.format.read_magic(header)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
            values = math.prod(shape) * layout.dtype.itemsize
            fits = shape[1:] == layout.unit_shape if layout.ragged else shape == layout.unit_shape
            if fortran or dtype != layout.dtype or not fits or info.size != NPY_HEADER + values:
                raise ValueError(f"member {info.name!r} of {dtype} {shape}, {info.size} bytes")
            if info.name != f"{row:08d}.npy" or row <= last or values < 0:
                raise ValueError(f"member {info.name!r} after row {last}")
        except (tarfile.HeaderError, ValueError, UnicodeDecodeError) as error:
            raise CorruptColumn(
                f"{name}: no member of a column's tar at byte {at}: {error}"
            ) from None
        yield row, at + HEADER, values
        last, at = row, at + BLOCK * int(member_blocks(values))
    if at + len(END) != size:
        raise CorruptColumn(f"{name}: cut off at byte {size}; its members end at {at}")


def starts(
    layout: Layout, lengths: NDArray[np.int64], present: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Returns the tar block at which each row of a shard starts, for rows that are present."""
    blocks = np.where(present, member_blocks(lengths * layout.unit_bytes), 0)
    first: NDArray[np.int64] = np.cumsum(blocks) - blocks
    return first


def first_byte(block: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the byte at which the values of a row start whose member starts at a tar block."""
    return block * BLOCK + HEADER
