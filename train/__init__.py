"""Train a diffusion transformer from columns: `torchrun -m train CONFIG data.latents=COLUMN`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .model.config import DiTConfig, FlowConfig, ModelConfig

if TYPE_CHECKING:
    from .checkpoints.checkpoint import load_for_sampling
    from .model.dit import DiT
    from .run import fit

__all__ = [
    "DiT",
    "DiTConfig",
    "FlowConfig",
    "ModelConfig",
    "TrainConfig",
    "fit",
    "load_for_sampling",
]

_MODULES = {
    "DiT": "model.dit",
    "fit": "run",
    "load_for_sampling": "checkpoints.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is asked for: torch takes seconds, and `--help` needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
