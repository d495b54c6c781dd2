"""The column format, version 1: names, shapes and JSON records. What is fixed here is never
changed, only versioned.

    <column>/column.json             identity, layout and norm, put before any data
    <column>/zarr.json               a Zarr v3 group; its arrays are the objects below
    <column>/moments/c/<z>/0/0/0     rows z*1024 .. z*1024+1023        (rows, 2C, H, W) float16
    <column>/latents/c/<z>/0/0/0     of an encoder without posterior     (rows, C, H, W) float16
    <column>/tokens/c/<z>/0          their tokens, back to back        (slots, D) bfloat16 as uint16
    <column>/ids/c/<z>               or their token ids                (slots,) int32
    <column>/lengths/c/<s>           tokens of each row of shard s     uint16
    <column>/status/c/<s>            what became of each row           uint8, fill 255 = no such row
    <column>/crc/c/<s>               crc32c of each row's values       uint32
    <column>/empty/c/0/0             the empty caption's tokens        (n, D) bfloat16 as uint16
    <column>/tar/<s>.tar             in place of moments or tokens, where the backend is webdataset
    <column>/commits/<s>.json        shard s is whole: written last
    <column>/complete/<digest>.json  every shard accounted for; <digest>.valid: valid-row bits

    <column>/statistics/<s>          of latents, made at any time: sums over the valid rows of shard s
    <column>/norms/<digest>          and a shift and scale made of them; no commit names either

row id = shard * shard_rows + row; Zarr shard z = row id // 1024; token slot = z * 1024 *
max_tokens + offset in z.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, StrictInt

from ..errors import IdentityMismatch
from .atomic import Json, canonical_json, sha256
from .norm import Norm, check_numbers, shown

COLUMN, COMMIT, COMPLETE, FAILURE, SOURCE, INDEX, MASK, STATISTICS, NORM = (
    f"latentbank-{name}"
    for name in (
        "column",
        "commit",
        "complete",
        "failure",
        "source",
        "index",
        "mask",
        "statistics",
        "norm",
    )
)
VERSION = 1
SHARD_ROWS = 65_536  # rows a source tar may hold; capacity that is not used costs nothing
ZARR_ROWS = 1_024  # rows of a Zarr shard: the unit of writing, and of the logical digests
CHUNK_ROWS, CHUNK_TOKENS = 32, 512  # inner chunks, for generic Zarr readers
CODEC_TOKENS = 64  # with a codec a chunk is decoded whole for one row, so it is small
MAX_SHARDS, MAX_SHARD_ROWS = 2**18, 2**24  # beyond these a layout is nonsense, not large
MAX_ROWS = 2**34  # shards * shard_rows: the valid-row bits of all of them take 2 GiB at most
MAX_ROW_VALUES = 2**29
BF16_NAN = 0x7FC0
BLOCK = 32  # rows of one word of valid-row bits, and of one block of the order


BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}


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


# what a value is stored as: numpy's name, Zarr's name, the word where there is no value
ELEMENTS: dict[str, tuple[str, str, int | str]] = {
    "float16": ("<f2", "float16", "NaN"),
    "bfloat16": ("<u2", "uint16", BF16_NAN),
    "int8": ("|i1", "int8", 0),
    "int32": ("<i4", "int32", 0),
}
# kind -> may a row be of any length, and the elements it may have (the usual one first)
KINDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "moments": (False, ("float16",)),
    "latents": (False, ("float16", "int8")),
    "features": (False, ("float16", "bfloat16", "int8")),
    "tokens": (True, ("bfloat16", "int8")),
    "ids": (True, ("int32",)),
}
SCALE_BYTES = 4  # of a float32 scale, which follows the int8 values of a token or row
# from so many channels on each place of an int8 row has a scale: a thirty-second of its bytes at most
PLACE_CHANNELS = 128
BACKENDS, CODECS = ("zarr", "webdataset"), (None, "blosc")
OPTIONS = ("element", "codec", "backend")  # of a layout; left out of its record where usual


@dataclass(frozen=True, slots=True)
class Layout:
    """Shapes of a column, and how its values are stored.

    `row_shape` is (2C, H, W) for moments, (C, H, W) for latents, any shape for features,
    (max_tokens, D) for tokens and (max_tokens,) for ids. `element` is the stored type ("": the
    usual one of the kind), `codec` None or "blosc" (bitshuffle and lz4, a chunk a row of moments or
    64 tokens), `backend` "zarr" or "webdataset" (a tar of .npy members a shard). Raises ValueError
    where these do not fit together.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    row_shape: tuple[StrictInt, ...]
    shards: StrictInt
    shard_rows: StrictInt = SHARD_ROWS
    element: str = ""
    codec: str | None = None
    backend: str = "zarr"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r:.80} is none of {', '.join(KINDS)}")
        allowed = KINDS[self.kind][1]
        if not self.element:
            object.__setattr__(self, "element", allowed[0])
        if self.element not in allowed:
            raise ValueError(
                f"{self.kind} of {self.element:.80}: one of {', '.join(allowed)} expected"
            )
        if self.shard_rows < 1 or self.shard_rows % ZARR_ROWS or self.shards < 0:
            raise ValueError(
                f"{self.shards} shards of {self.shard_rows} rows: a multiple of {ZARR_ROWS} rows "
                "expected"
            )
        if self.shards > MAX_SHARDS or self.shard_rows > MAX_SHARD_ROWS:
            raise ValueError(
                f"{self.shards} shards of {self.shard_rows} rows: at most {MAX_SHARDS} of "
                f"{MAX_SHARD_ROWS} expected"
            )
        fixed = {"moments": (3,), "latents": (3,), "tokens": (2,), "ids": (1,)}
        ranks = fixed.get(self.kind, (1, 2, 3, 4))
        if len(self.row_shape) not in ranks or not all(0 < n < 2**31 for n in self.row_shape):
            raise ValueError(f"{self.kind} rows of shape {self.row_shape}")
        if self.ragged and self.row_shape[0] >= 2**16:
            raise ValueError(f"{self.row_shape[0]} tokens in a row; lengths are uint16")
        if math.prod(self.row_shape) > MAX_ROW_VALUES or self.shards * self.shard_rows > MAX_ROWS:
            raise ValueError(
                f"{self.shards} shards of {self.shard_rows} rows of {self.row_shape} values are "
                "more than any column holds"
            )
        if self.backend not in BACKENDS or self.codec not in CODECS:
            raise ValueError(f"backend {self.backend!r} with codec {self.codec!r}")
        if self.backend == "webdataset" and self.codec:
            raise ValueError("the webdataset backend has no codec")

    def record(self) -> Json:
        """Returns the layout for column.json; options of their usual value are left out."""
        usual = {"element": KINDS[self.kind][1][0], "codec": None, "backend": "zarr"}
        record = {**asdict(self), "row_shape": list(self.row_shape)}
        return {k: v for k, v in record.items() if k not in OPTIONS or v != usual[k]}

    @property
    def ragged(self) -> bool:
        return KINDS[self.kind][0]

    @property
    def quantised(self) -> bool:
        """Returns whether values are int8 with scales, to be multiplied when they are read: tokens to
        bfloat16, rows of one shape to float16.
        """
        return self.element == "int8"

    @property
    def channels(self) -> int:
        """Returns the length of the axis of channels: the first of latents, the last of others."""
        return self.row_shape[0 if self.kind in ("moments", "latents") else -1]

    @property
    def scales(self) -> int:
        """Returns how many scales follow the int8 values of a token or row: one, or, of rows of many
        channels, one for each place, as a token has.
        """
        if self.ragged or self.channels < PLACE_CHANNELS:
            return 1
        return math.prod(self.row_shape) // self.channels

    @property
    def scale_bytes(self) -> int:
        return SCALE_BYTES * self.scales

    @property
    def as_read(self) -> Layout:
        """Returns the layout of rows of one shape in a batch: of int8 as float16."""
        return replace(self, element="float16") if self.quantised and not self.ragged else self

    @property
    def blocks_per_shard(self) -> int:
        """Returns the Zarr shards of values that one source shard has room for."""
        return self.shard_rows // ZARR_ROWS

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Returns the shape of what lies back to back: a row, or a token; of int8 its values in one line,
        followed by the bytes of its scales.
        """
        shape = self.row_shape[1:] if self.ragged else self.row_shape
        return (math.prod(shape) + self.scale_bytes,) if self.quantised else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Returns the type of the stored words; bfloat16 is held as uint16."""
        return np.dtype(ELEMENTS[self.element][0])

    @property
    def unit_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.unit_shape)

    def blank(self, units: int) -> NDArray[Any]:
        """Returns `units` rows or tokens without values: NaN, or of scale NaN."""
        fill = ELEMENTS[self.element][2]
        words = np.full((units, *self.unit_shape), np.nan if fill == "NaN" else fill, self.dtype)
        if self.quantised:
            nan = np.full(self.scales, np.nan, "<f4").view(np.int8)
            words[:, -self.scale_bytes :] = nan
        return words

    def finite(self, row: NDArray[Any]) -> bool:
        """Returns whether all values of a row, or of its tokens, are finite numbers."""
        if self.element == "int32":
            return True
        if self.quantised:
            scales = np.ascontiguousarray(row[..., -self.scale_bytes :]).view("<f4")
            return bool(np.isfinite(scales).all())
        mask = np.uint16(0x7C00 if self.element == "float16" else 0x7F80)  # the exponent's bits
        return bool(((row.view("<u2") & mask) != mask).all())

    def arrays(self) -> dict[str, ArraySpec]:
        """Returns the column's Zarr arrays by name."""
        rows = self.shards * self.shard_rows
        _, name, fill = ELEMENTS[self.element]
        notes = {"torch_dtype": "bfloat16"} if self.element == "bfloat16" else {}
        if self.quantised:
            unit = "a token" if self.ragged else "a row"
            notes = {
                "scale": f"the last {self.scale_bytes} bytes of {unit}: float32, little endian"
            }
        if self.ragged:
            slots = ZARR_ROWS * self.row_shape[0]
            chunk = CODEC_TOKENS if self.codec else CHUNK_TOKENS
            shape = (rows // ZARR_ROWS * slots, *self.unit_shape)
            values = ArraySpec(shape, name, slots, chunk, 0, notes, self.codec)
        else:
            chunk = 1 if self.codec else CHUNK_ROWS
            shape = (rows, *self.unit_shape)
            values = ArraySpec(shape, name, ZARR_ROWS, chunk, fill, notes, self.codec)
        arrays = {
            "status": ArraySpec((rows,), "uint8", self.shard_rows, ZARR_ROWS, int(Status.ABSENT)),
            "crc": ArraySpec((rows,), "uint32", self.shard_rows, ZARR_ROWS, 0),
        }
        if self.ragged:
            arrays["lengths"] = ArraySpec((rows,), "uint16", self.shard_rows, ZARR_ROWS, 0)
        return arrays if self.backend == "webdataset" else {self.kind: values, **arrays}


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
    codec: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.data_type).newbyteorder("<")

    @property
    def fill_value(self) -> Any:
        return self.dtype.type(np.nan if self.fill == "NaN" else self.fill)

    @property
    def chunks(self) -> int:
        """Returns the inner chunks of an object."""
        return self.object_len // self.chunk_len

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_len * int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def key(self, number: int) -> str:
        """Returns the path of an object below the array's folder."""
        return "/".join(["c", str(number), *["0"] * (len(self.shape) - 1)])

    def zarr_json(self) -> bytes:
        """Returns the array's Zarr v3 metadata. No checksum codec, and compression only where the
        layout names it: rows stay contiguous and readable in place.
        """
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs: list[Json] = [endian if self.dtype.itemsize > 1 else {"name": "bytes"}]
        if self.codec:
            codecs.append(
                {"name": "blosc", "configuration": {**BLOSC, "typesize": self.dtype.itemsize}}
            )
        sharding = {
            "chunk_shape": [self.chunk_len, *self.shape[1:]],
            "codecs": codecs,
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


GROUP_JSON = canonical_json(
    {"zarr_format": 3, "node_type": "group", "attributes": {"latentbank": "column.json"}}
)


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """What a column is: who made it from what (identity, compared), its layout and its norm.

    `identity` is JSON that is compared as it is; see `shards.format.identity` for what it says.
    `empty_tokens` is the number of tokens of the empty caption
    (token columns only). `quantisation` tells the scheme, the scale of each channel and the
    measured error of int8 values.
    """

    identity: Json
    layout: Layout
    norm: Norm | None = None
    empty_tokens: int | None = None
    quantisation: Json | None = None

    def __post_init__(self) -> None:
        shape = self.layout.row_shape
        if self.layout.quantised != (self.quantisation is not None):
            raise ValueError("int8 values, and only they, need the scale of each channel")
        if self.quantisation:
            check_numbers("quantisation.channel", self.quantisation["channel"], divides=True)
            for name in {"channel", "channel_error"} & self.quantisation.keys():
                if (count := len(self.quantisation[name])) != self.layout.channels:
                    raise ValueError(
                        f"quantisation.{name}: found {count}, expected {self.layout.channels}"
                    )
        channels = shape[0] // 2 if self.layout.kind == "moments" else shape[0]
        if self.norm:
            self.norm.check_shape((channels, *shape[1:]))
        if self.empty_tokens is not None and not 0 < self.empty_tokens <= shape[0]:
            raise ValueError(f"empty_tokens: found {self.empty_tokens}, expected 1 to {shape[0]}")

    def arrays(self) -> dict[str, ArraySpec]:
        arrays = self.layout.arrays()
        if self.empty_tokens is not None:  # one object, one chunk; never quantised
            n, element = self.empty_tokens, KINDS[self.layout.kind][1][0]
            shape, name = (n, *self.layout.row_shape[1:]), ELEMENTS[element][1]
            notes = {"torch_dtype": "bfloat16"} if element == "bfloat16" else {}
            arrays["empty"] = ArraySpec(shape, name, n, n, 0, notes)
        return arrays

    def zarr_json(self) -> dict[str, bytes]:
        """Returns the Zarr metadata files by their path below the column."""
        files = {"zarr.json": GROUP_JSON}
        return files | {f"{k}/zarr.json": v.zarr_json() for k, v in self.arrays().items()}

    def record(self) -> Json:
        """Returns column.json before sealing."""
        record = {
            "format": COLUMN,
            "version": VERSION,
            "identity": self.identity,
            "layout": self.layout.record(),
            "norm": self.norm and self.norm.record(),
            "empty_tokens": self.empty_tokens,
            "zarr": {path: sha256(data) for path, data in sorted(self.zarr_json().items())},
        }
        return record | ({"quantisation": self.quantisation} if self.quantisation else {})


def differences(actual: Any, expected: Any, place: str = "") -> list[str]:
    """Returns the fields in which two JSON values differ, as `field: found X, expected Y`."""
    if isinstance(actual, dict) and isinstance(expected, dict):
        lines = []
        for key in sorted(actual.keys() | expected.keys()):
            field = f"{place}.{key}".lstrip(".")
            lines += differences(actual.get(key), expected.get(key), field)
        return lines
    if actual == expected:
        return []
    return [f"{place}: found {shown(actual)}, expected {shown(expected)}"]


# where a model was found, which is not what it is
LOCATION = {f"identity.encoder.{field}" for field in ("path", "subfolder", "revision")}


def refuse_difference(subject: str, actual: Any, expected: Any, remedy: str) -> None:
    """Raises IdentityMismatch with every differing field named."""
    lines = differences(actual, expected)
    if lines:
        if {line.partition(":")[0] for line in lines} <= LOCATION:
            remedy = "The weights are the same: name their place as it was named first"
        raise IdentityMismatch("\n  ".join([f"{subject} is another one:", *lines, remedy]))
