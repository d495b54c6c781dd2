"""The drawn tars: whole, captioned rightly, without leaks, and the same every time."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, UnidentifiedImageError

from eval.demo.data import drawn, tar, validation
from eval.demo.openmoji import BACKGROUNDS, PHRASES, group_of

WHOLE = [f"openmoji/{number:05d}.tar" for number in range(8)] + ["openmoji-val/00000.tar"]


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> bytes, in the order of the tar."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            key, suffix = info.name.split(".", 1)
            file = archive.extractfile(info)
            assert file is not None
            samples.setdefault(key, {})[suffix] = file.read()
    return samples


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_tar_has_280_samples_of_three_members(data: Path, name: str) -> None:
    samples = contents(data / name)
    assert len(samples) == 280
    assert all(list(parts) == ["jpg", "txt", "short.txt"] for parts in samples.values())


def test_training_has_320_samples_of_each_group_and_no_key_twice(data: Path) -> None:
    keys = [key for name in WHOLE[:-1] for key in contents(data / name)]
    assert len(set(keys)) == len(keys) == 2240
    assert set(Counter(map(group_of, keys)).values()) == {320}


def test_captions_and_picture_say_the_same(data: Path) -> None:
    for key, parts in contents(data / "openmoji-val/00000.tar").items():
        short, long = parts["short.txt"].decode(), parts["txt"].decode()
        colour = long.removesuffix(" background.").split(" on a plain ")[1]
        assert long.startswith(f"An emoji of {PHRASES[group_of(key)]}: {short}, on")
        image = Image.open(io.BytesIO(parts["jpg"]))
        assert image.size == (96, 96)
        corner = image.convert("RGB").getpixel((1, 1))
        expected = bytes.fromhex(BACKGROUNDS[colour][1:])
        assert max(abs(a - b) for a, b in zip(corner, expected, strict=True)) <= 6, (key, corner)


def test_held_out_names_are_in_no_training_tar(data: Path) -> None:
    def bare(caption: bytes) -> str:
        words = re.sub(r"(medium-)?(light|dark)? ?skin tone|medium skin tone", "", caption.decode())
        words = re.sub(r"^(wo)?man |^person ", "", words)
        return re.sub(r"( facing right)| +$", "", words).strip()

    def names(tars: list[str]) -> set[str]:
        samples = (parts for name in tars for parts in contents(data / name).values())
        return {bare(parts["short.txt"]) for parts in samples}

    kept = names(WHOLE[-1:])
    assert len(kept) > 80
    assert not kept & names(WHOLE[:-1])


def test_the_damaged_tar_breaks_where_it_says(data: Path) -> None:
    path = data / "openmoji/00008.tar"
    with pytest.raises(tarfile.ReadError):
        contents(path)
    images: dict[str, bytes] = {}
    names = []
    with tarfile.open(path) as archive:
        for _ in range(99):  # the members whose bytes are all there
            info = archive.next()
            assert info is not None
            names.append(info.name)
            file = archive.extractfile(info)
            assert file is not None
            images[info.name] = file.read()
    keys = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert f"{keys[12]}.jpg" in names
    assert f"{keys[12]}.txt" not in names
    assert f"{keys[20]}.jpg" not in names
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(images[f"{keys[5]}.jpg"])).load()
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(images[f"{keys[8]}.jpg"]))


def test_photographs_are_in_the_wheels_and_captioned(data: Path) -> None:
    samples = contents(data / "photos/00000.tar")
    assert len(samples) == 42
    for parts in samples.values():
        assert min(Image.open(io.BytesIO(parts["jpg"])).size) == 96
        assert len(parts["txt"].split()) >= 4


def test_prompts_are_the_held_out_captions(data: Path) -> None:
    prompts = json.loads((data / "prompts.json").read_text())
    samples = contents(data / "openmoji-val/00000.tar")
    assert prompts == {key: parts["txt"].decode() for key, parts in samples.items()}
    assert set(Counter(map(group_of, prompts)).values()) == {40}


def test_drawing_again_gives_the_same_bytes(data: Path) -> None:
    again = tar(drawn(validation()))
    stored = (data / "openmoji-val/00000.tar").read_bytes()
    assert hashlib.sha256(again).digest() == hashlib.sha256(stored).digest()
