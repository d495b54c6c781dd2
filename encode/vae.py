"""A frozen VAE of diffusers: pixels -> moments, latents -> pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shards import Norm
from shards.storage import Json

from .errors import ModelNotUsable
from .registry import ModelSpec, autocast, check_weights, load_model, weights_digest

FRAME_AXIS = {"AutoencoderKLQwenImage"}  # takes (B, 3, 1, H, W) and gives (B, 2C, 1, h, w)


class Vae:
    """Encoder and decoder of one VAE with its own normalisation. `weights` is their digest."""

    def __init__(self, model: ModelSpec, device: str = "cpu", expected: str | None = None) -> None:
        """Load it; ModelNotUsable if the weights are not the `expected` ones, or a norm is
        missing.
        """
        import diffusers

        self.model, self.device = model, torch.device(device)
        diffusers.utils.logging.disable_progress_bar()
        self._module = load_model(diffusers, model, low_cpu_mem_usage=False)
        self.weights = weights_digest(self._module)
        check_weights(self.weights, expected, model.path)
        self.norm = norm_of(self._module.config, model.path)
        self._module.to(self.device)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w) fp32: mean | logvar in [-30,
        20].
        """
        frame = self.model.cls in FRAME_AXIS
        x = pixels.to(self.device, torch.float32)
        with autocast(self.model.precision, self.device):
            posterior = self._module.encode(x.unsqueeze(2) if frame else x).latent_dist
        moments: Tensor = torch.cat([posterior.mean, posterior.logvar], 1).float()
        return moments.squeeze(2) if frame else moments

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised -> pixels (B, 3, H, W) fp32 in [-1, 1]."""
        frame = self.model.cls in FRAME_AXIS
        z = latents.to(self.device, torch.float32)
        with autocast(self.model.precision, self.device):
            pixels = self._module.decode(z.unsqueeze(2) if frame else z, return_dict=False)[0]
        pixels = pixels.squeeze(2) if frame else pixels
        return pixels.float().clamp(-1, 1)  # type: ignore[no-any-return]  # diffusers is untyped

    def moments_shape(self, resolution: int) -> tuple[int, ...]:
        """(2C, h, w) for square pictures of this size, found by encoding a grey one."""
        return tuple(self.encode(torch.zeros(1, 3, resolution, resolution)).shape[1:])


def load_vae(encoder: Json, device: str = "cpu") -> Vae:
    """The VAE that a column's identity names (`identity["encoder"]`), its weights checked."""
    return Vae(ModelSpec.of_identity(encoder), device, encoder["weights"])


def norm_of(config: Any, path: str) -> Norm:
    """Normalisation from a VAE's config: per channel from latents_mean and latents_std if both are
    set, else scalar.

    z = (latent - shift) * scale. ModelNotUsable where the config has neither; nothing is guessed.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return Norm(tuple(map(float, mean)), tuple(1.0 / float(s) for s in std))
    shift, scale = config.get("shift_factor"), config.get("scaling_factor")
    if shift is None or scale is None:
        raise ModelNotUsable(
            f"{path}: its config has shift_factor {shift} and scaling_factor {scale}, and no "
            "latents_mean and "
            "latents_std. Training needs a normalisation: add it to config.json (a shift of 0 is "
            "a number too)"
        )
    return Norm((float(shift),), (float(scale),))
