"""GenAI-Bench's skills, joined to prompts by number whatever they are counted from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.errors import BadQuestions
from eval.prompts.prompts import Prompt, Prompts
from eval.scorers.genai import read_skills
from eval.scores.aggregate import aggregate
from eval.scores.results import Item


def prompts(*ids: str) -> Prompts:
    return Prompts("genaibench", tuple(Prompt(name, f"prompt {name}") for name in ids))


def skills(folder: Path, actual: object) -> Path:
    path = folder / "genai_skills.json"
    path.write_text(json.dumps(actual))
    return path


def test_skills_are_joined_by_number_not_by_place(tmp_path: Path) -> None:
    path = skills(tmp_path, {"counting": [1, 2], "basic": [2], "advanced": [1]})
    from_one = read_skills(path, prompts("00001", "00002"))
    from_zero = read_skills(path, prompts("00000", "00001", "00002"))
    short = read_skills(path, prompts("2", "1", "0"))
    expected = {"00001": ("counting", "advanced"), "00002": ("counting", "basic")}
    assert from_one == from_zero == (expected, 0)
    assert short == ({"1": expected["00001"], "2": expected["00002"]}, 0)


def test_all_is_the_union_of_prompts_with_any_skill(tmp_path: Path) -> None:
    """A prompt of two skills counts once, one of none not at all."""
    ids = ("00000", "00001", "00002", "00003")
    path = skills(tmp_path, {"counting": [0, 1], "negation": [1], "basic": [2], "advanced": [0, 1]})
    actual, _ = read_skills(path, prompts(*ids))
    odds = {"00000": 0.1, "00001": 0.4, "00002": 0.9, "00003": 1.0}
    items = [Item(name, 0, odds[name], actual[name]) for name in ids if name in actual]
    value, each = aggregate(items)
    assert value.value == pytest.approx((0.1 + 0.4 + 0.9) / 3)
    assert {name: v.value for name, v in each.items()} == pytest.approx(
        {"counting": 0.25, "advanced": 0.25, "negation": 0.4, "basic": 0.9}
    )


def test_skills_of_another_edition_are_refused(tmp_path: Path) -> None:
    path = skills(tmp_path, {"basic": [0, 1, 1599]})
    with pytest.raises(BadQuestions, match=r"it has 1 prompts that the set does not have \(1599\)"):
        read_skills(path, prompts("00000", "00001"))
    actual, absent = read_skills(path, prompts("00000", "00001"), partial=True)
    assert (set(actual), absent) == ({"00000", "00001"}, 1)
    with pytest.raises(BadQuestions, match="it has 3 prompts that the set does not have"):
        read_skills(path, prompts("00005"), partial=True)


@pytest.mark.parametrize("ids", [("a", "b"), ("1", "00001")])
def test_ids_that_are_no_different_numbers(tmp_path: Path, ids: tuple[str, ...]) -> None:
    with pytest.raises(BadQuestions, match="different whole numbers"):
        read_skills(skills(tmp_path, {"basic": [1]}), prompts(*ids))


@pytest.mark.parametrize(
    "actual", [[], {}, {"basic": []}, {"basic": ["x"]}, {"basic": 3}, "text", [1]]
)
def test_other_files_are_named(tmp_path: Path, actual: object) -> None:
    with pytest.raises(BadQuestions, match=r"genai_skills\.json: not genai_skills\.json"):
        read_skills(skills(tmp_path, actual), prompts("00001"))


def test_absent_skills_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(BadQuestions, match=r"no such file.*prompts fetch genaibench.*--skills"):
        read_skills(tmp_path / "none.json", prompts("00001"))
