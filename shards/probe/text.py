"""What captions say of latents, linearly: ridge regression that is fitted out of fold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    directions) are of the other folds alone; the penalty, unless given, has the least error of
    generalised cross-validation there for the targets `values` (N, V).
    """
    maker = np.eye(len(text), dtype=np.float32)
    penalties = []
    for held_out in np.unique(fold):
        inside, outside = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        ridge = Ridge(text[inside])
        chosen = penalty or ridge.penalty(values[inside])
        maker[np.ix_(outside, inside)] -= ridge.weights(text[outside], chosen)
        penalties.append(chosen)
    return maker, penalties


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

    def penalty(self, values: Floats32) -> float:
        """Returns the penalty of the least error of generalised cross-validation for targets (n, V),
        RSS / (1 - trace / n)^2 (Golub, Heath and Wahba 1979).
        """
        y = values.astype(np.float64)
        y -= y.mean(0)
        powers = np.square(self.left.T @ y).sum(1)  # along each vector, over all targets
        shrunk = self.squares / (self.squares + PENALTIES[:, None] * self._unit())
        errors = np.square(y).sum() - ((2 - shrunk) * shrunk) @ powers
        degrees = 1 + shrunk.sum(1)  # with the mean
        scores = errors / np.maximum(1 - degrees / len(y), 1e-6) ** 2
        return float(PENALTIES[int(np.argmin(scores))])

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
