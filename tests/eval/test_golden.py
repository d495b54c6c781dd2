"""Sets of pictures that an earlier version has written open, are finished and are reported (golden/pictures.tar.xz).

    whole   three pictures of `generate`, with the scores of a CLIP and of a Frechet distance
    half    the same settings and prompts, one picture of the three

All names of their files, the keys of their records and their exact bytes are as they were written then.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from eval.commands import main
from eval.images.imageset import ImageSetReader, ImageSetWriter

ARCHIVE = Path(__file__).parents[1] / "golden/pictures.tar.xz"
DIGEST = "92d15ff1005587e440941a358d2821b3cf73ae2fa8cfa3ab6f2763047cf0b9fa"
OWN = (
    "benchmark",
    "prompts",
    "layout",
    "images_per_prompt",
    "encoding",
)  # settings that a set adds


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_whole_set_opens(golden: Path) -> None:
    images = ImageSetReader.open(golden / "whole")
    assert images.digest == DIGEST
    assert images.missing == 0


def test_a_half_set_is_finished(golden: Path) -> None:
    """The picture that exists stays; with the others the set is the one that was made at once."""
    whole = ImageSetReader.open(golden / "whole")
    settings = {key: value for key, value in whole.settings.items() if key not in OWN}
    half = ImageSetWriter(golden / "half", whole.prompts, settings)
    assert [half.has(file) for file in half.files] == [True, False, False]
    for file in half.files[1:]:
        shutil.copy(whole.images / file.path, half.images / file.path)
    half.finish({})
    assert ImageSetReader.open(golden / "half").digest == DIGEST


def test_it_is_reported_with_its_scores(golden: Path) -> None:
    """How the weights were trained was not recorded then, and the report says that."""
    main(["report", str(golden / "whole"), "--out", str(golden / "report.html")])
    section = json.loads((golden / "report.json").read_text())["sections"][0]
    assert len(section["scores"]) == 2
    assert section["sets"][0]["training"] is None
    assert not (golden / "whole/run.json").exists()
