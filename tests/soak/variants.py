"""Latent spaces made from the demo's two VAEs without training one: a linear map behind the encoder, its
inverse before the decoder.

With z (16, 8, 8) the normalised latents of a VAE, a variant is y = mix (z - centre) filter, where `mix` acts
on channels and `filter` on the 64 places. `unmix` and `unfilter` go back, as far as there is a way back. All
have deviation 1 over all values, as the demo's have, so that they differ in structure alone.

    rotated     channels turned by a random rotation: a placebo, nothing that a model learns from differs
    whitened    every channel has mean 0 and deviation 1
    noise-*     a wider posterior, of which training draws: its deviation, over that of all latents
    pc12, pc8   the first 12 and 8 principal components of the channels
    low         frequencies below half of the highest, the others lost
    high        frequencies above half of the highest at twice their amplitude
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from shards import Column, atomic_write
from shards.column import valid_rows

VARIANTS: Mapping[str, tuple[str, str]] = {  # entry -> VAE of the demo, map
    "plain-rotated": ("vae-plain", "rotated"),
    "plain-whitened": ("vae-plain", "whitened"),
    "plain-noise25": ("vae-plain", "noise25"),
    "plain-noise50": ("vae-plain", "noise50"),
    "plain-pc12": ("vae-plain", "pc12"),
    "plain-pc8": ("vae-plain", "pc8"),
    "plain-low": ("vae-plain", "low"),
    "plain-high": ("vae-plain", "high"),
    "equi-pc8": ("vae-equi", "pc8"),
}
CLASS = "tests.soak.variants:Variant"
GAIN = 2.0  # of amplified frequencies
HALF = 0.5  # of the highest frequency of an axis: where low ones end


class Variant(torch.nn.Module):
    """A VAE of the demo and a linear map of its latents, for `encoder: {class: ..., path: FOLDER}`."""

    version = "1"
    posterior = True
    norm = (0.0, 1.0)

    def __init__(self, path: str) -> None:
        super().__init__()
        self.vae = AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False)
        for name, tensor in load_file(f"{path}/variant.safetensors").items():
            self.register_buffer(name, tensor)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        config = self.vae.config
        z = (posterior.mean - config.shift_factor) * config.scaling_factor
        variance = posterior.var * config.scaling_factor**2
        mean = self._mapped(z - self.centre, self.mix, self.filter)
        # of each value alone: what the map makes of a diagonal covariance, without the rest of it
        spread = self._mapped(variance, self.mix.square(), self.filter.square())
        return mean, (spread + self.noise**2).clamp_min(1e-12).log()

    def decode(self, latents: Tensor) -> Tensor:
        z = self._mapped(latents, self.unmix, self.unfilter) + self.centre
        config = self.vae.config
        return self.vae.decode(z / config.scaling_factor + config.shift_factor).sample

    @staticmethod
    def _mapped(z: Tensor, mix: Tensor, places: Tensor) -> Tensor:
        """Maps (B, C, h, w) by mix (D, C) and places (h*w, h*w) to (B, D, h, w)."""
        return torch.einsum("dc,bcp,qp->bdq", mix, z.flatten(2), places).unflatten(2, z.shape[2:])


def save_variant(kind: str, vae: Path, column: Path, folder: Path) -> None:
    """Writes the VAE of a variant to `folder`: weights, config, and a map fitted to the rows of `column`,
    which that VAE made.
    """
    z = normalised(column)
    maps = _map(kind, z)
    shutil.copytree(vae, folder, dirs_exist_ok=True)
    tensors = {
        name: torch.tensor(np.asarray(value), dtype=torch.float32) for name, value in maps.items()
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write(folder / "variant.safetensors", save(contiguous))


def normalised(column: Path) -> NDArray[np.float64]:
    """Returns the posterior means of a column's rows (N, C, h, w), normalised."""
    opened = Column.open(column)
    rows = opened.read(valid_rows(opened.valid_mask())).astype(np.float64)
    shift, scale = (
        np.reshape(v, (-1, 1, 1)) for v in (opened.spec.norm.shift, opened.spec.norm.scale)
    )
    return (rows[:, : rows.shape[1] // 2] - shift) * scale


def _map(kind: str, z: NDArray[np.float64]) -> dict[str, NDArray[np.float64] | float]:
    channels, side = z.shape[1], z.shape[2]
    by_channel = np.moveaxis(z, 1, 0).reshape(channels, -1)
    centre = np.zeros(channels)
    mix = unmix = np.eye(channels)
    places = back = np.eye(side * side)
    noise = 0.0
    if kind == "rotated":
        mix = np.linalg.qr(np.random.default_rng(0).standard_normal((channels, channels)))[0]
        unmix = mix.T
    elif kind == "whitened":
        centre = by_channel.mean(1)
        mix = np.diag(1 / by_channel.std(1))
        unmix = np.diag(by_channel.std(1))
    elif kind.startswith("noise"):
        noise = int(kind.removeprefix("noise")) / 100
    elif kind.startswith("pc"):
        centre = by_channel.mean(1)
        _, vectors = np.linalg.eigh(np.cov(by_channel))
        mix = vectors[:, ::-1][:, : int(kind.removeprefix("pc"))].T
        unmix = mix.T
    elif kind == "low":
        places = _filter(side, 0.0)
    elif kind == "high":
        places, back = _filter(side, GAIN), _filter(side, 1 / GAIN)
    else:
        raise ValueError(f"found {kind!r}, expected one of the maps above")
    mapped = np.einsum(
        "dc,ncp,qp->ndq", mix, z.reshape(len(z), channels, -1) - centre[:, None], places
    )
    scale = 1.0 if kind in ("rotated", "whitened") or noise else 1 / mapped.std()
    return {
        "centre": centre.reshape(-1, 1, 1), "mix": mix * scale, "unmix": unmix / scale,
        "filter": places, "unfilter": back, "noise": noise,
    }  # fmt: skip


def _filter(side: int, gain: float) -> NDArray[np.float64]:
    """Returns the matrix (side^2, side^2) that multiplies cosines from HALF of the highest frequency of an
    axis on by `gain`.
    """
    k, n = np.mgrid[:side, :side]
    cosines = np.cos(np.pi * k * (n + 0.5) / side) * np.sqrt(2 / side)
    cosines[0] /= np.sqrt(2)
    both = np.kron(cosines, cosines)
    frequency = np.maximum(*np.mgrid[:side, :side]).ravel() / side
    return both.T @ np.diag(np.where(frequency < HALF, 1.0, gain)) @ both
