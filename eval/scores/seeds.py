"""Training seeds: which trainings are one entry, and what its seeds say together.

A training seed is drawn by chance as a prompt is, but there are few of them, and resampling two or
three says far too little of how seeds vary: the interval of `over_seeds` is Student's t over seeds,
widened by what the prompts add. Seeds are never resampled.

Derivation. d_sp is what training seed s gives on prompt p (of two entries: their difference, of
the same seed, prompt and pictures' noise), with S seeds and P prompts:

    d_sp = d + a_s + b_p + e_sp        a_s: the seed, b_p: the prompt, e_sp: both together
    mean over s and p: its variance is  A/S + B/P + E/(S P)

V_S = var over s of d_s, over S, estimates A/S + E/(S P): it is blind to b_p, which moves all d_s
alike. V_P = var over p of the mean over seeds, over P, estimates B/P + E/(S P): it is blind to a_s.
Both hold E/(S P), so one of them is taken off: V_R, the mean square of what remains of d_sp without
its seed's and its prompt's mean, over S P. V_S has S - 1 degrees of freedom and V_P many, so each
has its own quantile, and the parts add as squares (Howe 1974):

    d +- sqrt(t(0.975; S - 1)^2 V_S + z(0.975)^2 max(0, V_P - V_R))

Where prompts are drawn within groups, V_P and V_R are sums over the groups. A score that is no mean
over prompts is one of the prompts' influences to first order, so V_P is the variance of the sum of
influences, averaged over the seeds: one draw of prompts for all seeds and both entries. V_R is then
taken as 0, which is wide rather than narrow: influences are of first order only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import OtherImages
from .results import LEVEL, Value

Seeded = dict[int | None, int]  # index by training seed; None: unknown
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ONE_SEED = "one training seed: how much another seed would move this is not known"
SEEDS_OF_A_VERDICT = 3  # the deviation of two has one degree of freedom: its interval says little
SMALLEST = 1e-100  # level that is searched; below it is 0


def grouped(sets: Sequence[tuple[Hashable | None, int | None]]) -> list[Seeded]:
    """Returns entries in the order of their first set, from sets' keys (all but the seed) and seeds.

    Sets of equal key are one entry; a set without a key, or with a seed that the entry has, is its
    own.
    """
    entries: list[tuple[Hashable | None, Seeded]] = []
    for index, (key, seed) in enumerate(sets):
        for other_key, members in entries:
            if key is not None and other_key == key and seed not in members:
                members[seed] = index
                break
        else:
            entries.append((key, {seed: index}))
    return [members for _, members in entries]


@dataclass(frozen=True, kw_only=True)
class Variances:
    """What the variance of a mean over training seeds is made of, in squared units of the score."""

    count: int  # S, of training seeds
    seeds: float | None  # V_S; None of one seed
    # V_P; None where it is not known: no items, or a prompt that is alone in its group
    prompts: float | None
    residual: float = 0.0  # V_R, which both of them hold

    @property
    def of_prompts(self) -> float:
        """The part of the variance that more training seeds would leave."""
        return max(0.0, (self.prompts or 0.0) - self.residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A score of one set, or a difference of two, and how each prompt moves it.

    `influences` (P,) are in units of the score: the sum of those of the prompts that are drawn is
    how far the score moves, to first order. `strata` hold the indices of prompts that are drawn
    together. Without prompts nothing is known of how they move the score.
    """

    value: float
    prompts: tuple[str, ...] = ()
    influences: Floats = field(default_factory=lambda: np.zeros(0))
    strata: tuple[Ints, ...] = ()
    additive: bool = False  # a mean over prompts
    subsets: Floats = field(default_factory=lambda: np.zeros(0))  # that a distance is the mean of

    def __sub__(self, other: Estimate) -> Estimate:
        """Returns the difference over the same prompts, drawn as those of the subtracted one.

        OtherImages where they are others.
        """
        return replace(
            other,
            value=self.value - other.value,
            influences=other._aligned(self) - other.influences,
            subsets=self.subsets - other.subsets,
        )

    def _aligned(self, other: Estimate) -> Floats:
        """Returns another's influences in the order of these prompts."""
        if self.prompts == other.prompts:
            return other.influences
        if sorted(self.prompts) != sorted(other.prompts):
            raise OtherImages(
                f"found scores of {len(self.prompts)} and of {len(other.prompts)} prompts that are not the same "
                "ones: only sets of the same prompts are compared"
            )
        place = {name: index for index, name in enumerate(other.prompts)}
        return other.influences[[place[name] for name in self.prompts]]


def combined(value: float, weights: Floats, estimates: Sequence[Estimate]) -> Estimate:
    """Returns a value that moves by the weighted sum of what prompts move each estimate by.

    It has no prompts where one of the estimates has none; OtherImages where they are of other prompts.
    """
    first = estimates[0]
    if not all(estimate.prompts for estimate in estimates):
        return Estimate(value=value)
    influences = np.stack([first._aligned(estimate) for estimate in estimates])
    return Estimate(
        value=value, prompts=first.prompts, influences=weights @ influences, strata=first.strata
    )


def over_seeds(estimates: Sequence[Estimate]) -> tuple[Value, Variances]:
    """Returns the mean over training seeds with its interval, and what its variance is made of.

    Of one seed the interval is over prompts alone; where nothing is known of prompts it is over
    seeds alone, and of one seed there is none. OtherImages where the seeds are of other prompts.
    """
    first, count = estimates[0], len(estimates)
    values = np.array([estimate.value for estimate in estimates])
    influences = np.stack([first._aligned(estimate) for estimate in estimates])
    prompts_vary = bool(first.strata) and min(map(len, first.strata)) > 1
    seeds_part, prompts_part, residual = variances(
        values, influences, first.strata if prompts_vary else (), first.additive
    )
    subsets = np.mean([estimate.subsets for estimate in estimates], axis=0)
    parts = Variances(
        count=count,
        seeds=float(seeds_part) if count > 1 else None,
        prompts=float(prompts_part) + variance_of_mean(subsets) if prompts_vary else None,
        residual=float(residual),
    )
    mean, prompts = float(values.mean()), len(first.prompts) or None
    if parts.seeds is None and parts.prompts is None:
        return Value(mean, count=prompts), parts
    half = half_width(parts)
    return Value(mean, mean - half, mean + half, prompts), parts


def variances(
    values: Floats, influences: Floats, strata: Sequence[Ints], additive: bool
) -> tuple[Floats, Floats, Floats]:
    """Returns V_S, V_P and V_R, each (...), of values (..., S) and influences (..., S, P).

    With influences (d_sp - d_s) / P they are those of the derivation above. V_S of one seed is 0.
    """
    count = values.shape[-1]
    seeds_part = values.var(-1, ddof=1) / count if count > 1 else np.zeros(values.shape[:-1])
    mean = influences.mean(-2)
    prompts_part, residual = np.zeros_like(seeds_part), np.zeros_like(seeds_part)
    for stratum in strata:
        size = len(stratum)
        prompts_part = prompts_part + size * mean[..., stratum].var(-1, ddof=1)
        if additive and count > 1:
            rest = influences[..., stratum] - mean[..., None, stratum]
            rest = rest - rest.mean(-1, keepdims=True)
            mean_square = np.square(rest).sum((-2, -1)) / ((count - 1) * (size - 1))
            residual = residual + size * mean_square / count
    return seeds_part, prompts_part, residual


def variance_of_mean(values: Floats) -> float:
    """Returns the variance of the mean of independent values; 0 of none."""
    return float(np.var(values, ddof=1) / len(values)) if len(values) else 0.0


def half_width(parts: Variances, level: float = 1 - LEVEL) -> float:
    """Returns how far the interval reaches to either side, at an error rate of `level`."""
    from scipy.stats import norm, t

    square = float(norm.isf(level / 2)) ** 2 * parts.of_prompts
    if parts.seeds is not None:
        square += float(t.isf(level / 2, parts.count - 1)) ** 2 * parts.seeds
    return sqrt(square)


def error_level(value: Value, parts: Variances) -> float | None:
    """Returns p: the error rate at which the interval of a difference would end at 0.

    It is at most 1 - LEVEL exactly where the interval leaves 0 out. None without an interval, and of
    two seeds, which give no verdict. The interval of one seed may be of resamples, so it is scaled
    as a normal one, by its end on the side of 0.
    """
    if value.low is None or value.high is None or 1 < parts.count < SEEDS_OF_A_VERDICT:
        return None
    if value.value == 0:
        return 1.0
    if parts.count == 1:
        from scipy.stats import norm

        half = value.value - value.low if value.value > 0 else value.high - value.value
        quantile = float(norm.isf((1 - LEVEL) / 2))
        return float(2 * norm.sf(quantile * abs(value.value) / half)) if half > 0 else 0.0
    return _root(abs(value.value), parts)


def _root(distance: float, parts: Variances) -> float:
    from scipy.optimize import brentq

    if half_width(parts, SMALLEST) < distance:
        return 0.0
    return exp(brentq(lambda x: half_width(parts, exp(x)) - distance, log(SMALLEST), 0.0))


def holm(levels: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns p of each entry against the baseline, adjusted for their number (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on, none below the one before.
    A verdict at an adjusted p of at most 1 - LEVEL is wrong for any of the entries in at most that
    share of studies. m counts all entries that are planned: one without p, such as that of a
    training which has not run, has no verdict, and is counted as if it were the largest. Whatever
    it gets later, the p of the others stay or become smaller.
    """
    order = sorted((p, name) for name, p in levels.items() if p is not None)
    adjustments: dict[str, float | None] = dict.fromkeys(levels)
    largest = 0.0
    for rank, (p, name) in enumerate(order):
        largest = max(largest, min(1.0, (len(levels) - rank) * p))
        adjustments[name] = largest
    return adjustments
