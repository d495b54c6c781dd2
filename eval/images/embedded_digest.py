"""Picture files that can be verified alone: each carries a digest of what made it.

A PNG has that digest as text; the CRC of each chunk covers the rest, and the file ends with IEND's.
A JPEG has no CRC, so its comment holds the digest and the sha256 of the file in which that sha256
is written as zeros.
"""

from __future__ import annotations

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
# length 0, name, CRC: the end of a PNG, which Pillow does not verify
IEND = b"\0\0\0\0IEND\xaeB\x60\x82"


def encode(picture: Picture, suffix: str, digest: str) -> bytes:
    """Returns a picture (H, W, 3) as the bytes of a file; the same picture gives the same bytes."""
    image, data = Image.fromarray(picture), io.BytesIO()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text(KEY, digest)
        image.save(data, "PNG", pnginfo=info)
        return data.getvalue()
    image.save(data, "JPEG", quality=75, comment=digest.encode() + ZEROS)
    blank = data.getvalue()
    return blank.replace(digest.encode() + ZEROS, digest.encode() + sha256(blank).encode(), 1)


def check(path: Path, digest: str) -> None:
    """OtherImages if a file is damaged, or was not given this digest."""
    try:
        data = read_file(path)
        with Image.open(io.BytesIO(data)) as image:
            comment = image.info.get("comment", b"")  # text in a PNG
            if isinstance(comment, bytes):
                comment = comment.decode(errors="replace")
            embedded = image.info.get(KEY) or comment
            image.verify()  # of a PNG the CRC of every chunk, to the end
            kind = image.format
        if kind == "PNG" and not data.endswith(IEND):
            raise SyntaxError("it does not end as a PNG does")
    except (
        UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError
    ) as error:  # fmt: skip
        raise OtherImages(f"{path}: unreadable ({error}). Delete it to make it again") from None
    if kind == "JPEG" and embedded.startswith(digest):
        embedded, of_file = embedded[:64], embedded[64:].encode()
        if len(of_file) != 64 or sha256(data.replace(of_file, ZEROS, 1)).encode() != of_file:
            raise OtherImages(
                f"{path}: damaged, its bytes are not those of its sha256. Delete it to make it again"
            )
    if embedded != digest:
        raise OtherImages(
            f"{path}: not made by this run's settings and prompt. Move it away, or choose another --save_dir"
        )
