"""GenEval 2's means over the probabilities of right answers, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.errors import BadQuestions
from eval.scorers import geneval2 as softtifa
from eval.scorers.geneval2 import PromptQuestions, geometric, items, read_questions, spellings

TWO_CATS = {
    "prompt": "two red cat", "atom_count": 3, "skills": ["count", "attribute", "object"],
    "vqa_list": [["How many cat are there?", "two"], ["Is the cat red?", "Yes"], ["Is there a cat?", "Yes"]],
}  # fmt: skip


def written(folder: Path, *records: Any) -> Path:
    path = folder / "geneval2_data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_questions_are_read_by_prompt(tmp_path: Path) -> None:
    assert read_questions(written(tmp_path, TWO_CATS)) == {
        "two red cat": PromptQuestions(
            (("How many cat are there?", "two"), ("Is the cat red?", "Yes"), ("Is there a cat?", "Yes")),
            ("count", "attribute", "object"), 3,
        )
    }  # fmt: skip


def test_spellings() -> None:
    assert spellings("Yes") == ("Yes", "yes", " Yes", " yes")
    assert spellings("seven") == ("seven", "Seven", " seven", "7", " 7")


def test_means() -> None:
    assert geometric([0.5, 0.5, 0.125]) == pytest.approx(0.03125 ** (1 / 3))
    assert geometric([0.9, 0.0, 0.9]) == 0
    assert geometric([1e-300] * 3) == pytest.approx(1e-300)  # the product alone would be 0
    questions = read_questions_of(TWO_CATS)
    arithmetic, other = items("00000", 0, questions, [0.2, 0.4, 0.9])
    assert (arithmetic.value, other.value) == (pytest.approx(0.5), pytest.approx(0.072 ** (1 / 3)))
    assert arithmetic.groups == other.groups == ("3 atoms",)
    skills = softtifa.by_skill([arithmetic])
    assert {name: [item.value for item in some] for name, some in skills.items()} == {
        "attribute": [0.4], "count": [0.2], "object": [0.9],
    }  # fmt: skip


def read_questions_of(record: dict[str, Any]) -> PromptQuestions:
    return softtifa.parse_questions(record)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"skills": ["count"]}, {"vqa_list": []}, {"vqa_list": [["How many?", "eleven"]], "skills": ["count"]},
        {"atom_count": "x"}, {"vqa_list": [["one"]]}, {"prompt": None, "vqa_list": 3},
    ],
)  # fmt: skip
def test_damaged_lines_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(BadQuestions, match=r"geneval2_data\.jsonl:2: found"):
        read_questions(written(tmp_path, TWO_CATS, TWO_CATS | {"prompt": "other"} | change))


def test_absent_and_repeated(tmp_path: Path) -> None:
    with pytest.raises(BadQuestions, match=r"no such file.*--questions"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(BadQuestions, match="occurs twice"):
        read_questions(written(tmp_path, TWO_CATS, TWO_CATS))
    with pytest.raises(BadQuestions, match="holds no question"):
        read_questions(written(tmp_path))
