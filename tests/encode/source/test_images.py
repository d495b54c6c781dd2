"""The reference's picture, bit for bit; what becomes of broken ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from encode.models.pixels import to_images, to_pixels
from encode.source import images
from encode.source.images import decode, transform
from shards import Status
from tests.encode.scarce import KINDS, outcome
from tests.encode.toy import jpeg, picture

GOLDEN = load_file(Path(__file__).parents[2] / "golden/image_transform.safetensors")


@pytest.mark.parametrize("name", ["landscape", "portrait", "small", "square"])
def test_golden(name: str) -> None:
    crop = transform(Image.fromarray(GOLDEN[f"in.{name}"]), 64)
    pixels = to_pixels(np.stack([crop]))[0]
    assert torch.equal(pixels, torch.from_numpy(GOLDEN[f"out.{name}"]))


def test_equals_torchvision() -> None:
    from torchvision import transforms

    chance = np.random.default_rng(0)
    for _ in range(150):
        resolution = int(chance.choice([8, 31, 32, 64]))
        height, width = (int(v) for v in chance.integers(1, 200, 2))
        image = Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
        reference = transforms.Compose([
            transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR, antialias=True),
            transforms.CenterCrop(resolution), transforms.ToTensor(), transforms.Normalize([0.5], [0.5]),
        ])  # fmt: skip
        pixels = to_pixels(np.stack([transform(image, resolution)]))[0]
        assert torch.equal(pixels, reference(image)), (
            width,
            height,
        )


def test_pixels_and_back() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 5, 7)
    np.testing.assert_array_equal(to_images(pixels), images)
    assert to_images(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)).tolist() == [
        [[[0, 128, 255]]]
    ]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_kinds_of_files(kind: str) -> None:
    data = encoded(picture(3), kind)
    image, status = decode(data)
    assert status == Status.OK
    assert image is not None
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_modes_become_rgb() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    for data, mode in (
        (encoded(grey, "JPEG"), "L"),
        (encoded(picture(1).convert("CMYK"), "JPEG"), "CMYK"),
        (encoded(deep, "PNG"), "I;16"),
        (encoded(picture(1).quantize(16), "PNG"), "P"),
        (encoded(picture(1).convert("RGBA"), "PNG"), "RGBA"),
        (encoded(picture(1).convert("1"), "PNG"), "1"),
    ):
        assert Image.open(io.BytesIO(data)).mode == mode
        image, status = decode(data)
        assert (status, image and image.mode) == (Status.OK, "RGB")
    np.testing.assert_array_equal(
        np.asarray(decode(encoded(grey, "PNG"))[0])[..., 1], np.asarray(grey)
    )


def test_exif_does_not_turn_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = decode(jpeg(2, exif=exif.tobytes()))
    assert image is not None
    assert image.size == (48, 40)


def test_cut_off_at_any_byte() -> None:
    """Every prefix is undecodable, truncated or (without the last marker) whole; in this order."""
    data = jpeg(5)
    statuses = []
    for cut in range(0, len(data) + 1, 7):
        image, status = decode(data[:cut])
        statuses.append(status)
        assert (image is None) == (status == Status.IMAGE_UNDECODABLE)
        if status == Status.TRUNCATED:
            assert image is not None
            assert image.size == (48, 40)
    assert set(statuses) >= {Status.IMAGE_UNDECODABLE, Status.TRUNCATED}
    assert statuses == sorted(
        statuses, key=[Status.IMAGE_UNDECODABLE, Status.TRUNCATED, Status.OK].index
    )
    data = encoded(picture(5, 320, 240), "JPEG")
    half, status = decode(data[: len(data) // 2])
    assert status == Status.TRUNCATED
    whole, _ = decode(data)
    np.testing.assert_array_equal(np.asarray(half)[:32], np.asarray(whole)[:32])  # before the cut


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"<html>404</html>",
        bytes(1000),
        b"GIF89a" + bytes(20),
        b"RIFF\0\0\0\0WEBPVP8 ",
    ],
)
def test_undecodable(data: bytes) -> None:
    assert decode(data) == (None, Status.IMAGE_UNDECODABLE)


def test_random_damage_never_raises() -> None:
    chance = np.random.default_rng(0)
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"]
    for kind in kinds:
        whole = encoded(picture(9), kind)
        for _ in range(150):
            data = bytearray(whole)
            for place in chance.integers(0, min(len(data), 400), 3):
                data[place] = chance.integers(256)
            image, status = decode(bytes(data))
            assert (image is None) == (status == Status.IMAGE_UNDECODABLE)


def test_a_decompression_bomb_is_refused() -> None:
    header = encoded(Image.new("1", (1, 1)), "PNG")
    bomb = bytearray(header)
    bomb[16:24] = (60_000).to_bytes(
        4, "big"
    ) * 2  # 3.6 gigapixels; its checksum no longer fits either
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert decode(bytes(bomb)) == (None, Status.IMAGE_UNDECODABLE)


def test_strict_and_lenient_decoding_side_by_side() -> None:
    """PIL's leniency is one switch of the process; a truncated picture must not make another thread lenient."""
    good, cut = jpeg(1), jpeg(2)[:-150]
    expected = [np.asarray(decode(data)[0]) for data in (good, cut)]
    assert [decode(data)[1] for data in (good, cut)] == [Status.OK, Status.TRUNCATED]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(decode, (good, cut)[i % 2]) for i in range(600)]
        for i, job in enumerate(jobs):
            image, status = job.result()
            assert status == (Status.OK, Status.TRUNCATED)[i % 2]
            np.testing.assert_array_equal(np.asarray(image), expected[i % 2])


def test_want_of_memory_is_no_status(tmp_path: Path) -> None:
    """A sound picture is decoded or raises MemoryError, whatever its decoder says; a broken one has
    its usual status once there is room.
    """
    pixels = picture(4, 900, 800)
    for kind in KINDS:
        (tmp_path / f"{kind} sound").write_bytes(encoded(pixels, kind))
    (tmp_path / "lossless WEBP sound").write_bytes(encoded(pixels, "WEBP", lossless=True))
    (tmp_path / "progressive JPEG sound").write_bytes(encoded(pixels, "JPEG", progressive=True))
    for path in list(tmp_path.glob("*sound")):
        data = path.read_bytes()
        (tmp_path / f"{path.name} cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "no picture").write_bytes(b"<html>404</html>")
    usual = {path.name: outcome(path.read_bytes()) for path in tmp_path.iterdir()}
    room = [0, 4, 7, 10, 16, 24, 200]  # MiB; the last is enough for a verdict
    command = [sys.executable, "-m", "tests.encode.scarce", tmp_path, *room]
    printed = subprocess.run(
        list(map(str, command)), check=True, capture_output=True, cwd=Path(__file__).parents[3]
    )
    short = 0
    for name, found in json.loads(printed.stdout).items():
        assert set(found) <= {"MemoryError", usual[name]}, name
        assert found[-1] == usual[name], name
        assert usual[name].startswith("OK") == name.endswith("sound"), name
        short += "MemoryError" in found
    assert short > len(usual) // 2


def test_a_decoder_that_cannot_be_loaded_is_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL goes on without it, for as long as the process lives."""
    data = encoded(picture(3), "WEBP")

    def unloadable(name: str) -> None:
        raise ImportError(f"{name}: failed to map segment from shared object")

    images._formats.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(images.importlib, "import_module", unloadable)
        with pytest.raises(ImportError, match="failed to map segment"):
            decode(data)
    assert decode(data)[1] == Status.OK


def test_one_picture_is_judged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is limited, a failed picture is decoded again while no other thread decodes."""
    monkeypatch.setattr(images, "_memory_is_limited", lambda: True)
    kinds = [jpeg(1), jpeg(2)[:-150], b"no picture"]
    usual = [Status.OK, Status.TRUNCATED, Status.IMAGE_UNDECODABLE]
    attempt, running, company = images._attempt, [], []

    def watched(data: bytes, formats: list[str]) -> tuple[Image.Image | None, Status]:
        repeated = images._gate._waiting and not images._gate._inside
        running.append(data)
        result = attempt(data, formats)
        if repeated:
            company.append(len(running))
        running.remove(data)
        return result

    monkeypatch.setattr(images, "_attempt", watched)
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda i: decode(kinds[i % 3])[1], range(600)))
    assert statuses == usual * 200
    assert company == [1] * 400
