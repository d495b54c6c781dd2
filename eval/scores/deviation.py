"""How far training seeds move a score, and how many seeds would resolve a gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from .results import LEVEL, Score
from .seeds import SEEDS_OF_A_VERDICT

DEVIATION_LEVEL = 0.8  # of a deviation's interval
POWER = 0.8  # share of studies that shall resolve the gap
MOST_SEEDS = 1_000  # beyond which a gap counts as not resolvable
NODES = 64  # of the quadrature over estimated variances; checked against the non-central t

PUBLISHED_PICTURES = 50_000
PUBLISHED = (
    "Published, for FID at 50,000 pictures alone: another training seed moves it by 1 to 2 % (coefficient of "
    "variation; The FID lottery, arXiv 2606.20536)."
)


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """A standard deviation of training seeds, in units of the score, with its 80 % interval."""

    value: float
    low: float
    high: float
    freedom: int  # degrees of it
    mean: float  # of the values

    @property
    def relative(self) -> float | None:
        """The coefficient of variation; None where the mean is 0."""
        return self.value / abs(self.mean) if self.mean else None


def pooled_deviation(entries: Sequence[Sequence[float]]) -> Deviation | None:
    """Returns the deviation of seeds within entries, each a score by seed; None without two seeds.

    Variances are pooled by their degrees of freedom f; f s^2 / sigma^2 is chi-squared.
    """
    from scipy.stats import chi2

    samples = [np.asarray(values, np.float64) for values in entries if len(values) > 1]
    freedom = sum(len(values) - 1 for values in samples)
    if not freedom:
        return None
    squares = sum(float(np.square(values - values.mean()).sum()) for values in samples)
    tail = (1 - DEVIATION_LEVEL) / 2
    return Deviation(
        value=sqrt(squares / freedom),
        low=sqrt(squares / float(chi2.isf(tail, freedom))),
        high=sqrt(squares / float(chi2.ppf(tail, freedom))),
        freedom=freedom,
        mean=float(np.concatenate(samples).mean()),
    )


def power(
    gap: float, deviation: float, seeds: int, prompts: float = 0.0, paired: bool = True
) -> float:
    """Returns how often the interval of `seeds.over_seeds` would leave 0 out, if `gap` were the truth.

    `deviation` is that of one seed's difference (paired), or of one seed of either entry (not paired:
    S seeds a side, 2 S - 2 degrees of freedom). `prompts` is the variance that seeds do not remove.
    Without it this is the power of Student's test, by the non-central t. With it, the difference is
    normal around the gap, and the estimated variance of seeds, which sets the interval's width, is
    averaged over its chi-squared distribution.
    """
    from scipy.stats import chi2, norm, t

    sides = 1 if paired else 2
    freedom, variance = sides * (seeds - 1), sides * deviation**2 / seeds
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    variances = variance * chi2.ppf((nodes + 1) / 2, freedom) / freedom
    quantiles = float(t.isf((1 - LEVEL) / 2, freedom)), float(norm.isf((1 - LEVEL) / 2))
    half = np.sqrt(quantiles[0] ** 2 * variances + quantiles[1] ** 2 * prompts)
    spread = sqrt(variance + prompts)
    if spread == 0:
        return float(gap != 0)
    shares = norm.sf((half - gap) / spread) + norm.sf((half + gap) / spread)
    return float(weights @ shares / 2)


def seeds_to_resolve(
    gap: float, deviation: float, prompts: float = 0.0, paired: bool = True
) -> int | None:
    """Returns the fewest training seeds, of each entry, that resolve a gap in four of five studies.

    At least as many as a verdict takes; None where MOST_SEEDS do not, as where the prompts alone hide
    the gap.
    """

    def enough(seeds: int) -> bool:
        return power(gap, deviation, seeds, prompts, paired) >= POWER

    low, high = SEEDS_OF_A_VERDICT - 1, SEEDS_OF_A_VERDICT  # too few, and perhaps enough
    while not enough(high):
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def range_to_resolve(
    gap: float, deviation: Deviation, prompts: float = 0.0, paired: bool = True
) -> tuple[int | None, int | None]:
    """Returns `seeds_to_resolve` at both ends of the deviation's interval."""
    low, high = (
        seeds_to_resolve(gap, end, prompts, paired) for end in (deviation.low, deviation.high)
    )
    return low, high


def published_deviation(score: Score) -> str | None:
    """Returns what is published of training seeds, for the one score that it is of; else None."""
    is_fid = score.scorer.startswith("fid-clean-") and score.pictures == PUBLISHED_PICTURES
    return PUBLISHED if is_fid else None
