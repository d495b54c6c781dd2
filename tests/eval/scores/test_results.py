"""Scores come back as they were written; damaged ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eval.distances import influences
from eval.distances.influences import Influence
from eval.errors import BadScores, NotFinite
from eval.scorers import geneval2 as softtifa
from eval.scores import results
from eval.scores.results import Item, Score, Value
from shards import canonical_json, seal, unseal
from train.report.records import read_records

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


def test_text_may_hold_what_python_takes_for_ends_of_lines(tmp_path: Path) -> None:
    """U+2028, U+0085 and U+001C stand in JSON as they are, or may."""
    text = "a\u2028b\u0085c\u001cd"
    items = [Item(text, 0, 1.0), Item("b", 0, 0.5)]
    assert results.read_items(results.write(tmp_path, SCORE, items)) == items
    influences.write(tmp_path, "s", "digest", some := [Influence(text, 0, 1.0)])
    assert influences.read(tmp_path, "s", "digest") == some
    record = {
        "prompt": text,
        "atom_count": 1,
        "skills": ["object"],
        "vqa_list": [["Is it?", "Yes"]],
    }
    (tmp_path / "q.jsonl").write_bytes(2 * b"\n" + canonical_json(record))
    assert set(softtifa.read_questions(tmp_path / "q.jsonl")) == {text}
    (tmp_path / "m.jsonl").write_bytes(canonical_json({"name": text, "step": 0}) + b'{"step": 1')
    assert read_records(tmp_path / "m.jsonl") == [{"name": text, "step": 0}]


def test_numbers_that_are_none_are_named_before_anything_is_written(tmp_path: Path) -> None:
    items = [Item("a", 0, 1.0), Item("b", 3, float("nan"))]
    with pytest.raises(
        NotFinite, match=r"geneval-hf-tiny\.json: picture 3 of prompt 'b': found NaN"
    ):
        results.write(tmp_path, SCORE, items)
    with pytest.raises(NotFinite, match=r"geneval-hf-tiny\.json: found NaN or infinity"):
        results.write(tmp_path, replace(SCORE, value=Value(float("inf"))), items[:1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [b"", b"{}", b"[]", None])
def test_damaged(tmp_path: Path, change: bytes | None) -> None:
    path = results.write(tmp_path, SCORE)
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9") if change is None else change)
    with pytest.raises(BadScores, match=r"geneval-hf-tiny\.json"):
        results.read_all(tmp_path)


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize("part", ["value", "groups"])
def test_an_interval_of_one_end_is_refused(tmp_path: Path, end: str, part: str) -> None:
    """As of an edited record that was sealed again, whether the other end is null or gone."""
    path = results.write(tmp_path, SCORE)
    for edit in (lambda value: value.update({end: None}), lambda value: value.pop(end)):
        record = unseal(path, results.FORMAT, results.VERSION)
        edit(record["value"] if part == "value" else record["groups"]["counting"])
        path.write_bytes(seal({k: v for k, v in record.items() if k != "digest"}))
        with pytest.raises(BadScores, match="expected both ends"):
            results.read(path)
        results.write(tmp_path, SCORE)
