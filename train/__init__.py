"""Train a diffusion transformer from columns: `torchrun -m train CONFIG data.latents=COLUMN`."""

from .config import TrainConfig
from .model.dit import DiT, DiTConfig, ModelConfig

__all__ = ["DiT", "DiTConfig", "ModelConfig", "TrainConfig"]
