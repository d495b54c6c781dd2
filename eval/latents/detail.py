"""Where detail is lost: the error of a reconstruction by octave of spatial frequency."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..images.layouts import Picture

OCTAVES = 6  # at most; what is lower belongs to the lowest
NYQUIST = 0.5  # cycles a pixel


def psnr_by_octave(a: Picture, b: Picture) -> list[float]:
    """Returns the PSNR in dB of the part of the error in each octave, the highest frequencies first.

    Octave k holds frequencies from NYQUIST / 2^(k+1) to NYQUIST / 2^k cycles a pixel, by the larger of
    the two axes'; the last one, all below. By Parseval the errors of the octaves add up to the whole
    mean squared error, so each is 10 log10(255^2 / its part). A part below one step in one value counts
    as that, as in `psnr`.
    """
    difference = a.astype(np.float64) - b
    height, width = difference.shape[:2]
    power = np.square(np.abs(np.fft.fft2(difference, axes=(0, 1)))).sum(2)
    power /= height * width * difference.size  # sums to the mean squared error
    octave = octaves(height, width)
    parts = np.bincount(octave.ravel(), power.ravel(), minlength=octave.max() + 1)
    return [float(10 * np.log10(255**2 / max(part, 1 / difference.size))) for part in parts]


@lru_cache(8)
def octaves(height: int, width: int) -> NDArray[np.int64]:
    """Returns the octave of each frequency of a picture, (height, width), 0 the highest."""
    fy, fx = np.abs(np.fft.fftfreq(height)), np.abs(np.fft.fftfreq(width))
    frequency = np.maximum(fy[:, None], fx[None])
    count = octave_count(height, width)
    with np.errstate(divide="ignore"):
        octave = np.floor(np.log2(NYQUIST / frequency))
    return np.asarray(np.minimum(octave, count - 1).astype(np.int64))


def octave_count(height: int, width: int) -> int:
    """Returns the number of octaves of a picture: the lowest is two cycles a side at least."""
    return max(1, min(OCTAVES, int(np.log2(min(height, width))) - 1))


def octave_names(height: int, width: int) -> list[str]:
    """Returns the name of each octave's score, by its wavelengths: psnr-2-to-4-px first."""
    count = octave_count(height, width)
    names = [f"psnr-{2 ** (k + 1)}-to-{2 ** (k + 2)}-px" for k in range(count - 1)]
    return [*names, f"psnr-over-{2**count}-px"]
