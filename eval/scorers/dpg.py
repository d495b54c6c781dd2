"""DPG-Bench: the official questions, answered by a model (TencentQQGYLab/ELLA at 3c228f1).

A question counts only if what it depends on was answered with yes: a cat that is absent is not
black. The official script walks the questions in the file's order, so that a question before its
own parent escapes a gate further up; here parents always come first. Its other bugs are not copied
either: it skips the first question, takes categories from the last tile alone, and drops pictures
that it cannot read.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from shards import canonical_json, sha256
from shards.format.atomic import read_file
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

URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
FETCHED = Path("prompts/dpgbench/dpg_bench.csv")  # where `eval prompts fetch` puts it
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
PROMPT = (
    "{} Please answer yes or no."  # mPLUG was trained to answer briefly, chat models are asked to
)
ADVICE = "Generate the set with --benchmark dpgbench and the csv's prompts"
log = logging.getLogger(__name__)
GATED = "categories are gated too; those that the official script prints are dpg-ungated's"


@dataclass(frozen=True, slots=True)
class Question:
    # the proposition's, within its prompt
    number: int
    parents: tuple[int, ...]
    text: str
    category: str  # "entity - whole"


Questions = dict[str, tuple[Question, ...]]  # by prompt id, parents first


def _flags(add: argparse.ArgumentParser) -> None:
    """DPG-Bench: the official questions, answered by a model of your choice"""
    vlm.flags(add)
    add.add_argument("--csv", type=local_path, default=FETCHED, help="the official questions")


def _ready(args: argparse.Namespace) -> None:
    read_questions(args.csv)
    vlm.load(args, vlm.ANY)


def _suits(args: argparse.Namespace, prompts: Prompts) -> None:
    _count_absent(read_questions(args.csv), prompts, args.partial)


def _count_absent(questions: Questions, prompts: Prompts, partial: bool) -> int:
    return count_absent(questions, [prompt.id for prompt in prompts.items], partial, ADVICE)


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    questions = read_questions(args.csv)
    absent = _count_absent(questions, images.prompts, args.partial)
    model = vlm.load(args, vlm.ANY)
    texts = {name: [[q.number, q.text] for q in group] for name, group in questions.items()}
    key = {"vlm": model.identity, "prompt": PROMPT, "questions": sha256(canonical_json(texts))}

    def predict(pictures: Sequence[PictureRef], pixels: Sequence[Picture]) -> list[Json]:
        predictions = []
        for picture, image in zip(pictures, pixels, strict=True):
            group = questions[picture.file.prompt.id]
            answers = model.answers(image, [PROMPT.format(q.text) for q in group])
            pairs = zip(group, answers, strict=True)
            predictions.append({str(q.number): [answer.yes, answer.no] for q, answer in pairs})
        return predictions

    name = label(args.vlm)
    predictions = cached_predictions(images, f"dpg-{name}", key, 1, predict, rank=Rank.here())
    if predictions is None:
        return
    gated_items = [
        item(picture.file.prompt.id, picture.number, questions[picture.file.prompt.id], odds)
        for picture, odds in predictions.pairs
    ]
    everything = {name: [asdict(q) for q in group] for name, group in questions.items()}
    made_by = key | {"paths": [args.vlm], "whole_questions": sha256(canonical_json(everything))}
    for kind, items, field, notes in (
        ("dpg", gated_items, "gated", (GATED,)),
        ("dpg-ungated", [ungated(gated_item) for gated_item in gated_items], "answer", ()),
    ):
        values = aggregate(items, unit=100)[0], pooled(by_category(items, field), unit=100)
        score = predictions.score(
            f"{kind}-{name}", items, values, made_by, notes=notes, absent=absent, unit=100
        )
        yield score, items


SCORER = Scorer(_flags, _score, _ready, suits=_suits)


def read_questions(path: Path) -> Questions:
    """Returns the questions of the official csv, or one like it; else BadQuestions."""
    rows: dict[str, list[Question]] = {}
    try:
        with io.StringIO(read_file(path).decode("utf-8-sig"), newline="") as file:
            lines = csv.DictReader(file)
            columns = lines.fieldnames or ()
            if missing := [name for name in COLUMNS if name not in columns]:
                raise BadQuestions(
                    f"{path}: found the columns {', '.join(columns) or 'none'}, expected also {', '.join(missing)}. "
                    f"The official file is at {URL}"
                )
            for row in lines:
                question = _question(row, f"{path}:{lines.line_num}")
                rows.setdefault(row["item_id"], []).append(question)
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected DPG-Bench's questions. `python -m eval prompts fetch dpgbench` brings "
            f"dpg_bench.csv from {URL}; or name the file with --csv"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadQuestions(
            f"{path}: not CSV in UTF-8 ({error}). Fetch it again from {URL}"
        ) from None
    if not rows:
        raise BadQuestions(f"{path}: holds no question. Fetch it again from {URL}")
    return {
        name: parents_first(group, f"{path}: {name}") for name, group in _mended(rows, path).items()
    }


def _mended(rows: Mapping[str, list[Question]], path: Path) -> dict[str, list[Question]]:
    """Returns each proposition once, the last of its rows, as the official script takes it, and
    without parents that are no propositions; both are counted in a warning.
    """
    doubled, lost, mended = 0, 0, {}
    for name, group in rows.items():
        by_number = {question.number: question for question in group}
        doubled += len(group) - len(by_number)
        lost += sum(len(set(q.parents) - by_number.keys()) for q in by_number.values())
        mended[name] = [
            replace(q, parents=tuple(p for p in q.parents if p in by_number))
            for q in by_number.values()
        ]
    if doubled:
        text = "%s: %d rows are of a proposition that has another row; the last of each counts"
        log.warning(text, path, doubled)
    if lost:
        text = "%s: %d parents are no propositions of their prompt; nothing depends on them"
        log.warning(text, path, lost)
    return mended


def _question(row: dict[str, str], where: str) -> Question:
    try:
        parents = dict.fromkeys(int(part) for part in row["dependency"].split(","))
        text = row["question_natural_language"].strip()
        category = row["tuple"].partition("(")[0].strip()
        if not row["item_id"] or not text or not category:
            raise ValueError("an empty field")
        number = int(row["proposition_id"])
        return Question(number, tuple(parent for parent in parents if parent), text, category)
    except (ValueError, AttributeError, TypeError) as error:
        raise BadQuestions(
            f"{where}: found {dict(row)!r:.200}, expected an id, a whole number, numbers of parents (0 for none), a "
            f"tuple and a question ({error}). The official file is at {URL}"
        ) from None


def parents_first(questions: Sequence[Question], where: str = "") -> tuple[Question, ...]:
    """Returns a prompt's questions, each after those that it depends on, which are among them."""
    by_number = {question.number: question for question in questions}
    sorter = TopologicalSorter({question.number: question.parents for question in questions})
    try:
        sorter.prepare()
    except CycleError as error:
        raise BadQuestions(
            f"{where}: propositions {error.args[1]} depend on each other. The official file is at {URL}"
        ) from None
    place = {question.number: i for i, question in enumerate(questions)}
    order: list[int] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=place.__getitem__)
        order += ready
        sorter.done(*ready)
    return tuple(by_number[number] for number in order)


def gated(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """Returns which answers count: yes, and yes to all that the question depends on.

    `questions` have their parents first.
    """
    counts: dict[int, bool] = {}
    for question in questions:
        counts[question.number] = answers[question.number] and all(
            counts[parent] for parent in question.parents
        )
    return counts


def item(
    prompt: str, number: int, questions: Sequence[Question], odds: Mapping[str, Sequence[float]]
) -> Item:
    """Returns a tile's item; `odds` are P(yes), P(no) by proposition, the likelier the answer."""
    answers = {q.number: odds[str(q.number)][0] > odds[str(q.number)][1] for q in questions}
    counts = gated(questions, answers)
    details = [
        {
            "proposition": q.number, "question": q.text, "category": q.category, "parents": list(q.parents),
            "yes": odds[str(q.number)][0], "no": odds[str(q.number)][1], "answer": answers[q.number],
            "gated": counts[q.number],
        }
        for q in questions
    ]  # fmt: skip
    return Item(prompt, number, sum(counts.values()) / len(details), (), {"questions": details})


def ungated(item: Item) -> Item:
    """Returns the same tile's item without gates."""
    answers = [question["answer"] for question in item.found["questions"]]
    return Item(item.prompt, item.number, sum(answers) / len(answers), (), item.found)


def by_category(items: Sequence[Item], field: str) -> dict[str, list[Item]]:
    """Returns for each category, broad ones first, an item a question about a tile.

    `field` is "answer" (as the official script has categories) or "gated".
    """
    categories: dict[str, list[Item]] = {}
    for item in items:
        for question in item.found["questions"]:
            broad = question["category"].partition("-")[0].strip()
            for name in dict.fromkeys((broad, question["category"])):
                part = Item(item.prompt, item.number, float(question[field]))
                categories.setdefault(name, []).append(part)
    return dict(sorted(categories.items(), key=lambda pair: ("-" in pair[0], pair[0])))
