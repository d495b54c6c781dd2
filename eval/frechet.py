"""Squared Frechet distance of Gaussians fitted to features, and what each picture adds to it.

|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2), m means, S covariances with n - 1. With R = S2^(1/2) the last trace
is that of (R S1 R)^(1/2), whose eigenvalues are real and not negative: no matrix root of a product is needed.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 1_024  # of features that are held in float64 at once
NEGLIGIBLE = 1e-10  # of the largest eigenvalue: directions in which a sample does not vary

Features = NDArray[np.floating[Any]]  # (pictures, width)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of `count` features."""

    mean: Floats
    covariance: Floats
    count: int

    @classmethod
    def fitted(cls, features: Features) -> "Gaussian":
        """In float64, a part of the rows at a time."""
        mean = features.mean(0, dtype=np.float64)
        outer = np.zeros((len(mean), len(mean)))
        for start in range(0, len(features), ROWS):
            part = features[start : start + ROWS] - mean
            outer += part.T @ part
        return cls(mean, outer / (len(features) - 1), len(features))

    @cached_property
    def root(self) -> Floats:
        """The covariance's symmetric root."""
        values, vectors = np.linalg.eigh(self.covariance)
        return np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T)


def frechet(mu1: Floats, sigma1: Floats, mu2: Floats, sigma2: Floats) -> float:
    """Squared Frechet distance of two Gaussians with means (D,) and covariances (D, D)."""
    return distance(Gaussian(mu2, sigma2, 0), Gaussian(mu1, sigma1, 0))


def frechet_features(a: Features, b: Features) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features."""
    return distance(Gaussian.fitted(a), Gaussian.fitted(b))


def distance(found: Gaussian, reference: Gaussian) -> float:
    root = reference.root
    values = np.linalg.eigvalsh(root @ found.covariance @ root)
    return _distance(found, reference, values)


def influence(features: Features, reference: Gaussian) -> tuple[float, Floats]:
    """The distance of features (N, D) from a reference that is taken as given, and each picture's influence (N,) on it.

    The influence is the derivative of the distance by the picture's weight, times N: its mean is 0, and the mean of
    its squares over N is the distance's variance, as far as it comes from which pictures were drawn. Along a centred
    feature c it is 2 c.(m1 - m2) + c.c - c^T T c, less its mean, where T = R (R S1 R)^(-1/2) R carries one Gaussian
    into the other. (A bootstrap would move the distance itself, which grows when pictures repeat.)
    """
    found, root = Gaussian.fitted(features), reference.root
    values, vectors = np.linalg.eigh(root @ found.covariance @ root)
    varies = values > values.max() * NEGLIGIBLE
    carried = (
        root @ vectors[:, varies] * values[varies] ** -0.25
    )  # (D, rank): T is this times its transpose
    shift = 2 * (found.mean - reference.mean)
    parts = []
    for start in range(0, len(features), ROWS):
        c = features[start : start + ROWS] - found.mean
        parts.append(c @ shift + np.square(c).sum(1) - np.square(c @ carried).sum(1))
    each = np.concatenate(parts)
    return _distance(found, reference, values), each - each.mean()


def _distance(found: Gaussian, reference: Gaussian, values: Features) -> float:
    """With the eigenvalues of R S1 R."""
    apart = np.square(found.mean - reference.mean).sum()
    traces = np.trace(found.covariance) + np.trace(reference.covariance)
    return float(apart + traces - 2 * np.sqrt(values.clip(0)).sum())
