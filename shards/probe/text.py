"""What captions say of latents, linearly: ridge regression that is fitted out of fold."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..errors import BadStatistics
from .estimates import Floats

Floats32 = NDArray[np.float32]

FOLDS = 5  # of rows, in turns
PENALTIES = 10.0 ** np.arange(-4, 3.5, 0.5)  # over the mean square of the features
SKETCH = 256  # values of a latent by which the penalty is chosen


def sketch(values: int) -> NDArray[np.int64]:
    """Returns which values of a flattened latent choose the penalty: evenly apart, by steps that fall
    on all rows and columns of its grid.
    """
    count = min(SKETCH, values)
    # the golden ratio: its multiples fill an interval evenly
    places = np.unique((np.arange(4 * count) * 0.6180339887498949 % 1 * values).astype(np.int64))
    return places[:: max(1, len(places) // count)][:count]


def folds(count: int, together: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Returns the fold of each row: in turns, or of rows with one number of `together` the same."""
    return (np.arange(count) if together is None else together) % FOLDS


def residual_maker(
    text: Floats32, values: Floats32, fold: NDArray[np.int64], penalty: float | None = None
) -> tuple[Floats32, list[float]]:
    """Returns M (N, N), so that M y are what ridge regression on the texts (N, D) leaves of targets y
    (N, ...), each row predicted by the folds that it is not in; and the penalty of each fold.

    The means, the regression and its penalty (over the mean square of the features along all
    directions) are of the other folds alone; the penalty, unless given, is that by which these
    predict each other's targets `values` (N, V) best. BadStatistics of fewer than three folds.
    """
    numbers = np.unique(fold).tolist()
    if len(numbers) < 3:
        raise BadStatistics(
            f"found rows in {len(numbers)} folds, expected at least 3: name smaller sets of rows that belong together"
        )
    maker = np.eye(len(text), dtype=np.float32)
    penalties = []
    errors = {} if penalty else _errors(text, values, fold, numbers)
    for number in numbers:
        inside, outside = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        best = penalty
        if best is None:
            sums = sum(errors[number, other] for other in numbers if other != number)
            best = float(PENALTIES[int(np.argmin(sums))])
        maker[np.ix_(outside, inside)] -= Ridge(text[inside]).weights(text[outside], best)
        penalties.append(best)
    return maker, penalties


def _errors(
    text: Floats32, values: Floats32, fold: NDArray[np.int64], numbers: list[int]
) -> dict[tuple[int, int], Floats]:
    """Returns by two folds the squared error of each penalty in the second, (len(PENALTIES),), of a fit on
    all that are neither.
    """
    errors = {}
    for first, second in combinations(numbers, 2):
        inside = (fold != first) & (fold != second)
        ridge = Ridge(text[inside])
        for left_out, number in ((first, second), (second, first)):
            outside = fold == number
            errors[left_out, number] = ridge.errors(values[inside], text[outside], values[outside])
    return errors


class Ridge:
    """Ridge regression on texts (n, D), whose features are taken at mean 0 and deviation 1."""

    def __init__(self, text: Floats32) -> None:
        x = text.astype(np.float64)
        self.mean = x.mean(0)
        self.scale = _scale(x - self.mean)
        self.x = (x - self.mean) / self.scale
        self.left, self.squares = _left_vectors(self.x)

    def weights(self, text: Floats32, penalty: float) -> Floats32:
        """Returns W (m, n): W y predicts the targets of other texts (m, D) by those of the rows, y (n,
        ...), their mean included.
        """
        test = (text - self.mean) / self.scale
        # x' (x x' + p)^-1, by the vectors of x x'
        shrunk = (test @ self.x.T @ self.left) / (self.squares + penalty * self._unit())
        weights = shrunk @ self.left.T
        weights += (1 - weights.sum(1, keepdims=True)) / len(self.x)
        rounded: Floats32 = weights.astype(np.float32)
        return rounded

    def errors(self, values: Floats32, text: Floats32, expected: Floats32) -> Floats:
        """Returns the squared error of each of PENALTIES, (len(PENALTIES),), in the targets (m, V) of other
        texts (m, D), for targets (n, V) of the rows.
        """
        mean = values.mean(0, dtype=np.float64)
        along = self.left.T @ (values - mean)
        test = ((text - self.mean) / self.scale) @ self.x.T @ self.left
        errors = []
        for penalty in PENALTIES:
            guess = (test / (self.squares + penalty * self._unit())) @ along
            errors.append(np.square(expected - mean - guess).sum())
        return np.array(errors)

    def _unit(self) -> float:
        return float(self.squares.mean()) if len(self.squares) else 1.0


def _scale(x: Floats) -> Floats:
    """Returns the deviation of each feature, 1 where it has none: hidden states have a few features a
    hundred times the others, which would be all that a ridge sees.
    """
    deviation: Floats = x.std(0)
    flat = deviation <= 1e-6 * max(float(deviation.max()), 1e-30)
    return np.where(flat, 1.0, deviation)


def _left_vectors(x: Floats) -> tuple[Floats, Floats]:
    """Returns left singular vectors (n, k) and squared singular values (k,) of x (n, D), by the smaller
    of its two Gram matrices.
    """
    if x.shape[0] <= x.shape[1]:
        squares, left = np.linalg.eigh(x @ x.T)
    else:
        squares, right = np.linalg.eigh(x.T @ x)
        left = x @ (right / np.sqrt(np.maximum(squares, 1e-30)))
    kept = squares > 1e-10 * max(float(squares[-1]), 1e-30)
    return left[:, kept], squares[kept]
