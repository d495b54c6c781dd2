"""One object of a sharded Zarr v3 array: `pack` streams it out, `read_into` reads parts of it.

    chunk 0 | chunk 1 | ... | index: offset and bytes of each chunk as uint64 | crc32c of the index

(An absent chunk has 2^64-1 twice.) Our objects hold their present chunks first and back to back, so
element i stands at i times its size; generic Zarr readers go by the index, which says the same.
"""

from __future__ import annotations

import os
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from .errors import CorruptColumn
from .schema import ArraySpec
from .storage import Staged

ABSENT = np.uint64(2**64 - 1)


def crc32c(data: Any) -> int:
    """crc32c of a bytes-like object."""
    if not memoryview(data).nbytes:
        return 0
    view = np.frombuffer(data, np.uint8)
    view.flags.writeable = False  # the library takes read-only buffers
    return int(google_crc32c.value(view))


def pack(file: Staged, spec: ArraySpec, parts: list[NDArray[Any]]) -> None:
    """Write the elements of `parts`, laid end to end, as one object; the last chunk is filled up,
    later ones absent.
    """
    elements = 0
    for part in parts:
        if part.shape[1:] != spec.shape[1:]:
            raise ValueError(f"elements of shape {part.shape[1:]}, the array says {spec.shape[1:]}")
        file.write(np.ascontiguousarray(part, spec.dtype))
        elements += len(part)
    if not 0 < elements <= spec.object_len:
        raise ValueError(f"{elements} elements in an object of {spec.object_len}")
    rest = -elements % spec.chunk_len
    file.write(np.full((rest, *spec.shape[1:]), spec.fill_value, spec.dtype))
    present = (elements + rest) // spec.chunk_len
    index = np.full((spec.chunks, 2), ABSENT, "<u8")
    index[:present, 0] = np.arange(present) * spec.chunk_bytes
    index[:present, 1] = spec.chunk_bytes
    data = index.tobytes()
    file.write(data + crc32c(data).to_bytes(4, "little"))


def check_index(descriptor: int, spec: ArraySpec, name: str) -> int:
    """Check an open object's size and index; returns how many elements its chunks hold.

    Raises CorruptColumn for a truncated or lengthened file, a damaged index, or one that is not
    laid back to back.
    """
    size, index_bytes = os.fstat(descriptor).st_size, 16 * spec.chunks + 4
    tail = os.pread(descriptor, index_bytes, max(0, size - index_bytes))
    if len(tail) != index_bytes or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
        raise CorruptColumn(f"{name}: the object's index is damaged or cut off ({size} bytes)")
    index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)
    present = int((index[:, 0] != ABSENT).sum())
    expected = np.full_like(index, ABSENT)
    expected[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(spec.chunk_bytes)
    expected[:present, 1] = spec.chunk_bytes
    if size != present * spec.chunk_bytes + index_bytes or not np.array_equal(index, expected):
        raise CorruptColumn(
            f"{name}: {size} bytes and {present} chunks do not fit the layout of this column "
            f"(chunks of {spec.chunk_bytes} bytes, back to back); it was not written by this "
            "program"
        )
    return present * spec.chunk_len


def read_elements(
    descriptor: int, spec: ArraySpec, first: int, count: int, name: str
) -> NDArray[Any]:
    """Elements first .. first+count-1 of an open object."""
    out = np.empty((count, *spec.shape[1:]), spec.dtype)
    read_into(descriptor, out, first * (spec.chunk_bytes // spec.chunk_len), name)
    return out


def read_into(descriptor: int, out: NDArray[Any], offset: int, name: str) -> None:
    """Fill a contiguous array from a file, straight from the page cache."""
    view = out.reshape(-1).view(np.uint8).data
    while view:
        got = os.preadv(descriptor, [view], offset)
        if not got:
            raise CorruptColumn(f"{name}: the object ends before byte {offset + len(view)}")
        view, offset = view[got:], offset + got
