"""The linear reference: the error of the best linear predictor of the velocity, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from .estimates import GROUPS, Estimate, Floats, estimate


def linear_error(variance: ArrayLike, sigma: ArrayLike) -> Floats:
    """Returns the mean squared error of the best linear predictor of v = e - x from (1 - s) x + s e, for
    x of a variance L and e of variance 1: L / ((1 - s)^2 L + s^2). The two broadcast; s in (0, 1].

    Var(v) = L + 1, Var(x_s) = (1 - s)^2 L + s^2 and Cov(v, x_s) = s - (1 - s) L; what linear regression
    leaves is Var(v) - Cov^2 / Var(x_s). For a Gaussian it is all that can be known (2606.03578, section
    3, has it for classes); for other data a model may lie below it.
    """
    variance, sigma = np.asarray(variance, np.float64), np.asarray(sigma, np.float64)
    error: Floats = variance / ((1 - sigma) ** 2 * variance + sigma**2)
    return error


@dataclass
class ErrorSums:
    """Sums of the closed form over frequencies and eigen directions, of all rows and without each group.

    A frequency that has a conjugate is counted for both.
    """

    sigmas: Floats  # (S,)
    count: float = 0.0  # of directions
    errors: Floats = field(init=False)  # (1 + GROUPS, S)
    roots: Floats = field(init=False)  # (1 + GROUPS,), of square roots of the variances

    def __post_init__(self) -> None:
        self.errors = np.zeros((1 + GROUPS, len(self.sigmas)))
        self.roots = np.zeros(1 + GROUPS)

    def add(self, weight: float, variances: Floats) -> None:
        """Adds a frequency: the variances along its directions, (1 + GROUPS, C)."""
        self.count += weight * variances.shape[1]
        self.errors += weight * linear_error(variances[..., None], self.sigmas).sum(1)
        self.roots += weight * np.sqrt(variances).sum(1)

    def by_sigma(self) -> list[Estimate]:
        """Returns the reference at each noise level."""
        return [estimate(values) for values in self.errors.T / self.count]

    def mean(self, part: slice) -> Estimate:
        """Returns its mean over some of the noise levels."""
        return estimate(self.errors[:, part].mean(1) / self.count)

    def viv(self) -> Estimate:
        """Returns the mean of the error over s uniform in (0, 1), (pi / 2) sqrt(L): the velocity's
        irreducible variance of 2606.03578, a value.
        """
        return estimate(np.pi / 2 * self.roots / self.count)
