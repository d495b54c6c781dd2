"""Scores come back as they were written; damaged ones are named."""

from pathlib import Path

import pytest

from eval import results
from eval.errors import BadScores
from eval.results import Item, Score, Value

SCORE = Score(
    scorer="geneval-hf-tiny", benchmark="geneval", value=Value(0.5, 0.4, 0.6, 10), better="higher",
    groups={"counting": Value(0.1, 0.0, 0.2, 3)}, overall="groups", prompts=10, pictures=40,
    notes=("uncalibrated",), images="sha256:a", prompt_list="sha256:b", made_by={"torch": "x"},
)  # fmt: skip


def test_written_and_read(tmp_path: Path) -> None:
    items = [Item("a", 0, 1.0, ("counting",), {"cats": [1, 2]}), Item("ä", 1, 0.5)]
    path = results.write(tmp_path, SCORE, items)
    assert results.read_all(tmp_path) == {"geneval-hf-tiny": SCORE}
    assert results.read_items(path) == items
    results.write(tmp_path, SCORE)
    assert results.read_all(tmp_path / "none") == {}


@pytest.mark.parametrize("change", [b"", b"{}", b"[]", None])
def test_damaged(tmp_path: Path, change: bytes | None) -> None:
    path = results.write(tmp_path, SCORE)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9") if change is None else change)
    with pytest.raises(BadScores, match=r"geneval-hf-tiny\.json"):
        results.read_all(tmp_path)
