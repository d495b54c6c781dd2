"""The page on pictures of one's own: its commands, in their order and each once, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encode.toy import jpeg

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/pictures.md"


def commands() -> list[list[str]]:
    lines = re.findall(r"^    python (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.timeout(1200)
@pytest.mark.slow  # a process for each command, with torch and its libraries
def test_from_a_folder_of_pictures_to_a_report(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(60):
        (pictures / f"{number}.jpg").write_bytes(jpeg(number))
        (pictures / f"{number}.txt").write_text(f"a picture of colour {number % 7}")
    (tmp_path / "prompts.txt").write_text("a picture of colour 3\na picture of colour 5\n")
    before: list[str] = []
    assert len(commands()) == 9
    for words in commands():
        result = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, (words, result.stdout, result.stderr)
        before.append(result.stdout)
    assert "next: python -m encode run my/encode.yaml" in before[0]
    assert shlex.join(commands()[2][:7]) in before[0]
    assert "60 rows: 60 ok" in before[1]
    assert "next: python -m train my/train.yaml" in before[2]
    assert "done: step 20 of 20" in before[3]
    assert "done: step 20 of 20" in before[4]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("plain", "equi"):
        assert len(list((tmp_path / "images" / name / "images").glob("*.png"))) == 2
        assert len(list((tmp_path / "images" / name / "scores").glob("demo-mind*.json"))) == 1
    assert "a picture of colour 3" in page
    assert "demo-mind" in page
