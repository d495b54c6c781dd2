"""Sets of pictures as the official scorers walk them, by readers that know their rules and nothing of the writer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.images.imageset import ImageSetReader, ImageSetWriter
from eval.images.layouts import joined, parted
from eval.prompts.benchmarks import BENCHMARKS
from eval.prompts.prompts import Prompt, Prompts

SIDE = 16
RECORDS = [
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "zwei Kätzchen"},
    {
        "tag": "colors",
        "include": [{"class": "cup", "count": 1, "color": "red"}],
        "prompt": "a red cup",
    },
]
PROMPTS = {
    "geneval": [Prompt(f"{i:05d}", r["prompt"], r["tag"], r) for i, r in enumerate(RECORDS)],
    "dpgbench": [Prompt("partiprompts97", "x"), Prompt("0", "y")],
    "genaibench": [Prompt("00000", "x"), Prompt("00001", "y")],
    "mjhq30k": [Prompt("0a", "x", "food"), Prompt("0b", "y", "art"), Prompt("0c", "z", "food")],
    "coco30k": [Prompt("37", "x"), Prompt("203", "y")],
}  # fmt: skip


def level(prompt: int, number: int) -> int:
    """The grey of a picture, which tells it from all others of its set."""
    return 20 + 60 * prompt + 10 * number


def picture(prompt: int, number: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), level(prompt, number), np.uint8)


@pytest.fixture(params=PROMPTS)
def written_set(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A benchmark's name, and the folder that its scorer is given."""
    name: str = request.param
    benchmark, prompts = BENCHMARKS[name], Prompts(name, tuple(PROMPTS[name]))
    images = ImageSetWriter(
        tmp_path / "model", prompts, {}, benchmark.layout, benchmark.images_per_prompt
    )
    numbers = {prompt.id: i for i, prompt in enumerate(prompts.items)}
    for file in images.files:
        images.save(file, [picture(numbers[file.prompt.id], k) for k in file.numbers])
    images.finish({})
    return name, tmp_path / "model" / "images"


def walk_geneval(root: Path) -> Iterator[tuple[dict[str, object], list[Path]]]:
    """Folders named by digits; metadata.jsonl read as one JSON value; names that begin as `<digits>.png`."""
    for folder in sorted(os.listdir(root)):
        if not (root / folder).is_dir() or not folder.isdigit():
            continue
        with (root / folder / "metadata.jsonl").open(encoding="ascii") as file:  # in any locale
            metadata = json.load(file)
        samples = sorted(os.listdir(root / folder / "samples"))
        yield (
            metadata,
            [root / folder / "samples" / name for name in samples if re.match(r"\d+\.png", name)],
        )


def walk_dpg(root: Path, resolution: int) -> Iterator[tuple[str, list[Image.Image]]]:
    """Every file is a picture; its id is its name up to the first dot; four crops, row by row."""
    for name in os.listdir(root):
        with Image.open(root / name) as grid:
            whole = grid.convert("RGB")
        corners = [(0, 0), (resolution, 0), (0, resolution), (resolution, resolution)]
        yield (
            name.split(".")[0],
            [whole.crop((x, y, x + resolution, y + resolution)) for x, y in corners],
        )


def grey(image: Image.Image) -> int:
    values = np.asarray(image.convert("RGB"))
    assert values.shape == (SIDE, SIDE, 3)
    assert np.ptp(values.astype(int)) <= 2  # of a JPEG
    return int(np.median(values))


def test_official_readers(written_set: tuple[str, Path]) -> None:
    name, root = written_set
    if name == "geneval":
        walked = list(walk_geneval(root))
        assert [metadata for metadata, _ in walked] == RECORDS
        for i, (_, samples) in enumerate(walked):
            assert [grey(Image.open(sample)) for sample in samples] == [
                level(i, k) for k in range(4)
            ]
    elif name == "dpgbench":
        tiles = {key: [grey(tile) for tile in crops] for key, crops in walk_dpg(root, SIDE)}
        assert tiles == {"partiprompts97": [20, 30, 40, 50], "0": [80, 90, 100, 110]}
    elif name == "genaibench":
        for i, key in enumerate(("00000", "00001")):
            path = (
                root.parent.parent / "model/images" / f"{key}.jpeg"
            )  # <output_dir>/<gen_model>/<key>.jpeg
            with Image.open(path) as image:
                assert image.format == "JPEG"
                assert abs(grey(image) - level(i, 0)) <= 1
        assert len(os.listdir(root)) == 2
    elif name == "mjhq30k":
        actual = {
            f"{path.parent.name}/{path.stem}": grey(Image.open(path)) for path in root.rglob("*.*")
        }
        assert actual == {"food/0a": 20, "art/0b": 80, "food/0c": 140}
    else:
        assert {path.name: grey(Image.open(path)) for path in root.iterdir()} == {
            "37.png": 20,
            "203.png": 80,
        }


def test_clean_fid_takes_the_pictures_and_nothing_else(written_set: tuple[str, Path]) -> None:
    import torch
    from cleanfid.fid import get_folder_features

    name, root = written_set
    (root.parent / "scores").mkdir()  # beside, not inside
    features = get_folder_features(
        str(root), model=lambda batch: batch.mean((1, 2, 3))[:, None], num_workers=0, batch_size=1,
        device=torch.device("cpu"), verbose=False, custom_fn_resize=lambda values: values.astype(np.float32),
    )  # fmt: skip
    expected = [
        level(i, k)
        for i in range(len(PROMPTS[name]))
        for k in range(BENCHMARKS[name].images_per_prompt)
    ]
    if name == "dpgbench":
        expected = [35, 95]  # a grid is one file
    assert sorted(np.round(features[:, 0]).tolist()) == pytest.approx(expected, abs=1)


def test_what_was_written_is_read_back(written_set: tuple[str, Path]) -> None:
    name, root = written_set
    images = ImageSetReader.open(root.parent)
    assert images.prompts.items == tuple(PROMPTS[name])
    numbers = {prompt.id: i for i, prompt in enumerate(images.prompts.items)}
    items_ = list(images)
    assert [(item.file.prompt.id, item.number) for item in items_] == [
        (prompt.id, k)
        for prompt in PROMPTS[name]
        for k in range(BENCHMARKS[name].images_per_prompt)
    ]
    for item in items_:
        assert (
            abs(
                grey(Image.fromarray(item.read()))
                - level(numbers[item.file.prompt.id], item.number)
            )
            <= 1
        )


def test_mjhq_without_categories_lies_flat() -> None:
    from eval.images.layouts import LAYOUTS

    prompts = Prompts("mjhq30k", (Prompt("00000", "x"),))
    assert [file.path for file in LAYOUTS["by-group"].files(prompts, 1)] == ["00000.png"]


def test_grids_are_row_major_and_square() -> None:
    tiles = [np.full((2, 3, 3), value, np.uint8) for value in range(9)]
    grid = joined(tiles)
    assert grid[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert all(np.array_equal(a, b) for a, b in zip(parted(grid, 9), tiles, strict=True))
    with pytest.raises(ValueError, match="expected a square number"):
        joined(tiles[:3])
