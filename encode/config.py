"""What `python -m encode run` is told: sources, columns and the engine that fills them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from configs import Strict
from shards.schema import SHARD_ROWS, ZARR_ROWS

from .registry import ModelSpec


class StoredColumn(Strict):
    """How a column's values are stored. It changes no value, so it is no part of the identity."""

    backend: Literal["zarr", "webdataset"] = "zarr"
    codec: Literal["blosc"] | None = None  # a fifth to a third smaller, 2.6 times the CPU to read


class MomentsColumn(StoredColumn):
    """A column of VAE moments. `encoder` is a name of `encode.registry.VAES` or a model given in
    full.
    """

    kind: Literal["moments"]
    encoder: str | ModelSpec
    resolution: PositiveInt
    image: str = "jpg"  # suffix of the picture in the tar


class TokensColumn(StoredColumn):
    """A column of text hidden states. `encoder` is a name of `encode.registry.TEXTS` or given in
    full.
    """

    kind: Literal["tokens"]
    encoder: str | ModelSpec
    max_tokens: PositiveInt = 256
    hidden_state: int = -1
    template: str = "{}"  # the caption takes the place of {}
    caption: str = "txt"  # suffix of the caption in the tar
    element: Literal["bfloat16", "int8"] = "bfloat16"  # int8: half the bytes, about 1 % off


ColumnConfig = Annotated[MomentsColumn | TokensColumn, Field(discriminator="kind")]


class EngineConfig(Strict):
    """How the work is done. None of it is part of a column's identity."""

    executor: Literal["ray", "inline"] = "ray"
    workers: PositiveInt | None = None  # None: one a GPU, else one a CPU
    threads: PositiveInt = 1  # decoding threads of a worker
    batch: PositiveInt = 64  # pictures a batch
    tokens: PositiveInt = 16_384  # tokens of a text batch, padding included
    torch_threads: PositiveInt = 1  # of a worker's models; on a CPU the last bit may depend on it
    device: Literal["auto", "cpu", "cuda"] = "auto"


class EncodeConfig(Strict):
    """Columns go to `<root>/<source>/<column>`; tars are paths or brace patterns like
    `a/{00..09}.tar`.
    """

    root: str  # a path, or an url as s3://bucket/prefix
    sources: dict[str, str | list[str]]
    columns: dict[str, ColumnConfig]
    shard_rows: Annotated[int, Field(gt=0, multiple_of=ZARR_ROWS)] = SHARD_ROWS
    allow_failed: bool = False  # complete a column although some of its shards failed
    engine: EngineConfig = EngineConfig()
