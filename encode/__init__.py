"""Frozen encoders over captioned pictures, once: tars in, columns out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import EncodeConfig
from .registry import ModelSpec

if TYPE_CHECKING:
    from .models.text import TextEncoder, load_text
    from .models.vae import Vae, load_vae

__all__ = ["EncodeConfig", "ModelSpec", "TextEncoder", "Vae", "load_text", "load_vae"]

_HOMES = {
    "Vae": "models.vae",
    "load_vae": "models.vae",
    "TextEncoder": "models.text",
    "load_text": "models.text",
}


def __getattr__(name: str) -> Any:
    """A model's class or loader when it is asked for: torch takes seconds, and a status needs none."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
