"""The distances: which network, what is done with its features, and what a score of them is called.

FID and KID are clean-fid's; CMMD is that of its authors; CLIP-FID takes clean-fid's preparation,
FD-DINOv2 dgm-eval's. MIND, precision and recall compare as many reference pictures as there are
generated ones, as their papers do. FDr (FD-loss, arXiv 2604.28190) is FD(generated, reference) over
FD(validation, reference): 1 is as far as other real pictures are. A new distance is an entry of
METRICS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import BadReference
from ..features.features import Floats
from . import frechet, kernels, neighbours, references, slices
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
    # how many real pictures it is of, where that is not the whole reference
    against: int | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)  # seeds and sizes, for the record


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
    better: Literal["higher", "lower"] = "lower"
    fewest: int = 2  # pictures of a side, whatever the network's width
    counted: bool = False  # the score's name ends with the number of pictures
    relative: bool = False  # to the distance of a validation half, which --validation names


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


def _ratio(features: Floats, reference: Reference, paired: bool = False) -> Distance:
    """Returns FD(generated, reference) / FD(validation, reference), of equal numbers of pictures.

    `subsets` are the ratio with what each part of the validation half adds to the denominator, so
    that the interval has the chance of that draw too, and a difference of two sets, which have the
    denominator in common, cancels it.
    """
    assert reference.validation is not None
    assert not paired  # to originals of the same pictures no other pictures are as near
    validation = reference.validation.drawn(len(features))
    below, of_validation = frechet.influence(validation, reference.gaussian)
    if below <= SAME * np.trace(reference.gaussian.covariance):
        raise BadReference(
            f"{reference.validation.label}: at the distance {below:.3g} of the reference {reference.label}, so nothing "
            "can be relative to it. Take other real pictures as the validation half, not copies of the reference's"
        )
    above, shares = frechet.influence(features, reference.gaussian)
    value, count = above / below, min(PARTS, len(validation))
    sums = np.array([part.sum() for part in np.array_split(of_validation, count)])
    subsets = value * (1 - count / len(validation) * sums / below)
    made_by = {
        "validation": reference.validation.digest,
        "validation_label": reference.validation.label,
        "validation_pictures": len(validation),
        "validation_distance": below,
        "drawn_by": references.SEED,
    }
    return Distance(value, shares / below, tuple(subsets.tolist()), made_by=made_by)


def _mind(features: Floats, reference: Reference, paired: bool = False) -> Distance:
    real = reference.features if paired else reference.drawn(len(features))
    value, shares = slices.mind_influence(features, real)
    if paired:
        shares += slices.mind_influence(real, features)[1]
    made_by = {
        "directions": slices.DIRECTIONS,
        "directions_seed": slices.SEED,
        "drawn_by": references.SEED,
    }
    return Distance(value, shares, against=len(real), made_by=made_by)


def _covered(
    influence: Callable[[Floats, Floats], tuple[float, NDArray[np.float64]]],
    features: Floats,
    reference: Reference,
    paired: bool = False,
) -> Distance:
    assert not paired  # what real pictures add to precision and recall is not computed
    real = reference.drawn(len(features))
    made_by = {"neighbours": neighbours.NEIGHBOURS, "drawn_by": references.SEED}
    return Distance(*influence(features, real), against=len(real), made_by=made_by)


def _inception(weights: str | None, device: str) -> Network:
    from ..features.networks import inception

    return inception(Path(weights) if weights else None, device)


def _clip(resize: str, weights: str | None, device: str) -> Network:
    from ..features.networks import Clip

    return Clip(str(weights), device).network(resize)


def _dinov2(weights: str | None, device: str) -> Network:
    from ..features.networks import dinov2

    return dinov2(str(weights), device)


SAME = 1e-9  # of the reference's variance: a distance that is 0 but for rounding
PARTS = 100  # of a validation half
FEW = "compare at equal numbers of pictures only: fewer give a larger one"
INCEPTION = "inception-2015-12-05"
SHORT, CENTRE = partial(_clip, "short-bicubic"), partial(_clip, "cc-bicubic-floor")
PRECISION = partial(_covered, neighbours.precision_influence)
RECALL = partial(_covered, neighbours.recall_influence)
COVERS = "by 3 nearest neighbours; compare at equal numbers of pictures only"
RATIO = "1 is as far as other real pictures are; compare at equal numbers of pictures only"
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
    "mind": Metric("sliced Wasserstein distance of Inception's features, good for 1,000 pictures",
                   "mind-clean", INCEPTION, _inception, None, _mind, False, FEW, counted=True),
    "precision": Metric("share of the pictures that lie among real ones, by Inception's features",
                        "precision-clean", INCEPTION, _inception, None, PRECISION,
                        False, COVERS, "higher", neighbours.LEAST, counted=True),
    "recall": Metric("share of real pictures that lie among the generated ones, by Inception's features",
                     "recall-clean", INCEPTION, _inception, None, RECALL,
                     False, COVERS, "higher", neighbours.LEAST, counted=True),
    "fdr": Metric("FID relative to that of as many other real pictures",
                  "fdr-clean", INCEPTION, _inception, None, _ratio, True, RATIO, counted=True, relative=True),
    "clip-fdr": Metric("CLIP-FID relative to that of as many other real pictures",
                       "clip-fdr", "clip-vit-b-32", SHORT, CLIP_BASE, _ratio, True, RATIO, counted=True, relative=True),
    "fdr-dinov2": Metric("FD-DINOv2 relative to that of as many other real pictures", "fdr-dinov2",
                         "dinov2-vit-l-14", _dinov2, DINOV2, _ratio, True, RATIO, counted=True, relative=True),
}  # fmt: skip


def least(metric: Metric, network: Network) -> int:
    """Returns how many pictures a distance needs: a covariance lacks rank under the width."""
    return network.width + 1 if metric.gaussian else metric.fewest
