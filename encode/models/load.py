"""The encoders of a config, with the models that stand behind them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards import Norm
from shards.format.atomic import Json

from ..config import (
    CaptionColumn,
    ColumnConfig,
    EngineConfig,
    FeaturesColumn,
    IdsColumn,
    LatentsColumn,
    MomentsColumn,
    PictureColumn,
    TokensColumn,
)
from ..errors import ModelNotUsable
from ..registry import FEATURES, TEXTS, VAES, check_weights, lookup
from ..source.decoding import View
from ..source.images import DECODER
from .encoder import CaptionEncoder, Encoder, ImageEncoder, Words
from .features import FeatureEncoder
from .pixels import pixels_on
from .rehearsal import rehearse
from .text import CaptionTokenizer, TextEncoder
from .vae import Vae


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

    def runs_on(self) -> Json:
        return place_of(self.model.device)

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

    def runs_on(self) -> Json:
        return place_of(self.model.device)

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

    def runs_on(self) -> Json:
        return place_of(self.model.device)

    def row(self) -> tuple[int, ...]:
        return self.model.tokenize.limit, self.model.width

    def lengths(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """As the tokenizer says; the model does not run."""
        return np.array([len(ids) for ids in self.model.tokenize(captions)], np.int64)

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


def pick_device(device: str) -> str:
    """`auto` is the GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_encoders(
    columns: Mapping[str, ColumnConfig], engine: EngineConfig,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Encoder]:  # fmt: skip
    """The encoders of a config, on this machine's device, with the threads that the engine is to
    have; their weights checked if they are known, else tried out: see `rehearsal`.
    """
    device = pick_device(engine.device)
    torch.set_num_threads(engine.torch_threads)
    encoders = {
        name: load_encoder(
            column, device, None if weights is None else weights[name],
            compiled=engine.compile, channels_last=engine.channels_last,
        )
        for name, column in columns.items()
    }  # fmt: skip
    for encoder in encoders.values() if weights is None else ():
        rehearse(encoder, engine)
    return encoders


# Identity ----------------------------------------------------------------------------------------


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
    """The model's normalisation, or the column's, which must not contradict it; ModelNotUsable if
    it does, or if neither says one.
    """
    return model.norm if config.norm is None else model.norms.agreed(config.norm.norm)


# Values ------------------------------------------------------------------------------------------


def to_float16(values: torch.Tensor) -> NDArray[np.float16]:
    """fp32 -> float16; what float16 cannot hold becomes infinite, which the writer marks
    NON_FINITE.
    """
    return values.to(torch.float16).cpu().numpy()


def bf16_words(values: torch.Tensor) -> NDArray[np.uint16]:
    """bfloat16 as the uint16 words that a column stores."""
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()


def place_of(device: torch.device) -> Json:
    """See `Encoder.runs_on`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch_threads": torch.get_num_threads()}
