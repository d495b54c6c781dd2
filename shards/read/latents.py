"""What a column stores to latents and back: `draw` a normalised latent, `undraw` what a VAE decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..format.norm import Norm


def _shift_scale(norm: Norm, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tensors of four axes that broadcast to (B, C, H, W), on the device of `like`."""
    shift, scale = (torch.from_numpy(array).to(like.device)[None] for array in norm.arrays)
    return shift, scale


def draw(stored: Tensor, norm: Norm, noise: Tensor | None) -> Tensor:
    """Samples the posterior and normalises: (B, 2C, H, W) mean | logvar, noise (B, C, H, W) ->
    (B, C, H, W) fp32.

    z = (mean + exp(clamp(logvar, -30, 20) / 2) * noise - shift) * scale: the reparameterised sample
    of a diagonal Gaussian (Kingma and Welling 2014, section 2.4), with diffusers' bounds, as the
    reference does at every step. Without noise `stored` are latents (B, C, H, W) of an encoder that has no posterior,
    and z = (latent - shift) * scale.
    """
    if noise is None:
        latents = stored.float()
    else:
        mean, logvar = stored.float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
    shift, scale = _shift_scale(norm, latents)
    return (latents - shift) * scale


def undraw(latents: Tensor, norm: Norm) -> Tensor:
    """Returns the VAE decoder's input of normalised latents (B, C, H, W): latents / scale + shift."""
    shift, scale = _shift_scale(norm, latents)
    return latents.float() / scale + shift
