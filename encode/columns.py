"""Columns and the encoders that fill them: what a config asks for, as an engine sees it.

An engine knows two shapes. An `ImageEncoder` takes square crops and gives rows of one shape
(moments, latents, features); a `CaptionEncoder` takes strings and gives rows of any length (tokens,
ids). Which model stands behind is nobody's business but `load_encoder`'s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards import ColumnSpec, Layout, Norm, Store
from shards.quantise import calibrate
from shards.schema import COLUMN, VERSION
from shards.storage import Json

from .config import (
    CaptionColumn,
    ColumnConfig,
    FeaturesColumn,
    IdsColumn,
    LatentsColumn,
    MomentsColumn,
    PictureColumn,
    TokensColumn,
)
from .errors import ModelNotUsable
from .features import FeatureEncoder
from .images import DECODER, to_pixels
from .registry import FEATURES, TEXTS, VAES, check_weights, lookup
from .text import CaptionTokenizer, TextEncoder
from .vae import Vae

CALIBRATION_ROWS = 256  # captions that the channel scales of an int8 column are measured on

Words = NDArray[Any]  # of the element a column stores: float16, bfloat16 as uint16, int32


@dataclass(frozen=True, slots=True)
class View:
    """What an image encoder is shown: the member with this suffix, cropped to this size. Encoders
    of one view share one decoding.
    """

    resolution: int
    suffix: str


class Encoder(ABC):
    """A column's config and the model that fills it. `weights` is the digest of what decides the
    values: a model's weights, or a tokenizer.
    """

    config: ColumnConfig
    weights: str
    model: Any  # what encode.vae, encode.text or encode.features has loaded

    @abstractmethod
    def identity(self) -> Json:
        """The column's identity, but for the source."""

    @abstractmethod
    def row(self) -> tuple[int, ...]:
        """`Layout.row_shape` of the column."""


class ImageEncoder(Encoder):
    """Crops -> rows of one shape."""

    view: View

    @property
    def norm(self) -> Norm | None:
        """Of latents; None for what is not normalised."""
        return None

    @abstractmethod
    def encode(self, images: NDArray[np.uint8]) -> Words:
        """(B, R, R, 3) uint8 -> (B, *row_shape) as they are stored. A value that the element cannot
        hold becomes infinite, and the writer marks its row NON_FINITE.
        """

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row, found by encoding a grey picture."""
        side = self.view.resolution
        return self.encode(np.full((1, side, side, 3), 128, np.uint8)).shape[1:]

    def row(self) -> tuple[int, ...]:
        return self.row_shape


class CaptionEncoder(Encoder):
    """Captions -> rows of any length."""

    suffix: str  # of the sample's member that holds the caption

    @abstractmethod
    def encode(self, captions: Sequence[str], budget: int) -> list[Words]:
        """A row for each caption, in their order: (n, D) bfloat16 words, or (n,) ids. A call's
        captions are sorted by length and run in batches of at most `budget` tokens.
        """

    @property
    @abstractmethod
    def blank(self) -> Words:
        """The row of a sample that has no caption: no tokens."""


class VaeEncoder(ImageEncoder):
    """Moments, or latents where there is no posterior."""

    config: MomentsColumn | LatentsColumn
    model: Vae

    def __init__(self, config: MomentsColumn | LatentsColumn, model: Vae) -> None:
        self.config, self.model, self.weights = config, model, model.weights
        self.view = View(config.resolution, config.image)
        if model.kind != config.kind:
            raise ModelNotUsable(
                f"{model.model.path}: {model.model.cls} has "
                f"{'a' if model.kind == 'moments' else 'no'} posterior. Say kind: {model.kind}, "
                f"not {config.kind}"
            )
        self._norm = norm_in(config, model)

    @property
    def norm(self) -> Norm:
        return self._norm

    def identity(self) -> Json:
        return picture_identity(self.config, self.view, "float16", self.model)

    def encode(self, images: NDArray[np.uint8]) -> Words:
        return to_float16(self.model.encode(pixels_on(self.model.device, images)))

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        shape = self.model.moments_shape(self.view.resolution)
        channels = shape[0] // 2 if self.model.kind == "moments" else shape[0]
        for name, values in (("shift", self._norm.shift), ("scale", self._norm.scale)):
            if len(values) not in (1, channels):
                raise ModelNotUsable(
                    f"{self.model.model.path}: a {name} for {len(values)} channels, but latents of "
                    f"{channels}. Correct latents_mean and latents_std in its config"
                )
        return shape


class FeaturesEncoder(ImageEncoder):
    """Tokens or the pooled vector of an image model."""

    config: FeaturesColumn
    model: FeatureEncoder

    def __init__(self, config: FeaturesColumn, model: FeatureEncoder) -> None:
        self.config, self.model, self.weights = config, model, model.weights
        self.view = View(model.resolution, config.image)

    def identity(self) -> Json:
        found = picture_identity(self.config, self.view, self.config.element, self.model)
        found["preprocess"] |= {
            "mean": self.model.mean, "std": self.model.std, "output": self.model.output
        }  # fmt: skip
        return found

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        return self.model.shape()

    def encode(self, images: NDArray[np.uint8]) -> Words:
        features = self.model.encode(pixels_on(self.model.device, images))
        return to_float16(features) if self.config.element == "float16" else bf16_words(features)


class TokensEncoder(CaptionEncoder):
    """Hidden states of a text encoder."""

    config: TokensColumn
    model: TextEncoder

    def __init__(self, config: TokensColumn, model: TextEncoder) -> None:
        self.config, self.model, self.weights = config, model, model.weights
        self.suffix = config.caption

    def identity(self) -> Json:
        found = caption_identity(self.config, self.config.element, self.model.tokenize)
        found["preprocess"]["hidden_state"] = self.config.hidden_state
        return {**found, "encoder": self.model.model.identity(self.weights)}

    def row(self) -> tuple[int, ...]:
        return self.model.tokenize.limit, self.model.width

    def encode(self, captions: Sequence[str], budget: int) -> list[Words]:
        return [bf16_words(states) for states in self.model.encode(captions, budget)]

    @property
    def blank(self) -> Words:
        return np.zeros((0, self.model.width), np.uint16)


class IdsEncoder(CaptionEncoder):
    """Token ids; no model is loaded, and the digest is the tokenizer's."""

    config: IdsColumn
    model: CaptionTokenizer

    def __init__(self, config: IdsColumn, tokenizer: CaptionTokenizer) -> None:
        self.config, self.model, self.weights = config, tokenizer, tokenizer.tokenizer
        self.suffix = config.caption

    def identity(self) -> Json:
        found = caption_identity(self.config, "int32", self.model)
        alone = {"cls": "AutoTokenizer", "precision": "fp32"}  # whichever model the ids are for
        who = self.model.model.model_copy(update=alone)
        return {**found, "encoder": who.identity(self.weights)}

    def row(self) -> tuple[int, ...]:
        return (self.model.limit,)

    def encode(self, captions: Sequence[str], budget: int) -> list[Words]:
        return [np.array(ids, np.int32) for ids in self.model(captions)]

    @property
    def blank(self) -> Words:
        return np.zeros(0, np.int32)


def load_encoder(
    config: ColumnConfig, device: str, expected: str | None = None, *,
    compiled: bool = False, channels_last: bool = False,
) -> Encoder:  # fmt: skip
    """The encoder of a column; ModelNotUsable if it cannot be loaded or its weights are not the
    `expected` ones. `compiled` and `channels_last` change how it runs, not what the column is.
    """
    if isinstance(config, CaptionColumn):
        said = config.model_dump(include={"max_tokens", "template", "instruction", "chat_template"})
        spec = lookup(config.encoder, TEXTS)
        if isinstance(config, TokensColumn):
            text = TextEncoder(
                spec, hidden_state=config.hidden_state, device=device, expected=expected,
                compiled=compiled, **said,
            )  # fmt: skip
            return TokensEncoder(config, text)
        tokenizer = CaptionTokenizer(spec, **said)
        check_weights(tokenizer.tokenizer, expected, spec.path)
        return IdsEncoder(config, tokenizer)
    how: Json = {
        "device": device, "expected": expected, "compiled": compiled, "channels_last": channels_last
    }  # fmt: skip
    if isinstance(config, FeaturesColumn):
        asked = config.model_dump(include={"output", "resolution", "mean", "std"})
        return FeaturesEncoder(
            config, FeatureEncoder(lookup(config.encoder, FEATURES), **asked, **how)
        )
    return VaeEncoder(config, Vae(lookup(config.encoder, VAES), **how))


# Identity and layout -----------------------------------------------------------------------------


def column_spec(
    encoder: Encoder, fingerprint: str, shards: int, shard_rows: int,
    scales: Callable[[], Json] | None = None,
) -> ColumnSpec:  # fmt: skip
    """Identity, layout and norm of the column that an encoder makes of a source.

    `scales` is asked for the channel scales if, and only if, the column is stored as int8: see
    `standing_scales` and `measured_scales`.
    """
    config = encoder.config
    layout = Layout(
        config.kind, encoder.row(), shards, shard_rows, getattr(config, "element", ""),
        codec=config.codec, backend=config.backend,
    )  # fmt: skip
    identity = {**encoder.identity(), "source": fingerprint}
    if isinstance(encoder, ImageEncoder):
        return ColumnSpec(identity, layout, encoder.norm)
    assert isinstance(encoder, CaptionEncoder)
    if layout.quantised and scales is None:
        raise ValueError("an int8 column needs the scales of its channels")
    found = scales() if layout.quantised and scales else None
    (empty,) = encoder.encode([""], encoder.row()[0])
    return ColumnSpec(identity, layout, empty_tokens=len(empty), quantisation=found)


def picture_identity(config: PictureColumn, view: View, dtype: str, model: Any) -> Json:
    """Who made a column of pictures, and how."""
    how = {
        "image": view.suffix, "resolution": view.resolution, "decoder": DECODER,
        "resize": "bilinear, short side", "crop": "centre",
    }  # fmt: skip
    encoder = model.model.identity(model.weights)
    return {"kind": config.kind, "preprocess": how, "dtype": dtype, "encoder": encoder}


def caption_identity(config: CaptionColumn, dtype: str, tokenizer: CaptionTokenizer) -> Json:
    """How captions become tokens. What is not used is not named, so that a column made before an
    option existed is the same column.
    """
    how = config.model_dump(include={"caption", "template", "max_tokens"})
    how["tokenizer"] = tokenizer.tokenizer
    if config.instruction:
        how["instruction"] = config.instruction
    if tokenizer.chat:
        how["chat_template"] = tokenizer.chat
    return {"kind": config.kind, "preprocess": how, "dtype": dtype}


def norm_in(config: MomentsColumn | LatentsColumn, model: Vae) -> Norm:
    """The model's normalisation, or the column's where the model has none; ModelNotUsable if they
    differ.
    """
    if config.norm is None:
        return model.norm
    asked = Norm(tuple(config.norm.shift), tuple(config.norm.scale))
    try:
        own = model.norm
    except ModelNotUsable:
        return asked
    if asked != own:
        raise ModelNotUsable(
            f"{model.model.path}: its config normalises by {own}, the column says {asked}. Leave "
            "norm out of the column"
        )
    return own


# Values ------------------------------------------------------------------------------------------


def pixels_on(device: torch.device, images: NDArray[np.uint8]) -> torch.Tensor:
    """`to_pixels` on a device. Bytes travel, and each is looked up in a table: a GPU's own division
    would be off in the last bit.
    """
    if device.type == "cpu":
        return to_pixels(images)
    return looked_up(torch.from_numpy(images).to(device))


def looked_up(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) bytes -> (B, 3, H, W) fp32 in [-1, 1], bit for bit as `to_pixels`."""
    every = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    table = to_pixels(every)[:, 0, 0, 0].to(images.device)
    return table[images.permute(0, 3, 1, 2).int()]


def to_float16(values: torch.Tensor) -> NDArray[np.float16]:
    """fp32 -> float16; what float16 cannot hold becomes infinite, which the writer marks
    NON_FINITE.
    """
    return values.to(torch.float16).cpu().numpy()


def bf16_words(values: torch.Tensor) -> NDArray[np.uint16]:
    """bfloat16 as the uint16 words that a column stores."""
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def standing_scales(column: Store) -> Json | None:
    """The channel scales of an int8 column that stands, if one does."""
    if column.size("column.json") is None:
        return None
    found = column.unseal("column.json", COLUMN, VERSION).get("quantisation")
    return None if found is None else dict(found)


def measured_scales(encoder: CaptionEncoder, captions: Sequence[str | None], budget: int) -> Json:
    """Channel scales for int8, from the first captions of a tar; None and "" are passed over, and
    one at least must be left.
    """
    there = [caption for caption in captions[:CALIBRATION_ROWS] if caption]
    return calibrate(np.concatenate(encoder.encode(there, budget)), len(there))
