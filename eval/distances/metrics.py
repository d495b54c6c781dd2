"""The distances: which network, what is done with its features, and what a score of them is called.

FID and KID are clean-fid's; CMMD is that of its authors; CLIP-FID takes clean-fid's preparation,
FD-DINOv2 dgm-eval's. A new distance is an entry of METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..features.features import Floats
from . import frechet, kernels
from .references import Reference

if TYPE_CHECKING:
    from ..features.networks import Network

CLIP_BASE, CLIP_LARGE = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14-336"
DINOV2 = "facebook/dinov2-large"


@dataclass(frozen=True, slots=True)
class Distance:
    """A distance, influences (N,), and the values it is the mean of where subsets were drawn."""

    value: float
    influence: NDArray[np.float64]
    subsets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    help: str
    prefix: str  # of the score's name
    usual: str  # the network's name; another one is said in the score's name
    load: Callable[[str | None, str], Network]  # where its weights are, device
    model: str | None  # the weights taken unless said; None: --inception names their folder
    distance: Callable[[Floats, Reference, bool], Distance]  # the last: `paired`, as below
    gaussian: bool  # a covariance is fitted: width + 1 pictures at least
    note: str


# A reference is fixed, unless it is `paired`: of the originals of the same pictures, in their order. Other
# pictures would then change both sides, mostly against each other: the influences are added.


def _frechet(features: Floats, reference: Reference, paired: bool = False) -> Distance:
    value, shares = frechet.influence(features, reference.gaussian)
    if paired:
        shares += frechet.influence(reference.features, frechet.Gaussian.fitted(features))[1]
    return Distance(value, shares)


def _kid(features: Floats, reference: Reference, paired: bool = False) -> Distance:
    subsets = 1_000 * kernels.kid_subsets(features, reference.features)
    shares = kernels.kid_influence(features, reference.features)
    if paired:
        shares += kernels.kid_influence(reference.features, features)
    return Distance(float(subsets.mean()), 1_000 * shares, tuple(subsets.tolist()))


def _cmmd(features: Floats, reference: Reference, paired: bool = False) -> Distance:
    value, shares = kernels.cmmd_influence(features, reference.features)
    if paired:
        shares += kernels.cmmd_influence(reference.features, features)[1]
    return Distance(value, shares)


def _inception(weights: str | None, device: str) -> Network:
    from ..features.networks import inception

    return inception(Path(weights) if weights else None, device)


def _clip(resize: str, weights: str | None, device: str) -> Network:
    from ..features.networks import Clip

    return Clip(str(weights), device).network(resize)


def _dinov2(weights: str | None, device: str) -> Network:
    from ..features.networks import dinov2

    return dinov2(str(weights), device)


FEW = "compare at equal numbers of pictures only: fewer give a larger one"
INCEPTION = "inception-2015-12-05"
SHORT, CENTRE = partial(_clip, "short-bicubic"), partial(_clip, "cc-bicubic-floor")
METRICS = {
    "fid": Metric("Frechet distance of Inception's features, as clean-fid computes it",
                  "fid-clean", INCEPTION, _inception, None, _frechet, True, FEW),
    "kid": Metric("kernel distance of the same features, x 1000; unbiased, so good for few pictures",
                  "kid-clean", INCEPTION, _inception, None, _kid, False, "x 1000"),
    "cmmd": Metric("kernel distance of CLIP ViT-L/14-336 embeddings, x 1000",
                   "cmmd", "clip-vit-l-14-336", CENTRE, CLIP_LARGE, _cmmd, False, FEW),
    "clip-fid": Metric("Frechet distance of CLIP ViT-B/32 embeddings",
                       "clip-fid", "clip-vit-b-32", SHORT, CLIP_BASE, _frechet, True, FEW),
    "fd-dinov2": Metric("Frechet distance of DINOv2 ViT-L/14 features, as dgm-eval prepares pictures",
                        "fd-dinov2", "dinov2-vit-l-14", _dinov2, DINOV2, _frechet, True, FEW),
}  # fmt: skip


def least(metric: Metric, network: Network) -> int:
    """Returns how many pictures a distance needs: a covariance lacks rank under the width."""
    return network.width + 1 if metric.gaussian else 2
