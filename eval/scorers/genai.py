"""GenAI-Bench's skills, and VQAScore (linzhiqiu/t2v_metrics at 6ecb74f, genai_bench).

Pure but for reading the skills.
A picture scores the probability that a model answers "Yes" to whether it shows its prompt, not divided by that of "No".
Skills name prompts by whole numbers. They are joined to ids by that number, and not by a picture's place in the order:
one list of the benchmark counts from 0, another from 1.
"""

from pathlib import Path
from typing import Any

from shards.format.atomic import read_json

from ..errors import BadQuestions
from ..prompts.prompts import Prompts
from ..scores.results import Item

URL = "https://huggingface.co/datasets/BaiqiL/GenAI-Bench-1600/resolve/main/genai_skills.json"
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'  # of t2v_metrics 3.1
NAMED = 5  # of many numbers, how many an error names

Skills = dict[str, tuple[str, ...]]  # prompt id -> its skills; prompts without one are not in it


def read_skills(path: Path, prompts: Prompts, partial: bool = False) -> tuple[Skills, int]:
    """The official genai_skills.json {skill: [numbers]} over the set's prompts, and how many of its prompts the set
    does not have: none, unless a part is enough. BadQuestions where there are some."""
    names = _numbered(prompts)
    lost: set[int] = set()
    found: dict[str, list[str]] = {}
    for skill, numbers in read(path).items():
        lost |= set(numbers) - names.keys()
        for number in dict.fromkeys(n for n in numbers if n in names):
            found.setdefault(names[number], []).append(skill)
    if not found or (lost and not partial):
        few = ", ".join(map(str, sorted(lost)[:NAMED]))
        raise BadQuestions(
            f"{path}: it has {len(lost)} prompts that the set does not have ({few}). Take skills and prompts of one "
            "edition (1,600 prompts counted from 0, or 527 counted from 1), or score what is there with --partial"
        )
    return {name: tuple(skills) for name, skills in found.items()}, len(lost)


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
    """{skill: [numbers]}, or BadQuestions."""
    try:
        found: Any = read_json(path)
        if found and all(numbers for numbers in found.values()):
            return {skill: [int(number) for number in numbers] for skill, numbers in found.items()}
    except FileNotFoundError:
        raise BadQuestions(
            f"{path}: no such file, expected GenAI-Bench's skills. `python -m eval prompts fetch genaibench` brings "
            f"genai_skills.json from {URL}; or say where it is with --skills"
        ) from None
    except (ValueError, TypeError, AttributeError):
        pass
    raise BadQuestions(
        f"{path}: not genai_skills.json, {{skill: [numbers of prompts]}}. It is at {URL}"
    )


def check(skills: Skills, prompts: Prompts) -> tuple[str, ...]:
    """What must be said: the value is over the prompts that have a skill."""
    without = len(prompts.items) - len(skills)
    return (
        (f"{without} of {len(prompts.items)} prompts have no skill and do not count",)
        if without
        else ()
    )


def item(prompt: str, number: int, skills: tuple[str, ...], yes: float, no: float) -> Item:
    """A picture's item; P("No") is kept beside P("Yes") and changes nothing."""
    return Item(prompt, number, yes, skills, {"yes": yes, "no": no})
