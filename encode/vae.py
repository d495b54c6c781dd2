"""A frozen autoencoder of diffusers: pixels -> moments or latents, latents -> pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shards import Norm
from shards.storage import Json

from .errors import ModelNotUsable
from .loading import autocast, load_model, trying, tune, weights_digest
from .registry import ModelSpec, check_weights


@dataclass(frozen=True, slots=True)
class Manner:
    """How a class is driven, where that differs from AutoencoderKL: (B, 3, H, W) in [-1, 1] to a
    posterior.
    """

    frame: bool = False  # takes (B, 3, 1, H, W) and gives (B, 2C, 1, h, w)
    latent: str = ""  # no posterior: the field of `encode`'s output that holds the latent
    alpha: bool = False  # may take a fourth channel, which is opaque here
    patches: bool = False  # latents are put into patches and normalised by its batch norm
    own_norm: bool = False  # takes pixels in [0, 1] and gives latents that are normalised already


MANNERS = {
    "AutoencoderKLQwenImage": Manner(frame=True),
    "AutoencoderKLQwenImage21": Manner(frame=True, alpha=True),
    "AutoencoderKLWan": Manner(frame=True),
    "AutoencoderKLFlux2": Manner(patches=True),
    "AutoencoderDC": Manner(latent="latent"),
    "AutoencoderTiny": Manner(latent="latents"),
    "AutoencoderRAE": Manner(latent="latent", own_norm=True),
}


class Vae:
    """Encoder and decoder of one autoencoder with its own normalisation. `weights` is the digest of
    both; `kind` says which column it fills: "moments", or "latents" where there is no posterior.
    """

    def __init__(
        self, model: ModelSpec, device: str = "cpu", expected: str | None = None, *,
        compiled: bool = False, channels_last: bool = False,
    ) -> None:  # fmt: skip
        """Load it; ModelNotUsable if the weights are not the `expected` ones."""
        import diffusers

        self.model, self.device = model, torch.device(device)
        self._manner = MANNERS.get(model.cls, Manner())
        self.kind = "latents" if self._manner.latent else "moments"
        diffusers.utils.logging.disable_progress_bar()
        self._module = load_model(diffusers, model, low_cpu_mem_usage=False)
        self.weights = weights_digest(self._module)
        check_weights(self.weights, expected, model.path)
        self._module.to(self.device)
        tune(self._module, self._module.encoder, compiled, channels_last)

    @cached_property
    def norm(self) -> Norm:
        """From its config, or where its class keeps it; ModelNotUsable if it has none."""
        config = self._module.config
        if self._manner.own_norm:
            return Norm((0.0,), (1.0,))
        if self._manner.patches:
            deviation = (self._module.bn.running_var + config.batch_norm_eps).sqrt()
            return Norm(
                tuple(self._module.bn.running_mean.tolist()), tuple((1 / deviation).tolist())
            )
        return norm_of(config, self.model.path)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> fp32 moments (B, 2C, h, w), mean | logvar in [-30, 20],
        or latents (B, C, h, w).
        """
        x = self._as_taken(pixels.to(self.device, torch.float32))
        with autocast(self.model.precision, self.device):
            output = self._module.encode(x)
        if self._manner.latent:
            return getattr(output, self._manner.latent).float()  # type: ignore[no-any-return]  # diffusers is untyped
        parts = [output.latent_dist.mean.float(), output.latent_dist.logvar.float()]
        if self._manner.frame:
            parts = [part.squeeze(2) for part in parts]
        if self._manner.patches:
            parts = [torch.pixel_unshuffle(part, self._patch) for part in parts]
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised -> pixels (B, 3, H, W) fp32 in [-1, 1]."""
        z = latents.to(self.device, torch.float32)
        if self._manner.patches:
            z = torch.pixel_shuffle(z, self._patch)
        with autocast(self.model.precision, self.device):
            pixels = self._module.decode(
                z.unsqueeze(2) if self._manner.frame else z, return_dict=False
            )[0]
        pixels = pixels.squeeze(2) if self._manner.frame else pixels
        pixels = pixels.float()[:, :3]
        pixels = pixels * 2 - 1 if self._manner.own_norm else pixels
        return pixels.clamp(-1, 1)  # type: ignore[no-any-return]  # diffusers is untyped

    def _as_taken(self, pixels: Tensor) -> Tensor:
        """Pixels in the shape and range that the class wants."""
        config, manner = self._module.config, self._manner
        if manner.own_norm:
            pixels = (pixels + 1) / 2
        if manner.alpha and config.in_channels == 4 * (config.patch_size or 1) ** 2:
            pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
        return pixels.unsqueeze(2) if manner.frame else pixels

    @property
    def _patch(self) -> int:
        height, width = self._module.config.patch_size
        if height != width:
            raise ModelNotUsable(f"{self.model.path}: patches of {height} x {width}, not square")
        return int(height)

    def moments_shape(self, resolution: int) -> tuple[int, ...]:
        """(2C, h, w) of moments or (C, h, w) of latents for square pictures of this size, found by
        encoding a grey one; ModelNotUsable if that fails.
        """
        with trying(
            f"{self.model.path}: {self.model.cls} cannot encode pictures of {resolution} x "
            f"{resolution} pixels",
            "Try another size; a class that takes frames, or has no posterior, must be known to "
            "encode.vae.MANNERS",
        ):
            row = self.encode(torch.zeros(1, 3, resolution, resolution))[0]
        if row.ndim != 3:
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives rows of shape {tuple(row.shape)}, "
                "expected (channels, height, width)"
            )
        return tuple(row.shape)


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
            "latents_std. Training needs a normalisation: say it in the column, as norm: {shift: "
            f"[0.0], scale: [{1.0 if scale is None else scale}]}} (a shift of 0 is a number too)"
        )
    return Norm((float(shift),), (float(scale),))
