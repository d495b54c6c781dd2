"""Train a diffusion transformer from columns: `torchrun -m train CONFIG data.latents=COLUMN`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

from .config import TrainConfig
from .model.config import DiTConfig, FlowConfig, ModelConfig

if TYPE_CHECKING:
    from .checkpoints.checkpoint import load_for_sampling
    from .loop import Batches
    from .model.dit import DiT
    from .ranks.world import World
    from .run import fit
else:
    __getattr__ = lazy_getattr(
        __name__,
        {
            "loop": ("Batches",),
            "model.dit": ("DiT",),
            "ranks.world": ("World",),
            "run": ("fit",),
            "checkpoints.checkpoint": ("load_for_sampling",),
        },
    )

__all__ = [
    "Batches",
    "DiT",
    "DiTConfig",
    "FlowConfig",
    "ModelConfig",
    "TrainConfig",
    "World",
    "fit",
    "load_for_sampling",
]
