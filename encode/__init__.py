"""Frozen encoders over captioned pictures, once: tars in, columns out."""

from .config import EncodeConfig
from .registry import ModelSpec
from .text import TextEncoder, load_text
from .vae import Vae, load_vae

__all__ = ["EncodeConfig", "ModelSpec", "TextEncoder", "Vae", "load_text", "load_vae"]
