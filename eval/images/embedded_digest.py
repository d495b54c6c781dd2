"""Picture files that can be verified alone: each carries a stamp of what made it, and shows every damage.

A PNG has the stamp as text; the CRC of each chunk covers the rest, and the file ends with IEND's. A JPEG has none, so
its comment holds the stamp and the sha256 of the file in which that sha256 is written as zeros.
"""

import io
from pathlib import Path

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from shards import sha256
from shards.format.atomic import read_file

from ..errors import OtherImages
from .layouts import Picture

KEY = "latentbank"
ENCODINGS = {".png": "png", ".jpeg": "jpeg-quality-75"}
ZEROS = b"0" * 64
IEND = b"\0\0\0\0IEND\xaeB\x60\x82"  # length 0, name, CRC: the end of a PNG, which Pillow does not verify


def encode(picture: Picture, suffix: str, stamp: str) -> bytes:
    """A picture (H, W, 3) as the bytes of a stamped file; the same picture gives the same bytes."""
    image, data = Image.fromarray(picture), io.BytesIO()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text(KEY, stamp)
        image.save(data, "PNG", pnginfo=info)
        return data.getvalue()
    image.save(data, "JPEG", quality=75, comment=stamp.encode() + ZEROS)
    blank = data.getvalue()
    return blank.replace(stamp.encode() + ZEROS, stamp.encode() + sha256(blank).encode(), 1)


def check(path: Path, stamp: str) -> None:
    """Raise OtherImages if a file is damaged, or is not one that was given this stamp."""
    try:
        data = read_file(path)
        with Image.open(io.BytesIO(data)) as image:
            comment = image.info.get("comment", b"")  # text in a PNG
            found = image.info.get(KEY) or (
                comment.decode(errors="replace") if isinstance(comment, bytes) else comment
            )
            image.verify()  # of a PNG the CRC of every chunk, to the end
            kind = image.format
        if kind == "PNG" and not data.endswith(IEND):
            raise SyntaxError("it does not end as a PNG does")
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise OtherImages(f"{path}: unreadable ({error}). Delete it to make it again") from None
    if kind == "JPEG" and found.startswith(stamp):
        found, digest = found[:64], found[64:].encode()
        if len(digest) != 64 or sha256(data.replace(digest, ZEROS, 1)).encode() != digest:
            raise OtherImages(
                f"{path}: damaged, its bytes are not those of its sha256. Delete it to make it again"
            )
    if found != stamp:
        raise OtherImages(
            f"{path}: not made by this run's settings and prompt. Move it away, or choose another --save_dir"
        )
