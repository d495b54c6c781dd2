"""FID and KID between two folders of pictures.

    python -m eval fid images/flux/images images/real --inception /weights

Both are clean-fid's ("clean" resize, Inception of 2015-12-05), with the weights taken from a local
file. A finished set is better scored by `python -m eval score fid`, which keeps features and gives
an interval.
"""

from __future__ import annotations

from pathlib import Path

from ..features.features import extract, of_folder
from ..features.networks import inception
from .frechet import frechet_features
from .kernels import kid_features
from .metrics import METRICS, least


def score(
    fake: Path, real: Path, weights: Path | None = None, device: str = "cpu", batch_size: int = 32
) -> dict[str, float | int | str]:
    """Returns FID and KID of two folders and their counts; `note` where FID wants more."""
    network = inception(weights, device)
    sets = [of_folder(folder) for folder in (fake, real)]
    a, b = (extract(pictures, network, batch_size=batch_size) for pictures in sets)
    few, needed = min(len(a), len(b)), least(METRICS["fid"], network)
    note = (
        f"FID of {few} pictures: fewer than {needed} leave no full covariance and give a larger one. Take KID, or "
        "compare at equal numbers only"
    )
    return {
        "fid": frechet_features(a, b),
        "kid_x1000": 1000 * kid_features(a, b),
        "fake_pictures": len(a),
        "real_pictures": len(b),
        "scorer": "clean-fid 0.1.35, clean, inception-2015-12-05",
        **({"note": note} if few < needed else {}),
    }
