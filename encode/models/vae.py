"""A frozen autoencoder of diffusers: pixels -> moments or latents, latents -> pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Norm
from shards.format.atomic import Json

from ..config import LatentsColumn, MomentsColumn, NormConfig
from ..errors import ModelNotUsable
from ..registry import VAES, ModelSpec, location, published
from ..source.decoding import View
from .encoder import ImageEncoder, Words
from .norm import ConfigNorm, config_norm
from .pixels import pixels_on, to_float16
from .weights import autocast, load_model, trying, tune


@dataclass(frozen=True, slots=True)
class VaeAdapter:
    """How a class is called, where that differs from AutoencoderKL: (B, 3, H, W) in [-1, 1] to a
    posterior.
    """

    frame: bool = False  # takes (B, 3, 1, H, W) and gives (B, 2C, 1, h, w)
    latent: str = ""  # no posterior: the field of `encode`'s output that holds the latent
    alpha: bool = False  # may take a fourth channel, which is opaque here
    patches: bool = False  # latents are put into patches and normalised by its batch norm
    own_norm: bool = False  # takes pixels in [0, 1] and gives latents that are normalised already


VAE_ADAPTERS = {
    "AutoencoderKLQwenImage": VaeAdapter(frame=True),
    "AutoencoderKLQwenImage21": VaeAdapter(frame=True, alpha=True),
    "AutoencoderKLWan": VaeAdapter(frame=True),
    "AutoencoderKLFlux2": VaeAdapter(patches=True),
    "AutoencoderDC": VaeAdapter(latent="latent"),
    "AutoencoderTiny": VaeAdapter(latent="latents"),
    "VQModel": VaeAdapter(latent="latents"),  # before its codebook, which `decode` applies
    "AutoencoderRAE": VaeAdapter(latent="latent", own_norm=True),
}


# classes like AutoencoderKL in all
POSTERIOR = (
    "AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderKLHunyuanImage", "AutoencoderKLKVAE",
)  # fmt: skip
# classes of diffusers that no column can be made with, and why
VIDEO = "it is of videos, and how a picture passes through it is not known here"
SOUND = "it is of sound, not of pictures"
REFUSED = {
    **dict.fromkeys(
        (
            "AutoencoderKLAllegro", "AutoencoderKLCogVideoX", "AutoencoderKLCosmos",
            "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLHunyuanVideo",
            "AutoencoderKLHunyuanVideo15", "AutoencoderKLKVAEVideo", "AutoencoderKLLTX2Video",
            "AutoencoderKLLTXVideo", "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3",
            "AutoencoderKLMochi", "AutoencoderVidTok", "Kandinsky6SRVAE",
        ),
        VIDEO,
    ),
    **dict.fromkeys(
        (
            "AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio",
            "AutoencoderOobleck", "AutoencoderSAME", "Cosmos3AVAEAudioTokenizer",
            "LongCatAudioDiTVae", "MMAudioVAE", "MMAudioVocoder", "MiniMaxMusic3Vocoder",
        ),
        SOUND,
    ),
    "AutoencoderKLTemporalDecoder": "its decoder is of videos: it needs num_frames",
    "ConsistencyDecoderVAE": "its decoder draws random numbers: a latent has no one picture",
    "RFD4ProteinaAutoencoder": "it is of proteins, not of pictures",
}  # fmt: skip
YAML_NORM = "norm of the column's encode config"
METHODS = ("encode", "decode")
FRAMES = (
    "A class that decodes frames, not pictures, must be known to encode.models.vae.VAE_ADAPTERS"
)


def refuse_class(cls: type, model: ModelSpec) -> None:
    """Raises ModelNotUsable for a class that is no autoencoder, or half of one."""
    absent = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if absent:
        raise ModelNotUsable(
            f"{model.path}: {cls.__name__} is no autoencoder: it has no {' and no '.join(absent)}. "
            "Expected a class that encodes pictures and decodes latents, as AutoencoderKL"
        )
    if reason := REFUSED.get(cls.__name__):
        raise ModelNotUsable(
            f"{model.path}: {cls.__name__} cannot make a column: {reason}. Take another class, or wrap it "
            "in one of your own: class: package.module:Class"
        )


class Vae(ImageEncoder):
    """Encoder and decoder of one autoencoder with its own normalisation. `weights` is the digest of
    both; `kind` says which column it fills: "moments", or "latents" where there is no posterior.
    One that is loaded to decode has neither `config` nor `view`.
    """

    config: MomentsColumn | LatentsColumn

    def __init__(
        self, model: ModelSpec, device: str = "cpu", expected: str | None = None, *,
        config: MomentsColumn | LatentsColumn | None = None, compiled: bool = False,
        channels_last: bool = False,
    ) -> None:  # fmt: skip
        """Loads it; ModelNotUsable if the weights are not the `expected` ones, or if it cannot fill
        the column of `config`.
        """
        self.model, self.device = model, torch.device(device)
        self._module, self.weights = load_model(
            "diffusers", model, device, expected=expected, check=refuse_class,
            low_cpu_mem_usage=False,
        )  # fmt: skip
        self._adapter = VAE_ADAPTERS.get(self.cls, VaeAdapter())
        self.kind = "latents" if self._adapter.latent else "moments"
        hot = getattr(self._module, "encoder", self._module)
        tune(self._module, hot, compiled, channels_last)
        self._column_norm: NormConfig | None = None
        if config is not None:
            if config.kind != self.kind:
                raise self._other_kind(config.kind)
            self.config, self._column_norm = config, config.norm
            self.view = View(config.resolution, config.suffix)
            _ = self.norm  # refuses a normalisation that is missing or wrong

    @property
    def cls(self) -> str:
        """The class that was loaded, also where AutoModel was asked for."""
        return type(self._module).__name__

    @property
    def _known(self) -> bool:
        """Whether it is known how the class is called."""
        return self.cls in VAE_ADAPTERS or self.cls in POSTERIOR

    def _other_kind(self, kind: str) -> ModelNotUsable:
        if self._known:
            noun = "a posterior" if self.kind == "moments" else "no posterior"
            return ModelNotUsable(
                f"{self.model.path}: {self.cls} has {noun}. Say kind: {self.kind}, not {kind}"
            )
        return ModelNotUsable(
            f"{self.model.path}: {self.cls} is not known to encode.models.vae.VAE_ADAPTERS, so it is "
            f"taken to have a posterior. Say kind: {self.kind}, or add the class there with the field "
            "of `encode`'s output that holds its latents"
        )

    @cached_property
    def file_norm(self) -> ConfigNorm:
        """What its config says of normalisation, or its class where that keeps it elsewhere;
        ModelNotUsable for numbers that are none.
        """
        config, path = self._module.config, self.model.path
        if self._adapter.patches:  # FLUX.2: (x - mean) / sqrt(var + eps) of its batch norm
            deviation = (self._module.bn.running_var + config.batch_norm_eps).sqrt()
            shift, scale = self._module.bn.running_mean.tolist(), (1 / deviation).tolist()
            return ConfigNorm(
                tuple(shift), tuple(scale), path, source="the batch norm in the weights"
            )
        file, entry = config, published(path, self.model.subfolder)
        if entry or (path, self.model.subfolder) not in {
            (m.path, m.subfolder) for m in VAES.values()
        }:
            # diffusers has filled up the config with its class's numbers; the file has its own alone
            file = type(self._module).load_config(
                location(path), subfolder=self.model.subfolder, revision=self.model.revision
            )
        if entry:
            return config_norm(file, path).published(entry.scale, entry.source)
        if self._adapter.own_norm:
            complete = None not in (file.get("latents_mean"), file.get("latents_std"))
            if not complete:
                return ConfigNorm(None, None, path)
            return ConfigNorm((0.0,), (1.0,), path, source="the class, which normalises")
        return config_norm(file, path, config)

    @cached_property
    def norm(self) -> Norm:
        """The config's normalisation, or the column's, which must not contradict it; ModelNotUsable
        if it does, or if neither says one.
        """
        if self._column_norm is None:
            return self.file_norm.own()
        return self.file_norm.agreed(self._column_norm.norm)

    @property
    def norm_source(self) -> str:
        """Where `norm` comes from: the encode config, fields of the model's config, or the registry."""
        return self.file_norm.source if self._column_norm is None else YAML_NORM

    def runs_on(self) -> Json:
        return {**super().runs_on(), "norm_source": self.norm_source}

    def rows(self, images: NDArray[np.uint8]) -> Words:
        return to_float16(self.encode(pixels_on(self.device, images)))

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        shape = self.moments_shape(self.view.resolution)
        channels = shape[0] // 2 if self.kind == "moments" else shape[0]
        try:
            self.norm.check_shape((channels, *shape[1:]))
        except ValueError as error:
            raise ModelNotUsable(
                f"{self.model.path}: {error}. Correct latents_mean and latents_std in its config"
            ) from None
        return shape

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> fp32 moments (B, 2C, h, w), mean | logvar in [-30, 20],
        or latents (B, C, h, w).
        """
        x = self._adapted(pixels.to(self.device, torch.float32))
        with autocast(self.model.precision, self.device):
            output = self._module.encode(x)
        if self._adapter.latent:
            return getattr(output, self._adapter.latent).float()  # type: ignore[no-any-return]  # diffusers is untyped
        if not hasattr(output, "latent_dist"):
            raise ModelNotUsable(
                f"{self.model.path}: {self.cls} has no posterior: `encode` gives {_fields(output)}, "
                "expected latent_dist. Add the class to encode.models.vae.VAE_ADAPTERS with the "
                "field that holds its latents, then say kind: latents"
            )
        parts = [output.latent_dist.mean.float(), output.latent_dist.logvar.float()]
        if self._adapter.frame:
            parts = [part.squeeze(2) for part in parts]
        if self._adapter.patches:
            parts = [torch.pixel_unshuffle(part, self._patch) for part in parts]
        return torch.cat(parts, 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), not normalised -> pixels (B, 3, H, W) fp32 in [-1, 1]."""
        z = latents.to(self.device, torch.float32)
        if self._adapter.patches:
            z = torch.pixel_shuffle(z, self._patch)
        with autocast(self.model.precision, self.device):
            pixels = self._module.decode(
                z.unsqueeze(2) if self._adapter.frame else z, return_dict=False
            )[0]
        pixels = pixels.squeeze(2) if self._adapter.frame else pixels
        pixels = pixels.float()[:, :3]
        pixels = pixels * 2 - 1 if self._adapter.own_norm else pixels
        return pixels.clamp(-1, 1)  # type: ignore[no-any-return]  # diffusers is untyped

    def _adapted(self, pixels: Tensor) -> Tensor:
        """Returns pixels in the shape and range that the class takes."""
        config, manner = self._module.config, self._adapter
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
        """Returns (2C, h, w) of moments or (C, h, w) of latents of a grey picture of this size;
        ModelNotUsable if it cannot be encoded.
        """
        try:
            with trying(
                f"{self.model.path}: {self.cls} cannot encode pictures of {resolution} x "
                f"{resolution} pixels",
                "Try another size"
                if self._known
                else "It is not known to encode.models.vae.VAE_ADAPTERS: a class that takes frames "
                "must be; else try another size",
            ):
                row = self.encode(torch.zeros(1, 3, resolution, resolution))[0]
        except ModelNotUsable:
            self._refuse_channels()
            raise
        if row.ndim != 3:
            raise ModelNotUsable(
                f"{self.model.path}: {self.model.cls} gives rows of shape {tuple(row.shape)}, "
                "expected (channels, height, width)"
            )
        return tuple(row.shape)

    def _refuse_channels(self) -> None:
        """Raises ModelNotUsable if the model takes other pictures than those of three channels."""
        config = self._module.config
        patch = config.get("patch_size")
        patch = patch if isinstance(patch, int) else 1
        channels = config.get("in_channels", 3)
        if channels not in (3, 3 * patch**2):
            raise ModelNotUsable(
                f"{self.model.path}: {self.cls} takes pictures of {channels} channels (in_channels of "
                "its config; 4 are red, green, blue and opacity), columns are made of three, red, "
                "green and blue. Give a model that takes these"
            ) from None

    def refuse_decoder(self) -> None:
        """Raises ModelNotUsable if the latents of a picture do not become a picture of its size again:
        nobody could look at what a model trained on them makes.
        """
        side = self.view.resolution
        advice = "" if self._known else FRAMES
        with trying(f"{self.model.path}: {self.cls} cannot decode what it encodes", advice):
            row = self.encode(torch.zeros(1, 3, side, side))
            shape = tuple(self.decode(row if self.kind == "latents" else row.chunk(2, 1)[0]).shape)
        if shape != (1, 3, side, side):
            raise ModelNotUsable(
                f"{self.model.path}: {self.cls} makes {shape} of the latents of a picture, expected "
                f"{(1, 3, side, side)}. Give another model or resolution. {advice}"
            )


def _fields(output: Any) -> str:
    """Returns the names of the fields of what a class of diffusers gives."""
    return ", ".join(output.keys()) if hasattr(output, "keys") else type(output).__name__
