"""Prompts whose pictures a scorer cannot judge are known from their list, before a picture is made."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.errors import BadPrompts, BadQuestions
from eval.prompts.prompts import Prompt, Prompts
from eval.score import SCORERS

OWN = Prompts("few", (Prompt("00000", "a red cat"), Prompt("00001", "a dog")))


def dpg(folder: Path, *ids: str) -> Namespace:
    """The questions of DPG-Bench to these prompts."""
    head = "item_id,proposition_id,dependency,tuple,question_natural_language"
    rows = [f"{name},1,0,entity - whole (cat),Is there a cat?" for name in ids]
    (folder / "dpg.csv").write_text("\n".join([head, *rows]))
    return Namespace(csv=folder / "dpg.csv", partial=False)


def softtifa(folder: Path, *texts: str) -> Namespace:
    questions = {"atom_count": 1, "skills": ["object"], "vqa_list": [["Is there a cat?", "Yes"]]}
    lines = [json.dumps({"prompt": text, **questions}) for text in texts]
    (folder / "geneval2.jsonl").write_text("\n".join(lines))
    return Namespace(questions=folder / "geneval2.jsonl", partial=False)


def genai(folder: Path, *numbers: int) -> Namespace:
    (folder / "skills.json").write_text(json.dumps({"counting": numbers}))
    return Namespace(skills=folder / "skills.json", partial=False)


@pytest.mark.parametrize(
    ("scorer", "questions", "suitable", "few", "many"),
    [
        ("dpg", dpg, ("00000", "00001"), ("00000",), ("00000", "00001", "kite")),
        ("softtifa", softtifa, ("a red cat", "a dog"), ("a dog",), ("a red cat", "a dog", "kite")),
        ("genai", genai, (1,), (7,), (0, 1, 7)),
    ],
)
def test_prompts_and_questions_of_different_editions(
    tmp_path: Path, scorer: str, questions: Callable[..., Namespace], suitable: tuple[str, ...],
    few: tuple[str, ...], many: tuple[str, ...],
) -> None:  # fmt: skip
    suits = SCORERS[scorer].suits
    suits(questions(tmp_path, *suitable), OWN)
    for others in (few, many):
        with pytest.raises(BadQuestions, match=r"without a question|that the set does not have"):
            suits(questions(tmp_path, *others), OWN)
    part = Namespace(**{**vars(questions(tmp_path, *many)), "partial": True})
    suits(part, OWN)  # as of a half, which never has all


def test_geneval_is_of_prompts_with_its_records() -> None:
    with pytest.raises(BadPrompts, match="prompt 00000: found the record None, expected GenEval's"):
        SCORERS["geneval"].suits(Namespace(), OWN)
    record = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    SCORERS["geneval"].suits(Namespace(), Prompts("few", (Prompt("0", "a cat", record=record),)))
