"""Frechet and kernel distances between two folders of pictures.

    python -m eval fid images/flux/images images/real --inception /weights

FID and KID are clean-fid's ("clean" resize, Inception of 2015-12-05), with the weights taken from a local file.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import MissingWeights, TooFewImages

WEIGHTS = "inception-2015-12-05.pt"
KID_SUBSETS, KID_SIZE = 100, 1_000  # clean-fid's
Features = NDArray[np.floating[Any]]  # (pictures, width)


def frechet(mu1: Features, sigma1: Features, mu2: Features, sigma2: Features) -> float:
    """Squared Frechet distance of two Gaussians with means (D,) and covariances (D, D).

    |mu1 - mu2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2). The eigenvalues of S1 S2 are those of the symmetric
    S1^(1/2) S2 S1^(1/2), real and not negative, so the last trace is the sum of their roots and needs no matrix root.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * shared
    return float(distance)


def frechet_features(a: Features, b: Features) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return frechet(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def kid_features(a: Features, b: Features, seed: int = 0) -> float:
    """Kernel distance with k(x, y) = (x.y / D + 1)^3: the unbiased estimate, averaged over 100 seeded subsets."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = min(len(a), len(b), KID_SIZE)
    generator = np.random.default_rng(seed)
    draws = [
        _kernel_distance(
            a[generator.choice(len(a), size, replace=False)],
            b[generator.choice(len(b), size, replace=False)],
        )
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(draws))


def _kernel_distance(x: Features, y: Features) -> float:
    """Unbiased squared MMD of two equally large sets."""
    m, width = x.shape

    def kernel(p: Features, q: Features) -> Features:
        return np.asarray((p @ q.T / width + 1) ** 3)

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def folder_features(
    folder: Path, network: Callable[[Tensor], Tensor], device: str = "cpu", batch_size: int = 32
) -> Features:
    """Features of all pictures below a folder: clean-fid's files, order and resize; `network` sees (B, 3, 299, 299)
    in [0, 255]."""
    from cleanfid import fid  # five seconds

    if not folder.is_dir():
        raise TooFewImages(f"{folder}: no such folder. Expected one with pictures")
    if ".zip" in str(folder):
        raise TooFewImages(
            f"{folder}: clean-fid takes a path with .zip in it for an archive; rename"
        )
    found = sum(1 for path in folder.rglob("*") if path.suffix[1:].lower() in fid.EXTENSIONS)
    if found < 2:
        raise TooFewImages(f"{folder}: found {found} pictures, expected at least 2")
    return np.asarray(
        fid.get_folder_features(
            str(folder), network, num_workers=0, batch_size=batch_size, device=torch.device(device),
            mode="clean", verbose=False,
        )
    )  # fmt: skip


def inception(folder: Path | None, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """clean-fid's Inception from a folder that holds its weights; never downloads."""
    from cleanfid import downloads_helper
    from cleanfid.inception_torchscript import InceptionV3W

    where = folder or Path(tempfile.gettempdir())  # clean-fid's own place
    if not (where / WEIGHTS).is_file():
        raise MissingWeights(
            f"FID needs Inception's weights: found no {WEIGHTS} in {where}. Fetch "
            f"{downloads_helper.inception_url} on a machine with a network, copy the file here, and name its folder "
            "with --inception. Without them there is no FID"
        )
    network = InceptionV3W(str(where), download=False).to(device).eval()
    return network  # type: ignore[no-any-return]  # clean-fid is untyped


def score(
    fake: Path, real: Path, weights: Path | None = None, device: str = "cpu", batch_size: int = 32
) -> dict[str, float | int | str]:
    """FID and KID of two folders, with the number of pictures of each."""
    network = inception(weights, device)
    a, b = (folder_features(folder, network, device, batch_size) for folder in (fake, real))
    return {
        "fid": frechet_features(a, b),
        "kid_x1000": 1000 * kid_features(a, b),
        "fake_pictures": len(a),
        "real_pictures": len(b),
        "scorer": "clean-fid 0.1.35, clean, inception-2015-12-05",
    }
