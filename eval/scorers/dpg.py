"""DPG-Bench's questions, and a picture's score from the answers (TencentQQGYLab/ELLA at 3c228f1, dpg_bench).

Pure but for reading the questions. A question counts only if what it depends on was answered with yes: a cat that is
not there is not black. The official script walks the questions in the file's order, so that a question which stands
before its own parent escapes a gate further up; here parents always come first. Its other bugs are not copied either:
it skips the first question, takes categories from the last tile alone, and drops pictures that it cannot read.
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from shards import canonical_json, sha256
from shards.format.atomic import read_file

from ..errors import BadQuestions
from ..prompts.prompts import Prompts
from ..scores.results import Item

URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
PROMPT = "{} Please answer yes or no."  # mPLUG was trained to answer shortly; a model for dialogue is asked to
NAMED = 5  # of many ids, how many an error names


@dataclass(frozen=True, slots=True)
class Question:
    number: int  # the proposition's, within its prompt
    parents: tuple[int, ...]
    text: str
    category: str  # "entity - whole"

    @property
    def broad(self) -> str:
        """ "entity"."""
        return self.category.partition("-")[0].strip()


Questions = dict[str, tuple[Question, ...]]  # by prompt id, parents first


def read_questions(path: Path) -> Questions:
    """The official csv, or one of its columns for questions of one's own; else BadQuestions."""
    rows: dict[str, list[Question]] = {}
    try:
        with io.StringIO(read_file(path).decode("utf-8-sig"), newline="") as file:
            lines = csv.DictReader(file)
            absent = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
            if absent:
                raise BadQuestions(
                    f"{path}: found the columns {', '.join(lines.fieldnames or ()) or 'none'}, expected also "
                    f"{', '.join(absent)}. The official file is at {URL}"
                )
            for row in lines:
                rows.setdefault(row["item_id"], []).append(
                    _question(row, f"{path}:{lines.line_num}")
                )
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected DPG-Bench's questions. `python -m eval prompts fetch dpgbench` brings "
            f"dpg_bench.csv from {URL}; or say where it is with --csv"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadQuestions(
            f"{path}: not CSV in UTF-8 ({error}). Fetch it again from {URL}"
        ) from None
    if not rows:
        raise BadQuestions(f"{path}: holds no question. Fetch it again from {URL}")
    return {name: parents_first(found, f"{path}: {name}") for name, found in rows.items()}


def _question(row: dict[str, str], where: str) -> Question:
    try:
        parents = tuple(int(part) for part in row["dependency"].split(","))
        text, category = (
            row["question_natural_language"].strip(),
            row["tuple"].partition("(")[0].strip(),
        )
        if not row["item_id"] or not text or not category:
            raise ValueError("an empty field")
        return Question(
            int(row["proposition_id"]),
            tuple(dict.fromkeys(p for p in parents if p)),
            text,
            category,
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise BadQuestions(
            f"{where}: found {dict(row)!r:.200}, expected an id, a whole number, numbers of parents (0 for none), a "
            f"tuple and a question ({error}). The official file is at {URL}"
        ) from None


def parents_first(questions: Sequence[Question], where: str = "") -> tuple[Question, ...]:
    """The questions of a prompt, first those without parents, then those about them, and so on."""
    known = {question.number: question for question in questions}
    twice = [number for number, count in Counter(q.number for q in questions).items() if count > 1]
    lost = sorted({p for question in questions for p in question.parents} - known.keys())
    if twice or lost:
        raise BadQuestions(
            f"{where}: " + (f"propositions {twice} stand twice" if twice else f"parents {lost} are no propositions")
            + f". The official file is at {URL}"
        )  # fmt: skip
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
    return tuple(known[number] for number in order)


def absent(questions: Questions, prompts: Prompts, partial: bool) -> int:
    """How many of the prompts that are asked about the set does not have: none, unless a part is enough.

    BadQuestions where there are some, or where a prompt of the set is not asked about.
    """
    ids = {prompt.id for prompt in prompts.items}
    unasked, lost = sorted(ids - questions.keys()), sorted(questions.keys() - ids)
    if unasked:
        raise BadQuestions(
            f"found {len(unasked)} prompts of the set without a question in the csv ({', '.join(unasked[:NAMED])}), "
            "expected the ids of DPG-Bench. Generate the set with --benchmark dpgbench"
        )
    if lost and not partial:
        raise BadQuestions(
            f"found questions to {len(lost)} prompts that the set does not have ({', '.join(lost[:NAMED])}). Generate "
            "the whole benchmark, or score what is there with --partial"
        )
    return len(lost)


def digest(questions: Questions) -> str:
    """Of all that the answers follow from besides pictures and model."""
    asked = {name: [[q.number, q.text] for q in some] for name, some in questions.items()}
    return sha256(canonical_json(asked))


def whole_digest(questions: Questions) -> str:
    """Of all that the score follows from besides pictures and model: parents and categories too."""
    return sha256(
        canonical_json({name: [asdict(q) for q in some] for name, some in questions.items()})
    )


def gated(questions: Sequence[Question], answers: Mapping[int, bool]) -> dict[int, bool]:
    """Answers that count: yes, and yes to all that the question depends on. `questions` with parents first."""
    counts: dict[int, bool] = {}
    for question in questions:
        counts[question.number] = answers[question.number] and all(
            counts[parent] for parent in question.parents
        )
    return counts


def item(
    prompt: str, number: int, questions: Sequence[Question], odds: Mapping[str, Sequence[float]]
) -> Item:
    """A tile's item. `odds` are P(yes), P(no) by proposition; the likelier one is the answer."""
    answers = {q.number: odds[str(q.number)][0] > odds[str(q.number)][1] for q in questions}
    counts = gated(questions, answers)
    asked = [
        {
            "proposition": q.number, "question": q.text, "category": q.category, "parents": list(q.parents),
            "yes": odds[str(q.number)][0], "no": odds[str(q.number)][1], "answer": answers[q.number],
            "gated": counts[q.number],
        }
        for q in questions
    ]  # fmt: skip
    return Item(prompt, number, sum(counts.values()) / len(asked), (), {"questions": asked})


def ungated(one: Item) -> Item:
    """The same tile without gates."""
    asked = one.found["questions"]
    return Item(one.prompt, one.number, sum(q["answer"] for q in asked) / len(asked), (), one.found)


def by_category(items: Sequence[Item], field: str) -> dict[str, list[Item]]:
    """Of each category, broad ones first, an item for each of its questions about each tile.

    `field` is "answer" (as the official script has categories) or "gated".
    """
    made: dict[str, list[Item]] = {}
    for one in items:
        for asked in one.found["questions"]:
            broad = asked["category"].partition("-")[0].strip()
            for name in dict.fromkeys((broad, asked["category"])):
                made.setdefault(name, []).append(Item(one.prompt, one.number, float(asked[field])))
    return dict(sorted(made.items(), key=lambda pair: ("-" in pair[0], pair[0])))
