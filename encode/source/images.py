"""Bytes of a picture -> the reference's square crop, bit for bit: PIL, RGB, short side bilinear, centre."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from shards import Status

DECODER = "pil"
LARGE = 1 << 26  # pixels of a resized picture that are not made only to be cut away
# Memory that must be free before a picture counts as broken: more than any decoder takes (JPEG 2000
# takes the most, 22 bytes a pixel).
ROOM, ROOM_PER_PIXEL = 64 << 20, 64


class _Lenient(threading.local):
    """PIL's switch for cut-off files is one global of the process; this makes it one a thread."""

    on = False

    def __bool__(self) -> bool:
        return self.on


_lenient = _Lenient()


class _Gate:
    """Lets many threads decode at once, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._inside)
                yield  # under the lock, so that nobody enters
            finally:
                self._waiting -= 1
                self._changed.notify_all()


_gate = _Gate()


def decode(data: bytes) -> tuple[Image.Image | None, Status]:
    """Returns a picture in RGB, and OK, TRUNCATED (cut off; the rest as PIL leaves it) or
    IMAGE_UNDECODABLE.

    No rotation by EXIF, as in the reference. Raises MemoryError where a picture may have failed for
    want of memory: many decoders then raise what they raise for broken bytes.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = _lenient  # type: ignore[assignment]  # only its truth is asked
    formats = _formats()
    with _gate.shared():
        image, status = _attempt(data, formats)
    if status == Status.OK or not _memory_is_limited():
        return image, status
    with _gate.alone():  # a failure counts if there was room before it and after it
        pixels = _pixels(data, formats)
        _check_memory(pixels)
        image, status = _attempt(data, formats)
        if status != Status.OK:
            _check_memory(pixels)
    return image, status


def _attempt(data: bytes, formats: list[str]) -> tuple[Image.Image | None, Status]:
    for status in (Status.OK, Status.TRUNCATED):
        _lenient.on = status == Status.TRUNCATED
        try:
            return _open(data, formats).convert("RGB"), status
        except MemoryError:
            raise  # of this machine, not of the picture
        except Exception:  # broken bytes: OSError, SyntaxError, struct.error, by decoder
            continue  # broken or cut off: the lenient decoder tells which
        finally:
            _lenient.on = False
    return None, Status.IMAGE_UNDECODABLE


def _open(data: bytes, formats: list[str]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of odd metadata, which is not used
        return Image.open(io.BytesIO(data), formats=formats)


@cache
def _formats() -> list[str]:
    """Returns the formats that PIL reads, but for EPS: Ghostscript would run a stranger's program.

    Raises ImportError where a decoder cannot be loaded for want of memory; PIL would do without it.
    """
    for name in ("PIL._avif", "PIL._webp"):
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _memory_is_limited() -> bool:
    """Returns whether this process can be refused memory. Where it cannot, the kernel grants every
    request and kills when it has no more.
    """
    try:
        strict = Path("/proc/sys/vm/overcommit_memory").read_bytes().strip() == b"2"
    except OSError:
        strict = False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return strict or any(limit != resource.RLIM_INFINITY for limit in limits)


def _pixels(data: bytes, formats: list[str]) -> int:
    """Returns the pixels that a picture's header promises; 0 without a header, or for more than PIL
    ever decodes. Those of WebP and AVIF are read here, since PIL already decodes when it opens one.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        sizes = [_webp_size(data)]
    elif data[4:8] == b"ftyp":
        boxes = re.finditer(rb"ispe.{4}(.{4})(.{4})", data, re.DOTALL)
        sizes = [(int.from_bytes(box[1]), int.from_bytes(box[2])) for box in boxes]
    else:
        try:
            sizes = [_open(data, formats).size]
        except MemoryError:
            raise
        except Exception:  # as in _attempt
            sizes = []
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return max((w * h for w, h in sizes if w * h <= most), default=0)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Returns width and height by the first chunk of a WebP (RFC 9649, section 2.5 to 2.7)."""

    def number(first: int, stop: int) -> int:
        return int.from_bytes(data[first:stop], "little")

    if data[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 23) & 0x3FFF) + 1, (number(22, 25) >> 6 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF


def _check_memory(pixels: int) -> None:
    """Raises MemoryError unless a picture of so many pixels has the memory that any decoder takes."""
    size = ROOM + ROOM_PER_PIXEL * pixels
    try:
        np.empty(size, np.uint8)  # costs nothing, for no page of it is touched
    except MemoryError:
        raise MemoryError(
            f"a picture of {pixels:,} pixels failed, and this process cannot get the {size >> 20:,} "
            "MiB that would show that it is broken. Raise the limit (ulimit -v, or "
            "vm.overcommit_memory), or lower engine.threads and engine.batch"
        ) from None


def transform(image: Image.Image, resolution: int) -> NDArray[np.uint8]:
    """Returns an RGB picture as (resolution, resolution, 3) uint8: short side resized, centre cropped.

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
