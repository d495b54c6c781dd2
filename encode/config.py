"""The config of `python -m encode run`: sources, columns and the engine that fills them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from configs import Strict
from shards import Norm, Store, open_store
from shards.format import SHARD_ROWS, ZARR_ROWS, checked_name, refuse_doubles
from shards.places import local_path, place

from .registry import ModelSpec
from .source.members import PICTURES, in_order, normal_caption, normal_suffix

_List = str | list[str]
Image = Annotated[str, BeforeValidator(in_order(normal_suffix), json_schema_input_type=_List)]
Caption = Annotated[str, BeforeValidator(in_order(normal_caption), json_schema_input_type=_List)]
Name = Annotated[str, AfterValidator(checked_name)]  # of a source or a column


class StoredColumn(Strict):
    """How a column's values are stored. It changes no value, so it is no part of the identity."""

    # what the column holds: mean and log-variance of a VAE's posterior, latents of an autoencoder without one, image
    # features, hidden states of text, or token ids
    kind: str
    # a name of encode.registry (VAES, FEATURES or TEXTS, by the kind), or a model in full
    encoder: str | ModelSpec
    # what it is stored as: arrays, or a tar of `.npy` members for each source tar
    backend: Literal["zarr", "webdataset"] = "zarr"
    # compression, without loss; blosc: a fifth to a third smaller, 2.6 times the CPU to read
    codec: Literal["blosc"] | None = None


class PictureColumn(StoredColumn):
    """A column made from the pictures: one row of fixed shape each."""

    # suffix of the picture in the tar, or several in their order: of each sample the first that it
    # has; null: of jpg, jpeg, png, webp and the like those that the source holds
    image: Image | None = None

    @property
    def suffix(self) -> str:
        """What is read where neither the config nor the source says more."""
        return self.image or PICTURES[0]


class NormConfig(Strict):
    """z = (latent - shift) * scale, a number for all channels or one for each. Only for a model
    whose own config has none, or the same.
    """

    # what is taken from a latent: a number, or one for each channel
    shift: list[float] = Field(min_length=1)
    # by which it is then multiplied, likewise
    scale: list[float] = Field(min_length=1)

    @model_validator(mode="after")
    def _valid(self) -> NormConfig:
        _ = self.norm
        return self

    @property
    def norm(self) -> Norm:
        """Raises ValueError where latents cannot be normalised so."""
        return Norm(tuple(self.shift), tuple(self.scale))


class VaeColumn(PictureColumn):
    """A column by an autoencoder."""

    # pixels: the short side is resized to it, and the middle square taken
    resolution: PositiveInt
    # shift and scale of the latents; null: those of the model's config
    norm: NormConfig | None = None


class MomentsColumn(VaeColumn):
    """Mean and log-variance of a VAE's posterior."""

    kind: Literal["moments"] = "moments"


class LatentsColumn(VaeColumn):
    """Latents, by an autoencoder that has no posterior (DC-AE, TAESD, RAE)."""

    kind: Literal["latents"] = "latents"
    # number type of the values; int8: half the bytes, about 1 % off, see docs/columns.md
    element: Literal["float16", "int8"] = "float16"


class FeaturesColumn(PictureColumn):
    """A column of image features by an `AutoModel` of transformers (DINOv2, SigLIP). What is not given
    here is read from the model's preprocessor_config.json.
    """

    kind: Literal["features"] = "features"
    # pixels: the short side is resized to it, and the middle square taken; null: the model's
    resolution: PositiveInt | None = None
    # of red, green and blue in 0 .. 1, taken from the pixels; null: the model's
    mean: list[float] | None = Field(default=None, min_length=3, max_length=3)
    # by which they are then divided; null: the model's
    std: list[PositiveFloat] | None = Field(default=None, min_length=3, max_length=3)
    # tokens: the last hidden state with its class token; pooled: one vector a picture
    output: Literal["tokens", "pooled"] = "tokens"
    # number type of the values; int8: half the bytes, about 1 % off
    element: Literal["float16", "bfloat16", "int8"] = "float16"


class CaptionColumn(StoredColumn):
    """A column made from the captions: a row of as many tokens as the caption has."""

    # tokens of a caption that are kept, the first ones
    max_tokens: int = Field(default=256, ge=1, le=65_535)  # lengths are uint16
    template: str = "{}"  # the caption takes the place of {}
    instruction: str = ""  # before every caption; its tokens come on top of max_tokens
    chat_template: bool = False  # put the caption into the tokenizer's chat template
    # suffix of the caption in the tar, or json:field; or several in their order
    caption: Caption = "txt"

    @property
    def suffix(self) -> str:
        return self.caption


class TokensColumn(CaptionColumn):
    """A column of text hidden states."""

    kind: Literal["tokens"] = "tokens"
    hidden_state: int = -1  # which is stored; -1: the model's output, after its last norm
    element: Literal["bfloat16", "int8"] = "bfloat16"  # int8: half the bytes, about 1 % off


class IdsColumn(CaptionColumn):
    """A column of token ids: a thousandth of the bytes, but the trainer runs the text encoder. Only
    the tokenizer of `encoder` is loaded.
    """

    kind: Literal["ids"] = "ids"


ColumnConfig = Annotated[
    MomentsColumn | LatentsColumn | FeaturesColumn | TokensColumn | IdsColumn,
    Field(discriminator="kind"),
]


class EngineConfig(Strict):
    """How the work is done. None of it is part of a column's identity."""

    # what runs the workers: Ray, or this process alone; auto: Ray on a cluster, for several GPUs or
    # workers, and where so many rows are left that its start is the smaller part
    executor: Literal["auto", "ray", "inline"] = "auto"
    workers: PositiveInt | None = None  # null: one a GPU, else one a CPU
    threads: PositiveInt = 1  # decoding threads of a worker
    batch: PositiveInt = 64  # pictures a batch
    tokens: PositiveInt = 16_384  # tokens of a text batch, padding included
    torch_threads: PositiveInt = (
        1  # threads of a worker's models; on a CPU the last bit may depend on it
    )
    # what the models run on; auto: a GPU if there is one
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False  # torch.compile, for GPUs
    channels_last: bool = False  # convolutions in that memory format, for GPUs
    # folder for tars that are downloaded; null: the system's for temporary files
    scratch: Annotated[Path, BeforeValidator(local_path)] | None = None
    remote_decode: float = Field(default=0.0, ge=0, le=1)  # share of shards decoded on other nodes
    patience: PositiveFloat = 1800.0  # seconds without progress, or to load, of a worker
    look: PositiveFloat = 30.0  # seconds between two looks at the cluster's nodes and the leases
    # keep sums over the rows of moments and latents, so that `shards norm` need not read them
    statistics: bool = True
    cooperate: bool = False  # hold no lease: several runs may work on one column

    @property
    def scratch_folder(self) -> Path:
        return self.scratch or Path(tempfile.gettempdir())


def _without_nulls(kind: Any) -> BeforeValidator:
    """Lets a config leave out what its `base` names; `kind` is what a YAML may then say."""

    def named(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    return BeforeValidator(named, json_schema_input_type=kind)


Tars = str | list[str]


class EncodeConfig(Strict):
    """Columns go to `<root>/<source>/<column>`; tars are paths or brace patterns like
    `a/{00..09}.tar` (see `source.places`). A source or column that is null is left out: `columns.flux-512=null`.
    """

    # above the columns: a path, or a url as s3://bucket/prefix
    root: Annotated[str, BeforeValidator(place)]
    # tars of each source, by its name: paths, urls, patterns like `a/{00..09}.tar` or `a/*.tar`, a
    # folder of tars; or pictures to be packed once: their folder, a table or Parquet
    sources: Annotated[dict[Name, Tars], _without_nulls(dict[Name, Tars | None])]
    # columns to make of each source, by their names
    columns: Annotated[dict[Name, ColumnConfig], _without_nulls(dict[Name, ColumnConfig | None])]
    # most rows of a tar
    shard_rows: Annotated[int, Field(gt=0, multiple_of=ZARR_ROWS)] = SHARD_ROWS
    allow_failed: bool = False  # complete a column although some of its shards failed
    engine: EngineConfig = EngineConfig()

    @property
    def root_store(self) -> Store:
        """Where the columns go, by an absolute name: workers run elsewhere."""
        root = open_store(self.root)
        return root if root.folder is None else open_store(root.folder.resolve())

    @field_validator("sources", "columns")
    @classmethod
    def _without_doubles(cls, named: dict[str, Any]) -> dict[str, Any]:
        refuse_doubles(named)
        return named
