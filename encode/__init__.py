"""Frozen encoders over captioned pictures, once: tars in, columns out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import EncodeConfig
from .registry import ModelSpec

if TYPE_CHECKING:
    from .models.text import load_text
    from .models.vae import load_vae

__all__ = ["EncodeConfig", "ModelSpec", "load_text", "load_vae"]

_HOMES = {"load_vae": "models.vae", "load_text": "models.text"}


def __getattr__(name: str) -> Any:
    """Imports a loader when it is first used: torch takes seconds, and a status needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
