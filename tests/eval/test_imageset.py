"""A folder of pictures goes on after a stop and refuses what it did not make."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.errors import OtherImages
from eval.imageset import ImageSet
from eval.prompts import Prompt, Prompts

PROMPTS = Prompts("p", (Prompt("a", "one"), Prompt("b", "two")))
SETTINGS = {"steps": 4, "guidance_scale": 6.0}


def picture(value: int) -> np.ndarray:
    return np.full((8, 6, 3), value, np.uint8)


def made(folder: Path) -> ImageSet:
    images = ImageSet(folder, PROMPTS, SETTINGS)
    images.save(images.files[0], [picture(1)])
    images.save(images.files[1], [picture(2)])
    return images


def test_a_set_is_complete_when_its_digests_are_recorded(tmp_path: Path) -> None:
    images = ImageSet(tmp_path, PROMPTS, SETTINGS)
    images.save(images.files[0], [picture(1)])
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is False
    again = ImageSet(tmp_path, PROMPTS, SETTINGS)
    assert [again.has(file) for file in again.files] == [True, False]
    again.save(again.files[1], [picture(2)])
    assert set(again.finish({"torch": "x"})["files"]) == {"a.png", "b.png"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "b.png")), picture(2))
    third = ImageSet(tmp_path, PROMPTS, SETTINGS)
    assert third.finish({"torch": "y"})["provenance"] == {"torch": "x"}


def test_the_same_pictures_are_the_same_bytes(tmp_path: Path) -> None:
    files = [made(tmp_path / name).finish({})["files"] for name in ("x", "y")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("prompts", "settings", "field"),
    [
        (PROMPTS, SETTINGS | {"steps": 5}, "steps: found 4, expected 5"),
        (Prompts("q", PROMPTS.items), SETTINGS, "benchmark: found 'p', expected 'q'"),
        (Prompts("p", (Prompt("a", "one"), Prompt("b", "other"))), SETTINGS, "prompts: found"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, prompts: Prompts, settings: dict[str, object], field: str
) -> None:
    made(tmp_path)
    with pytest.raises(OtherImages) as error:
        ImageSet(tmp_path, prompts, settings)
    assert field in str(error.value)


def test_strange_and_damaged_files_are_refused_and_left(tmp_path: Path) -> None:
    images = made(tmp_path)
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
        ImageSet(tmp_path, PROMPTS, SETTINGS)


def test_a_complete_set_that_changed_is_refused(tmp_path: Path) -> None:
    images = made(tmp_path)
    images.finish({})
    path = tmp_path / "images" / "a.png"
    path.unlink()
    images.save(
        images.files[0], [picture(9)]
    )  # a picture of the same settings, but not the one recorded
    with pytest.raises(OtherImages, match=r"1 pictures changed .*\(a\.png\)"):
        images.finish({})


def test_another_manifest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(OtherImages, match="not a manifest of images"):
        ImageSet(tmp_path, PROMPTS, SETTINGS)
    assert (tmp_path / "manifest.json").read_text() == "{}"
