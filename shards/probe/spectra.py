"""Cross spectra of latents, and what they say: the linear reference, with and without captions.

The columns' rows are Fourier transformed in blocks; at each frequency the C channels have a complex
covariance (C, C), whose eigenvalues are the variances L of a stationary Gaussian with these spectra.
Latents are real, so half of the frequencies are enough. What the posterior adds to L is exact: white
noise of each channel's mean variance. Memory holds the transforms of as many frequencies as MEMORY
has room for, and the rows are read again for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .estimates import GROUPS, Estimate, Floats, estimate, group_of, no_figure, without_each
from .reference import ErrorSums
from .rows import LatentRows, Part
from .text import folds, residual_maker, sketch

Spectrum = NDArray[np.complex64]  # (N, C), the transforms of all rows at one frequency

MEMORY = 560_000_000  # bytes of the transforms
MANY = 16  # rows a channel, below which the figure of the same rows is too low by 1 % and more
ROWS_A_CHANNEL = 2  # at least
# what is spent on the eigenvalues of all frequencies: 48 matrices of 768 channels, one minute of a core
COST = 48 * 768**3
LEAST_FREQUENCIES = 16


@dataclass(frozen=True)
class Frequencies:
    """Half of the frequencies of a (H, W) grid: of a pair of conjugates one, which counts twice."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]  # up to W / 2
    weight: Floats
    high: NDArray[np.bool_]  # above half of the highest along an axis

    @classmethod
    def of(cls, height: int, width: int) -> Frequencies:
        rows, columns = (axis.ravel() for axis in np.mgrid[:height, : width // 2 + 1])
        alone = (2 * columns) % width == 0  # columns that are their own conjugates
        kept = ~alone | (2 * rows <= height)
        rows, columns, alone = rows[kept], columns[kept], alone[kept]
        weight = np.where(alone & ((2 * rows) % height == 0), 1.0, 2.0)
        radius = np.hypot(2 * np.minimum(rows, height - rows) / height, 2 * columns / width)
        return cls(rows, columns, weight, radius > 0.5)

    def __len__(self) -> int:
        return len(self.row)

    def thinned(self, most: int) -> Frequencies:
        """Returns at most so many of them, evenly apart from low to high, with weights that add up to
        the same.
        """
        if most >= len(self):
            return self
        order = np.argsort(np.hypot(self.row, self.column), kind="stable")
        parts = np.array_split(order, most)
        kept = np.array([part[len(part) // 2] for part in parts])
        weight = np.array([self.weight[part].sum() for part in parts])
        return Frequencies(self.row[kept], self.column[kept], weight, self.high[kept])

    def parts(self, most: int) -> Iterator[Frequencies]:
        """Yields them in parts of at most so many."""
        for first in range(0, len(self), most):
            part = slice(first, first + most)
            yield Frequencies(self.row[part], self.column[part], self.weight[part], self.high[part])


class Watcher(Protocol):
    """What else looks at the rows while they are read: at each part once, and at each frequency."""

    def part(self, part: Part) -> None: ...

    def frequency(self, weight: float, spectrum: Spectrum) -> None: ...


@dataclass
class Sums:
    """What is summed over frequencies of one set of rows."""

    errors: ErrorSums
    held_out: ErrorSums | None  # along directions of other rows
    power: Floats = field(default_factory=lambda: np.zeros((1 + GROUPS, 2)))  # all, and high

    def add(
        self, weight: float, high: bool, spectrum: Spectrum, noise: Floats, freedom: int
    ) -> None:
        """Adds a frequency; `noise` (C,) is the posterior's, `freedom` how many fewer rows than there are
        the variances are divided by.
        """
        covariance = spectrum.conj().T @ spectrum / (len(spectrum) - freedom)
        directions = np.linalg.eigh(_with_noise(covariance, noise))[1]
        variances = _variances(spectrum, directions, noise, freedom)
        self.errors.add(weight, variances)
        power = weight * variances.sum(1)
        self.power[:, 0] += power
        self.power[:, 1] += power * high
        if self.held_out is not None:
            half = spectrum[::2]
            covariance = half.conj().T @ half / (len(half) - freedom)
            directions = np.linalg.eigh(_with_noise(covariance, noise))[1]
            others = spectrum.copy()
            others[::2] = 0  # whose groups are then none of the others
            self.held_out.add(weight, _variances(others, directions, noise, freedom, step=2))


def _with_noise(covariance: NDArray[np.complex64], noise: Floats) -> NDArray[np.complex64]:
    covariance[np.diag_indices(len(covariance))] += noise.astype(np.float32)
    return covariance


def _variances(
    spectrum: Spectrum,
    directions: NDArray[np.complex64],
    noise: Floats,
    freedom: int,
    step: int = 1,
) -> Floats:
    """Returns the variances along directions (C, C), (1 + GROUPS, C): of all rows, and without each
    group. Of every `step`-th row the others are 0, and not counted.
    """
    along = spectrum @ directions
    powers = np.square(along.real) + np.square(along.imag)
    places = np.arange(len(spectrum))
    sums = np.zeros((GROUPS, powers.shape[1]))
    for group in range(GROUPS):
        sums[group] = powers[group::GROUPS].sum(0, dtype=np.float64)
    present = np.ones(len(spectrum)) if step == 1 else places % step != 0
    counts = np.bincount(group_of(places), present.astype(np.float64), minlength=GROUPS)
    posterior = noise @ (np.square(directions.real) + np.square(directions.imag))
    degrees = without_each(counts) - freedom
    variances: Floats = without_each(sums) / degrees[:, None] + posterior
    return np.maximum(variances, 0)  # rounding leaves less than 0 of a direction without any


@dataclass(frozen=True)
class References:
    """What the spectra of some rows say. Figures of held-out directions exist where rows are few for
    the channels: the truth lies between the two.
    """

    rows: int
    frequencies: tuple[int, int]  # looked at, of all
    plain: Sums
    given_text: Sums | None
    text_r2: Estimate | None
    penalties: list[float]

    def high_share(self) -> Estimate:
        """Returns the share of the variance at frequencies above half of the highest along an axis."""
        if self.frequencies[1] == 1:
            return no_figure("a grid of 1 x 1 has one frequency")
        return estimate(self.plain.power[:, 1] / self.plain.power[:, 0])


def least_rows(channels: int) -> int:
    """Returns how many rows the spectra of so many channels need."""
    return max(4 * GROUPS, ROWS_A_CHANNEL * channels)


def linear_references(
    rows: LatentRows,
    sigmas: Sequence[float],
    text: NDArray[np.float32] | None = None,
    *,
    together: NDArray[np.int64] | None = None,
    penalty: float | None = None,
    watcher: Watcher | None = None,
    most: int | None = None,
    memory: int = MEMORY,
    advance: Callable[[int], Any] = lambda count: None,
) -> References:
    """Returns the references of rows at noise levels in (0, 1], and with texts (N, D) given these.

    `together` numbers rows (N,) whose captions are variants of one: such are in one fold. `penalty` is
    chosen in each fold unless given. `watcher` sees all that is read; `most` bounds the number of
    frequencies, of which many channels have `affordable` ones. `advance` is called with parts of
    `work` that are done.
    """
    channels, height, width = rows.shape
    whole = Frequencies.of(height, width)
    chosen = whole.thinned(most or affordable(channels))
    levels = np.array(sigmas)
    few = channels * MANY > rows.count

    def sums() -> Sums:
        return Sums(ErrorSums(levels), ErrorSums(levels) if few else None)

    plain, given_text = sums(), sums() if text is not None else None
    total, left = np.zeros(GROUPS), np.zeros(GROUPS)  # squares about the mean, and residuals
    values = sketch(channels * height * width)
    maker: NDArray[np.float32] | None = None
    penalties: list[float] = []
    noise = np.zeros(channels)
    for number, frequencies in enumerate(chosen.parts(at_once(rows, memory))):
        picked = np.empty((rows.count, len(values)), np.float32)
        spectra = np.empty((len(frequencies), rows.count, channels), np.complex64)
        for part in rows.parts():
            place = slice(part.first, part.first + len(part.mean))
            spectra[:, place] = transforms(part, frequencies)
            if number == 0:
                picked[place] = part.mean.reshape(len(part.mean), -1)[:, values]
                if part.variance is not None:
                    noise += part.variance.sum((0, 2, 3), dtype=np.float64)
                if watcher is not None:
                    watcher.part(part)
            advance(len(part.mean))
        if number == 0:
            noise /= rows.count * height * width
            if text is not None:
                maker, penalties = residual_maker(
                    text, picked, folds(rows.count, together), penalty
                )
        for i, (weight, high) in enumerate(zip(frequencies.weight, frequencies.high, strict=True)):
            spectrum = spectra[i]
            if watcher is not None:
                watcher.frequency(float(weight), spectrum)
            spectrum -= spectrum.mean(0)
            plain.add(weight, high, spectrum, noise, freedom=1)
            if given_text is not None and maker is not None:
                # real and imaginary parts side by side: the fit is of real numbers
                residual = (maker @ spectrum.view(np.float32)).view(np.complex64)
                given_text.add(weight, high, residual, noise, freedom=0)
                total += weight * _by_group(spectrum)
                left += weight * _by_group(residual)
            advance(rows.count // 16)
        del spectra
    r2 = None
    if text is not None:
        r2 = estimate(1 - without_each(left) / np.maximum(without_each(total), 1e-30))
    return References(rows.count, (len(chosen), len(whole)), plain, given_text, r2, penalties)


def spectra_of(rows: LatentRows, frequencies: Frequencies) -> NDArray[np.complex64]:
    """Returns the transforms of all rows, (frequencies, N, C)."""
    spectra = np.empty((len(frequencies), rows.count, rows.shape[0]), np.complex64)
    for part in rows.parts():
        place = slice(part.first, part.first + len(part.mean))
        spectra[:, place] = transforms(part, frequencies)
    return spectra


def transforms(part: Part, frequencies: Frequencies) -> NDArray[np.complex64]:
    """Returns the transforms of some rows, (frequencies, B, C)."""
    half: NDArray[Any] = np.fft.rfft2(part.mean, norm="ortho")  # complex64 of float32
    return half[:, :, frequencies.row, frequencies.column].transpose(2, 0, 1)


def affordable(channels: int) -> int:
    """Returns how many frequencies are looked at: all of a usual grid up to 500 channels."""
    return max(LEAST_FREQUENCIES, COST // channels**3)


def at_once(rows: LatentRows, memory: int = MEMORY) -> int:
    """Returns how many frequencies' transforms there is room for."""
    return max(1, memory // (8 * max(1, rows.count) * rows.shape[0]))


def work(rows: LatentRows, most: int | None = None) -> int:
    """Returns the work of `linear_references`, in rows: those that are read, and a sixteenth of them for
    each frequency.
    """
    whole = len(Frequencies.of(*rows.shape[1:]))
    count = min(most or affordable(rows.shape[0]), whole)
    return -(-count // at_once(rows)) * rows.count + count * (rows.count // 16)


def _by_group(spectrum: Spectrum) -> Floats:
    squares = (np.square(spectrum.real) + np.square(spectrum.imag)).sum(1, dtype=np.float64)
    groups = group_of(np.arange(len(squares)))
    return np.bincount(groups, squares, minlength=GROUPS).astype(np.float64)
