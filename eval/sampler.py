"""Noise to latents: Euler steps along the flow, with classifier-free guidance."""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.flow import TRAIN_STEPS, inference_sigmas
from train.model import DiT


@torch.inference_mode()
def sample(
    model: DiT,
    text: Tensor,
    mask: Tensor,
    empty: Tensor,
    *,
    noise: Tensor,
    steps: int = 25,
    guidance: float = 6.0,
) -> Tensor:
    """Latents (B, C, H, W) fp32, normalised as in training, from noise of that shape.

    text (B, L, D) and mask (B, L) are the prompts, empty (n, D) the empty caption. Without guidance (<= 1) only the
    prompts are run; with it each step runs [empty x B, prompts] as one batch. Latents stay fp32 between the
    steps, whatever precision the caller's autocast gives the model.
    """
    guided = guidance > 1
    if guided:
        text, mask = _with_empty(text, mask, empty)
    sigmas = inference_sigmas(steps).tolist()  # (steps + 1), the last is 0
    latents = noise.float()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        batch = torch.cat([latents, latents]) if guided else latents
        timestep = torch.full((len(batch),), TRAIN_STEPS * sigma, device=latents.device)
        velocity = model(batch, timestep, text, mask).float()
        if guided:
            without, towards = velocity.chunk(2)
            velocity = without + guidance * (towards - without)
        latents = latents + (following - sigma) * velocity
    return latents


def _with_empty(text: Tensor, mask: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The empty caption B times before the prompts; both sides padded to one length."""
    batch, length = mask.shape
    longest = max(length, len(empty))
    text, mask = F.pad(text, (0, 0, 0, longest - length)), F.pad(mask, (0, longest - length))
    alone = F.pad(empty.to(text), (0, 0, 0, longest - len(empty))).expand(batch, -1, -1)
    alone_mask = (torch.arange(longest, device=mask.device) < len(empty)).to(mask.dtype)
    return torch.cat([alone, text]), torch.cat([alone_mask.expand(batch, -1), mask])
