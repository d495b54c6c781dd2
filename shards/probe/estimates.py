"""Figures with their intervals: a delete-a-group jackknife over groups of rows.

Rows are dealt out to GROUPS groups in turns, and a figure is computed anew without each of them.
What is left out are rows of the column: the intervals cover which pictures were encoded, and no
training seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Estimate = dict[str, Any]  # "value", "low", "high", and "why" where there is no figure

GROUPS = 16  # of rows
T = 2.131  # Student's t at 0.975 with 15 degrees of freedom


def group_of(rows: NDArray[np.int64] | int) -> Any:
    """Returns the group of each place among the rows that are read."""
    return rows % GROUPS


def estimate(values: Floats) -> Estimate:
    """Returns the figure of all rows with its 95 % interval, of (1 + GROUPS,) figures: of all rows, and
    without each group.

    The variance is (G - 1) / G times the sum of squares about the mean of the latter (Kott 2001, "The
    delete-a-group jackknife", J. Official Statistics 17).
    """
    value, others = float(values[0]), values[1:]
    squares = np.square(others - others.mean()).sum()
    half = T * float(np.sqrt((GROUPS - 1) / GROUPS * squares))
    return {"value": value, "low": value - half, "high": value + half}


def no_figure(why: str) -> Estimate:
    """Returns the cell of a figure that cannot be had, with the reason."""
    return {"value": None, "low": None, "high": None, "why": why}


def without_each(sums: NDArray[Any]) -> NDArray[Any]:
    """Returns (1 + GROUPS, ...) sums, of all groups and without each, of the groups' own (GROUPS, ...)."""
    total = sums.sum(0)
    return np.concatenate([total[None], total - sums])
