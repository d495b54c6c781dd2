"""The encoders of a config, with their models loaded."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch

from ..config import (
    ColumnConfig,
    EngineConfig,
    FeaturesColumn,
    IdsColumn,
    LatentsColumn,
    MomentsColumn,
    TokensColumn,
)
from ..errors import ModelNotUsable, NoGpu
from ..registry import VAES, ModelSpec, lookup
from .encoder import Encoder
from .features import FeatureEncoder
from .own import load_autoencoder
from .rehearsal import rehearse
from .text import TextEncoder
from .tokenizer import CaptionTokenizer


def load_encoder(
    config: ColumnConfig, device: str, expected: str | None = None, *,
    compiled: bool = False, channels_last: bool = False,
) -> Encoder:  # fmt: skip
    """Returns the encoder of a column; ModelNotUsable if it cannot be loaded or its weights are not
    the `expected` ones. `compiled` and `channels_last` change how it runs, not what the column is.
    """
    if not isinstance(config, MomentsColumn | LatentsColumn):
        _refuse_own(config)
    if isinstance(config, IdsColumn):
        return CaptionTokenizer(config, expected)
    if isinstance(config, TokensColumn):
        return TextEncoder(config, device, expected, compiled=compiled)
    if isinstance(config, FeaturesColumn):
        return FeatureEncoder(
            config, device, expected, compiled=compiled, channels_last=channels_last
        )
    return load_autoencoder(
        lookup(config.encoder, VAES), device, expected, config=config,
        compiled=compiled, channels_last=channels_last,
    )  # fmt: skip


def _refuse_own(config: ColumnConfig) -> None:
    """Raises ModelNotUsable for a class of the user's own that is to be no autoencoder."""
    if isinstance(config.encoder, ModelSpec) and config.encoder.own:
        raise ModelNotUsable(
            f"{config.encoder.cls}: a class of your own encodes pictures, as kind latents or moments, not "
            f"{config.kind}. Name a class of transformers"
        )


def load_encoders(
    columns: Mapping[str, ColumnConfig], engine: EngineConfig,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Encoder]:  # fmt: skip
    """Returns the encoders of a config, on this machine's device, with the threads that the engine
    sets; they are checked if their signatures are given, else the encoders are tried out: see
    `rehearsal`. NoGpu where the engine asks for one and there is none.
    """
    device = device_of(engine)
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


def device_of(engine: EngineConfig) -> str:
    """Returns the device that the models run on; NoGpu where the engine asks for one and there is none."""
    device = engine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise NoGpu(
            f"engine.device=cuda: torch {torch.__version__} finds no GPU on {socket.gethostname()}. "
            "Look at nvidia-smi and CUDA_VISIBLE_DEVICES, or leave device out: auto takes what there is"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
