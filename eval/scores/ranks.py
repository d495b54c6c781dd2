"""How well a figure that is known before training orders entries as their scores do afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atanh, sqrt, tanh
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .results import LEVEL

FEWEST = 4  # entries of an interval


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Spearman's rank correlation in -1 .. 1, its 95 % interval, and the number of entries.

    `low` and `high` are None of fewer than FEWEST entries, and where the correlation is -1 or 1.
    """

    value: float
    low: float | None
    high: float | None
    entries: int


def rank_correlation(figures: Sequence[float], outcomes: Sequence[float]) -> RankCorrelation | None:
    """Returns the rank correlation of two values an entry; None of fewer than two entries, or where one
    of both is the same for all.

    Ties share the mean of their ranks. The interval is by Fisher's z with the variance
    (1 + r^2 / 2) / (n - 3) (Bonett and Wright, 2000, doi 10.1007/BF02294183). Raises ValueError for
    values that are not finite, and for other numbers of figures than of outcomes.
    """
    a, b = (np.asarray(values, np.float64) for values in (figures, outcomes))
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"found {a.shape} figures of {b.shape} outcomes, expected one of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("found a value that is not finite")
    x, y = ranks(a), ranks(b)
    if len(a) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    low: float | None = None
    high: float | None = None
    if len(a) >= FEWEST and 1 - abs(value) > 1e-9:
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * sqrt((1 + value**2 / 2) / (len(a) - 3))
        low, high = tanh(atanh(value) - half), tanh(atanh(value) + half)
    return RankCorrelation(value=value, low=low, high=high, entries=len(a))


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the rank of each value, 1 for the lowest; equal values share the mean of theirs."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), np.float64)


def joint(figures: Mapping[str, Sequence[float]]) -> list[float]:
    """Returns the mean rank of each entry over several figures, of each of which lower is better."""
    both = [ranks(np.asarray(values, np.float64)) for values in figures.values()]
    return [float(value) for value in np.mean(both, axis=0)]
