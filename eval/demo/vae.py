"""Trains the demo's two VAEs; they differ in one term of the loss.

    python -m eval.demo.vae --recipe plain --data demo/data --out configs/demo/vae-plain
    python -m eval.demo.vae --recipe equi --data demo/data --out configs/demo/vae-equi

About half an hour each on one core. `equi` adds scale equivariance of the latents: a latent made smaller
must decode to the picture made smaller (the idea of EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509).
Architecture, pictures, their order, steps and seed are the same; the weights are stored in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from shards import sha256_file
from shards.console import Bar, positive
from shards.places import local_path

from .data import digest, read, training_tars

RESOLUTION = 64
RECIPES = ("plain", "equi")
FIRST = 4  # losses that are recorded
PHOTO_REPEATS = 5  # 42 crops among 2240 drawings would hardly be seen


@dataclass(frozen=True)
class Budget:
    """What both recipes spend; the test shortens it."""

    steps: int = 3600
    batch: int = 8
    rate: float = 4e-3
    warmup: int = 100  # steps
    seed: int = 0


KL_WEIGHT = 1e-4  # per latent element; the reconstruction terms are per pixel element
EQUI_WEIGHT = 0.5


def build() -> AutoencoderKL:
    """(B, 3, 64, 64) -> latents (B, 16, 8, 8); 0.7 million parameters, most of them at low resolution."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=RESOLUTION,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def pictures(data: Path) -> Tensor:
    """Returns all training pictures, (N, 3, 64, 64) in [-1, 1]; never the held-out tar."""
    drawings = read(training_tars(data), RESOLUTION)[1]
    crops = read([data / "photos/00000.tar"], RESOLUTION)[1]
    return torch.cat([drawings] + [crops] * PHOTO_REPEATS)


def difference(decoded: Tensor, real: Tensor) -> Tensor:
    """Returns the mean absolute error of the pixels and of their slopes, which keeps outlines sharp."""
    loss = F.l1_loss(decoded, real)
    for axis in (2, 3):
        loss = loss + 0.5 * F.l1_loss(decoded.diff(dim=axis), real.diff(dim=axis))
    return loss


def loss(vae: AutoencoderKL, pixels: Tensor, recipe: str) -> Tensor:
    """Returns one step's loss on pixels (B, 3, H, W)."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    total = difference(vae.decode(latents).sample, pixels) + KL_WEIGHT * kl
    if recipe == "equi":
        # Half the batch, at 4/8 or 6/8 of the size: the term costs a fifth of the step.
        half = len(pixels) // 2
        side = (4, 6)[int(torch.randint(2, ()))]
        small = _resize(latents[:half], side)
        total = total + EQUI_WEIGHT * difference(
            vae.decode(small).sample, _resize(pixels[:half], 8 * side)
        )
    return total


def _resize(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)


def train(
    images: Tensor, recipe: str, budget: Budget, report: Callable[[int, float], None]
) -> AutoencoderKL:
    """Returns a VAE trained on images (N, 3, H, W) in [-1, 1]; `report` gets step and loss."""
    torch.manual_seed(budget.seed)
    vae = build()
    # The order has a generator of its own: the recipes draw different amounts of noise, not other pictures.
    order = torch.Generator().manual_seed(budget.seed)
    optimizer = torch.optim.AdamW(
        vae.parameters(), budget.rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, budget))
    for step in range(budget.steps):
        rows = torch.randint(len(images), (budget.batch,), generator=order)
        mirrored = torch.rand(budget.batch, generator=order) < 0.5
        pixels = images[rows]
        pixels[mirrored] = pixels[mirrored].flip(3)
        value = loss(vae, pixels, recipe)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, value.item())
    return vae


def _rate(step: int, budget: Budget) -> float:
    """Returns the factor of the learning rate: linear warm-up, then a half cosine to zero."""
    if step < budget.warmup:
        return (step + 1) / budget.warmup
    share = (step - budget.warmup) / max(1, budget.steps - budget.warmup)
    return 0.5 * (1 + math.cos(math.pi * share))


@torch.inference_mode()
def encode_means(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])


@torch.inference_mode()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Returns the mean PSNR in dB of reconstructions from the latent's mean; pictures span [-1, 1]."""
    values = []
    for part in images.split(64):
        decoded = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        error = ((decoded - part) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * error.log10())
    return float(torch.cat(values).mean())


@torch.inference_mode()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Writes shift and scale into the config so that drawn latents (z - shift) * scale have mean 0 and
    deviation 1.
    """
    torch.manual_seed(0)
    latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(64)])
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 6),
        scaling_factor=round(1 / float(latents.std()), 6),
    )


def save(vae: AutoencoderKL, out: Path) -> AutoencoderKL:
    """Stores the weights in half precision; returns the VAE that a user of the files gets."""
    vae.to(torch.float16).save_pretrained(out)
    return AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32, local_files_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--data", type=local_path, required=True, help="folder of eval.demo.data")
    parser.add_argument("--out", type=local_path, required=True)
    parser.add_argument("--steps", type=positive, default=Budget.steps)
    arguments = parser.parse_args()
    budget = Budget(steps=arguments.steps)
    images = pictures(arguments.data)
    held_out = read([arguments.data / "openmoji-val/00000.tar"], RESOLUTION)[1]
    start = time.monotonic()
    losses: list[float] = []

    def report(_: int, loss: float) -> None:
        losses.append(loss)
        bar.advance(1)

    def text() -> str:
        return f"loss {np.mean(losses[-100:]):.4f}, {bar.pace()}"

    with Bar(arguments.recipe, budget.steps, "steps", text=text) as bar:
        vae = train(images, arguments.recipe, budget, report).eval()
    normalise(vae, images)
    vae = save(vae, arguments.out)
    recipe = {
        "recipe": arguments.recipe,
        **asdict(budget),
        "resolution": RESOLUTION,
        "data": digest(),
        "weights": sha256_file(arguments.out / "diffusion_pytorch_model.safetensors"),
        # A test repeats these steps, so that script, pictures and weights stay together.
        "first_losses": [round(value, 4) for value in losses[:FIRST]],
        "minutes": round((time.monotonic() - start) / 60, 1),
        "torch": torch.__version__,
        "held_out_psnr_db": round(psnr(vae, held_out), 2),
    }
    (arguments.out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe))


if __name__ == "__main__":
    main()
