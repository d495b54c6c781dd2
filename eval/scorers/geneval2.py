"""GenEval 2's Soft-TIFA: how probable right answers to a prompt's questions are.

As facebookresearch/GenEval2 at a6e82d2 has it. The questions, geneval2_data.jsonl, are under CC
BY-NC 4.0: the file is fetched by hand, and pictures are joined to it by the text of their prompts,
as the official scorer does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from shards import canonical_json, sha256
from shards.format.atomic import parse_json, read_file
from shards.places import local_path

from ..errors import BadQuestions
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..prompts.prompts import Prompts
from ..scores.aggregate import aggregate, pooled
from ..scores.results import Item, Score
from ..scores.scorer import Scorer, label
from . import vlm
from .predictions import Json, cached_predictions, count_absent

URL = "https://github.com/facebookresearch/GenEval2"
ADVICE = "Generate pictures of GenEval 2's prompts"
PROMPT = "{} Answer in one word."
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True, slots=True)
class PromptQuestions:
    """The questions about a prompt's picture."""

    # with their answers: Yes, or a number's word
    questions: tuple[tuple[str, str], ...]
    skills: tuple[str, ...]  # of each question
    atoms: int


def _flags(add: argparse.ArgumentParser) -> None:
    """GenEval 2's Soft-TIFA: its questions, answered by a model of your choice"""
    vlm.flags(add)
    default = Path("geneval2_data.jsonl")
    add.add_argument("--questions", type=local_path, default=default, help="the official questions")


def _ready(args: argparse.Namespace) -> None:
    read_questions(args.questions)
    vlm.load(args, vlm.ANY)


def _suits(args: argparse.Namespace, prompts: Prompts) -> None:
    _count_absent(read_questions(args.questions), prompts, args.partial)


def _count_absent(questions: Mapping[str, PromptQuestions], prompts: Prompts, partial: bool) -> int:
    return count_absent(questions, [prompt.text for prompt in prompts.items], partial, ADVICE)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    questions = read_questions(args.questions)
    absent = _count_absent(questions, images.prompts, args.partial)
    model = vlm.load(args, vlm.ANY)
    pairs_of = {prompt: group.questions for prompt, group in questions.items()}
    key = {"vlm": model.identity, "prompt": PROMPT, "questions": sha256(canonical_json(pairs_of))}

    def predict(pictures: Sequence[PictureRef], pixels: Sequence[Picture]) -> list[Json]:
        predictions = []
        for picture, image in zip(pictures, pixels, strict=True):
            group = pairs_of[picture.file.prompt.text]
            pairs = [(image, PROMPT.format(question)) for question, _ in group]
            odds = model.odds(pairs, [spellings(answer) for _, answer in group])
            predictions.append({"odds": odds})
        return predictions

    name = label(args.vlm)
    predictions = cached_predictions(images, f"geneval2-{name}", key, 1, predict, rank=Rank.here())
    if predictions is None:
        return
    pairs = [
        items(
            picture.file.prompt.id, picture.number, questions[picture.file.prompt.text], p["odds"]
        )
        for picture, p in predictions.pairs
    ]
    everything = {prompt: asdict(group) for prompt, group in questions.items()}
    made_by = key | {"paths": [args.vlm], "whole_questions": sha256(canonical_json(everything))}
    arithmetic, geometric_items = ([pair[i] for pair in pairs] for i in (0, 1))
    skills = pooled(by_skill(arithmetic), unit=100)
    for kind, mean_items, groups in (("am", arithmetic, skills), ("gm", geometric_items, {})):
        value, atoms = aggregate(mean_items, unit=100)
        score = predictions.score(
            f"geneval2-softtifa-{kind}-{name}", mean_items, (value, atoms | groups), made_by,
            absent=absent, unit=100,
        )  # fmt: skip
        yield score, mean_items


SCORER = Scorer(_flags, _score, _ready, suits=_suits)


def read_questions(path: Path) -> dict[str, PromptQuestions]:
    """Returns the official questions by the prompts' texts; else BadQuestions."""
    questions: dict[str, PromptQuestions] = {}
    try:
        lines = read_file(path).decode().split("\n")
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected GenEval 2's geneval2_data.jsonl. It is at {URL} (CC BY-NC 4.0); name "
            "your copy with --questions"
        ) from None
    except UnicodeDecodeError as error:
        raise BadQuestions(f"{path}: not UTF-8 ({error}). The file is at {URL}") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            prompt, group = parse_questions(parse_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise BadQuestions(
                f"{path}:{number}: found {line!r:.100}, expected a prompt, its vqa_list, skills and atom_count "
                f"({error}). The file is at {URL}"
            ) from None
        if prompt in questions:
            raise BadQuestions(f"{path}:{number}: the prompt {prompt!r:.80} occurs twice")
        questions[prompt] = group
    if not questions:
        raise BadQuestions(f"{path}: holds no question. The file is at {URL}")
    return questions


def parse_questions(record: Any) -> tuple[str, PromptQuestions]:
    """Returns a line's prompt and questions; ValueError, KeyError or TypeError of others."""
    pairs = tuple((str(question), str(answer)) for question, answer in record["vqa_list"])
    strange = [answer for _, answer in pairs if answer not in ("Yes", *NUMBERS)]
    if strange or not pairs or len(pairs) != len(record["skills"]):
        raise ValueError(f"answers {strange}" if strange else "a skill for each question")
    questions = PromptQuestions(pairs, tuple(record["skills"]), int(record["atom_count"]))
    return str(record["prompt"]), questions


def spellings(answer: str) -> tuple[str, ...]:
    """Returns how a model may begin an answer that is right."""
    if answer == "Yes":
        return ("Yes", "yes", " Yes", " yes")
    digit = str(NUMBERS.index(answer) + 1)
    return (answer, answer.capitalize(), f" {answer}", digit, f" {digit}")


def geometric(values: Sequence[float]) -> float:
    """Returns the geometric mean; 0 where a value is 0."""
    return exp(sum(map(log, values)) / len(values)) if all(values) else 0.0


def items(
    prompt: str, number: int, questions: PromptQuestions, odds: Sequence[float]
) -> tuple[Item, Item]:
    """Returns a picture's items under the arithmetic mean and under the geometric one."""
    details = {
        "questions": [
            {"question": question, "answer": answer, "skill": skill, "probability": p}
            for (question, answer), skill, p in zip(
                questions.questions, questions.skills, odds, strict=True
            )
        ]
    }
    groups = (f"{questions.atoms} atoms",)
    means = sum(odds) / len(odds), geometric(odds)
    arithmetic, product = (Item(prompt, number, mean, groups, details) for mean in means)
    return arithmetic, product


def by_skill(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Returns for each skill an item a question."""
    skills: dict[str, list[Item]] = {}
    for item in items:
        for question in item.found["questions"]:
            part = Item(item.prompt, item.number, question["probability"])
            skills.setdefault(question["skill"], []).append(part)
    return dict(sorted(skills.items()))
