"""Time to quality: how much sooner an entry has a score than the baseline has it, without bias.

"First reach of the baseline's final score" takes a level from one noisy value and compares it with
the best of several: of two identical entries the second seems faster, and the more so the noisier the
scores are. Here both entries are treated alike, seed by seed:

1. Both curves of scores over log steps are made monotone: the least squares fit that never gets worse
   (isotonic regression). A run of equal fitted values lies at the mean of its checkpoints' log steps,
   and between such runs the fit is a straight line.
2. The level is the worse of the two fitted final values, so both curves have it.
3. The log ratio of this seed is log(steps of the baseline) - log(steps of the entry), each at the
   curve's own first reach of the level. Swapped entries change its sign exactly.

The mean of the log ratios over seeds has the interval of `scores.seeds`: Student's t over seeds,
widened by prompts. How a prompt moves a log ratio is, to first order, the sum of what it moves each
scored value by, times the log ratio's derivative by that value; the derivative is a difference over
one standard error of the prompts to either side, since a fit's own derivative jumps.

Between two checkpoints a curve is interpolated, so an interval that is narrower than their spacing
claims more than was measured: where noise is small, interpolation is most of the error. It is widened
to the spacing before it is asked whether it holds 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .results import Value
from .seeds import SEEDS_OF_A_VERDICT, Estimate, combined, over_seeds

Floats = NDArray[np.float64]
Outcome = Literal["sooner", "later", "not resolved"]
EQUAL = 1e-9  # share of a curve's range within which two fitted values are one


class NoFigure(Exception):
    """Why no time to quality is known, as the rest of a sentence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """Where the two curves of one training seed first have the level that both reach."""

    level: float  # in units of the score
    baseline: float  # steps
    entry: float
    spacing: float  # of the checkpoints around either, in log steps
    log_ratio: Estimate  # log(baseline / entry), and how prompts move it


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeToQuality:
    """The ratio of the baseline's steps to the entry's, over training seeds: above 1 is sooner."""

    log_mean: float
    log_half: float  # how far its 95 % interval reaches to either side, half a spacing at least
    spacing: float  # of checkpoints, in log steps
    prompts: int | None
    by_seed: Mapping[int, Crossing]

    @property
    def ratio(self) -> Value:
        """The geometric mean over seeds, with its 95 % interval."""
        return self.times(1.0)

    def times(self, factor: float) -> Value:
        """Returns the ratio in another unit, of which a step of the baseline takes `factor` times as
        many as a step of the entry.
        """
        low, high = (self.log_mean + side * self.log_half for side in (-1, 1))
        return Value(
            factor * exp(self.log_mean), factor * exp(low), factor * exp(high), self.prompts
        )


def outcome_of(ratio: Value) -> Outcome:
    """Returns what the interval of a ratio says."""
    assert ratio.low is not None
    assert ratio.high is not None
    if ratio.low <= 1 <= ratio.high:
        return "not resolved"
    return "sooner" if ratio.low > 1 else "later"


def isotonic(values: Floats) -> Floats:
    """Returns the least squares fit (..., K) of values (..., K) that never falls.

    By the min-max formula: the fit at k is the largest over i <= k of the smallest over j >= k of the
    mean of values i to j (Barlow et al. 1972, chapter 1).
    """
    count = values.shape[-1]
    first = values[..., :1]  # taken off, so that equal values stay so
    sums = np.cumsum(values - first, -1)
    sums = np.concatenate([np.zeros_like(first), sums], -1)
    fit = np.empty_like(values)
    smallest = np.empty((*values.shape[:-1], count, count))  # [i, k] over j >= k of the mean i to j
    for i in range(count):
        means = (sums[..., i + 1 :] - sums[..., i : i + 1]) / np.arange(1, count - i + 1)
        smallest[..., i, i:] = np.minimum.accumulate(means[..., ::-1], -1)[..., ::-1]
    for k in range(count):
        fit[..., k] = smallest[..., : k + 1, k].max(-1)
    return fit + first


def reach(positions: Floats, fit: Floats, level: Floats) -> Floats:
    """Returns the first positions (...) at which fits (..., K) that never fall are at a level (...).

    `positions` (K,) are those of the checkpoints. A level below the first fitted value is at the
    first, one above the last at the last.
    """
    near = EQUAL * (fit[..., -1:] - fit[..., :1])
    same = np.abs(fit[..., :, None] - fit[..., None, :]) <= near[..., None]
    places = (same * positions).sum(-1) / same.sum(-1)
    after = (fit >= level[..., None] - near).argmax(-1)[..., None]
    before = np.maximum(after - 1, 0)
    (low, high), (start, end) = (
        [np.take_along_axis(array, index, -1)[..., 0] for index in (before, after)]
        for array in (fit, places)
    )
    rise = high - low
    share = np.where(rise > 0, (level - low) / np.where(rise > 0, rise, 1), 1)
    return np.asarray(start + (end - start) * np.clip(share, 0, 1), np.float64)


def log_ratios(positions: Floats, curves: Floats) -> Floats:
    """Returns log(baseline's steps / entry's steps) (...) of pairs of curves (..., 2, K), baseline first.

    `positions` (K,) are log steps. Higher values are better.
    """
    _, places = _reaches(positions, curves)
    return np.asarray(places[..., 0] - places[..., 1], np.float64)


def _reaches(positions: Floats, curves: Floats) -> tuple[Floats, Floats]:
    """Returns the level (...) of pairs of curves and the positions (..., 2) of both at it."""
    fits = isotonic(curves)
    level = fits[..., -1].min(-1)
    return level, np.stack([reach(positions, fits[..., i, :], level) for i in range(2)], -1)


def crossing(
    steps: Sequence[int], baseline: Sequence[Estimate], entry: Sequence[Estimate], better: str
) -> Crossing:
    """Returns where both curves of a training seed have the level, from their scores at `steps`.

    `better` is "higher" or "lower". NoFigure where a curve says nothing of time; OtherImages where
    the scores are of other prompts.
    """
    sign = 1.0 if better == "higher" else -1.0
    estimates = [*baseline, *entry]
    if len(steps) < 2:
        raise NoFigure("a curve takes two checkpoints at least that are scored")
    curves = sign * np.array([estimate.value for estimate in estimates]).reshape(2, -1)
    if not np.isfinite(curves).all():
        side, place = np.argwhere(~np.isfinite(curves))[0]
        raise NoFigure(f"{_side(side)} has a score that is not finite, at step {steps[place]:,}")
    positions = np.log(np.asarray(steps, np.float64))
    fits = isotonic(curves)
    level, places = _reaches(positions, curves)
    first, last = fits[:, 0], fits[:, -1]
    for side in np.flatnonzero(last - first <= EQUAL * np.maximum(abs(first), abs(last))):
        raise NoFigure(f"{_side(side)} does not get better from step {steps[0]:,} to {steps[-1]:,}")
    for side in np.flatnonzero(level <= first):
        raise NoFigure(
            f"{_side(side)} has the level at step {steps[0]:,} already, the first that is scored: earlier "
            "checkpoints would tell"
        )
    ends = np.clip(np.searchsorted(positions, places), 1, len(steps) - 1)
    return Crossing(
        level=sign * float(level),
        baseline=exp(places[0]),
        entry=exp(places[1]),
        spacing=float((positions[ends] - positions[ends - 1]).max()),
        log_ratio=combined(
            float(places[0] - places[1]),
            sign * _derivative(positions, curves, estimates),
            estimates,
        ),
    )


def _side(index: np.intp) -> str:
    return ("the baseline", "the entry")[int(index)]


def _derivative(positions: Floats, curves: Floats, estimates: Sequence[Estimate]) -> Floats:
    """Returns the log ratio's derivative (2 K,) by each scored value, over a standard error of prompts
    to either side; 0 where prompts do not move a value.
    """
    errors = np.array([_error(estimate) for estimate in estimates])
    moves = np.diag(errors).reshape(-1, *curves.shape)
    change = log_ratios(positions, curves + moves) - log_ratios(positions, curves - moves)
    return change / np.where(errors > 0, 2 * errors, 1)  # change is 0 where the error is


def _error(estimate: Estimate) -> float:
    """Returns the standard error of a score over prompts."""
    strata = [stratum for stratum in estimate.strata if len(stratum) > 1]
    return float(np.sqrt(sum(len(s) * np.var(estimate.influences[s], ddof=1) for s in strata)))


def time_to_quality(crossings: Mapping[int, Crossing]) -> TimeToQuality:
    """Returns the ratio over training seeds with its interval; NoFigure of fewer than three."""
    if len(crossings) < SEEDS_OF_A_VERDICT:
        seeds = (
            "1 training seed is" if len(crossings) == 1 else f"{len(crossings)} training seeds are"
        )
        raise NoFigure(f"{seeds} too few, {SEEDS_OF_A_VERDICT} are the least")
    value, _ = over_seeds([crossing.log_ratio for crossing in crossings.values()])
    assert value.high is not None
    spacing = max(crossing.spacing for crossing in crossings.values())
    return TimeToQuality(
        log_mean=value.value,
        log_half=max(value.high - value.value, spacing / 2),
        spacing=spacing,
        prompts=value.count,
        by_seed=dict(crossings),
    )
