"""Kernel distances (squared maximum mean discrepancies) of features, and what each picture adds.

KID (Binkowski et al. 2018): k(x, y) = (x.y / D + 1)^3, unbiased, the mean over 100 subsets of
1,000, as clean-fid has it, in float64. CMMD (Jayasumana et al. 2024): k(x, y) = exp(-|x - y|^2 / (2
* 10^2)) of normalised features, all pairs, diagonal included, times 1,000.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .frechet import ROWS, Features, Floats

SUBSETS, SUBSET = 100, 1_000  # clean-fid's
COLUMNS = 10_000  # with how many others a picture is compared for its influence on KID
SIGMA, UNIT = 10.0, 1_000.0  # CMMD's

Kernel = Callable[[Floats, Floats], Floats]  # (n, D), (m, D) -> (n, m)


def polynomial(x: Floats, y: Floats) -> Floats:
    base = x @ y.T / x.shape[1] + 1
    return np.asarray(base * base * base)  # a tenth of what `** 3` takes


def gaussian(x: Floats, y: Floats) -> Floats:
    distances = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    return np.asarray(np.exp(-distances / (2 * SIGMA**2)))


def kid_subsets(a: Features, b: Features, seed: int = 0) -> Floats:
    """Returns the unbiased distance of 100 pairs of subsets, drawn as clean-fid draws them."""
    size = min(len(a), len(b), SUBSET)
    chance = np.random.RandomState(seed)
    draws = []
    for _ in range(SUBSETS):
        y = b[chance.choice(len(b), size, replace=False)].astype(np.float64)
        x = a[chance.choice(len(a), size, replace=False)].astype(np.float64)
        xx, yy = polynomial(x, x), polynomial(y, y)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        draws.append(within - 2 * polynomial(x, y).mean())
    return np.array(draws)


def kid_features(a: Features, b: Features, seed: int = 0) -> float:
    """Returns the kernel distance of two sets of features: the mean over subsets."""
    return float(kid_subsets(a, b, seed).mean())


def kid_influence(a: Features, b: Features) -> Floats:
    """Returns how much each picture of `a` adds, times N: see `frechet.influence`."""
    columns = np.arange(0, len(a), -(-len(a) // COLUMNS))
    sample, reference = a[columns], b[:: -(-len(b) // COLUMNS)]
    sums = _row_means(a, sample, polynomial) * len(columns)
    own = np.zeros(len(a))
    own[columns] = (np.square(sample.astype(np.float64)).sum(1) / a.shape[1] + 1) ** 3
    count = len(columns) - (own > 0)  # a picture is not compared with itself
    influences = 2 * ((sums - own) / np.maximum(count, 1) - _row_means(a, reference, polynomial))
    return np.asarray(influences - influences.mean())


def cmmd_influence(a: Features, b: Features) -> tuple[float, Floats]:
    """Returns the CMMD of two sets of features of any norm, and each picture's influence on it."""
    with np.errstate(invalid="ignore"):  # of a feature of norm 0 nothing follows: NaN
        x, y = (f / np.linalg.norm(f.astype(np.float64), axis=1, keepdims=True) for f in (a, b))
    within, across = _row_means(x, x, gaussian), _row_means(x, y, gaussian)
    value = within.mean() + _row_means(y, y, gaussian).mean() - 2 * across.mean()
    influences = 2 * UNIT * (within - across)
    return float(UNIT * value), np.asarray(influences - influences.mean())


def _row_means(x: Features, y: Features, kernel: Kernel) -> Floats:
    """Returns the mean kernel of each of x with all of y, a block of pairs at a time."""
    sums = np.zeros(len(x))
    for i in range(0, len(x), ROWS):
        rows = x[i : i + ROWS].astype(np.float64)
        for j in range(0, len(y), ROWS):
            sums[i : i + ROWS] += kernel(rows, y[j : j + ROWS].astype(np.float64)).sum(1)
    return sums / len(y)
