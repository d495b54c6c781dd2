"""Errors by octave: pure waves, and Parseval."""

from __future__ import annotations

import numpy as np
import pytest

from eval.latents.detail import octave_names, psnr_by_octave
from eval.reconstruct import psnr


def error(decibel: float) -> float:
    return float(255**2 / 10 ** (decibel / 10))


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (64, 64), (256, 256)])
def test_the_octaves_add_up_to_the_whole(size: tuple[int, int]) -> None:
    chance = np.random.default_rng(0)
    a, b = (chance.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(2))
    parts = psnr_by_octave(a, b)
    assert len(parts) == len(octave_names(*size))
    assert sum(map(error, parts)) == pytest.approx(error(psnr(a, b)), rel=1e-9)


@pytest.mark.parametrize(
    ("wavelength", "name"),
    [
        (2, "psnr-2-to-4-px"),
        (4, "psnr-4-to-8-px"),
        (8, "psnr-8-to-16-px"),
        (32, "psnr-over-32-px"),
        (64, "psnr-over-32-px"),
    ],
)
def test_a_wave_is_in_its_octave_alone(wavelength: int, name: str) -> None:
    wave = np.rint(40 * np.cos(2 * np.pi * np.arange(64) / wavelength))  # rounding makes harmonics
    a = np.full((64, 64, 3), 100.0)
    b = a + wave[None, :, None]
    names = octave_names(64, 64)
    parts = dict(zip(names, psnr_by_octave(a.astype(np.uint8), b.astype(np.uint8)), strict=True))
    assert error(parts[name]) == pytest.approx(np.square(wave).mean(), rel=0.01)
    assert all(error(parts[other]) < 0.2 for other in names if other != name)


def test_a_constant_error_is_in_the_lowest() -> None:
    a = np.full((64, 64, 3), 100, np.uint8)
    parts = psnr_by_octave(a, a + np.uint8(5))
    assert error(parts[-1]) == pytest.approx(25)
    assert min(parts[:-1]) > 80
