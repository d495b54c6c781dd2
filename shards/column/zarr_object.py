"""One object of a sharded Zarr v3 array: `pack` streams it out, `read_elements` reads parts of it.

    chunk 0 | chunk 1 | ... | index: offset and bytes of each chunk as uint64 | crc32c of the index

(An absent chunk has 2^64-1 twice.) Our objects hold their present chunks first and back to back, so
without a codec element i is at i times its size; generic Zarr readers go by the index, which
says the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn
from ..format.atomic import Staging, naming
from ..format.layout import BLOSC, ArraySpec
from ..store.base import Handle, Store
from .checksum import crc32c

ABSENT = np.uint64(2**64 - 1)
Array = NDArray[Any]


def compress(chunk: Array) -> bytes:
    """Returns a chunk as the blosc codec of the array's metadata stores it."""
    from numcodecs import Blosc

    blosc = Blosc(BLOSC["cname"], BLOSC["clevel"], Blosc.BITSHUFFLE, typesize=chunk.itemsize)
    return bytes(blosc.encode(np.ascontiguousarray(chunk)))


def decompress(data: bytes | bytearray, out: Array, name: str) -> None:
    """Decodes one chunk into a contiguous array of just its size; CorruptColumn if it is not one."""
    from numcodecs import blosc

    try:
        size, _, encoded = np.frombuffer(data[4:16], "<u4")  # of blosc's header
        if (size, encoded) != (out.nbytes, len(data)):
            raise RuntimeError(f"{size} bytes in {encoded}")
        blosc.decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise CorruptColumn(
            f"{name}: a chunk cannot be decoded ({error}); {out.nbytes} bytes in {len(data)} were "
            "expected"
        ) from None


def chunked(parts: Sequence[Array], spec: ArraySpec) -> Iterator[Array]:
    """Yields the elements of `parts`, laid end to end, as whole chunks; the last is filled up."""
    chunk = np.full((spec.chunk_len, *spec.shape[1:]), spec.fill_value, spec.dtype)
    filled = 0
    for part in parts:
        while len(part):
            take = min(len(part), spec.chunk_len - filled)
            chunk[filled : filled + take] = part[:take]
            filled, part = filled + take, part[take:]
            if filled == spec.chunk_len:
                yield chunk
                filled = 0
                chunk[:] = spec.fill_value
    if filled:
        yield chunk


def pack(file: Staging, spec: ArraySpec, parts: Sequence[Array]) -> None:
    """Writes the elements of `parts`, laid end to end, as one object; the last chunk is filled up,
    later ones absent.
    """
    for part in parts:
        if part.shape[1:] != spec.shape[1:]:
            raise ValueError(f"elements of shape {part.shape[1:]}, the array says {spec.shape[1:]}")
    elements = sum(map(len, parts))
    if not 0 < elements <= spec.object_len:
        raise ValueError(f"{elements} elements in an object of {spec.object_len}")
    present = -(-elements // spec.chunk_len)
    sizes = np.full(present, spec.chunk_bytes, "<u8")
    if spec.codec:
        for number, chunk in enumerate(chunked(parts, spec)):
            data = compress(chunk)
            file.write(data)
            sizes[number] = len(data)
    else:
        for part in parts:
            file.write(np.ascontiguousarray(part, spec.dtype))
        padding = present * spec.chunk_len - elements
        file.write(np.full((padding, *spec.shape[1:]), spec.fill_value, spec.dtype))
    index = np.full((spec.chunks, 2), ABSENT, "<u8")
    index[:present, 0] = np.cumsum(sizes) - sizes
    index[:present, 1] = sizes
    file.write(index.tobytes() + crc32c(index).to_bytes(4, "little"))


def read_index(store: Store, handle: Handle, spec: ArraySpec, name: str) -> NDArray[np.uint64]:
    """Checks an open object's size and index; returns where each present chunk starts, and where the
    last ends.

    Raises CorruptColumn for a truncated or lengthened file, a damaged index, or one that is not
    laid back to back.
    """
    size = store.length(handle, name)
    index_bytes = 16 * spec.chunks + 4
    if size < index_bytes:
        raise CorruptColumn(f"{name}: the object is cut off ({size} bytes)")
    tail = np.zeros(index_bytes, np.uint8)
    read_into(store, handle, tail.data, size - index_bytes, name, apart=True)
    if crc32c(tail[:-4]) != int.from_bytes(tail[-4:].tobytes(), "little"):
        raise CorruptColumn(f"{name}: the object's index is damaged or cut off ({size} bytes)")
    index = tail[:-4].view("<u8").reshape(-1, 2)
    present = int((index[:, 0] != ABSENT).sum())
    edges = np.zeros(present + 1, np.uint64)
    np.cumsum(index[:present, 1], out=edges[1:])
    sound = bool(
        (index[present:] == ABSENT).all()
        and (index[:present, 0] == edges[:-1]).all()
        and (index[:present, 1] <= np.uint64(size)).all()
        and (spec.codec or (index[:present, 1] == spec.chunk_bytes).all())
        and int(edges[-1]) + index_bytes == size
    )
    if not sound:
        raise CorruptColumn(
            f"{name}: {size} bytes and {present} chunks do not fit the layout of this column "
            f"(chunks of {spec.chunk_bytes} bytes, back to back); it was not written by this "
            "program"
        )
    return edges


def read_elements(
    store: Store, handle: Handle, spec: ArraySpec, first: int, count: int, name: str
) -> Array:
    """Returns elements first .. first+count-1 of an open object whose index has been checked."""
    out = np.empty((count, *spec.shape[1:]), spec.dtype)
    if spec.codec:
        decode_into(store, handle, spec, read_index(store, handle, spec, name), first, out, name)
    else:
        element = spec.chunk_bytes // spec.chunk_len
        view = out.reshape(-1).view(np.uint8).data
        read_into(store, handle, view, first * element, name)
    return out


def decode_into(
    store: Store, handle: Handle, spec: ArraySpec, edges: NDArray[np.uint64], first: int, out: Array,
    name: str,
) -> None:  # fmt: skip
    """Fills `out` with elements from `first` on of an object that has a codec; `edges` is its index."""
    scratch, at = None, 0
    while at < len(out):
        chunk, inside = divmod(first + at, spec.chunk_len)
        take = min(spec.chunk_len - inside, len(out) - at)
        if chunk + 1 >= len(edges):
            raise CorruptColumn(f"{name}: the object ends before element {first + at}")
        start, size = int(edges[chunk]), int(edges[chunk + 1] - edges[chunk])
        data = bytearray(size)
        read_into(store, handle, data, start, name)
        if take == spec.chunk_len:
            decompress(data, out[at : at + take], name)
        else:
            if scratch is None:
                scratch = np.empty((spec.chunk_len, *spec.shape[1:]), spec.dtype)
            decompress(data, scratch, name)
            out[at : at + take] = scratch[inside : inside + take]
        at += take


def read_into(
    store: Store, handle: Handle, view: Any, offset: int, name: str, apart: bool = False
) -> None:
    """Fills a flat buffer from an open object, `apart` by `Store.read_apart`; CorruptColumn if the object
    ends before that.
    """
    view = memoryview(view)
    read = store.read_apart if apart else store.preadv
    with naming(name):
        while view:
            count = read(handle, [view], offset)
            if not count:
                raise CorruptColumn(f"{name}: the object ends before byte {offset + len(view)}")
            view, offset = view[count:], offset + count
