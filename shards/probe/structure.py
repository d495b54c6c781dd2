"""The structure of latents: how alike neighbouring places are, how many channels carry variance, and
whether pictures with alike captions lie near each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadStatistics
from .estimates import GROUPS, Estimate, Floats, estimate, group_of, no_figure, without_each
from .rows import Part

FAR = 6 / 16  # of the longer side: 6 places of a 16 x 16 grid, as iREPA has it
QUERIES = 512  # rows whose neighbours are looked for
NEAREST = 10


@dataclass
class Structure:
    """Sums over rows of latents of the shape (C, H, W), by group; posterior means unless said."""

    shape: tuple[int, int, int]
    counts: Floats = field(init=False)  # (GROUPS,) rows
    sums: Floats = field(init=False)  # (GROUPS, C), means over places
    products: Floats = field(init=False)  # (GROUPS, C, C), of channels at one place
    noise: Floats = field(init=False)  # (GROUPS, C), variances of the posterior
    cosines: Floats = field(init=False)  # (GROUPS, 2H, W + 1), spectrum of the cosines
    lowest: NDArray[np.float32] = field(init=False)  # (C, H, W), over rows
    highest: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        channels, height, width = self.shape
        self.counts = np.zeros(GROUPS)
        self.sums = np.zeros((GROUPS, channels))
        self.products = np.zeros((GROUPS, channels, channels))
        self.noise = np.zeros((GROUPS, channels))
        self.cosines = np.zeros((GROUPS, 2 * height, width + 1))
        self.lowest = np.full(self.shape, np.inf, np.float32)
        self.highest = -self.lowest

    def add(self, part: Part) -> None:
        _, height, width = self.shape
        np.minimum(self.lowest, part.mean.min(0), out=self.lowest)
        np.maximum(self.highest, part.mean.max(0), out=self.highest)
        group = group_of(part.first + np.arange(len(part.mean)))
        for number in np.unique(group):
            mean = part.mean[group == number]
            self.counts[number] += len(mean)
            self.sums[number] += mean.mean((2, 3), dtype=np.float64).sum(0)
            flat = mean.transpose(1, 0, 2, 3).reshape(self.shape[0], -1)
            self.products[number] += (flat @ flat.T) / (height * width)
            if part.variance is not None:
                variance = part.variance[group == number]
                self.noise[number] += variance.mean((2, 3), dtype=np.float64).sum(0)
            # correlation at every displacement, by a transform with as much nothing beside it
            length = np.sqrt(np.square(mean).sum(1, keepdims=True))
            unit = mean / np.maximum(length, 1e-8)
            spectrum = np.fft.rfft2(unit, s=(2 * height, 2 * width))
            power = np.square(spectrum.real) + np.square(spectrum.imag)
            self.cosines[number] += power.sum((0, 1), dtype=np.float64)

    def _moments(self) -> tuple[Floats, Floats, Floats]:
        """Returns channel means (1 + GROUPS, C), covariances (1 + GROUPS, C, C) of the posterior means,
        and variances of the posterior (1 + GROUPS, C); of all rows, and without each group.
        """
        rows = without_each(self.counts)[:, None]
        mean = without_each(self.sums) / rows
        covariance = without_each(self.products) / rows[..., None]
        covariance -= mean[:, :, None] * mean[:, None, :]
        return mean, covariance, without_each(self.noise) / rows

    def channels(self) -> tuple[Floats, Floats]:
        """Returns mean and deviation of each channel of latents as they are drawn, (C,) each."""
        mean, covariance, noise = self._moments()
        variance = np.maximum(np.diagonal(covariance[0]), 0) + noise[0]
        return mean[0], np.sqrt(variance)

    def refuse_constant(self) -> None:
        """Raises BadStatistics where a channel is the same in all rows, or nearly so beside the others."""
        _, deviations = self.channels()
        alike = (self.lowest == self.highest).all((1, 2))
        noise = np.sqrt(self._moments()[2][0])
        flat = np.where(alike, noise, deviations) <= 1e-6 * max(float(deviations.max()), 1e-30)
        if flat.any():
            first = np.flatnonzero(flat)[:4].tolist()
            raise BadStatistics(
                f"found {int(flat.sum())} of {len(flat)} channels constant in all rows, the first {first}, "
                "expected all to differ between pictures"
            )

    def posterior_share(self) -> Estimate:
        """Returns the share of the posterior's variance in that of the latents that are drawn."""
        _, covariance, noise = self._moments()
        means = np.trace(covariance, axis1=1, axis2=2)
        return estimate(noise.sum(1) / (means + noise.sum(1)))

    def effective_rank(self) -> Estimate:
        """Returns how many channels the variance of a place amounts to: exp of the entropy of the
        covariance's eigenvalues (Roy and Vetterli 2007), from 1 to C; of latents as they are drawn.
        """
        _, covariance, noise = self._moments()
        ranks = []
        for matrix, variance in zip(covariance, noise, strict=True):
            values = np.linalg.eigvalsh(matrix + np.diag(variance))
            share = np.maximum(values, 0) / np.maximum(values, 0).sum()
            ranks.append(np.exp(-(share * np.log(np.maximum(share, 1e-30))).sum()))
        return estimate(np.array(ranks))

    def local_similarity(self) -> Estimate:
        """Returns LDS, local against distant similarity (iREPA, arXiv 2512.10794, `metric_lds`): the mean
        cosine of the channel vectors of two neighbours along an axis, less that of two places at least
        `far` apart (sum of both distances), averaged over rows.

        far is 6 on the 16 x 16 grid, as published, and in proportion to the longer side on others.
        """
        _, height, width = self.shape
        far = max(2, round(FAR * max(height, width)))
        rows, columns = np.mgrid[: 2 * height, : 2 * width]
        rows, columns = (
            np.minimum(rows, 2 * height - rows),
            np.minimum(columns, 2 * width - columns),
        )
        distance = rows + columns
        pairs = np.maximum(height - rows, 0) * np.maximum(width - columns, 0)
        if not pairs[distance >= far].sum() or not pairs[distance == 1].sum():
            return no_figure(f"a grid of {height} x {width} has no places {far} apart")
        sums = np.fft.irfft2(without_each(self.cosines), s=(2 * height, 2 * width))
        counts = without_each(self.counts)
        near, distant = (
            (sums * mask).sum((1, 2)) / (pairs[mask].sum() * counts)
            for mask in (distance == 1, distance >= far)
        )
        return estimate(near - distant)


@dataclass
class Neighbours:
    """How often the nearest rows of a row are of its group, by the cosine of flattened posterior means."""

    group: NDArray[np.int64]  # (N,)
    products: NDArray[np.float32] = field(init=False)  # (Q, N), of queries and rows
    squares: Floats = field(init=False)  # (N,)

    def __post_init__(self) -> None:
        count = len(self.group)
        self.queries = np.linspace(0, count - 1, min(QUERIES, count)).astype(np.int64)
        self.products = np.zeros((len(self.queries), count), np.float32)
        self.squares = np.zeros(count)

    def add(self, weight: float, spectrum: NDArray[np.complex64]) -> None:
        """Adds the products at a frequency, which by Parseval's theorem add up to those of latents."""
        numbers = np.ascontiguousarray(spectrum).view(np.float32)
        self.products += np.float32(weight) * (numbers[self.queries] @ numbers.T)
        self.squares += weight * np.square(numbers).sum(1, dtype=np.float64)

    def share(self) -> dict[str, Any]:
        """Returns the share of the NEAREST rows that are of the query's group (LNC of 2606.03578), and
        `chance`, that of rows at random.
        """
        cosine = self.products / np.sqrt(np.maximum(self.squares, 1e-30)).astype(np.float32)
        cosine[np.arange(len(self.queries)), self.queries] = -np.inf
        nearest = np.argpartition(-cosine, NEAREST, axis=1)[:, :NEAREST]
        same = self.group[nearest] == self.group[self.queries][:, None]
        shares = same.mean(1)
        group = group_of(np.arange(len(shares)))
        sums = np.bincount(group, shares, minlength=GROUPS)
        counts = np.bincount(group, minlength=GROUPS)
        sizes = np.bincount(self.group)
        others = (sizes[self.group[self.queries]] - 1) / (len(self.group) - 1)
        return estimate(without_each(sums) / without_each(counts)) | {
            "groups": len(sizes),
            "chance": float(others.mean()),
        }
