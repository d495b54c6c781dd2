"""How a picture is cut and resized before a network sees it, by a name that says all of it.

    none                the picture itself
    cc256-lanczos       centre square of the short side, then 256 x 256 (GigaGAN's COCO protocol)
    squash224-bicubic   224 x 224 whatever its shape (DINOv2 as dgm-eval runs it; old COCO numbers)
    short224-bicubic    short side to 224, then the centre square (CLIP's own)
    ...-floor           an odd margin is halved downwards (CMMD); else as torchvision rounds it

All work on 8-bit RGB with PIL, as the protocols do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import numpy as np
from PIL import Image

from ..images.layouts import Picture

Crop = Callable[[Picture], Picture]
NAME = re.compile(r"(cc|squash|short)([1-9]\d{0,4})-(bicubic|lanczos|bilinear|box)(-floor)?")


def crop(name: str) -> Crop:
    """Returns the function of a name; ValueError where it is none."""
    if name == "none":
        return lambda picture: picture
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"found {name!r}, expected none or a name such as cc256-lanczos, squash256-bicubic, short224-bicubic"
        )
    kind, side, kernel, floor = match.groups()
    size, resample = int(side), Image.Resampling[kernel.upper()]

    def resized(picture: Picture) -> Picture:
        image = Image.fromarray(picture)
        if kind == "cc":
            image = _centre(image, min(image.size), bool(floor))
        if kind == "short":
            image = _centre(image.resize(_short(image.size, size), resample), size, bool(floor))
        return np.asarray(image.resize((size, size), resample))

    return resized


def argument(text: str) -> str:
    """Type of an option that is a crop's name."""
    try:
        crop(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _short(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Returns width and height with a short side of `side`, rounded down as torchvision does."""
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _centre(image: Image.Image, side: int, floor: bool) -> Image.Image:
    margins = (length - side for length in image.size)
    left, top = (margin // 2 if floor else round(margin / 2) for margin in margins)
    return image.crop((left, top, left + side, top + side))
