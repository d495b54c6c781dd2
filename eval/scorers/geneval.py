"""GenEval's verdict on a picture, from the objects that a detector found in it (djghosh13/geneval at af4902f).

Pure: detections and likenesses to colours in, right or wrong out. Both are stored with the verdict, so that it can be
reached again, under other thresholds too, without a model. The official suppression of boxes that overlap has a limit
of 1, which suppresses nothing: there is none here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from shards import canonical_json, sha256

from ..errors import BadPrompts
from ..prompts.prompts import Prompts
from ..scores.results import Item

Json = dict[str, Any]
# x1, y1, x2, y2 in pixels, y downwards; x2 and y2 lie behind the last pixel
Box = tuple[float, float, float, float]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_NAMES = (  # COCO's 80 in their order, three under GenEval's own names: a detector's classes are joined by number
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_NAMES.split(", "))
OFFICIAL = "a4c321f8331d71b73ae1d1291e07868855a417cb5bf97440259a8530d8649522"  # of the 553 records, as canonical JSON


@dataclass(frozen=True, slots=True)
class Rules:
    """The official thresholds."""

    score: float = 0.3  # a detection counts above it
    counting: float = 0.9  # likewise where the tag is "counting"
    most: int = 16  # objects of a class: the surest
    gap: float = 0.1  # of the sum of two objects' sizes, taken off the distance of their centres


@dataclass(frozen=True, slots=True)
class Detection:
    box: Box
    score: float
    likeness: tuple[float, ...] = ()  # cosine to each of COLOURS; empty where nobody asks for it

    @property
    def colour(self) -> str:
        return COLOURS[max(range(len(COLOURS)), key=self.likeness.__getitem__)]


Objects = dict[str, list[Detection]]  # by class


@dataclass(frozen=True, slots=True)
class Verdict:
    correct: bool
    reasons: tuple[str, ...]  # what is wrong
    kept: Objects


def judge(record: Json, found: Objects, rules: Rules = Rules()) -> Verdict:
    """Whether a picture shows what its prompt's record asks for."""
    objects = kept(
        found, rules.counting if record["tag"] == "counting" else rules.score, rules.most
    )
    groups: list[list[Detection] | None] = []  # of each item of include, where it is matched
    reasons: list[str] = []
    for wanted in record["include"]:
        candidates = objects.get(wanted["class"], [])[: wanted["count"]]
        wrong = _wrong(wanted, candidates, groups, rules)
        reasons += wrong
        groups.append(None if wrong else candidates)
    for unwanted in record.get("exclude", ()):
        count = len(objects.get(unwanted["class"], ()))
        if count >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {count}")
    return Verdict(not reasons, tuple(reasons), objects)


def kept(found: Objects, above: float, most: int) -> Objects:
    """Of each class the `most` surest detections that score above the threshold, the surest first."""
    ordered = {name: sorted(all_, key=lambda d: -d.score) for name, all_ in found.items()}
    cut = {name: [d for d in all_ if d.score > above][:most] for name, all_ in ordered.items()}
    return {name: detections for name, detections in cut.items() if detections}


def _wrong(
    wanted: Json, candidates: list[Detection], groups: list[list[Detection] | None], rules: Rules
) -> list[str]:
    """What keeps the candidates from being what is wanted."""
    name, count = wanted["class"], wanted["count"]
    if len(candidates) < count:
        return [f"expected {name}>={count}, found {len(candidates)}"]
    if "color" in wanted:
        colours = [candidate.colour for candidate in candidates]
        if colours.count(wanted["color"]) < count:
            return [f"expected {wanted['color']} {name}>={count}, found {', '.join(colours)}"]
    if "position" in wanted:
        expected, index = wanted["position"]
        target = groups[index]
        if target is None:
            return [f"no target for {name} to be {expected}"]
        for one in candidates:
            for other in target:
                relations = related(one.box, other.box, rules.gap)
                if expected not in relations:
                    seen = " and ".join(sorted(relations)) or "no relation to"
                    return [f"expected {name} {expected} target, found {seen} target"]
    return []


def related(a: Box, b: Box, gap: float = 0.1) -> set[str]:
    """How `a` lies to `b`: by the direction between their centres, after their sizes' share is taken off."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    left = [max(abs(o) - gap * size, 0.0) for o, size in zip(offset, sizes, strict=True)]
    if max(left) < 1e-3:
        return set()
    length = hypot(*offset)  # of what was not shortened
    x, y = (r / length * (1 if o > 0 else -1) for r, o in zip(left, offset, strict=True))
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def looked_at(record: Json) -> dict[str, int]:
    """The classes whose colours are asked for, and of how many objects (the surest)."""
    wanted = [(item["class"], item["count"]) for item in record["include"] if "color" in item]
    return {name: max(count for other, count in wanted if other == name) for name, _ in wanted}


# What is stored ------------------------------------------------------------------------------------


def to_json(found: Objects) -> Json:
    return {
        name: [[*d.box, d.score, *d.likeness] for d in detections]
        for name, detections in found.items()
    }


def from_json(stored: Json) -> Objects:
    return {
        name: [Detection(tuple(d[:4]), d[4], tuple(d[5:])) for d in detections]
        for name, detections in stored.items()
    }


def item(prompt: str, number: int, record: Json, found: Objects) -> Item:
    """A picture's item. `judge` of what it holds gives its value again."""
    verdict = judge(record, found)
    told = {"detections": to_json(found), "reasons": list(verdict.reasons)}
    return Item(prompt, number, float(verdict.correct), (record["tag"],), told)


def official(filename: str, record: Json, found: Objects) -> Json:
    """The picture's line in the official scorer's results.jsonl."""
    verdict = judge(record, found)
    details = {name: [[*d.box, d.score] for d in all_] for name, all_ in verdict.kept.items()}
    return {
        "filename": filename, "tag": record["tag"], "prompt": record["prompt"], "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons), "metadata": json.dumps(record), "details": json.dumps(details),
    }  # fmt: skip


def summary(items: Sequence[Item]) -> Json:
    """The official summary's other two numbers: shares of right pictures, and of prompts with one of them right."""
    best: dict[str, float] = {}
    for one in items:
        best[one.prompt] = max(one.value, best.get(one.prompt, 0.0))
    return {
        "correct_pictures": sum(one.value for one in items) / len(items),
        "prompts_with_a_correct_picture": sum(best.values()) / len(best),
    }


# The prompts ---------------------------------------------------------------------------------------


def check(prompts: Prompts) -> tuple[str, ...]:
    """What must be said of these prompts; BadPrompts where they are none of GenEval's."""
    for prompt in prompts.items:
        _check(prompt.id, prompt.record)
    notes = []
    absent = [
        tag for tag in TAGS if tag not in {p.record["tag"] for p in prompts.items if p.record}
    ]
    if sha256(canonical_json([prompt.record for prompt in prompts.items])) != OFFICIAL:
        notes.append(f"not the official list of 553 prompts: {len(prompts.items)} others")
    if absent:
        notes.append(f"no prompt of {', '.join(absent)}: a mean over the other tags")
    return tuple(notes)


def _check(name: str, record: Json | None) -> None:
    try:
        good = record is not None and record["tag"] in TAGS and _sound(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise BadPrompts(
            f"prompt {name}: found the record {record!r:.120}, expected one of GenEval's (tag, include). Generate the "
            "set with --benchmark geneval and its evaluation_metadata.jsonl"
        )


def _sound(record: Json) -> bool:
    for at, wanted in enumerate(record["include"]):
        relation, target = wanted.get("position", (RELATIONS[0], 0))
        if relation not in RELATIONS or wanted.get("color", COLOURS[0]) not in COLOURS:
            return False
        if "position" in wanted and not 0 <= target < at:
            return False
    asked = [*record["include"], *record.get("exclude", ())]
    return bool(record["include"]) and all(i["class"] in CLASSES and i["count"] > 0 for i in asked)
