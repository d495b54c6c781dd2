"""The diffusion transformer and its flow: `from train.model import DiT, DiTConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.lazy import lazy_getattr

from .config import LEAST_SHIFT, MOST_SHIFT, SHIFT, DiTConfig, FlowConfig, ModelConfig

if TYPE_CHECKING:
    from .dit import DiT
    from .flow import TRAIN_STEPS, fixed_sigmas, inference_sigmas, schedule_sigmas, velocity_of
else:
    __getattr__ = lazy_getattr(
        __name__,
        {
            "dit": ("DiT",),
            "flow": (
                "TRAIN_STEPS",
                "fixed_sigmas",
                "inference_sigmas",
                "schedule_sigmas",
                "velocity_of",
            ),
        },
    )

__all__ = [
    "LEAST_SHIFT",
    "MOST_SHIFT",
    "SHIFT",
    "TRAIN_STEPS",
    "DiT",
    "DiTConfig",
    "FlowConfig",
    "ModelConfig",
    "fixed_sigmas",
    "inference_sigmas",
    "schedule_sigmas",
    "velocity_of",
]
