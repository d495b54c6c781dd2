"""What turns prompts into pictures: a model, its VAE and its text encoder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encode.models import Vae
from encode.registry import VAES
from shards import Norm
from shards.read import undraw
from train.checkpoints.checkpoint import CheckpointError
from train.config import LONGEST_EMA, SHORTEST_EMA
from train.model import LEAST_SHIFT, MOST_SHIFT, DiT

from ..errors import BadRequest, EncoderMismatch
from ..prompts.prompts import Half
from .checkpoint import TYPES, Checkpoint
from .encoders import Text, check_named, latent_shape, vae_of
from .ranks import check_device
from .runs import Run
from .sampler import Interval, sample

Json = dict[str, Any]
log = logging.getLogger(__name__)
RESOLUTION = 256  # the reference's, where no column says


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; names and defaults are the command line's."""

    checkpoint: Path
    save_dir: Path
    prompts: Path | None = None  # or where the benchmark's were fetched to
    benchmark: str = "prompts"
    type: str = "latentbank"  # of eval.images.checkpoint.TYPES
    tag: int | None = None
    resolution: int | None = None  # pixels; the columns', or RESOLUTION
    num_inference_steps: int = 25
    guidance_scale: float = 6.0
    guidance_interval: Interval | None = None
    sampler: str = "euler"
    shift: float | None = None  # timestep shift of the sampler; the run's
    batch_size: int | None = None  # pictures; the benchmark's
    n_samples: int | None = None  # pictures of a prompt; the benchmark's
    half: Half | None = None  # of the prompts, as `eval sweep` divides them; all
    seed: int = 42
    ema_weights: bool = True
    ema: float | None = None  # relative length of another average than the run's own
    vae: str | None = None
    text_encoder: str | None = None
    allow_other_encoder: bool = False
    allow_class: Sequence[str] | None = None  # of the user, that a column may name as its encoder
    text_cache: Path | None = None
    threads: int = 1  # on a CPU; the last bits may depend on it
    device: str = "cpu"

    def __post_init__(self) -> None:
        """BadRequest for a seed, a guidance, a shift, an average or a device that cannot be;
        ModelNotUsable for a VAE that is not there (of a text encoder, prompts may be encoded already).
        """
        if not 0 <= self.seed < 2**64:
            raise BadRequest(f"--seed: found {self.seed}, expected 0 to 2**64 - 1")
        if not 0 <= self.guidance_scale < math.inf:  # which NaN is not either
            raise BadRequest(
                f"--guidance_scale: found {self.guidance_scale:g}, expected a finite number of at least 0 (at 1 or "
                "below the prompt alone is run, without guidance)"
            )
        if self.shift is not None and not LEAST_SHIFT <= self.shift <= MOST_SHIFT:
            raise BadRequest(
                f"--shift: found {self.shift:g}, expected {LEAST_SHIFT:g} to {MOST_SHIFT:g}"
            )
        if self.ema is not None:
            self._check_ema(self.ema)
        check_device(self.device)
        if not self.allow_class:  # which alone knows what its path names
            check_named("--vae", self.vae, VAES)

    def _check_ema(self, length: float) -> None:
        if not SHORTEST_EMA <= length <= LONGEST_EMA:
            raise BadRequest(
                f"--ema: found {length:g}, expected {SHORTEST_EMA:g} to {LONGEST_EMA:g}, relative to updates"
            )
        other = "" if self.type == "latentbank" else f"--type {self.type}"
        if other := other or ("" if self.ema_weights else "--no-ema_weights"):
            raise BadRequest(
                f"--ema: found it beside {other}, expected it alone: it is an average that is made of a run's snapshots"
            )

    @property
    def average(self) -> bool | float:
        """The run's own average, none, or the length of another one."""
        return self.ema_weights if self.ema is None else self.ema


@dataclass(frozen=True)
class Generator:
    """Everything that turns prompts into pictures, on one device."""

    model: DiT
    texts: Text
    vae: Vae
    norm: Norm
    latent_shape: tuple[int, int, int]  # (C, H, W)
    identity: Json  # of weights, VAE and text encoder
    run: Run  # the training that made the weights

    @classmethod
    def load(cls, request: Request) -> Generator:
        """Loads the checkpoint and its VAE, and finds which text encoder it takes."""
        _check_named(request)
        checkpoint = TYPES[request.type](request.checkpoint, request.tag, request.average)
        _check_imported(request, checkpoint)
        allow_other, device = request.allow_other_encoder, request.device
        vae = vae_of(
            checkpoint.latents, request.vae, device, allow_other, request.allow_class or ()
        )
        norm = checkpoint.norm or vae.norm
        default = checkpoint.latents.picture.resolution if checkpoint.latents else RESOLUTION
        resolution = request.resolution or default
        shape = latent_shape(vae, resolution, checkpoint.model.config.in_channels)
        _check_size(checkpoint.model, shape, resolution)
        _check_norm(norm, shape, resolution)
        _check_decoded(vae, shape, resolution)
        texts = Text(
            checkpoint.text, request.text_encoder, device, allow_other, checkpoint.hidden_state
        )
        width = checkpoint.model.config.text_width
        if texts.width not in (None, width):
            raise EncoderMismatch(
                f"{request.text_encoder}: found a text encoder of width {texts.width}, expected {width}, as the model "
                "has. Name the one that it was trained with"
            )
        identity = {
            "type": request.type, "weights": checkpoint.weights, "step": checkpoint.step, "ema": request.average,
            "vae": vae.weights, "decoding": {"class": vae.model.cls, "precision": vae.model.precision},
            "norm": norm.summary(),
            "text_encoder": texts.weights, "text": texts.identity, "resolution": resolution,
        }  # fmt: skip
        _warn_of_others(checkpoint, identity)
        for warning in checkpoint.run.warnings(request.guidance_scale):
            log.warning("%s: %s", request.checkpoint, warning)
        return cls(checkpoint.model, texts, vae, norm, shape, identity, checkpoint.run)

    def pictures(
        self, text: Sequence[Tensor], empty: Tensor, noise: Tensor, steps: int, guidance: float,
        sampler: str = "euler", interval: Interval | None = None, shift: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Returns pixels (B, 3, H', W') in [-1, 1] of tokens [(n_i, D)] and noise (B, C, H, W).

        The timestep shift is the run's unless another is given."""
        device, flow = noise.device, self.run.flow
        packed = torch.cat(list(text)).to(device).float()
        tokens = torch.split(packed, [len(caption) for caption in text])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = sample(
                self.model, tokens, empty.to(device).float(), noise=noise, steps=steps, guidance=guidance,
                sampler=sampler, interval=interval, shift=shift or flow.timestep_shift,
                prediction=flow.prediction,
            )  # fmt: skip
        return self.vae.decode(undraw(latents, self.norm))


def _check_named(request: Request) -> None:
    """BadRequest where a reference's checkpoint, which names no encoders, comes alone."""
    if request.type == "latentbank":
        return
    flags = {"--vae": request.vae, "--text-encoder": request.text_encoder}
    if missing := [flag for flag, name in flags.items() if name is None]:
        raise BadRequest(
            f"--type {request.type}: found no {' and no '.join(missing)}, expected those of the model's training, of "
            "which its checkpoint says nothing: a folder, or a name of the registry such as flux, gemma-2b"
        )


def _check_imported(request: Request, checkpoint: Checkpoint) -> None:
    """CheckpointError where imported weights, whose columns were not named, come alone."""
    if request.type != "latentbank" or checkpoint.latents or (request.vae and request.text_encoder):
        return
    raise CheckpointError(
        f"{request.checkpoint}: found imported weights and no word of their VAE and text encoder. Import them again "
        "and name the latent column and the text column that these made, or name --vae and --text-encoder"
    )


def _check_size(model: DiT, shape: tuple[int, int, int], resolution: int) -> None:
    """BadRequest where the model cannot take latents of this shape."""
    config, (channels, *sides) = model.config, shape
    patch, most = config.patch_size, config.pos_embed_max_size
    if config.out_channels != channels:
        raise BadRequest(
            f"found a model of {channels} channels in and {config.out_channels} out, expected as many"
        )
    size = " x ".join(map(str, sides))
    if any(side % patch for side in sides):
        raise BadRequest(
            f"--resolution {resolution}: found latents of {size}, expected multiples of {patch}, the model's patches"
        )
    if config.pos_embed == "ape" and max(sides) > patch * most:
        raise BadRequest(
            f"--resolution {resolution}: found latents of {size}, expected at most {patch * most}, for the model's "
            f"table of positions has {most} x {most} patches"
        )


def _check_norm(norm: Norm, shape: tuple[int, int, int], resolution: int) -> None:
    """BadRequest where latents of this shape cannot be normalised: each place has a number of its own."""
    try:
        norm.check_shape(shape)
    except ValueError as error:
        raise BadRequest(
            f"--resolution {resolution}: {error}. Leave it out for that of the columns"
        ) from None


def _check_decoded(vae: Vae, shape: tuple[int, int, int], resolution: int) -> None:
    """BadRequest where pictures would have another size, which the VAE's factor does not divide."""
    height, width = vae.decode(torch.zeros(1, *shape)).shape[-2:]
    if (height, width) != (resolution, resolution):
        raise BadRequest(
            f"--resolution {resolution}: found a VAE that makes pictures of {width} x {height} pixels of its latents, "
            f"expected {resolution} x {resolution}. Choose a multiple of the VAE's factor, such as {width}"
        )


def _warn_of_others(checkpoint: Checkpoint, identity: Json) -> None:
    """Warns where VAE or text encoder have other weights than those of the columns."""
    columns = {
        "vae": checkpoint.latents.encoder.weights if checkpoint.latents else None,
        "text_encoder": checkpoint.text.encoder.weights if checkpoint.text else None,
    }
    for name, weights in columns.items():
        if weights and identity[name] != weights:
            log.warning(
                "%s: using weights %.16s..., the columns were made with %.16s...: these pictures are not of the model "
                "as it was trained",
                name, identity[name], weights,
            )  # fmt: skip
