"""Squared Frechet distance of Gaussians fitted to features, and what each picture adds to it.

|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2), m means, S covariances with n - 1 (Dowson and
Landau 1982). With S = F F^T the last trace is the sum of the singular values of F1^T F2: the same
whichever comes first, and no root of a product is taken, whose eigenvalues, where they are 0 but
for rounding, would each add the root of that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.linalg import svd
from numpy.typing import NDArray

ROWS = 1_024  # of features that are held in float64 at once
NEGLIGIBLE = 1e-10  # of the largest singular value: directions in which a sample does not vary

Features = NDArray[np.floating[Any]]  # (pictures, width)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of `count` features."""

    mean: Floats
    covariance: Floats
    count: int

    @classmethod
    def fitted(cls, features: Features) -> Gaussian:
        """Returns the fit, in float64, a part of the rows at a time."""
        mean = features.mean(0, dtype=np.float64)
        outer = np.zeros((len(mean), len(mean)))
        for start in range(0, len(features), ROWS):
            part = features[start : start + ROWS] - mean
            outer += part.T @ part
        return cls(mean, outer / (len(features) - 1), len(features))

    @cached_property
    def factor(self) -> Floats:
        """F (D, rank) with F F^T the covariance: eigenvectors times roots of eigenvalues.

        Those are left out that are 0 as far as float64 can tell: their roots would be 1e-8 of the
        largest, and not 1e-16.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        varies = values > values.max() * len(values) * np.finfo(np.float64).eps
        return np.asarray(vectors[:, varies] * np.sqrt(values[varies]))


def frechet_features(a: Features, b: Features) -> float:
    """Returns the distance of the Gaussians fitted to two sets of features."""
    return distance(Gaussian.fitted(a), Gaussian.fitted(b))


def distance(sample: Gaussian, reference: Gaussian) -> float:
    return _distance(sample, reference, svd(sample.factor.T @ reference.factor, compute_uv=False))


def influence(features: Features, reference: Gaussian) -> tuple[float, Floats]:
    """Returns the distance of features (N, D) from a fixed reference, and the influences (N,).

    The influence is the derivative of the distance by the picture's weight, times N: its mean is 0,
    and the mean of its squares over N is the distance's variance, as far as it comes from which
    pictures were drawn. Along a centred feature c it is 2 c.(m1 - m2) + c.c - c^T T c, less its
    mean, where T carries one Gaussian into the other: with F1^T F2 = U s V^T it is F2 V s^-1 V^T
    F2^T. (A bootstrap would move the distance itself, which grows when pictures repeat.)
    """
    sample = Gaussian.fitted(features)
    _, values, vectors = svd(sample.factor.T @ reference.factor, full_matrices=False)
    varies = values > values.max(initial=0) * NEGLIGIBLE
    # (D, rank): T is this times its transpose
    transport = reference.factor @ (vectors[varies].T / np.sqrt(values[varies]))
    shift = 2 * (sample.mean - reference.mean)
    parts = []
    for start in range(0, len(features), ROWS):
        c = features[start : start + ROWS] - sample.mean
        parts.append(c @ shift + np.square(c).sum(1) - np.square(c @ transport).sum(1))
    influences = np.concatenate(parts)
    return _distance(sample, reference, values), influences - influences.mean()


def _distance(sample: Gaussian, reference: Gaussian, values: Features) -> float:
    """Returns the distance, given the singular values of F1^T F2; 0 where rounding leaves less."""
    shift = np.square(sample.mean - reference.mean).sum()
    traces = np.trace(sample.covariance) + np.trace(reference.covariance)
    return max(0.0, float(shift + traces - 2 * values.sum()))
