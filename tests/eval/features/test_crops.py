"""Crops against torchvision's and the protocols' own steps."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from eval.features.crops import crop
from tests.eval.small import picture

SIZES = [(40, 33), (33, 40), (41, 34), (64, 64), (20, 50)]


@pytest.mark.parametrize("size", SIZES)
def test_as_the_protocols_do_it(size: tuple[int, int]) -> None:
    pixels = picture(np.random.default_rng(0), *size)
    image = Image.fromarray(pixels)
    gigagan = resize(center_crop(image, min(size)), 24, InterpolationMode.LANCZOS)
    assert np.array_equal(crop("cc24-lanczos")(pixels), np.asarray(gigagan))
    clip = center_crop(resize(image, 24, InterpolationMode.BICUBIC), 24)
    assert np.array_equal(crop("short24-bicubic")(pixels), np.asarray(clip))
    squashed = image.resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(crop("squash24-bicubic")(pixels), np.asarray(squashed))
    side, (left, top) = min(size), ((length - min(size)) // 2 for length in size)
    cmmd = image.crop((left, top, left + side, top + side)).resize(
        (24, 24), Image.Resampling.BICUBIC
    )
    assert np.array_equal(crop("cc24-bicubic-floor")(pixels), np.asarray(cmmd))
    assert crop("none")(pixels) is pixels


def test_a_picture_of_that_size_stays_as_it_is() -> None:
    pixels = picture(np.random.default_rng(1))
    for name in ("cc32-lanczos", "squash32-bicubic", "short32-bicubic"):
        assert np.array_equal(crop(name)(pixels), pixels)


@pytest.mark.parametrize(
    "name", ["", "cc", "cc0-box", "cc256", "cc256-nearest", "cut256-box", "cc256-box "]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected none or a name such as cc256-lanczos"):
        crop(name)
