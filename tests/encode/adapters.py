"""Autoencoders of a user's own, as short as they may be: a 1-D tokenizer, a representation autoencoder
with statistics of each place, pixels themselves, and one with a posterior.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

SIDE, PATCH, WIDTH = 32, 8, 48  # pixels, pixels of a token, channels of a latent


class Tokens(torch.nn.Module):
    """Rows of N x C: the lowest frequencies of each patch, without places."""

    version = "1"
    norm = (0.0, 1.5)

    def __init__(self, path: str) -> None:
        super().__init__()
        self.register_buffer("basis", load_file(path)["basis"])

    def encode(self, pixels: Tensor) -> Tensor:
        return F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2) @ self.basis

    def decode(self, latents: Tensor) -> Tensor:
        patches = (latents @ self.basis.T).transpose(1, 2)
        side = round(patches.shape[2] ** 0.5) * PATCH
        return F.fold(patches, (side, side), PATCH, stride=PATCH)


class Representation:
    """Pixels in 0 .. 1, and mean and deviation of each channel and place, as RAE has them."""

    version = "2026-11"
    pixel_range = (0, 1)

    def __init__(self, path: str) -> None:
        tensors = load_file(f"{path}/weights.safetensors")
        self.kernel = tensors["basis"].T.reshape(WIDTH, 3, PATCH, PATCH).contiguous()
        self.norm = (tensors["mean"], 1 / tensors["deviation"])

    def encode(self, pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, self.kernel, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        return F.conv_transpose2d(latents, self.kernel, stride=PATCH)


class Pixels:
    version = "1"
    norm = ([0.0, 0.0, 0.0], [2.0, 2.0, 2.0])

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Posterior(Tokens):
    posterior = True

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean = super().encode(pixels)
        return mean, torch.full_like(mean, -40.0)

    @classmethod
    def load(cls, path: str) -> Posterior:
        return cls(f"{path}/weights.safetensors")


def basis() -> Tensor:
    """The cosine basis of a patch (3 * PATCH^2, WIDTH): four by four frequencies of each colour."""
    k, n = torch.meshgrid(torch.arange(4.0), torch.arange(PATCH) + 0.5, indexing="ij")
    cosines = torch.cos(torch.pi * k * n / PATCH) * (2 / PATCH) ** 0.5
    cosines[0] /= 2**0.5
    planes = torch.einsum("ay,bx->abyx", cosines, cosines).reshape(16, PATCH * PATCH)
    return torch.block_diag(planes, planes, planes).T.contiguous()


def save_weights(folder: Path) -> Path:
    """The file that `Tokens` takes, in the folder that `Representation` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    places = (WIDTH, SIDE // PATCH, SIDE // PATCH)
    generator = torch.Generator().manual_seed(0)
    mean, deviation = (
        torch.randn(places, generator=generator),
        torch.rand(places, generator=generator),
    )
    save_file(
        {"basis": basis(), "mean": mean, "deviation": deviation + 0.5},
        folder / "weights.safetensors",
    )
    return folder / "weights.safetensors"


ADAPTERS = {  # class -> kind, shape of a row; the path that it is called with, below the folder
    "Tokens": ("latents", (WIDTH, 1, 16), "weights.safetensors"),
    "Representation": ("latents", (WIDTH, 4, 4), "."),
    "Pixels": ("latents", (3, SIDE, SIDE), None),
    "Posterior.load": ("moments", (2 * WIDTH, 1, 16), "."),
}


def plain_own(name: str, folder: Path, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """What the class alone makes of pixels in -1 .. 1, as rows, and of latents (B, C, h, w) or (B, C, 1, N);
    ranges, tokens and posterior are written out by hand.
    """
    path = ADAPTERS[name][2]
    word = () if path is None else (str(folder / path),)
    half = name == "Representation"
    made = Posterior.load(*word) if name == "Posterior.load" else globals()[name](*word)
    z = made.encode((x + 1) / 2 if half else x)
    parts = [
        part[:, None].transpose(1, 3).transpose(2, 3) if part.ndim == 3 else part
        for part in (z if isinstance(z, tuple) else (z,))
    ]
    rows = torch.cat([parts[0], *(part.clamp(-30, 20) for part in parts[1:])], 1)
    tokens = latents[:, :, 0].transpose(1, 2) if latents.shape[2] == 1 else latents
    pixels = made.decode(tokens)
    return rows, (pixels * 2 - 1 if half else pixels).clamp(-1, 1)


def own(name: str, folder: Path) -> dict[str, str]:
    """`encoder` of a column's config."""
    path = ADAPTERS[name][2]
    encoder = {"class": f"tests.encode.adapters:{name}"}
    return encoder if path is None else {**encoder, "path": str(folder / path)}
