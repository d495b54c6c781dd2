"""Power-function averages of the weights (EDM2: Karras et al., arXiv 2312.02696, section 3): what
share each update has in them, and how an average of any length is combined from those that exist.

After t updates the average of exponent g holds update k with the share

    (k^(g+1) - (k-1)^(g+1)) / t^(g+1)

which is the integral from k - 1 to k of its profile p(s) = (g+1) s^g / t^(g+1) on [0, t]. Its
length is the standard deviation of the profile, relative to t. The inner product of two profiles
has a closed form, so least squares over profiles needs no sum over updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Largest distance of a combined profile from the wanted one, relative to its L2 norm. Up to here
# weights of trainings are within 1e-3 of an average that was updated in every step.
FARTHEST = 0.012
ROUNDING = 2e-4  # of a value in half precision, relative, root mean square
# Largest rounding of a combined average, relative to its L2 norm: snapshots of large shares of both signs add theirs up
ROUGHEST = 2e-3
MOST = 1000  # snapshots that are looked at for a length
Array = NDArray[np.float64]


class Profile(NamedTuple):
    """Which average: how many updates are in it, and its exponent."""

    updates: float
    exponent: float


class Combination(NamedTuple):
    """Weights of averages whose sum is close to another average; the weights add up to 1."""

    weights: list[float]
    distance: float  # L2, of the profiles, relative to the wanted one
    rounding: float  # L2, of the weights that are combined, relative to theirs

    @property
    def close(self) -> bool:
        """Whether it may be taken for the other average."""
        return self.distance <= FARTHEST and self.rounding <= ROUGHEST


def exponent(length: float) -> float:
    """Returns g of an average of this relative length, 0 < length < 0.288.

    length^2 = (g+1) / ((g+2)^2 (g+3)), the variance of the profile on [0, 1] (EDM2, appendix C):
    g is the largest root of a cubic."""
    square = length**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(max(roots.real))


def new_share(update: int, exponent: float) -> float:
    """Returns the share of the newest weights in an average after `update` updates, the first of
    which is 1: 1 - (1 - 1/update)^(g+1), without cancellation."""
    if update == 1:
        return 1.0
    return -math.expm1((exponent + 1) * math.log1p(-1 / update))


def combination(profiles: Sequence[Profile], wanted: Profile) -> Combination:
    """Returns the least-squares combination of different profiles under the condition that its
    weights add up to 1, so that what all updates have in common is kept exactly.

    Averages after fewer updates than the wanted one are snapshots, in half precision."""
    products = _products(profiles, profiles)
    with_wanted = _products(profiles, [wanted])[:, 0]
    square = float(_products([wanted], [wanted])[0, 0])
    scale = 1 / np.sqrt(np.diag(products))  # units in which the matrix is well conditioned
    n = len(profiles)
    system = np.zeros((n + 1, n + 1))  # of the normal equations and a Lagrange multiplier
    system[:n, :n] = products * scale * scale[:, None]
    system[n, :n] = system[:n, n] = scale
    weights = np.linalg.solve(system, np.append(with_wanted * scale, 1.0))[:n] * scale
    distance = weights @ products @ weights - 2 * weights @ with_wanted + square
    halves = weights[[profile.updates < wanted.updates for profile in profiles]]
    rounding = ROUNDING * float(np.linalg.norm(halves))
    return Combination(weights.tolist(), math.sqrt(max(0.0, float(distance)) / square), rounding)


def snapshots_needed(lengths: Sequence[float], length: float) -> int | None:
    """Returns how many evenly spaced snapshots of averages of `lengths`, the last one at the end, an
    average of `length` at the end takes; None for more than MOST."""
    exponents, wanted = [exponent(x) for x in lengths], Profile(1.0, exponent(length))

    def enough(count: int) -> bool:
        kept = [Profile((i + 1) / count, g) for i in range(count) for g in exponents]
        return combination(kept, wanted).close

    high = 1
    while not enough(high):
        if high == MOST:
            return None
        high = min(2 * high, MOST)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _products(a: Sequence[Profile], b: Sequence[Profile]) -> Array:
    """Returns the integral of the product of each of `a` with each of `b`, over the updates that both
    have: (g+1)(h+1) / (g+h+1) * m^(g+h+1) / (t^(g+1) u^(h+1)) with m = min(t, u)."""
    t, g = (np.array(column)[:, None] for column in zip(*a, strict=True))
    u, h = (np.array(column) for column in zip(*b, strict=True))
    m: Array = np.minimum(t, u)
    powers = (g + 1) * np.log(m / t) + (h + 1) * np.log(m / u)
    result: Array = (g + 1) * (h + 1) / (g + h + 1) * np.exp(powers) / m
    return result
