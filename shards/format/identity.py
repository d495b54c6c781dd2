"""What a column's identity says: which encoder made it, of what, and how.

In column.json an identity is a JSON object that is compared field by field, whoever wrote it. These
are its typed forms, made by encoders and read by whoever loads them again. A field that an encoder
does not use is not in the JSON, so that a column made before an option existed is the same column; a
field that this version does not know stays as it is. So `of(record).record() == record`, to the byte.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from ..errors import IdentityMismatch
from .atomic import Json
from .checks import explained


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow", populate_by_name=True)

    @classmethod
    def of(cls, record: Any) -> Self:
        """Returns the typed form of a JSON object; IdentityMismatch names a field that is missing or wrong."""
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            raise IdentityMismatch(
                f"identity of a column: {explained(error, record)}. Name a column, or a run on one, that "
                "`python -m encode` has made"
            ) from None

    def record(self) -> Json:
        """Returns the JSON object: the fields that were set, and no others."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class EncoderIdentity(_Part):
    """Which model; `path`, `subfolder` and `revision` are where it was found, `weights` what it is."""

    cls: str = Field(
        alias="class"
    )  # of diffusers (VAEs), transformers (text, features), or a module: `a.b:Class`
    path: str
    subfolder: str | None = None
    revision: str | None = None
    precision: str = "fp32"
    tokenizer: str | None = None  # its subfolder of `path`, where that is not the model's
    variant: str | None = None  # of the files of weights, as fp16
    trust_remote_code: bool = False  # whether Python code that comes with the model was run
    version: str | None = None  # that a class of the user's own states
    outputs: Any = None  # what such a class makes of fixed pictures, in figures
    weights: str  # sha256 over the sorted tensor names, dtypes, shapes and bytes; or of a tokenizer


class PicturePreprocess(_Part):
    """How pictures become square crops of `resolution` pixels, and for features numbers."""

    resolution: int
    image: str = "jpg"  # suffix of the sample's member
    decoder: str = "pil"
    resize: str = "bilinear, short side"
    crop: str = "centre"
    mean: Any = None  # of each channel, and deviation, of features alone
    std: Any = None
    output: str | None = None  # which of a model's outputs


class CaptionPreprocess(_Part):
    """How captions become token ids, and for tokens which hidden state is kept."""

    max_tokens: int
    template: str
    tokenizer: str  # digest of its files
    caption: str | None = None  # suffix of the sample's member; of no matter to the values
    instruction: str = ""
    chat_template: str | None = None  # digest
    hidden_state: int = -1  # 0 the embeddings, -1 the output after the last norm


def _of_what(preprocess: Any) -> str:
    """Returns what a preprocess is of, so that what is wrong with it is said of this one."""
    if isinstance(preprocess, dict):
        is_text = "max_tokens" in preprocess and "resolution" not in preprocess
    else:
        is_text = isinstance(preprocess, CaptionPreprocess)
    return "captions" if is_text else "pictures"


Preprocess = Annotated[
    Annotated[PicturePreprocess, Tag("pictures")] | Annotated[CaptionPreprocess, Tag("captions")],
    Discriminator(_of_what),
]


class ColumnIdentity(_Part):
    """Everything that decides a column's values. Encoders leave `source` out: see `column_spec`."""

    encoder: EncoderIdentity
    preprocess: Preprocess
    kind: str = ""
    dtype: str = ""
    source: str = ""  # fingerprint

    @property
    def picture(self) -> PicturePreprocess:
        """Returns `preprocess` of a column of pictures; IdentityMismatch for one of captions."""
        if not isinstance(self.preprocess, PicturePreprocess):
            raise IdentityMismatch(f"found a column of {self.kind}, expected one made of pictures")
        return self.preprocess

    @property
    def text(self) -> CaptionPreprocess:
        """Returns `preprocess` of a column of captions; IdentityMismatch for one of pictures."""
        if not isinstance(self.preprocess, CaptionPreprocess):
            raise IdentityMismatch(f"found a column of {self.kind}, expected one made of captions")
        return self.preprocess


def without_figures(identity: Json) -> Json:
    """Returns an identity without the figures that were measured of its encoder: another machine, or
    pictures of another size, give others; where the encoder is loaded they are compared.
    """
    encoder = identity.get("encoder")
    if not isinstance(encoder, dict) or "outputs" not in encoder:
        return identity
    return {**identity, "encoder": {k: v for k, v in encoder.items() if k != "outputs"}}


def preprocess_of(identity: Json) -> Json | None:
    """Returns `preprocess` in the identity of any program; None where there is none."""
    preprocess = identity.get("preprocess")
    return preprocess if isinstance(preprocess, dict) else None
