"""Flow matching as pure functions: noise levels, the noisy latent, the target and the loss.

The noise levels are those of SD3's scheduler: sigma = 3 s / (1 + 2 s) for s = 1, 0.999, ..., 0.001, and the
model is told t = 1000 sigma. A training sample draws u in (0, 1) and takes entry floor(1000 u): a small u is much
noise.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .config import FlowConfig as FlowConfig

TRAIN_STEPS = 1000
SHIFT = 3.0


def shifted(s: Tensor) -> Tensor:
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def train_sigmas() -> Tensor:
    """(1000,) fp32, falling from 1 to 0.002994."""
    s = (
        torch.from_numpy(np.linspace(1, TRAIN_STEPS, TRAIN_STEPS, dtype=np.float32)[::-1].copy())
        / TRAIN_STEPS
    )
    return shifted(s)


def train_timesteps() -> Tensor:
    """(1000,) fp32, falling from 1000: what the model is told."""
    return train_sigmas() * TRAIN_STEPS


def inference_sigmas(steps: int) -> Tensor:
    """(steps + 1,) fp32, falling from 1 to 0. The last level but one is shifted twice, as in diffusers."""
    low = float(train_sigmas()[-1])
    s = torch.linspace(1, low, steps, dtype=torch.float64)
    return torch.cat([shifted(s), torch.zeros(1, dtype=torch.float64)]).float()


def density(config: FlowConfig, normal: Tensor) -> Tensor:
    """u in (0, 1) from standard normal values (B,)."""
    if config.weighting == "logit_normal":
        return torch.sigmoid(config.logit_mean + config.logit_std * normal)
    uniform = torch.special.ndtr(normal)
    return mode_density(uniform, config.mode_scale) if config.weighting == "mode" else uniform


def mode_density(uniform: Tensor, scale: float) -> Tensor:
    return 1 - uniform - scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def noise_levels(u: Tensor) -> tuple[Tensor, Tensor]:
    """u (B,) in [0, 1) -> sigma (B,), timestep (B,)."""
    index = (u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1).cpu()
    sigma = train_sigmas()[index].to(u.device)
    return sigma, sigma * TRAIN_STEPS


def level_of(sigma: Tensor, levels: int) -> Tensor:
    """Which of `levels` equal parts of the 1000 training levels each sigma (B,) lies in, int64; 0 is the most noise."""
    s = sigma / (SHIFT - (SHIFT - 1) * sigma)  # the inverse of `shifted`
    return ((1 - s) * TRAIN_STEPS).round().long() * levels // TRAIN_STEPS


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latent (B, C, H, W)."""
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * latents + s * noise


def target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model learns: from the latent to the noise."""
    return noise - latents


LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigma_sqrt": lambda sigma: sigma**-2.0,
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
}


def losses(
    config: FlowConfig, predicted: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Squared error of each sample (B,), fp32, weighted as configured."""
    predicted, wanted = predicted.float(), target(latents, noise)
    if config.precondition:
        predicted, wanted = (
            interpolate(latents, noise, sigma) - sigma.view(-1, 1, 1, 1) * predicted,
            latents,
        )
    error = (predicted - wanted).square().flatten(1).mean(1)
    return (
        error * LOSS_WEIGHTS[config.weighting](sigma) if config.weighting in LOSS_WEIGHTS else error
    )
