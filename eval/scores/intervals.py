"""Scores with their uncertainty: percentile bootstrap over the units that were drawn (prompts or pictures)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .results import LEVEL


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """For a difference: whether it is shown at all."""
        return self.low > 0 or self.high < 0


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    units: int,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Resample `units` with replacement; `statistic` gets the indices drawn.

    Paired comparison: let the statistic be the difference of both sets' scores at the same indices. A Frechet
    distance grows when pictures repeat, so its own interval sits too high; differences of two sets suffer less.
    """
    generator = np.random.default_rng(seed)
    draws = [statistic(generator.integers(0, units, units)) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(np.arange(units))), float(low), float(high))
