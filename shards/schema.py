"""The column format, version 1: names, shapes and JSON records. What is fixed here is never
changed, only versioned.

    <column>/column.json             identity, layout and norm, put before any data
    <column>/zarr.json               a Zarr v3 group; its arrays are the objects below
    <column>/moments/c/<z>/0/0/0     rows z*1024 .. z*1024+1023        (rows, 2C, H, W) float16
    <column>/tokens/c/<z>/0          their tokens, back to back        (slots, D) bfloat16 as uint16
    <column>/lengths/c/<s>           tokens of each row of shard s     uint16
    <column>/status/c/<s>            what became of each row           uint8, fill 255 = no such row
    <column>/crc/c/<s>               crc32c of each row's values       uint32
    <column>/empty/c/0/0             the empty caption's tokens        (n, D) bfloat16 as uint16
    <column>/commits/<s>.json        shard s is whole: written last
    <column>/complete/<digest>.json  every shard accounted for; <digest>.valid: valid-row bits

row id = shard * shard_rows + row; Zarr shard z = row id // 1024; token slot = z * 1024 *
max_tokens + offset in z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from .errors import IdentityMismatch
from .storage import Json, canonical_json, sha256

COLUMN, COMMIT, COMPLETE, SOURCE, INDEX = (
    f"latentbank-{name}" for name in ("column", "commit", "complete", "source", "index")
)
VERSION = 1
SHARD_ROWS = 65_536  # rows a source tar may hold; capacity that is not used costs nothing
ZARR_ROWS = 1_024  # rows of a Zarr shard: the unit of writing, and of the logical digests
CHUNK_ROWS, CHUNK_TOKENS = 32, 512  # inner chunks, for generic Zarr readers
BLOCK = 32  # rows of one word of valid-row bits, and of one block of the order


class Status(IntEnum):
    """What became of a row."""

    OK = 0
    TRUNCATED = 1  # the picture's file is cut off, but decodes (the rest is grey)
    IMAGE_UNDECODABLE = 2
    IMAGE_MISSING = 3
    CAPTION_MISSING = 4
    CAPTION_UNDECODABLE = 5
    NON_FINITE = 6  # the encoder gave an infinity, a NaN or a value that float16 cannot hold
    SHARD_FAILED = 7
    ABSENT = 255  # the tar has no such row


HAS_VALUES = (Status.OK, Status.TRUNCATED)


@dataclass(frozen=True, slots=True)
class Norm:
    """Per-channel normalisation of latents, z = (latent - shift) * scale; one value stands for all
    channels.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of a column. `row_shape` is (2C, H, W) for moments and (max_tokens, D) for tokens."""

    kind: Literal["moments", "tokens"]
    row_shape: tuple[int, ...]
    shards: int
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if self.shard_rows % ZARR_ROWS:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of {ZARR_ROWS}")

    @property
    def ragged(self) -> bool:
        return self.kind == "tokens"

    @property
    def blocks_per_shard(self) -> int:
        """Zarr shards of values that one source shard has room for."""
        return self.shard_rows // ZARR_ROWS

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of what lies back to back in a values object: a row of moments, or one token."""
        return self.row_shape[1:] if self.ragged else self.row_shape

    @property
    def unit_bytes(self) -> int:
        return 2 * int(np.prod(self.unit_shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored words; tokens are bfloat16 held as uint16."""
        return np.dtype("<u2" if self.ragged else "<f2")

    def arrays(self) -> dict[str, ArraySpec]:
        """The column's Zarr arrays by name."""
        rows = self.shards * self.shard_rows
        if self.ragged:
            slots = ZARR_ROWS * self.row_shape[0]
            values = ArraySpec(
                (rows // ZARR_ROWS * slots, *self.unit_shape), "uint16", slots, CHUNK_TOKENS, 0,
                {"torch_dtype": "bfloat16"},
            )  # fmt: skip
        else:
            values = ArraySpec((rows, *self.row_shape), "float16", ZARR_ROWS, CHUNK_ROWS, "NaN")
        arrays = {
            self.kind: values,
            "status": ArraySpec((rows,), "uint8", self.shard_rows, ZARR_ROWS, int(Status.ABSENT)),
            "crc": ArraySpec((rows,), "uint32", self.shard_rows, ZARR_ROWS, 0),
        }
        if self.ragged:
            arrays["lengths"] = ArraySpec((rows,), "uint16", self.shard_rows, ZARR_ROWS, 0)
        return arrays


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One sharded Zarr v3 array: objects of `object_len` along the first axis, in chunks of
    `chunk_len`.
    """

    shape: tuple[int, ...]
    data_type: str
    object_len: int
    chunk_len: int
    fill: int | str
    attributes: Mapping[str, str] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.data_type).newbyteorder("<")

    @property
    def fill_value(self) -> Any:
        return self.dtype.type(np.nan if self.fill == "NaN" else self.fill)

    @property
    def chunks(self) -> int:
        """Inner chunks of an object."""
        return self.object_len // self.chunk_len

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_len * int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def key(self, number: int) -> str:
        """Path of an object below the array's folder."""
        return "/".join(["c", str(number), *["0"] * (len(self.shape) - 1)])

    def zarr_json(self) -> bytes:
        """The array's Zarr v3 metadata. No compression, no checksum codec: rows stay contiguous
        and readable in place.
        """
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.chunk_len, *self.shape[1:]],
            "codecs": [endian if self.dtype.itemsize > 1 else {"name": "bytes"}],
            "index_codecs": [endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return canonical_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape),
                "data_type": self.data_type,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [self.object_len, *self.shape[1:]]},
                },
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": self.fill,
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                "attributes": dict(self.attributes or {}),
            }
        )


def empty_spec(tokens: int, width: int) -> ArraySpec:
    """The array of the empty caption's tokens: one object, one chunk."""
    return ArraySpec((tokens, width), "uint16", tokens, tokens, 0, {"torch_dtype": "bfloat16"})


GROUP_JSON = canonical_json(
    {"zarr_format": 3, "node_type": "group", "attributes": {"latentbank": "column.json"}}
)


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """What a column is: who made it from what (identity, compared), its layout and its norm.

    `identity` is plain JSON: encoder class, path and revision, weights digest, preprocessing,
    precision, source fingerprint. `empty_tokens` is the number of tokens of the empty caption
    (token columns only).
    """

    identity: Json
    layout: Layout
    norm: Norm | None = None
    empty_tokens: int | None = None

    def arrays(self) -> dict[str, ArraySpec]:
        arrays = self.layout.arrays()
        if self.empty_tokens is not None:
            arrays["empty"] = empty_spec(self.empty_tokens, self.layout.row_shape[1])
        return arrays

    def zarr_json(self) -> dict[str, bytes]:
        """The Zarr metadata files by their path below the column."""
        files = {"zarr.json": GROUP_JSON}
        return files | {f"{k}/zarr.json": v.zarr_json() for k, v in self.arrays().items()}

    def record(self) -> Json:
        """column.json before sealing."""
        return {
            "format": COLUMN,
            "version": VERSION,
            "identity": self.identity,
            "layout": {**asdict(self.layout), "row_shape": list(self.layout.row_shape)},
            "norm": self.norm and {k: list(v) for k, v in asdict(self.norm).items()},
            "empty_tokens": self.empty_tokens,
            "zarr": {path: sha256(data) for path, data in sorted(self.zarr_json().items())},
        }

    @classmethod
    def from_record(cls, record: Json) -> ColumnSpec:
        layout = record["layout"]
        norm = record["norm"]
        return cls(
            record["identity"],
            Layout(**{**layout, "row_shape": tuple(layout["row_shape"])}),
            norm and Norm(tuple(norm["shift"]), tuple(norm["scale"])),
            record["empty_tokens"],
        )


def differences(found: Any, expected: Any, at: str = "") -> list[str]:
    """The fields in which two JSON values differ, as `field: found X, expected Y`."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        return [
            line
            for key in keys
            for line in differences(found.get(key), expected.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if found == expected else [f"{at}: found {found!r}, expected {expected!r}"]


def refuse_difference(what: str, found: Any, expected: Any, remedy: str) -> None:
    """Raise IdentityMismatch with every differing field named."""
    lines = differences(found, expected)
    if lines:
        raise IdentityMismatch("\n  ".join([f"{what} is another one:", *lines, remedy]))
