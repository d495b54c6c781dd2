"""Bytes of a picture -> the reference's square crop: PIL, RGB, short side bilinear, centre crop,
bit for bit.
"""

from __future__ import annotations

import io
import threading
import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from shards import Status

DECODER = "pil"
LARGE = 1 << 26  # pixels of a resized picture that are not made only to be cut away


class _Lenient(threading.local):
    """PIL's switch for cut-off files is one global of the process; this makes it one a thread."""

    on = False

    def __bool__(self) -> bool:
        return self.on


_lenient = _Lenient()


def decode(data: bytes) -> tuple[Image.Image | None, Status]:
    """A picture in RGB and what became of it: OK, TRUNCATED (cut off; the rest as PIL leaves it)
    or IMAGE_UNDECODABLE.

    No rotation by EXIF, as in the reference.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = _lenient  # type: ignore[assignment]  # only its truth is asked
    for status in (Status.OK, Status.TRUNCATED):
        _lenient.on = status == Status.TRUNCATED
        try:
            return _open(data), status
        except MemoryError:
            raise  # of this machine, not of the picture
        except Exception:  # PIL's thirty decoders raise whatever they like on broken bytes
            continue  # broken or cut off: the lenient decoder tells which
        finally:
            _lenient.on = False
    return None, Status.IMAGE_UNDECODABLE


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata, which is not used
        return Image.open(io.BytesIO(data), formats=_formats()).convert("RGB")


@cache
def _formats() -> list[str]:
    """What PIL reads, but for EPS: that it gives to Ghostscript, which runs a stranger's program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def transform(image: Image.Image, resolution: int) -> NDArray[np.uint8]:
    """RGB picture -> (resolution, resolution, 3) uint8: short side resized, centre cropped.

    Equal to torchvision's Resize and CenterCrop on PIL images, its rounding included. (Of a picture
    so long that its resized form would take gigabytes, only the crop is made; a value may then be
    off by one.)
    """
    width, height = image.size
    if width <= height:
        size = (resolution, int(resolution * height / width))
    else:
        size = (int(resolution * width / height), resolution)
    left, top = (round((side - resolution) / 2) for side in size)
    if size[0] * size[1] > LARGE:
        x, y = width / size[0], height / size[1]
        right, bottom = (left + resolution) * x, (top + resolution) * y
        box = left * x, top * y, min(right, width), min(bottom, height)
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))
