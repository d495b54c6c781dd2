"""Frozen encoders over captioned pictures, once: tars in, columns out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

from .config import EncodeConfig, TokensColumn
from .registry import ModelSpec

if TYPE_CHECKING:
    from .models.own import load_vae
    from .models.text import load_text
else:
    __getattr__ = lazy_getattr(
        __name__, {"models.own": ("load_vae",), "models.text": ("load_text",)}
    )

__all__ = ["EncodeConfig", "ModelSpec", "TokensColumn", "load_text", "load_vae"]
