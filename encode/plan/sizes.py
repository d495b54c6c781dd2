"""How many bytes a column will take: the arithmetic of the layout, objects and records alike.

Exact for stored arrays without a codec (as `zarr_object` and `tar_object` write them), within a few
bytes for the records. A codec makes values smaller by a ratio that must be measured.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shards import Layout, seal
from shards.column import Commit, statistics_bytes, tar_bytes
from shards.format import GROUP_JSON, KINDS, ZARR_ROWS, ArraySpec

DIGEST = "0" * 64  # of the size of any
# what a commit tells of how it was made: host, versions, device, seconds
PROVENANCE = {"of": "x" * 310}
COLUMN_RECORD, ARRAY_RECORD = 720, 82  # bytes of column.json, and more of it for each array
CHANNEL = 21  # bytes of the scale of a channel of int8
CHANNEL_ERROR = 9  # and of what is lost in it


def object_bytes(array: ArraySpec, elements: int) -> int:
    """Returns the bytes of one Zarr object before compression; none is written for no elements."""
    if not elements:
        return 0
    return -(-elements // array.chunk_len) * array.chunk_bytes + 16 * array.chunks + 4


def shard_bytes(
    layout: Layout, present: NDArray[np.bool_], lengths: NDArray[np.int64], ratio: float = 1.0
) -> int:
    """Returns the bytes that one shard adds to a column: values, small arrays, commit record.

    `present` says which rows have values, (rows,); `lengths` is tokens a row, 0 where there are
    none (of no meaning where rows are of one shape). `ratio` is what a codec makes of the values.
    """
    rows, arrays = len(present), layout.arrays()
    objects = _values(layout, present, lengths, ratio)
    for name in ("lengths", "status", "crc"):
        if name in arrays and rows:
            size = object_bytes(arrays[name], rows)
            objects.append((f"{name}/{arrays[name].key(0)}", size, DIGEST))
    total = sum(size for _, size, _ in objects)
    if layout.ragged:  # of the column, but named by every commit
        objects.append(("empty/c/0/0", 10_000, DIGEST))
    blocks = -(-rows // ZARR_ROWS)
    runs = int(np.count_nonzero(np.diff(~present, prepend=False, append=False))) // 2
    commit = Commit(
        1, rows, ((1_000, 1, 2),) * runs, tuple(objects), (DIGEST,) * blocks, DIGEST, DIGEST,
        PROVENANCE, {"jpg": DIGEST},
    )  # fmt: skip
    return total + len(seal(commit.record()))


def _values(
    layout: Layout, present: NDArray[np.bool_], lengths: NDArray[np.int64], ratio: float
) -> list[tuple[str, int, str]]:
    """Returns the objects that hold the values of a shard: (path, bytes, digest)."""
    if layout.backend == "webdataset":
        each = np.where(layout.ragged, lengths, 1)[present] * layout.unit_bytes
        return [("tar/00000.tar", tar_bytes(each), DIGEST)]
    array, objects = layout.arrays()[layout.kind], []
    for start in range(0, len(present), ZARR_ROWS):
        block = slice(start, start + ZARR_ROWS)
        count = int(lengths[block][present[block]].sum()) if layout.ragged else len(present[block])
        size = object_bytes(array, count)
        if layout.codec and size:
            tail = 16 * array.chunks + 4
            size = int((size - tail) * ratio) + tail
        if size:
            objects.append((f"{layout.kind}/{array.key(start)}", size, DIGEST))
    return objects


def column_bytes(layout: Layout, rows: int, empty: int = 0, statistics: bool = False) -> int:
    """Returns the bytes a column holds once, beside its shards: column.json, Zarr metadata, the
    empty caption (`empty` tokens), the COMPLETE record of `rows` rows, and sums over rows.
    """
    arrays = layout.arrays()
    metadata = len(GROUP_JSON) + sum(len(array.zarr_json()) for array in arrays.values())
    record = COLUMN_RECORD + ARRAY_RECORD * (len(arrays) + 1)
    if layout.quantised:
        record += (CHANNEL if layout.ragged else CHANNEL + CHANNEL_ERROR) * layout.channels
    if layout.ragged:
        plain = replace(layout, element=KINDS[layout.kind][1][0])
        metadata += 500  # of the empty caption's array
        record += empty * plain.unit_bytes + 20 + ARRAY_RECORD
    sums = statistics_bytes(layout) if statistics else 0
    return metadata + record + layout.shards * 140 + rows // 8 + 350 + sums


def alternatives(layout: Layout) -> dict[str, Layout]:
    """Returns cheaper layouts for the same captions, features or latents, by name."""
    if layout.kind in ("features", "latents") and not layout.quantised:
        return {"int8": replace(layout, element="int8", codec=None)}
    if layout.kind != "tokens":
        return {}
    most, shards, rows = layout.row_shape[0], layout.shards, layout.shard_rows
    layouts = {} if layout.quantised else {"int8": replace(layout, element="int8", codec=None)}
    return layouts | {"ids": Layout("ids", (most,), shards, rows)}
