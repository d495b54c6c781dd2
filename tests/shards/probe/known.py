"""Latents whose spectra and dependence on captions are known, as rows that a probe reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.probe.rows import Part

# eight noise levels as a run validates at, from much noise to little
SIGMAS = [0.9746, 0.9190, 0.8523, 0.7714, 0.6712, 0.5438, 0.3759, 0.1672]


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory, (N, C, H, W), and variances of posteriors, or none."""

    latents: NDArray[np.float32]
    variance: NDArray[np.float32] | None = None
    block: int = 100

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.latents.shape
        return channels, height, width

    @property
    def count(self) -> int:
        return len(self.latents)

    def parts(self) -> Iterator[Part]:
        for first in range(0, self.count, self.block):
            part = slice(first, first + self.block)
            variance = None if self.variance is None else self.variance[part]
            yield Part(first, self.latents[part], variance)


def white(rows: int, shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    """Independent normal values."""
    return np.random.default_rng(seed).standard_normal((rows, *shape), np.float32)


def mixed(
    noise: NDArray[np.float32], seed: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """A stationary Gaussian of white noise (N, C, H, W), and its variances L (H * W * C,): each frequency is
    multiplied by a gain that falls with it, each channel by its own, and channels are rotated.
    """
    _, channels, height, width = noise.shape
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    gain = 1 / (0.2 + np.hypot(rows, columns))
    scale = np.linspace(0.3, 1.5, channels)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((channels, channels)))[0]
    spectrum = np.fft.fft2(noise) * gain
    latents = np.fft.ifft2(spectrum).real * scale[:, None, None]
    latents = np.einsum("dc,nchw->ndhw", rotation, latents, optimize=True)
    variances = np.square(gain[..., None] * scale).ravel()
    return latents.astype(np.float32), variances
