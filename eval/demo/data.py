"""Draws the demo's captioned pictures into tars: `python -m eval.demo.data demo/data`.

    demo/data/openmoji/00000.tar ... 00007.tar   280 training samples each, seven groups mixed
    demo/data/openmoji/00008.tar                 35 more, damaged: see `damage`
    demo/data/openmoji-val/00000.tar             280 samples of held-out emoji
    demo/data/photos/00000.tar                   42 crops of photographs
    demo/data/prompts.json                       the held-out captions by key, for `eval generate`
    demo/data/CREDITS.txt                        authors and licences

Members are `KEY.jpg`, `KEY.txt` (a sentence) and `KEY.short.txt` (a name), as in the BLIP3o sets. Equal
package versions give equal bytes; the digest is over what is drawn, so it survives a new JPEG library.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from encode.models import to_pixels
from encode.source import transform
from shards import atomic_write
from shards.console import counted
from shards.places import local_path

from .openmoji import BACKGROUNDS, GROUPS, Sample, choose, hashed
from .photos import photos

SIZE = 96  # pixels; larger than the demo's 64, so that the encode step has something to resize
TARS = 8
PER_GROUP = 320  # training samples of each group
DAMAGED_PER_GROUP = 5
VALIDATION_PER_GROUP = 40

CREDITS = """\
openmoji, openmoji-val: emoji designed by OpenMoji (https://openmoji.org), the open-source emoji and
icon project. Licence: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). Changed here:
drawn on a coloured background and stored as JPEG. The pictures in this folder, and what is generated
from them, keep that licence.

photos: crops of photographs in scikit-image (astronaut, chelsea, coffee, rocket, motorcycle) and
scikit-learn (china.jpg by Grace Ou, flower.jpg by vultilion; CC BY); see the README.txt beside the
originals in these packages.
"""

Members = list[tuple[str, bytes]]  # file name in the tar, content


def training() -> list[Sample]:
    """Returns the samples of the whole training tars, mixed."""
    return sorted(
        (sample for group in GROUPS for sample in choose(group, PER_GROUP, validation=False)),
        key=lambda sample: hashed(sample.key),
    )


def damaged() -> list[Sample]:
    """Returns further samples, for the tar that is not whole."""
    count = PER_GROUP + DAMAGED_PER_GROUP
    surplus = (list(choose(group, count, validation=False))[PER_GROUP:] for group in GROUPS)
    return sorted((s for samples in surplus for s in samples), key=lambda s: hashed(s.key))


def validation() -> list[Sample]:
    """Returns the samples of the held-out names."""
    return sorted(
        (s for group in GROUPS for s in choose(group, VALIDATION_PER_GROUP, validation=True)),
        key=lambda sample: hashed(sample.key),
    )


def digest() -> str:
    """Returns the SHA-256 of all that the demo's models are trained on: drawings, backgrounds, captions."""
    digest = hashlib.sha256()
    for sample in training():
        drawing = hashlib.sha256(sample.emoji.svg.read_bytes()).hexdigest()
        colour = BACKGROUNDS[sample.background]
        digest.update(f"{sample.key}|{sample.long}|{colour}|{drawing}\n".encode())
    for photo in photos():
        drawing = hashlib.sha256(photo.file.read_bytes()).hexdigest()
        digest.update(f"{photo.key}|{photo.long}|{photo.box}|{drawing}\n".encode())
    return digest.hexdigest()


def jpeg(sample: Sample) -> bytes:
    """Returns the emoji centred on its background, 96 x 96."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(sample.emoji.svg),
        width=SIZE,
        background=BACKGROUNDS[sample.background],
        skip_system_fonts=True,
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "JPEG", quality=95)
    return out.getvalue()


def members(key: str, image: bytes, long: str, short: str) -> Members:
    return [
        (f"{key}.jpg", image),
        (f"{key}.txt", long.encode()),
        (f"{key}.short.txt", short.encode()),
    ]


def drawn(samples: Iterable[Sample]) -> Members:
    return [m for s in samples for m in members(s.key, jpeg(s), s.long, s.short)]


def tar(contents: Members) -> bytes:
    """Returns a tar of these files; times and owners are zero, so equal files give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def damage(contents: Members) -> bytes:
    """Returns a damaged tar: four samples are spoilt, and the end is missing.

    Sample 5 has half a JPEG, sample 8 noise in its place, sample 12 no caption, sample 20 no picture;
    the file stops in the middle of the last sample's JPEG.
    """
    keys = list(dict.fromkeys(name.split(".")[0] for name, _ in contents))
    spoilt: Members = []
    for name, content in contents:
        key, suffix = name.split(".", 1)
        number = keys.index(key)
        if (number == 12 and suffix.endswith("txt")) or (number == 20 and suffix == "jpg"):
            continue
        if number == 8 and suffix == "jpg":
            content = b"not a picture"
        half = number == 5 and suffix == "jpg"
        spoilt.append((name, content[: len(content) // 2] if half else content))
    archive = tar(spoilt)
    end = archive.index(f"{keys[-1]}.jpg".encode()) + tarfile.BLOCKSIZE
    return archive[: end + 700]


def read(tars: Iterable[Path], resolution: int) -> tuple[list[str], Tensor]:
    """Returns keys and pictures of whole tars, as the encode step sees them: (N, 3, H, W) in [-1, 1]."""
    keys, images = [], []
    for path in tars:
        with tarfile.open(path) as archive:
            for info in archive:
                if info.name.endswith(".jpg"):
                    file = archive.extractfile(info)
                    assert file is not None
                    keys.append(info.name.removesuffix(".jpg"))
                    image = Image.open(io.BytesIO(file.read())).convert("RGB")
                    images.append(transform(image, resolution))
    return keys, to_pixels(np.stack(images))


def training_tars(data: Path) -> list[Path]:
    """Returns the whole tars of the training source, without the damaged one."""
    return [data / f"openmoji/{number:05d}.tar" for number in range(TARS)]


def draw(out: Path) -> None:
    """Writes all files; about 15 seconds on one core."""
    samples = training()
    share = len(samples) // TARS
    tars = {
        f"openmoji/{number:05d}.tar": tar(drawn(samples[number * share : (number + 1) * share]))
        for number in range(TARS)
    }
    held_out = validation()
    crops = [m for p in photos() for m in members(p.key, p.jpeg(), p.long, p.short)]
    files = tars | {
        f"openmoji/{TARS:05d}.tar": damage(drawn(damaged())),
        "openmoji-val/00000.tar": tar(drawn(held_out)),
        "photos/00000.tar": tar(crops),
        "prompts.json": json.dumps({sample.key: sample.long for sample in held_out}).encode(),
        "CREDITS.txt": CREDITS.encode(),
    }
    for name, content in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (
            path.exists() and path.read_bytes() == content
        ):  # a file of that content keeps its time
            atomic_write(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=local_path)
    out = parser.parse_args().out
    draw(out)
    tars = sorted(out.glob("*/*.tar"))
    size = sum(path.stat().st_size for path in tars)
    print(
        f"{counted(len(tars), 'tar')}, {size / 1e6:.1f} MB in {out}; training data {digest()[:16]}"
    )


if __name__ == "__main__":
    main()
