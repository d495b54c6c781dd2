"""GenEval: objects by Mask2Former, colours by CLIP (djghosh13/geneval at af4902f).

What decides is pure: detections and likenesses to colours in, right or wrong out. Both are stored
with the verdict, so that it can be reached again, under other thresholds too, without a model. The
official suppression of boxes that overlap has a limit of 1, which suppresses nothing: there is none
here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from math import hypot
from typing import TYPE_CHECKING, Any

from shards import canonical_json, sha256
from shards.places import model

from ..errors import BadPrompts
from ..fence import publish
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..prompts.prompts import Prompts
from ..scores.aggregate import aggregate
from ..scores.results import NAME, Item, Score
from ..scores.scorer import Scorer, label
from .predictions import cached_predictions

if TYPE_CHECKING:
    from .detector import Box, ColourClassifier, Detector, Segment

Json = dict[str, Any]

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
UNCALIBRATED = "uncalibrated until compared with the official scorer"
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


def _flags(add: argparse.ArgumentParser) -> None:
    """GenEval: objects by Mask2Former, colours by CLIP"""
    add.add_argument(
        "--detector", type=model, default=DETECTOR,
        help="Mask2Former for COCO instances: hub name or folder",
    )  # fmt: skip
    add.add_argument(
        "--clip", type=model, default=CLIP, help="CLIP for colours: hub name or folder"
    )
    add.set_defaults(batch_size=8)  # pictures


@lru_cache(maxsize=1)
def _load_models(detector: str, clip: str, device: str) -> tuple[Detector, ColourClassifier]:
    from .detector import ColourClassifier, Detector

    return Detector(detector, device), ColourClassifier(clip, device, COLOURS)


def _models(args: argparse.Namespace) -> tuple[Detector, ColourClassifier]:
    """Returns the models that the options name, loaded once for several sets."""
    return _load_models(args.detector, args.clip, Rank.here().device(args.device))


def _score(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, Sequence[Item]]]:
    notes = (UNCALIBRATED, *check(images.prompts))
    detector, colours = _models(args)
    records = [prompt.record for prompt in images.prompts.items]
    key = {
        "detector": detector.identity, "colours": colours.identity, "batch_size": args.batch_size,
        "records": sha256(canonical_json(records)),
    }  # fmt: skip

    def predict(pictures: Sequence[PictureRef], pixels: Sequence[Picture]) -> list[Json]:
        predictions: list[Json] = []
        pairs = zip(pictures, pixels, strict=True)
        for _, group in groupby(pairs, lambda pair: pair[1].shape):  # the detector takes one shape
            members, shown_images = zip(*group, strict=True)
            for picture, image, segments in zip(
                members, shown_images, detector(shown_images), strict=True
            ):
                counts = coloured_classes(picture.file.prompt.record or {})
                predictions.append(to_json(_with_colours(image, segments, counts, colours)))
        return predictions

    name = f"geneval-hf-{label(args.detector)}"
    predictions = cached_predictions(images, name, key, args.batch_size, predict, rank=Rank.here())
    if predictions is None:
        return
    items, lines = [], []
    for picture, stored in predictions.pairs:
        record, objects = picture.file.prompt.record or {}, from_json(stored)
        items.append(item(picture.file.prompt.id, picture.number, record, objects))
        lines.append(official(str(picture.path), record, objects))
    made_by = key | {
        "paths": [args.detector, args.clip], "rules": asdict(Rules()), "summary": summary(items),
    }  # fmt: skip
    values = aggregate(items, overall="groups")
    score = predictions.score(name, items, values, made_by, notes=notes, overall="groups")
    path = images.folder / NAME / f"{score.scorer}.results.jsonl"
    publish(path, b"".join(map(canonical_json, lines)))
    yield score, items


def _with_colours(
    picture: Picture, segments: Sequence[Segment], counts: dict[str, int], colours: ColourClassifier
) -> Objects:
    """Returns objects by class, surest first; of the `counts` surest the likeness to colours."""
    objects: Objects = {}
    ordered = sorted(segments, key=lambda segment: -segment.score)
    for kind in sorted({segment.kind for segment in segments}):
        name = CLASSES[kind]
        members = [segment for segment in ordered if segment.kind == kind]
        coloured = members[: counts.get(name, 0)]
        likeness = colours(picture, coloured, name) if coloured else []
        likeness += [()] * (len(members) - len(coloured))
        objects[name] = [
            Detection(s.box, s.score, like) for s, like in zip(members, likeness, strict=True)
        ]
    return objects


def _suits(args: argparse.Namespace, prompts: Prompts) -> None:
    check(prompts)


SCORER = Scorer(_flags, _score, _models, suits=_suits)


# The verdict --------------------------------------------------------------------------------------


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


def judge(record: Json, objects: Objects, rules: Rules = Rules()) -> Verdict:
    """Returns whether a picture shows what its prompt's record asks for."""
    least = rules.counting if record["tag"] == "counting" else rules.score
    objects = kept(objects, least, rules.most)
    groups: list[list[Detection] | None] = []  # of each item of include, where it is matched
    reasons: list[str] = []
    for item in record["include"]:
        candidates = objects.get(item["class"], [])[: item["count"]]
        wrong = _wrong(item, candidates, groups, rules)
        reasons += wrong
        groups.append(None if wrong else candidates)
    for excluded in record.get("exclude", ()):
        count = len(objects.get(excluded["class"], ()))
        if count >= excluded["count"]:
            reasons.append(f"expected {excluded['class']}<{excluded['count']}, found {count}")
    return Verdict(not reasons, tuple(reasons), objects)


def kept(objects: Objects, above: float, most: int) -> Objects:
    """Returns of each class the `most` surest detections that score above a limit, surest first."""
    surest = {
        name: sorted((d for d in detections if d.score > above), key=lambda d: -d.score)[:most]
        for name, detections in objects.items()
    }
    return {name: detections for name, detections in surest.items() if detections}


def _wrong(
    item: Json, candidates: list[Detection], groups: list[list[Detection] | None], rules: Rules
) -> list[str]:
    """Returns what keeps the candidates from being what is wanted."""
    name, count = item["class"], item["count"]
    if len(candidates) < count:
        return [f"expected {name}>={count}, found {len(candidates)}"]
    if "color" in item:
        colours = [candidate.colour for candidate in candidates]
        if colours.count(item["color"]) < count:
            return [f"expected {item['color']} {name}>={count}, found {', '.join(colours)}"]
    if "position" in item:
        expected, index = item["position"]
        target = groups[index]
        if target is None:
            return [f"no target for {name} to be {expected}"]
        for candidate in candidates:
            for object_ in target:
                relations = related(candidate.box, object_.box, rules.gap)
                if expected not in relations:
                    actual = " and ".join(sorted(relations)) or "no relation to"
                    return [f"expected {name} {expected} target, found {actual} target"]
    return []


def related(a: Box, b: Box, gap: float = 0.1) -> set[str]:
    """Returns how `a` lies to `b`: the direction between centres, a share of sizes taken off."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    rest = [max(abs(o) - gap * size, 0.0) for o, size in zip(offset, sizes, strict=True)]
    if max(rest) < 1e-3:
        return set()
    length = hypot(*offset)  # before the share is taken off, as the official scorer has it
    x, y = (r / length * (1 if o > 0 else -1) for r, o in zip(rest, offset, strict=True))
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def coloured_classes(record: Json) -> dict[str, int]:
    """Returns the classes whose colours are asked for, and of how many objects (the surest)."""
    counts: dict[str, int] = {}
    for item in record["include"]:
        if "color" in item:
            counts[item["class"]] = max(item["count"], counts.get(item["class"], 0))
    return counts


# What is stored ------------------------------------------------------------------------------------


def to_json(objects: Objects) -> Json:
    return {
        name: [[*d.box, d.score, *d.likeness] for d in detections]
        for name, detections in objects.items()
    }


def from_json(stored: Json) -> Objects:
    return {
        name: [Detection(tuple(d[:4]), d[4], tuple(d[5:])) for d in detections]
        for name, detections in stored.items()
    }


def item(prompt: str, number: int, record: Json, objects: Objects) -> Item:
    """Returns a picture's item; `judge` of its detections gives its value again."""
    verdict = judge(record, objects)
    details = {"detections": to_json(objects), "reasons": list(verdict.reasons)}
    return Item(prompt, number, float(verdict.correct), (record["tag"],), details)


def official(filename: str, record: Json, objects: Objects) -> Json:
    """Returns the picture's line in the official scorer's results.jsonl."""
    verdict = judge(record, objects)
    details = {
        name: [[*d.box, d.score] for d in detections] for name, detections in verdict.kept.items()
    }
    return {
        "filename": filename, "tag": record["tag"], "prompt": record["prompt"], "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons), "metadata": json.dumps(record), "details": json.dumps(details),
    }  # fmt: skip


def summary(items: Sequence[Item]) -> Json:
    """Returns the official shares of correct pictures, and of prompts with a correct picture."""
    best: dict[str, float] = {}
    for item in items:
        best[item.prompt] = max(item.value, best.get(item.prompt, 0.0))
    return {
        "correct_pictures": sum(item.value for item in items) / len(items),
        "prompts_with_a_correct_picture": sum(best.values()) / len(best),
    }


# The prompts ---------------------------------------------------------------------------------------


def check(prompts: Prompts) -> tuple[str, ...]:
    """Returns what must be said of these prompts; BadPrompts where they are not GenEval's."""
    records = [prompt.record for prompt in prompts.items]
    for prompt in prompts.items:
        if not _is_valid(prompt.record):
            raise BadPrompts(
                f"prompt {prompt.id}: found the record {prompt.record!r:.120}, expected GenEval's (tag, include). "
                "Generate the set with --benchmark geneval and its evaluation_metadata.jsonl"
            )
    notes = []
    if sha256(canonical_json(records)) != OFFICIAL:
        notes.append(f"not the official list of 553 prompts: {len(records)} others")
    tags = {record["tag"] for record in records if record}
    if missing := [tag for tag in TAGS if tag not in tags]:
        notes.append(f"no prompt of {', '.join(missing)}: a mean over the other tags")
    return tuple(notes)


def _is_valid(record: Json | None) -> bool:
    try:
        if record is None or record["tag"] not in TAGS or not record["include"]:
            return False
        for i, item in enumerate(record["include"]):
            relation, target = item.get("position", (RELATIONS[0], -1))
            if relation not in RELATIONS or item.get("color", COLOURS[0]) not in COLOURS:
                return False
            if "position" in item and not 0 <= target < i:
                return False
        objects = [*record["include"], *record.get("exclude", ())]
        return all(item["class"] in CLASSES and item["count"] > 0 for item in objects)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
