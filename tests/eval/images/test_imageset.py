"""A folder of pictures goes on after a stop and refuses what it did not make."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from eval.errors import MissingImages, OtherImages
from eval.images.imageset import ImageSetReader, ImageSetWriter
from eval.prompts.prompts import Prompt, Prompts
from shards.errors import StoreError
from tests.forks import fork, wait
from tests.seccomp import no_atomic_names, no_links

PROMPTS = Prompts("p", (Prompt("a", "one"), Prompt("b", "two")))
SETTINGS = {"steps": 4, "guidance_scale": 6.0}


def picture(value: int) -> np.ndarray:
    return np.full((8, 6, 3), value, np.uint8)


def make_set(folder: Path) -> ImageSetWriter:
    images = ImageSetWriter(folder, PROMPTS, SETTINGS)
    images.save(images.files[0], [picture(1)])
    images.save(images.files[1], [picture(2)])
    return images


def test_a_set_is_complete_when_its_digests_are_recorded(tmp_path: Path) -> None:
    images = ImageSetWriter(tmp_path, PROMPTS, SETTINGS)
    images.save(images.files[0], [picture(1)])
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is False
    again = ImageSetWriter(tmp_path, PROMPTS, SETTINGS)
    assert [again.has(file) for file in again.files] == [True, False]
    again.save(again.files[1], [picture(2)])
    assert set(again.finish({"torch": "x"})["files"]) == {"a.png", "b.png"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "b.png")), picture(2))
    third = ImageSetWriter(tmp_path, PROMPTS, SETTINGS)
    assert third.finish({"torch": "y"})["provenance"] == {"torch": "x"}


def test_the_same_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    files = [make_set(tmp_path / name).finish({})["files"] for name in ("x", "y")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("prompts", "settings", "field"),
    [
        (PROMPTS, SETTINGS | {"steps": 5}, "steps: found 4, expected 5"),
        (Prompts("q", PROMPTS.items), SETTINGS, "benchmark: found p, expected q"),
        (
            Prompts("p", (Prompt("a", "one"), Prompt("b", "other"))),
            SETTINGS,
            "prompts: other prompts",
        ),
        (PROMPTS, SETTINGS | {"text": {"path": "x"}}, "text.path: found None, expected x"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, prompts: Prompts, settings: dict[str, object], field: str
) -> None:
    make_set(tmp_path)
    with pytest.raises(OtherImages) as error:
        ImageSetWriter(tmp_path, prompts, settings)
    assert field in str(error.value)


def test_a_complete_set_of_other_prompts_is_said_to_be_one(tmp_path: Path) -> None:
    """Its pictures are no strangers that should be moved away."""
    images = make_set(tmp_path)
    whole = images.finish({})
    others = Prompts("p", (Prompt("c", "three"), Prompt("d", "four")))
    with pytest.raises(OtherImages, match="holds images of other settings") as error:
        ImageSetWriter(tmp_path, others, SETTINGS)
    assert "move" not in str(error.value)
    assert "Choose another --save_dir" in str(error.value)
    assert images.finish({}) == whole


def test_strange_and_damaged_files_are_refused_and_left(tmp_path: Path) -> None:
    images = make_set(tmp_path)
    path = tmp_path / "images" / "a.png"
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole.replace(b"IDAT", b"IDAX"), b"", b"no picture"):
        path.write_bytes(damaged)
        with pytest.raises(OtherImages, match=r"a\.png"):
            images.has(images.files[0])
        assert path.read_bytes() == damaged
    Image.fromarray(picture(1)).save(path)
    with pytest.raises(OtherImages, match="not made by this run's settings"):
        images.has(images.files[0])
    path.write_bytes((tmp_path / "images" / "b.png").read_bytes())
    with pytest.raises(OtherImages, match="not made by this run's settings"):
        images.has(images.files[0])
    (tmp_path / "images" / "grid.png").write_bytes(whole)
    with pytest.raises(OtherImages, match=r"no prompt asks for \(grid\.png\)"):
        ImageSetWriter(tmp_path, PROMPTS, SETTINGS)


def test_a_png_shows_every_damage(tmp_path: Path) -> None:
    """No byte can change, to the end of IEND, nor can the file end early or late."""
    images = make_set(tmp_path)
    path = tmp_path / "images" / "a.png"
    whole = path.read_bytes()
    flipped = [bytearray(whole) for _ in whole]
    for at, data in enumerate(flipped):
        data[at] ^= 0x04
    for damaged in (*map(bytes, flipped), *(whole[:at] for at in range(len(whole))), whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(OtherImages, match=r"a\.png"):
            images.has(images.files[0])
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "of a stranger")
    Image.fromarray(picture(1)).save(path, pnginfo=info)
    with pytest.raises(OtherImages, match="not made by this run's settings"):
        images.has(images.files[0])
    path.write_bytes(whole)
    assert images.has(images.files[0])


def test_a_complete_set_that_changed_is_refused(tmp_path: Path) -> None:
    images = make_set(tmp_path)
    images.finish({})
    other = ImageSetWriter(tmp_path / "other", PROMPTS, SETTINGS)
    other.save(other.files[0], [picture(9)])
    data = (other.images / "a.png").read_bytes()  # of the same settings, but not the one recorded
    (tmp_path / "images" / "a.png").write_bytes(data)
    with pytest.raises(OtherImages, match=r"1 pictures changed .*\(a\.png\)"):
        images.finish({})


def test_a_lost_picture_that_is_made_otherwise_is_not_put_in_place(tmp_path: Path) -> None:
    """As on a machine that rounds otherwise: the set stays one that the first machine can mend."""
    images = make_set(tmp_path)
    whole = images.finish({"torch": "2.0", "device": "cpu"})
    path = tmp_path / "images" / "a.png"
    path.unlink()
    for actual in (images, ImageSetWriter(tmp_path, PROMPTS, SETTINGS)):
        with pytest.raises(OtherImages, match=r"a\.png: was lost, .*\(device cpu, torch 2\.0\)"):
            actual.save(actual.files[0], [picture(9)])
        assert not path.exists()
    actual.save(actual.files[0], [picture(1)])
    assert actual.finish({}) == whole


def test_another_manifest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(OtherImages, match="not a manifest of images"):
        ImageSetWriter(tmp_path, PROMPTS, SETTINGS)
    assert (tmp_path / "manifest.json").read_text() == "{}"


def test_a_jpeg_verifies_itself(tmp_path: Path) -> None:
    images = ImageSetWriter(tmp_path, PROMPTS, SETTINGS, "jpeg")
    for file, value in zip(images.files, (90, 160), strict=True):
        images.save(file, [picture(value)])
    path = tmp_path / "images" / "a.jpeg"
    whole = path.read_bytes()
    assert whole[:3] == b"\xff\xd8\xff"
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (6, 8))
        assert np.abs(np.asarray(image).astype(int) - 90).max() <= 1
    again = ImageSetWriter(tmp_path, PROMPTS, SETTINGS, "jpeg")
    assert [again.has(file) for file in again.files] == [True, True]
    for at in range(0, len(whole), 4):  # no byte can change, nor can the file end early
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        for actual in (bytes(damaged), whole[:at]) if at % 32 == 0 else (bytes(damaged),):
            path.write_bytes(actual)
            with pytest.raises(OtherImages, match=r"a\.jpeg"):
                again.has(again.files[0])
    path.write_bytes((tmp_path / "images" / "b.jpeg").read_bytes())
    with pytest.raises(OtherImages, match="not made by this run's settings"):
        again.has(again.files[0])
    Image.fromarray(picture(90)).save(path)
    with pytest.raises(OtherImages, match="not made by this run's settings"):
        again.has(again.files[0])
    assert (
        json.loads((tmp_path / "manifest.json").read_text())["settings"]["encoding"]
        == "jpeg-quality-75"
    )


def test_nothing_unfinished_is_ever_among_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    link = os.link

    def looking(old: Path, new: Path) -> None:
        seen.extend(path.name for path in (tmp_path / "images").rglob("*") if path.is_file())
        link(old, new)

    monkeypatch.setattr(os, "link", looking)
    images = make_set(tmp_path)
    assert set(seen) == {"a.png"}
    old, new = tmp_path / ".tmp-old", tmp_path / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)  # of a killed process; the other may be still writing
    images.finish({})
    assert (old.exists(), new.exists()) == (False, True)


def test_what_is_missing_is_listed(tmp_path: Path) -> None:
    with pytest.raises(MissingImages, match=r"found no manifest\.json"):
        ImageSetReader.open(tmp_path)
    prompts = Prompts("p", tuple(Prompt(f"{i:02d}", "x") for i in range(30)))
    images = ImageSetWriter(tmp_path, prompts, {}, "flat", 2)
    images.save(images.files[3], [picture(3)])
    for act in (lambda: ImageSetReader.open(tmp_path), lambda: images.finish({})):
        with pytest.raises(MissingImages) as error:
            act()
        assert (
            "59 of 60 files are missing, of 30 prompts: 00_0.png, 00_1.png, 01_0.png, 02_0.png"
            in str(error.value)
        )
        assert "and 39 more" in str(error.value)
    some = ImageSetReader.open(tmp_path, partial=True)
    assert [(item.file.path, item.read()[0, 0, 0]) for item in some] == [("01_1.png", 3)]
    assert some.missing == 59
    for file in images.files:
        if not images.has(file):
            images.save(file, [picture(7)])
    with pytest.raises(MissingImages, match="the run that makes them has not ended"):
        ImageSetReader.open(tmp_path)
    images.finish({})
    assert ImageSetReader.open(tmp_path).missing == 0


def test_a_set_that_changed_is_not_scored(tmp_path: Path) -> None:
    images = ImageSetWriter(tmp_path, PROMPTS, SETTINGS)
    images.save(images.files[0], [picture(1)])
    strange = tmp_path / "images" / "b.png"
    Image.fromarray(picture(2)).save(strange)
    with pytest.raises(OtherImages, match=r"b\.png: not made by"):
        ImageSetReader.open(tmp_path, partial=True)  # a mixed set
    strange.unlink()
    images.save(images.files[1], [picture(2)])
    images.finish({})
    whole = ImageSetReader.open(tmp_path)
    path = tmp_path / "images" / "a.png"
    before = path.read_bytes()
    path.write_bytes(before + b"x")
    with pytest.raises(OtherImages, match=r"1 pictures changed .*\(a\.png\)"):
        ImageSetReader.open(tmp_path)
    path.write_bytes(before)
    (tmp_path / "images" / "empty").mkdir()
    with pytest.raises(OtherImages, match="no prompt asks for .empty/."):
        ImageSetReader.open(tmp_path)
    (tmp_path / "images" / "empty").rmdir()
    assert ImageSetReader.open(tmp_path).digest == whole.digest
    stored = tmp_path / "prompts.json"
    stored.write_text(stored.read_text().replace("two", "too"))
    with pytest.raises(OtherImages, match="changed since the pictures were made"):
        ImageSetReader.open(tmp_path)


def test_what_lies_beside_the_pictures_is_checked(tmp_path: Path) -> None:
    record = {"tag": "colors", "include": [], "prompt": "x"}
    prompts = Prompts("geneval", (Prompt("00000", "x", "colors", record),))
    images = ImageSetWriter(tmp_path, prompts, {}, "folders")
    images.save(images.files[0], [picture(1)])
    images.finish({})
    path = tmp_path / "images" / "00000" / "metadata.jsonl"
    path.write_text("{}")
    for act in (
        lambda: ImageSetReader.open(tmp_path),
        lambda: ImageSetWriter(tmp_path, prompts, {}, "folders"),
    ):
        with pytest.raises(OtherImages, match=r"metadata\.jsonl: changed"):
            act()
    assert path.read_text() == "{}"
    path.unlink()
    with pytest.raises(OtherImages, match=r"metadata\.jsonl: missing"):
        ImageSetReader.open(tmp_path)
    ImageSetWriter(tmp_path, prompts, {}, "folders")
    assert ImageSetReader.open(tmp_path).files[0].path == "00000/samples/00000.png"


def test_a_refused_folder_stays_as_it_was(tmp_path: Path) -> None:
    make_set(tmp_path)

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    for prompts, settings in ((PROMPTS, {}), (Prompts("p", (Prompt("c", "x"),)), SETTINGS)):
        with pytest.raises(OtherImages):
            ImageSetWriter(tmp_path, prompts, settings)
    assert state() == before


def _write_at_once(folder: Path, rank: int, start: multiprocessing.synchronize.Barrier) -> None:
    prompts = Prompts("p", tuple(Prompt(f"{i:02d}", "x") for i in range(24)))
    start.wait()
    images = ImageSetWriter(folder, prompts, SETTINGS, "flat")
    for file in images.files[rank // 2 :: 2]:  # each file is made by two of the four
        if not images.has(file):
            images.save(file, [picture(int(file.prompt.id))])
    start.wait()
    images.finish({"torch": "x"})


def test_processes_write_one_set_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    ranks = [
        context.Process(target=_write_at_once, args=(tmp_path, rank, start)) for rank in range(4)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * 4
    actual = ImageSetReader.open(tmp_path)
    assert [item.read()[0, 0, 0] for item in actual] == list(range(24))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"images", "manifest.json", "prompts.json"}


@pytest.mark.parametrize("atomic", [True, False])
def test_a_file_system_without_hard_links(tmp_path: Path, atomic: bool) -> None:
    def work() -> None:
        (no_links if atomic else no_atomic_names)()
        if atomic:
            make_set(tmp_path / "set").finish({})
            assert len(ImageSetReader.open(tmp_path / "set").files) == 2
        else:
            with pytest.raises(StoreError, match="neither hard links"):
                make_set(tmp_path / "set")

    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert atomic or not list((tmp_path / "set/images").iterdir())
