"""LPIPS: how different two pictures look to a network of ImageNet (Zhang et al. 2018, version 0.1).

Both pictures, in [-1, 1], are shifted and scaled as the authors do and go through the convolutions
of AlexNet or VGG16. After five of their layers the activations are brought to length 1 along the
channels; the squared differences are weighted by a channel's linear head, summed over channels,
averaged over the picture, and the five are added (eq. 1).

Weights are files: torchvision's backbone, and the authors' heads, which the package `lpips`
carries.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import sha256_file

from ..errors import MissingWeights
from ..images.ranks import check_device
from .pretrained import damaged

# network -> torchvision's file, the layers that are compared
BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16-397923af.pth", (3, 8, 15, 22, 29)),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALL = 1e-10  # beside a length


class Lpips:
    """The distance by one network. `weights` are the digests of its two files."""

    def __init__(self, network: str, folder: Path | None = None, device: str = "cpu") -> None:
        """Load backbone and heads from `folder`, or from where torchvision and lpips keep them."""
        from torchvision import models

        self._layers = BACKBONES[network][1]
        backbone, heads = find(network, folder)
        check_device(device)
        self.name, self._device = f"lpips-{network}", torch.device(device)
        self.weights = {"backbone": sha256_file(backbone), "heads": sha256_file(heads)}
        model = models.alexnet() if network == "alex" else models.vgg16()
        with _loading(backbone, _backbone_url(network)):
            stored = torch.load(backbone, "cpu", weights_only=True)
            model.features.load_state_dict({
                k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")
            })  # fmt: skip
        self._features = model.features.eval().requires_grad_(False).to(self._device)
        with _loading(heads, f"weights/v0.1/{heads.name} of the package lpips"):
            weights = torch.load(heads, "cpu", weights_only=True)
            rows = [weights[f"lin{i}.model.1.weight"] for i in range(5)]
        self._heads = [row.to(self._device) for row in rows]

    @torch.inference_mode()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> list[float]:
        """Returns the distance of each pair of pictures, both (B, H, W, 3)."""
        distances = torch.zeros(len(a), device=self._device)
        layers = zip(self._activations(a), self._activations(b), self._heads, strict=True)
        for x, y, head in layers:  # (B, C, h, w), (B, C, h, w), (1, C, 1, 1)
            distances += (((x - y) ** 2) * head).sum(1).mean((1, 2))
        return distances.tolist()

    def _activations(self, pictures: NDArray[np.uint8]) -> list[Tensor]:
        shift, scale = (
            torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (SHIFT, SCALE)
        )
        x = torch.from_numpy(pictures).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x, activations = (x - shift) / scale, []
        for i, layer in enumerate(self._features):
            x = layer(x)
            if i in self._layers:
                activations.append(x / (x.square().sum(1, keepdim=True).sqrt() + SMALL))
            if i == self._layers[-1]:
                break
        return activations


@contextmanager
def _loading(path: Path, source: str) -> Iterator[None]:
    """Turns what torch raises of a file that is cut off, or is another, into MissingWeights."""
    try:
        yield
    except (
        RuntimeError, UnpicklingError, EOFError, KeyError, AttributeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise damaged(path, source, error) from error


def _backbone_url(network: str) -> str:
    return f"https://download.pytorch.org/models/{BACKBONES[network][0]}"


def find(network: str, folder: Path | None) -> tuple[Path, Path]:
    """Returns the files of backbone and heads; MissingWeights says what is missing."""
    package = importlib.util.find_spec("lpips")
    carried = Path(package.origin).parent / "weights/v0.1" if package and package.origin else None
    backbone, heads = BACKBONES[network][0], f"{network}.pth"
    places = {
        backbone: (folder, Path(torch.hub.get_dir()) / "checkpoints"),
        heads: (folder, carried),
    }
    paths = {}
    for file, folders in places.items():
        files = [place / file for place in folders if place and (place / file).is_file()]
        if not files:
            raise MissingWeights(
                f"LPIPS needs {file}: not found in {' or '.join(str(f) for f in folders if f) or 'any folder'}. The "
                f"backbone is {_backbone_url(network)}; the heads are weights/v0.1/{heads} of "
                "the package lpips (`pip install lpips`). Name their folder with --lpips"
            )
        paths[file] = files[0]
    return paths[backbone], paths[heads]
