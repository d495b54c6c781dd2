"""The linear reference of rows that were held out: what a linear model of the training rows loses on
them. Everything but their own variances comes from the training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reference import linear_error
from .rows import LatentRows
from .spectra import MEMORY, Frequencies, affordable, at_once, spectra_of
from .text import PENALTIES, Ridge, folds, residual_maker, sketch

Floats32 = NDArray[np.float32]
PART = 3  # of the frequencies that a probe has time for


@dataclass(frozen=True)
class HeldOut:
    """The reference of held-out rows at each noise level, and the share of their variance that the
    captions explain; None without captions.
    """

    levels: tuple[float, ...]
    text_r2: float | None


def held_out_reference(
    training: LatentRows,
    held_out: LatentRows,
    sigmas: Sequence[float],
    texts: tuple[Floats32, Floats32] | None = None,
    memory: int = MEMORY,
) -> HeldOut:
    """Returns the reference of held-out rows at noise levels in (0, 1], given `texts` (of both) if there are
    any.

    Means, regression and directions are those of the training rows; along the directions L is the
    variance of the held-out ones. The penalty is the best of PENALTIES for the held-out rows
    themselves, so that captions are, if anything, too good.
    """
    channels, height, width = training.shape
    chosen = Frequencies.of(height, width).thinned(max(16, affordable(channels) // PART))
    levels, count = np.array(sigmas), 0.0
    errors, total, left = np.zeros(len(levels)), 0.0, 0.0
    values = sketch(channels * height * width)
    noise = _noise(held_out)
    weights = maker = None
    if texts is not None:
        picked, expected = (_values(rows, values) for rows in (training, held_out))
        ridge = Ridge(texts[0])
        penalty = float(PENALTIES[int(np.argmin(ridge.errors(picked, texts[1], expected)))])
        weights = ridge.weights(texts[1], penalty)
        maker, _ = residual_maker(texts[0], picked, folds(training.count), penalty)
    for frequencies in chosen.parts(at_once(training, memory)):
        both = spectra_of(training, frequencies), spectra_of(held_out, frequencies)
        for weight, inside, outside in zip(frequencies.weight, *both, strict=True):
            mean = inside.mean(0)
            rest, residual = outside - mean, inside - mean
            total += weight * float(np.square(np.abs(rest)).sum(dtype=np.float64))
            if weights is not None and maker is not None:
                rest = outside - (weights @ inside.view(np.float32)).view(np.complex64)
                residual = (maker @ inside.view(np.float32)).view(np.complex64)
            left += weight * float(np.square(np.abs(rest)).sum(dtype=np.float64))
            directions = np.linalg.eigh(residual.conj().T @ residual)[1]
            powers = np.square(np.abs(rest @ directions)).mean(0, dtype=np.float64)
            variances = powers + noise @ np.square(np.abs(directions))
            errors += weight * linear_error(variances[:, None], levels).sum(0)
            count += weight * channels
    explained = None if texts is None else 1 - left / max(total, 1e-30)
    return HeldOut(tuple((errors / count).tolist()), explained)


def _noise(rows: LatentRows) -> NDArray[np.float64]:
    """Returns the mean variance of the posterior by channel, (C,)."""
    sums = np.zeros(rows.shape[0])
    for part in rows.parts():
        if part.variance is not None:
            sums += part.variance.mean((2, 3), dtype=np.float64).sum(0)
    return sums / rows.count


def _values(rows: LatentRows, places: NDArray[np.int64]) -> Floats32:
    parts = [part.mean.reshape(len(part.mean), -1)[:, places] for part in rows.parts()]
    return np.concatenate(parts)
