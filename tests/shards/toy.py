"""Columns of three shards whose every value follows from the row id, so that a lost or swapped row shows at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import (
    ColumnSpec,
    Layout,
    Norm,
    ShardWriter,
    Status,
    create_column,
    put_complete,
    put_empty,
)

SHARD_ROWS, ROWS = 2048, (1100, 40, 1024)  # two blocks, part of a chunk, a whole block
SHAPE, TOKENS, WIDTH = (4, 2, 2), 4, 3
NORM = Norm((0.5, -0.25), (2.0, 4.0))
EMPTY = np.array([[0x3F80, 0, 0x4000]], np.uint16)  # 1, 0, 2 in bfloat16
EMPTY_IDS = np.array([2, 70_000], np.int32)
SOURCE = "fingerprint of toy"


def row_ids(shard: int, rows: tuple[int, ...] = ROWS) -> NDArray[np.int64]:
    return shard * SHARD_ROWS + np.arange(rows[shard])


def moments_of(ids: NDArray[np.int64]) -> NDArray[np.float16]:
    """(n, 4, 2, 2): the id in base 100, and the place in the row. float16 holds these exactly."""
    values = np.empty((len(ids), *SHAPE), np.float16)
    values[:, 0] = (ids // 100)[:, None, None]
    values[:, 1] = (ids % 100)[:, None, None]
    values[:, 2:] = np.arange(8).reshape(2, 2, 2) / 8
    return values


def length_of(row: int, caption: int = 0) -> int:
    return 1 + (row + caption) % TOKENS


def tokens_of(row: int, caption: int = 0) -> NDArray[np.uint16]:
    """(1 to 4, 3) words below 0x7F80, so finite in bfloat16; each of a row's captions has others."""
    place = np.arange(length_of(row, caption) * WIDTH, dtype=np.uint32).reshape(-1, WIDTH)
    return ((row * 7 + place + 9_000 * caption) % 0x7F80).astype(np.uint16)


def ids_of(row: int, caption: int = 0) -> NDArray[np.int32]:
    """(1 to 4,) ids, beyond 16 bits for some; each of a row's captions has others."""
    place = np.arange(length_of(row, caption), dtype=np.int32)
    return place + np.int32(100 * row + 1_000_000 * caption)


def image_status(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    status = np.where(ids % 37 == 5, Status.IMAGE_UNDECODABLE, Status.OK)
    return np.where(ids % 41 == 3, Status.TRUNCATED, status).astype(np.uint8)


def caption_status(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.where(ids % 53 == 7, Status.CAPTION_MISSING, Status.OK).astype(np.uint8)


def moments_spec(
    shards: int = 3, source: str = SOURCE, weights: str = "vae", **storage: Any
) -> ColumnSpec:
    """`storage`: options of the layout."""
    identity = {"kind": "moments", "encoder": {"weights": weights}, "source": source}
    return ColumnSpec(identity, Layout("moments", SHAPE, shards, SHARD_ROWS, **storage), NORM)


def tokens_spec(shards: int = 3, source: str = SOURCE, **storage: Any) -> ColumnSpec:
    identity = {"kind": "tokens", "encoder": {"weights": "text"}, "source": source}
    layout = Layout("tokens", (TOKENS, WIDTH), shards, SHARD_ROWS, **storage)
    return ColumnSpec(identity, layout, empty_tokens=1)


def caption_spec(member: str, source: str = SOURCE, **preprocess: Any) -> ColumnSpec:
    """Tokens of one of several captions of a row."""
    spec = tokens_spec(source=source)
    how = {"caption": member, "template": "{}", **preprocess}
    return replace(spec, identity={**spec.identity, "preprocess": how})


def ids_spec(
    shards: int = 3, source: str = SOURCE, member: str = "txt", **storage: Any
) -> ColumnSpec:
    """Token ids of one of several captions of a row."""
    how = {"caption": member, "max_tokens": TOKENS}
    identity = {
        "kind": "ids", "encoder": {"weights": "tokenizer"}, "source": source, "preprocess": how,
    }  # fmt: skip
    layout = Layout("ids", (TOKENS,), shards, SHARD_ROWS, **storage)
    return ColumnSpec(identity, layout, empty_tokens=len(EMPTY_IDS))


SPECS = {"moments": moments_spec, "tokens": tokens_spec}
STORED: dict[str, dict[str, Any]] = {
    "zarr": {},
    "blosc": {"codec": "blosc"},
    "webdataset": {"backend": "webdataset"},
}


def write_shard(
    path: Path, spec: ColumnSpec, digest: str, shard: int, rows: tuple[int, ...] = ROWS,
    index: str = "index", shift: float = 0.0, caption: int = 0, statistics: bool = False,
) -> None:  # fmt: skip
    """Write and commit a shard; `shift` is added to the third channel of moments, `caption` is the one encoded."""
    writer = ShardWriter(path, spec, digest, shard, rows[shard], f"{index} {shard}", statistics)
    ids = row_ids(shard, rows)
    for start in range(0, len(ids), 1024):
        block = ids[start : start + 1024]
        if spec.layout.ragged:
            words: Any = ids_of if spec.layout.kind == "ids" else tokens_of
            writer.put_block([words(int(i), caption) for i in block], caption_status(block))
        else:
            values = moments_of(block)
            values[:, 2] += np.float16(shift)
            writer.put_block(values, image_status(block))
    writer.commit({"host": "toy"})


def write_column(
    path: Path, spec: ColumnSpec, rows: tuple[int, ...] = ROWS, **how: Any
) -> Path:  # fmt: skip
    digest = create_column(path, spec)
    if spec.layout.ragged:
        put_empty(path, spec, EMPTY_IDS if spec.layout.kind == "ids" else EMPTY)
    for shard in range(len(rows)):
        write_shard(path, spec, digest, shard, rows, **how)
    put_complete(path, digest, len(rows), allow_failed=False)
    return path


def small_moments(path: Path) -> Path:
    """One shard of 70 rows."""
    return write_column(path, moments_spec(1), (70,))


def small_tokens(path: Path) -> Path:
    return write_column(path, tokens_spec(1), (70,))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the litter of writers that were killed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".tmp-")
    }


class Counted:
    """A progress that keeps the total, and each count of work done."""

    def __init__(self) -> None:
        self.total = 0
        self.counts: list[int] = []

    def begin(self, total: int) -> None:
        self.total = total

    def advance(self, count: int) -> None:
        self.counts.append(count)
