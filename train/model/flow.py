"""Rectified flow (arXiv 2209.03003) as SD3 trains it (arXiv 2403.03206), as pure functions: noise
levels, the noisy latent, the target and the loss.

The noise levels are those of SD3's scheduler: sigma = shift s / (1 + (shift - 1) s) for s = 1,
0.999, ..., 0.001, and the model gets t = 1000 sigma. A training sample draws u in (0, 1) and takes
entry floor(1000 u): a small u is much noise. RAE and RAEv2 have the same map, and draw s from a
continuum.

The model's output is a velocity, or a latent x, of which the velocity at z is (z - x) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .config import SHIFT as SHIFT
from .config import FlowConfig as FlowConfig

TRAIN_STEPS = 1000
LEVELS = 8  # that every run validates at
# of a velocity that is made of a latent, in the loss: below it the division would weigh the loss by 400 and more
LEAST_SIGMA = 0.05


def shifted(s: Tensor, shift: float) -> Tensor:
    """Returns levels in [0, 1] moved towards noise, for shifts below 1 away from it: SD3's timestep
    shift, section 5.3.2."""
    return (shift * s / (1 + (shift - 1) * s)).clamp(max=1)  # rounding may lead beyond


def train_sigmas(shift: float = SHIFT) -> Tensor:
    """Returns the noise levels of training: (1000,) fp32, falling from 1 (at shift 3 to 0.002994)."""
    s = (
        torch.from_numpy(np.linspace(1, TRAIN_STEPS, TRAIN_STEPS, dtype=np.float32)[::-1].copy())
        / TRAIN_STEPS
    )
    return shifted(s, shift)


def train_timesteps(shift: float = SHIFT) -> Tensor:
    """Returns what the model gets at each level: (1000,) fp32, falling from 1000."""
    return train_sigmas(shift) * TRAIN_STEPS


def inference_sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Returns the levels of an Euler solver: (steps + 1,) fp32, falling from 1 to 0. The last level
    but one is shifted twice, as in diffusers."""
    low = float(train_sigmas(shift)[-1])
    s = torch.linspace(1, low, steps, dtype=torch.float64)
    return torch.cat([shifted(s, shift), torch.zeros(1, dtype=torch.float64)]).float()


def density(config: FlowConfig, normal: Tensor) -> Tensor:
    """Returns u in (0, 1) of the configured density (SD3, section 3.1) from normal values (B,)."""
    if config.weighting == "logit_normal":
        return torch.sigmoid(config.logit_mean + config.logit_std * normal)
    uniform = torch.special.ndtr(normal)
    return mode_density(uniform, config.mode_scale) if config.weighting == "mode" else uniform


def mode_density(uniform: Tensor, scale: float) -> Tensor:
    """Returns u (B,) of SD3's mode sampling with heavy tails: f(v; s) = 1 - v - s (cos^2(pi v / 2)
    - 1 + v)."""
    return 1 - uniform - scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def noise_levels(u: Tensor, shift: float = SHIFT) -> tuple[Tensor, Tensor]:
    """Maps u (B,) in [0, 1) to sigma (B,) in (0, 1] and timestep (B,) in (0, 1000]."""
    index = (u * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1).cpu()
    sigma = train_sigmas(shift)[index].to(u.device)
    return sigma, sigma * TRAIN_STEPS


def fixed_sigmas(levels: int = LEVELS) -> list[float]:
    """Returns the noise levels that every run validates at: the middles of equal parts of the 1000
    training levels at shift 3, falling."""
    u = (torch.arange(levels) + 0.5) / levels
    return noise_levels(u, SHIFT)[0].tolist()


def schedule_sigmas(config: FlowConfig, count: int = 64) -> list[float]:
    """Returns noise levels that stand for those a run draws: `count` quantiles of its density."""
    normal = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    u = density(config, normal).sort().values
    return noise_levels(u, config.timestep_shift)[0].tolist()


def level_of(sigma: Tensor, levels: int, shift: float = SHIFT) -> Tensor:
    """Returns which of `levels` equal parts of the 1000 training levels of a shift each sigma (B,)
    is in, int64; 0 is the most noise."""
    s = sigma / (shift - (shift - 1) * sigma)  # the inverse of `shifted`
    return ((1 - s) * TRAIN_STEPS).round().long() * levels // TRAIN_STEPS


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Returns the noisy latent (B, C, H, W) of rectified flow: z = (1 - sigma) x + sigma eps."""
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * latents + s * noise


def target(latents: Tensor, noise: Tensor) -> Tensor:
    """Returns the velocity (B, C, H, W) that the model learns: dz / dsigma = eps - x."""
    return noise - latents


def velocity_of(
    output: Tensor, noisy: Tensor, sigma: float, prediction: str = "velocity"
) -> Tensor:
    """Returns the velocity (B, C, H, W) that a model's output means at a noise level in (0, 1]."""
    return output if prediction == "velocity" else (noisy - output) / sigma


# of the loss, for u that is uniform; cosmap is the density of SD3's CosMap, section 3.1
LOSS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigma_sqrt": lambda sigma: sigma**-2.0,
    "cosmap": lambda sigma: 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
}


def losses(
    config: FlowConfig, predicted: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor
) -> Tensor:
    """Returns the loss of each sample (B,), fp32, weighted: conditional flow matching."""
    predicted, s = predicted.float(), sigma.view(-1, 1, 1, 1)
    if config.prediction == "latent":  # (z - x) / s of the latent less that of the output
        difference = (predicted - latents) / s.clamp(min=LEAST_SIGMA)
    elif config.precondition:  # x = z - s v
        difference = interpolate(latents, noise, sigma) - s * predicted - latents
    else:
        difference = predicted - target(latents, noise)
    error = difference.square().flatten(1).mean(1)
    weight = LOSS_WEIGHTS.get(config.weighting)
    return error * weight(sigma) if weight else error
