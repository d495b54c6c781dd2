"""The diffusion transformer and its flow: `from train.model import DiT, DiTConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import DiTConfig, FlowConfig, ModelConfig

if TYPE_CHECKING:
    from .dit import DiT

__all__ = ["DiT", "DiTConfig", "FlowConfig", "ModelConfig"]


def __getattr__(name: str) -> Any:
    """Loads the model, and with it torch, when it is asked for."""
    if name != "DiT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .dit import DiT

    return DiT
