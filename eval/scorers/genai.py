"""GenAI-Bench by VQAScore (linzhiqiu/t2v_metrics at 6ecb74f, genai_bench).

A picture scores the probability that a model answers "Yes" to whether it shows its prompt, not
divided by that of "No". Skills name prompts by whole numbers. They are joined to ids by that
number, and not by a picture's place in the order: one list of the benchmark counts from 0, another
from 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shards import canonical_json, sha256
from shards.format.atomic import read_json
from shards.places import local_path

from ..errors import BadQuestions
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..prompts.prompts import Prompts
from ..scores.aggregate import aggregate
from ..scores.results import Item, Score
from ..scores.scorer import Scorer, label
from . import vlm
from .predictions import NAMED, Json, cached_predictions

URL = "https://huggingface.co/datasets/BaiqiL/GenAI-Bench-1600/resolve/main/genai_skills.json"
FETCHED = Path("prompts/genaibench/genai_skills.json")  # where `eval prompts fetch` puts them
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'  # of t2v_metrics 3.1

Skills = dict[str, tuple[str, ...]]  # prompt id -> its skills; prompts without one are not in it


def _flags(add: argparse.ArgumentParser) -> None:
    """GenAI-Bench: VQAScore by a model of your choice"""
    vlm.flags(add)
    add.add_argument("--skills", type=local_path, help="the official skills; fetched ones without")


def _ready(args: argparse.Namespace) -> None:
    if args.skills or not any(FETCHED.parents[1].glob(f"genaibench*/{FETCHED.name}")):
        read(args.skills or FETCHED)
    vlm.load(args, vlm.EXACT)


def _suits(args: argparse.Namespace, prompts: Prompts) -> None:
    _skills(args, prompts)


def _skills(args: argparse.Namespace, prompts: Prompts) -> tuple[Skills, int]:
    path = args.skills or FETCHED.parents[1] / prompts.benchmark / FETCHED.name
    return read_skills(path, prompts, args.partial)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    skills, absent = _skills(args, images.prompts)
    model = vlm.load(args, vlm.EXACT)
    key = {"vlm": model.identity, "prompt": QUESTION, "prompts": images.prompts.digest}

    def predict(pictures: Sequence[PictureRef], pixels: Sequence[Picture]) -> list[Json]:
        questions = [QUESTION.format(picture.file.prompt.text) for picture in pictures]
        answers = model.ask(list(zip(pixels, questions, strict=True)))
        return [{"yes": answer.yes, "no": answer.no} for answer in answers]

    name = f"genai-vqascore-{label(args.vlm)}"
    predictions = cached_predictions(
        images, name, key, args.batch_size, predict,
        lambda picture: picture.file.prompt.id in skills, Rank.here(),
    )  # fmt: skip
    if predictions is None:
        return
    items = [
        Item(prompt, picture.number, odds["yes"], skills[prompt], odds)
        for picture, odds in predictions.pairs
        for prompt in [picture.file.prompt.id]
    ]
    made_by = key | {"paths": [args.vlm], "skills": sha256(canonical_json(skills))}
    count = len(images.prompts.items)
    note = f"{count - len(skills)} of {count} prompts have no skill and do not count"
    notes = (note,) if len(skills) < count else ()
    score = predictions.score(name, items, aggregate(items), made_by, notes=notes, absent=absent)
    yield score, items


SCORER = Scorer(_flags, _score, _ready, suits=_suits)


def read_skills(path: Path, prompts: Prompts, partial: bool = False) -> tuple[Skills, int]:
    """Returns the skills of a set's prompts, and how many prompts with skills it lacks.

    `path` is the official genai_skills.json {skill: [numbers]}. BadQuestions where prompts are
    absent and `partial` does not allow it, or where none is present.
    """
    names = _numbered(prompts)
    missing: set[int] = set()
    skills: dict[str, list[str]] = {}
    for skill, numbers in read(path).items():
        missing |= set(numbers) - names.keys()
        for number in dict.fromkeys(n for n in numbers if n in names):
            skills.setdefault(names[number], []).append(skill)
    if not skills or (missing and not partial):
        few = ", ".join(map(str, sorted(missing)[:NAMED]))
        raise BadQuestions(
            f"{path}: it has {len(missing)} prompts that the set does not have ({few}). Take skills and prompts of one "
            "edition (1,600 prompts counted from 0, or 527 counted from 1), or score what exists with --partial"
        )
    return {name: tuple(names_) for name, names_ in skills.items()}, len(missing)


def _numbered(prompts: Prompts) -> dict[int, str]:
    try:
        names = {int(prompt.id): prompt.id for prompt in prompts.items}
    except ValueError:
        names = {}
    if len(names) < len(prompts.items):
        raise BadQuestions(
            f"found ids such as {prompts.items[0].id!r}, expected GenAI-Bench's, which are different whole numbers "
            "(00000). Generate the set with --benchmark genaibench and its genai_image.json"
        )
    return names


def read(path: Path) -> dict[str, list[int]]:
    """Returns {skill: [numbers of prompts]}, or raises BadQuestions."""
    try:
        skills: Any = read_json(path)
        if skills and all(skills.values()):
            return {skill: [int(number) for number in numbers] for skill, numbers in skills.items()}
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected GenAI-Bench's skills. `python -m eval prompts fetch genaibench` brings "
            f"genai_skills.json from {URL}; or name the file with --skills"
        ) from None
    except (ValueError, TypeError, AttributeError):
        pass
    raise BadQuestions(
        f"{path}: not genai_skills.json, {{skill: [numbers of prompts]}}. It is at {URL}"
    )
