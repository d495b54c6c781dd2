"""`encode check`: each miss is found by the check that is for it, with what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from encode.__main__ import main
from encode.errors import EncodeError
from encode.models.check import drawn, psnr
from tests.encode.adapters import ADAPTERS, SIDE, own, save_weights
from tests.encode.models.test_own import MINE, module  # noqa: F401 - a fixture
from tests.encode.toy import picture

CHECKS = [
    "loads", "shape", "values", "determinism", "batch", "size", "range", "round trip", "norm", "digest"
]  # fmt: skip
ROOT = Path(__file__).parents[3]


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Exit code and output of the command on these columns."""

    def run(columns: dict[str, Any], *words: str) -> tuple[int, str]:
        path = tmp_path / "encode.yaml"
        path.write_text(
            yaml.safe_dump({"root": "r", "sources": {"s": "t.tar"}, "columns": columns})
        )
        monkeypatch.setattr(
            sys, "argv", ["encode", "check", str(path), "engine.device=cpu", *words]
        )
        code = main()
        return code, capsys.readouterr().out

    return run


def column(encoder: dict[str, str], kind: str = "latents") -> dict[str, Any]:
    return {"kind": kind, "encoder": encoder, "resolution": SIDE}


def test_adapters_and_a_class_of_diffusers_pass(
    check: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    save_weights(tmp_path)
    columns = {
        name.partition(".")[0].lower(): column(own(name, tmp_path), kind)
        for name, (kind, _, _) in ADAPTERS.items()
    }
    demo = {"class": "AutoencoderKL", "path": str(ROOT / "configs/demo/vae-plain")}
    columns["demo"] = {**column(demo, "moments"), "resolution": 64}
    columns["text"] = {"kind": "ids", "encoder": "gemma-2b"}
    code, output = check(columns)
    assert code == 0
    assert "MISS" not in output
    assert output.count("all passed") == 5
    _, output = check({"tokens": columns["tokens"]}, "--json")
    results = [json.loads(line) for line in output.splitlines()]
    assert [result["check"] for result in results] == CHECKS
    assert results[1]["found"] == "latents (48, 1, 16), tokens without places"


@pytest.mark.parametrize(
    ("change", "missed", "advice"),
    [
        (("class Mine:", "class Yours:"), "loads", "Name it as package.module:Class"),
        (("norm = (0.0, 1.0)", ""), "loads", "give the class norm = "),
        (("::2, ::2] * 1", "::2, ::2] * 1e6"), "loads", "Divide by a constant in the class"),
        (("* 1\n", "+ __import__('torch').rand(1)\n"), "determinism", "Take the mean"),
        (("* 1\n", "+ pixels.mean()\n"), "batch", "no statistics over the batch"),
        (("repeat_interleave(2, 3) / 1", "repeat_interleave(2, 3)[:, :, 1:]"), "size", "must give 32 x 32"),
        (('version = "1"', 'version = "1"; pixel_range = (0, 1)'), "range", "Is pixel_range"),
        (("return latents.rep", "return -latents.rep"), "round trip", "The decoder shows less"),
        (("norm = (0.0, 1.0)", "norm = (0.0, 0.01)"), "norm", "scale the inverse of the deviation"),
        (("class Mine:", "import torch\nclass Mine:\n  def __init__(self): self.w = torch.rand(3)"),
         "digest", "Read every weight from path"),
    ],
)  # fmt: skip
def test_each_miss_is_found(
    change: tuple[str, str], missed: str, advice: str, check: Callable[..., tuple[int, str]],
    module: Callable[[str], str],  # noqa: F811 - the fixture
) -> None:  # fmt: skip
    text = MINE.format(factor=1)
    if missed == "range":  # it takes 0 .. 1, as it says, and gives -1 .. 1
        text = text.replace("return latents", "return (latents * 2 - 1)")
    if missed == "digest":
        text = text.replace("    ", "  ")
    assert change[0] in text
    name = module(text.replace(*change))
    code, output = check({"own": column({"class": name})}, "--json")
    results = [json.loads(line) for line in output.splitlines()]
    misses = {result["check"]: result["advice"] for result in results if not result["passed"]}
    assert code == 2
    assert next(iter(misses)) == missed
    assert advice in misses[missed]
    code, output = check({"own": column({"class": name})})
    assert code == 2
    assert "MISS" in output
    assert f"own: {missed}: " in output


def test_pictures_of_a_folder(check: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    pixels = {"own": column(own("Pixels", tmp_path))}
    folder = tmp_path / "pictures/below"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(EncodeError, match="found no picture among 1 file\\. Name"):
        check(pixels, "--pictures", str(folder.parent))
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    code, output = check(pixels, "--pictures", str(folder.parent), "--count", "2")
    assert code == 0
    code, single = check(pixels, "--pictures", str(folder / "1.png"))
    assert code == 0
    assert single.count("pass") == output.count("pass")
    with pytest.raises(EncodeError, match=r"notes.txt: no picture that can be decoded. Name"):
        check(pixels, "--pictures", str(folder / "notes.txt"))
    with pytest.raises(EncodeError, match="gone: no such file or folder. Name a folder of"):
        check(pixels, "--pictures", str(tmp_path / "gone"))
    with pytest.raises(EncodeError, match="expected one of moments or latents to check"):
        check({"text": {"kind": "ids", "encoder": "gemma-2b"}})


def test_pictures_that_are_drawn() -> None:
    pictures = drawn(16)
    assert pictures.shape == (4, 16, 16, 3)
    assert all(image.std() > 20 for image in pictures)
    black, white = np.zeros_like(pictures), np.full_like(pictures, 255)
    assert psnr(black, white) == 0
    assert psnr(black, black + np.uint8(1)) == pytest.approx(20 * np.log10(255))
