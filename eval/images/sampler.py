"""Noise to latents: along the flow from sigma = 1 to 0, with classifier-free guidance.

A latent at sigma is x = (1 - sigma) x0 + sigma noise (rectified flow, Liu et al. 2022), and the
model predicts its velocity v = noise - x0, or x0 itself, of which v = (x - x0) / sigma.

    euler       x += (sigma' - sigma) v, as the reference does it
    dpmpp-2m    DPM-Solver++(2M): x0 = x - sigma v, extrapolated in lambda from two steps
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from train.model import SHIFT, TRAIN_STEPS, DiT, inference_sigmas, velocity_of

Velocity = Callable[[Tensor, float], Tensor]  # (latents, sigma) -> velocity
Step = Callable[[Tensor, Tensor, float, float], Tensor]  # (latents, velocity, sigma, following)
Interval = tuple[float, float]  # of sigma, both ends included


def euler() -> Step:
    return lambda latents, velocity, sigma, following: latents + (following - sigma) * velocity


def dpmpp_2m() -> Step:
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2, for alpha = 1 - sigma.

    A step of order 1 is x' = s'/s x + (a' - a s'/s) x0, which is Euler's. It has no logarithm in
    it, so that the first step (a = 0, lambda = -inf) and the last (s' = 0, lambda = inf) are exact;
    beside an infinite lambda nothing can be extrapolated, hence the first two steps and the last
    are of order 1.
    """
    before: list[tuple[Tensor, float]] = []  # x0 and sigma of the step before

    def step(latents: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
        clean = latents - sigma * velocity
        target = clean
        if before and following > 0 and before[0][1] < 1:
            old, old_sigma = before[0]
            step_ratio = (log_snr(following) - log_snr(sigma)) / (
                log_snr(sigma) - log_snr(old_sigma)
            )
            target = clean + 0.5 * step_ratio * (clean - old)
        before[:] = [(clean, sigma)]
        ratio = following / sigma
        return ratio * latents + ((1 - following) - (1 - sigma) * ratio) * target

    return step


def log_snr(sigma: float) -> float:
    """Returns lambda = log((1 - sigma) / sigma), for 0 < sigma < 1."""
    return math.log1p(-sigma) - math.log(sigma)


SAMPLERS: dict[str, Callable[[], Step]] = {"euler": euler, "dpmpp-2m": dpmpp_2m}


def integrate(
    velocity: Velocity, latents: Tensor, sigmas: Sequence[float], sampler: str = "euler"
) -> Tensor:
    """Returns latents at the last of falling sigmas; one call of `velocity` a step."""
    step = SAMPLERS[sampler]()
    for sigma, following in pairwise(sigmas):
        latents = step(latents, velocity(latents, sigma), sigma, following)
    return latents


@torch.inference_mode()
def sample(
    model: DiT, text: Sequence[Tensor], empty: Tensor, *, noise: Tensor, steps: int = 25,
    guidance: float = 6.0, sampler: str = "euler", interval: Interval | None = None,
    shift: float = SHIFT, prediction: str = "velocity",
) -> Tensor:  # fmt: skip
    """Returns latents (B, C, H, W) fp32, normalised as in training, from noise of that shape.

    The steps are at the noise levels of `shift`, whichever the model was trained with, and
    `prediction` is what its output is.

    text [(n_i, D)] are the prompts' tokens, empty (n, D) those of the empty caption. Without
    guidance (<= 1), and at sigmas outside the interval, only the prompts are run; with it a step
    runs [empty x B, prompts] as one batch. Latents stay fp32 between the steps, whatever precision
    the caller's autocast gives the model.
    """
    low, high = interval or (0.0, 1.0)
    alone = _packed(text)
    both = _packed([empty] * len(text) + list(text)) if guidance > 1 else alone

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        guided = guidance > 1 and low <= sigma <= high
        batch = torch.cat([latents, latents]) if guided else latents
        timestep = torch.full((len(batch),), TRAIN_STEPS * sigma, device=latents.device)
        output: Tensor = model(batch, timestep, *(both if guided else alone)).float()
        output = velocity_of(output, batch, sigma, prediction)
        if not guided:
            return output
        # classifier-free guidance (Ho and Salimans 2022, eq. 6), its weight w + 1 here `guidance`
        unconditional, conditional = output.chunk(2)
        guided_velocity: Tensor = unconditional + guidance * (conditional - unconditional)
        return guided_velocity

    return integrate(velocity, noise.float(), inference_sigmas(steps, shift).tolist(), sampler)


def _packed(captions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns captions back to back, (T, D), and where each starts, (B + 1,) on the CPU.

    So no step waits for a GPU to know where.
    """
    return torch.cat(list(captions)), torch.tensor([0, *map(len, captions)]).cumsum(0)
