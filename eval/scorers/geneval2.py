"""GenEval 2's Soft-TIFA: how probable right answers to a prompt's questions are (facebookresearch/GenEval2, a6e82d2).

Pure but for reading the questions. Their file, geneval2_data.jsonl, is under CC BY-NC 4.0: it is fetched by hand, and
pictures are joined to it by the text of their prompts, as the official scorer does.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from shards import canonical_json, sha256
from shards.format.atomic import parse_json, read_file

from ..errors import BadQuestions
from ..prompts.prompts import Prompts
from ..scores.results import Item

URL = "https://github.com/facebookresearch/GenEval2"
PROMPT = "{} Answer in one word."
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven")
NAMED = 3  # of many prompts, how many an error names


@dataclass(frozen=True, slots=True)
class PromptQuestions:
    """What is asked about a prompt's picture."""

    questions: tuple[tuple[str, str], ...]  # with their answers: Yes, or a number's word
    skills: tuple[str, ...]  # of each question
    atoms: int


def read_questions(path: Path) -> dict[str, PromptQuestions]:
    """The official lines, by the prompts' texts; else BadQuestions."""
    found: dict[str, PromptQuestions] = {}
    try:
        lines = read_file(path).decode().split("\n")
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected GenEval 2's geneval2_data.jsonl. It is at {URL} (CC BY-NC 4.0); say where "
            "it lies with --questions"
        ) from None
    except UnicodeDecodeError as error:
        raise BadQuestions(f"{path}: not UTF-8 ({error}). The file is at {URL}") from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            prompt, asked = _asked(parse_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise BadQuestions(
                f"{path}:{number}: found {line!r:.100}, expected a prompt, its vqa_list, skills and atom_count "
                f"({error}). The file is at {URL}"
            ) from None
        if prompt in found:
            raise BadQuestions(f"{path}:{number}: the prompt {prompt!r:.80} stands twice")
        found[prompt] = asked
    if not found:
        raise BadQuestions(f"{path}: holds no question. The file is at {URL}")
    return found


def _asked(record: Any) -> tuple[str, PromptQuestions]:
    pairs = tuple((str(question), str(answer)) for question, answer in record["vqa_list"])
    strange = [answer for _, answer in pairs if answer not in ("Yes", *NUMBERS)]
    if strange or not pairs or len(pairs) != len(record["skills"]):
        raise ValueError(f"answers {strange}" if strange else "a skill for each question")
    return str(record["prompt"]), PromptQuestions(
        pairs, tuple(record["skills"]), int(record["atom_count"])
    )


def absent(questions: dict[str, PromptQuestions], prompts: Prompts, partial: bool) -> int:
    """How many prompts that are asked about the set does not have: none, unless a part is enough."""
    texts = {prompt.text for prompt in prompts.items}
    unasked, lost = sorted(texts - questions.keys()), sorted(questions.keys() - texts)
    if unasked or (lost and not partial):
        what = "prompts of the set are not asked about" if unasked else "prompts are not in the set"
        few = ", ".join(map(repr, (unasked or lost)[:NAMED]))
        raise BadQuestions(
            f"{len(unasked or lost)} {what} ({few}). Generate pictures of GenEval 2's prompts, all of them"
            + ("" if unasked else "; or score what is there with --partial")
        )
    return len(lost)


def digest(questions: dict[str, PromptQuestions]) -> str:
    """Of all that the probabilities follow from besides pictures and model."""
    return sha256(canonical_json({prompt: asked.questions for prompt, asked in questions.items()}))


def whole_digest(questions: dict[str, PromptQuestions]) -> str:
    """Of all that the scores follow from besides pictures and model: skills and atoms too."""
    return sha256(canonical_json({prompt: asdict(asked) for prompt, asked in questions.items()}))


def spellings(answer: str) -> tuple[str, ...]:
    """How a model may begin an answer that is right."""
    if answer == "Yes":
        return ("Yes", "yes", " Yes", " yes")
    digit = str(NUMBERS.index(answer) + 1)
    return (answer, answer.capitalize(), f" {answer}", digit, f" {digit}")


def geometric(values: Sequence[float]) -> float:
    """Geometric mean; 0 where one is 0."""
    return exp(sum(map(log, values)) / len(values)) if all(values) else 0.0


def items(
    prompt: str, number: int, asked: PromptQuestions, odds: Sequence[float]
) -> tuple[Item, Item]:
    """A picture's items under the arithmetic mean and under the geometric one."""
    told = {
        "questions": [
            {"question": question, "answer": answer, "skill": skill, "probability": p}
            for (question, answer), skill, p in zip(
                asked.questions, asked.skills, odds, strict=True
            )
        ]
    }
    groups = (f"{asked.atoms} atoms",)
    return (
        Item(prompt, number, sum(odds) / len(odds), groups, told),
        Item(prompt, number, geometric(odds), groups, told),
    )


def by_skill(some: Sequence[Item]) -> dict[str, list[Item]]:
    """Of each skill an item for each of its questions."""
    made: dict[str, list[Item]] = {}
    for one in some:
        for asked in one.found["questions"]:
            made.setdefault(asked["skill"], []).append(
                Item(one.prompt, one.number, asked["probability"])
            )
    return dict(sorted(made.items()))
