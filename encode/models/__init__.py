"""Frozen encoders: pictures or captions in, rows of a column out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

from ..config import ColumnConfig, EngineConfig
from .encoder import Encoder

if TYPE_CHECKING:
    from .own import expected_of, load_autoencoder, load_vae
    from .packed_text import PackedText
    from .pixels import pixels_on, to_images, to_pixels
    from .text import TextEncoder
    from .tokenizer import CaptionTokenizer, load_tokenizer, tokenizer_digest
    from .vae import Vae
    from .weights import load_model, weights_digest
else:
    __getattr__ = lazy_getattr(
        __name__,
        {
            "packed_text": ("PackedText",),
            "pixels": ("pixels_on", "to_images", "to_pixels"),
            "text": ("TextEncoder",),
            "tokenizer": ("CaptionTokenizer", "load_tokenizer", "tokenizer_digest"),
            "own": ("expected_of", "load_autoencoder", "load_vae"),
            "vae": ("Vae",),
            "weights": ("load_model", "weights_digest"),
        },
    )

__all__ = [
    "CaptionTokenizer",
    "PackedText",
    "TextEncoder",
    "Vae",
    "expected_of",
    "load_autoencoder",
    "load_model",
    "load_tokenizer",
    "load_vae",
    "pixels_on",
    "to_images",
    "to_pixels",
    "tokenizer_digest",
    "weights_digest",
]


def load_encoders(
    columns: Mapping[str, ColumnConfig], engine: EngineConfig,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Encoder]:  # fmt: skip
    """Calls `load`, which is imported here: torch takes seconds, and most verbs load no model."""
    from . import load

    return load.load_encoders(columns, engine, weights)
