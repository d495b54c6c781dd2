"""GenEval's verdict: every branch of the official rules, on detections worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from eval.errors import BadPrompts
from eval.prompts.prompts import Prompt, Prompts
from eval.scorers import geneval
from eval.scorers.detector import Box
from eval.scorers.geneval import CLASSES, COLOURS, Detection, Objects, Rules, judge, kept, related

HERE, RIGHT = (0.0, 0.0, 10.0, 10.0), (100.0, 0.0, 110.0, 10.0)


def at(score: float, box: Box = HERE, colour: str | None = None) -> Detection:
    likeness = tuple(0.9 if name == colour else 0.1 for name in COLOURS) if colour else ()
    return Detection(box, score, likeness)


def record(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "a photo", **more}


def entry(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


CAT, DOG = entry("cat"), entry("dog")
LEFT_OF_CAT = entry("dog", position=["left of", 0])
COUNTING = record("counting", entry("cat", 3), exclude=[entry("cat", 4)])
RED_CAT = entry("cat", color="red")
TWO_COLOURS = record("color_attr", RED_CAT, entry("dog", color="blue"))


@pytest.mark.parametrize(
    ("prompt_record", "actual", "reasons"),
    [
        (record("single_object", CAT), {"cat": [at(0.31)]}, []),
        (record("single_object", CAT), {"cat": [at(0.3)]}, ["expected cat>=1, found 0"]),
        (record("single_object", CAT), {"dog": [at(0.9)]}, ["expected cat>=1, found 0"]),
        (record("single_object", CAT), {}, ["expected cat>=1, found 0"]),
        (record("single_object", CAT), {"cat": [at(0.9)] * 5}, []),  # more than asked for is no fault
        (record("two_object", CAT, DOG), {"cat": [at(0.4)], "dog": [at(0.4)]}, []),
        (record("two_object", CAT, DOG), {"dog": [at(0.4)]}, ["expected cat>=1, found 0"]),
        (
            record("two_object", CAT, DOG),
            {},
            ["expected cat>=1, found 0", "expected dog>=1, found 0"],
        ),
        (COUNTING, {"cat": [at(0.91)] * 3}, []),
        (COUNTING, {"cat": [at(0.91)] * 3 + [at(0.9)]}, []),  # the fourth is at the threshold
        (COUNTING, {"cat": [at(0.91)] * 4}, ["expected cat<4, found 4"]),
        (COUNTING, {"cat": [at(0.91)] * 2 + [at(0.9)]}, ["expected cat>=3, found 2"]),
        (record("colors", RED_CAT), {"cat": [at(0.5, colour="red")]}, []),
        (
            record("colors", RED_CAT),  # only the surest cat is looked at
            {"cat": [at(0.5, colour="red"), at(0.6, colour="blue")]},
            ["expected red cat>=1, found blue"],
        ),
        (
            TWO_COLOURS,
            {"cat": [at(0.5, colour="red")], "dog": [at(0.5, colour="red")]},
            ["expected blue dog>=1, found red"],
        ),
        (TWO_COLOURS, {"cat": [at(0.5, colour="red")], "dog": [at(0.5, colour="blue")]}, []),
        (record("position", CAT, LEFT_OF_CAT), {"cat": [at(0.5, RIGHT)], "dog": [at(0.5)]}, []),
        (
            record("position", CAT, LEFT_OF_CAT),
            {"cat": [at(0.5)], "dog": [at(0.5, RIGHT)]},
            ["expected dog left of target, found right of target"],
        ),
        (
            record("position", CAT, LEFT_OF_CAT),
            {"cat": [at(0.5)], "dog": [at(0.5)]},
            ["expected dog left of target, found no relation to target"],
        ),
        (
            record("position", CAT, LEFT_OF_CAT),
            {"dog": [at(0.5)]},
            ["expected cat>=1, found 0", "no target for dog to be left of"],
        ),
        (
            record("position", CAT, LEFT_OF_CAT),  # not found: nothing more is said of it
            {"cat": [at(0.5, RIGHT)]},
            ["expected dog>=1, found 0"],
        ),
        (
            record("position", RED_CAT, LEFT_OF_CAT),  # a target of the wrong colour is none
            {"cat": [at(0.5, RIGHT, "blue")], "dog": [at(0.5)]},
            ["expected red cat>=1, found blue", "no target for dog to be left of"],
        ),
        (
            record("position", CAT, entry("dog", color="red", position=["left of", 0])),
            {"cat": [at(0.5, RIGHT)], "dog": [at(0.5, HERE, "blue")]},
            ["expected red dog>=1, found blue"],
        ),
        (
            record("position", entry("cat", 2), LEFT_OF_CAT),  # every pair must hold
            {"cat": [at(0.6, RIGHT), at(0.5, (-90.0, 0.0, -80.0, 10.0))], "dog": [at(0.5)]},
            ["expected dog left of target, found right of target"],
        ),
    ],
)  # fmt: skip
def test_verdicts(prompt_record: dict[str, Any], actual: Objects, reasons: list[str]) -> None:
    verdict = judge(prompt_record, actual)
    assert (verdict.correct, list(verdict.reasons)) == (not reasons, reasons)


def test_an_image_has_at_most_sixteen_of_a_class() -> None:
    crowd: Objects = {"cat": [at(0.91 + i / 1000) for i in range(20)]}
    actual = judge(COUNTING, crowd)
    assert actual.reasons == ("expected cat<4, found 16",)
    assert [d.score for d in actual.kept["cat"]] == [0.91 + i / 1000 for i in range(19, 3, -1)]
    sixteen = record("counting", entry("cat", 16), exclude=[entry("cat", 17)])
    assert judge(sixteen, crowd).correct  # the official cut hides the other four


def test_classes_without_a_detection_disappear_and_rules_are_what_they_say() -> None:
    assert kept({"cat": [at(0.2)], "dog": [at(0.8)]}, 0.3, 16) == {"dog": [at(0.8)]}
    strict, single = Rules(score=0.5), record("single_object", CAT)
    assert not judge(single, {"cat": [at(0.5)]}, strict).correct
    assert asdict(Rules()) == {"score": 0.3, "counting": 0.9, "most": 16, "gap": 0.1}


@pytest.mark.parametrize(
    ("a", "b", "relations"),
    [
        (HERE, RIGHT, {"left of"}),
        (RIGHT, HERE, {"right of"}),
        ((100, 100, 110, 110), HERE, {"right of", "below"}),
        (HERE, HERE, set()),
        ((5, 0, 15, 10), HERE, {"right of"}),  # 5 - 2 = 3 of 5 pixels are left: 0.6
        ((4, 0, 14, 10), HERE, set()),  # 4 - 2 = 2 of 4 pixels: 0.5 at most
        ((2, 0, 12, 10), HERE, set()),  # no more than the sizes' share
        ((0, 0, 10, 10), (0, 100, 10, 110), {"above"}),
    ],
)  # fmt: skip
def test_relations(a: Box, b: Box, relations: set[str]) -> None:
    assert related(a, b) == relations


def test_relations_against_the_formula_in_arrays() -> None:
    random = np.random.default_rng(0)
    for corners in random.uniform(0, 100, (200, 2, 2, 2)):
        a, b = (np.sort(corner, axis=0) for corner in corners)
        offset = a.mean(0) - b.mean(0)
        shrunk = np.maximum(np.abs(offset) - 0.1 * (a[1] - a[0] + b[1] - b[0]), 0)
        x, y = np.sign(offset) * shrunk / np.linalg.norm(offset)
        message = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
        expected = {name for name, holds in message.items() if holds and (shrunk >= 1e-3).any()}
        assert related(tuple(a.ravel()), tuple(b.ravel())) == expected


def test_items_hold_what_the_verdict_follows_from() -> None:
    actual: Objects = {"cat": [at(0.5, RIGHT, "blue"), at(0.2)], "dog": [at(0.15)]}
    item = geneval.item("00007", 2, record("colors", RED_CAT), actual)
    assert (item.prompt, item.number, item.value, item.groups) == ("00007", 2, 0.0, ("colors",))
    stored = json.loads(json.dumps(item.found))
    assert geneval.from_json(stored["detections"]) == actual
    assert stored["reasons"] == ["expected red cat>=1, found blue"]


def test_the_official_line() -> None:
    prompt_record = record("colors", RED_CAT)
    actual: Objects = {"cat": [at(0.5, RIGHT, "red"), at(0.2)], "dog": [at(0.15)]}
    line = geneval.official("a/00000.png", prompt_record, actual)
    assert json.loads(line.pop("metadata")) == prompt_record
    assert json.loads(line.pop("details")) == {"cat": [[100.0, 0.0, 110.0, 10.0, 0.5]]}
    assert line == {
        "filename": "a/00000.png", "tag": "colors", "prompt": "a photo", "correct": True, "reason": "",
    }  # fmt: skip


def test_summary_counts_pictures_and_prompts() -> None:
    prompt_record = record("single_object", CAT)
    good: Objects = {"cat": [at(0.5)]}
    items = [geneval.item(name, k, prompt_record, actual) for name, k, actual in (
        ("a", 0, good), ("a", 1, {}), ("b", 0, {}), ("b", 1, {}))]  # fmt: skip
    assert geneval.summary(items) == {
        "correct_pictures": 0.25, "prompts_with_a_correct_picture": 0.5,
    }  # fmt: skip


def test_classes_are_cocos_in_their_order() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "stop sign", "tv", "toothbrush")] == [
        0,
        11,
        62,
        79,
    ]
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")


def prompts(*records: dict[str, Any] | None) -> Prompts:
    return Prompts("geneval", tuple(Prompt(f"{i:05d}", "x", "t", r) for i, r in enumerate(records)))


def test_what_is_said_of_the_prompts() -> None:
    notes = geneval.check(prompts(record("single_object", CAT), COUNTING))
    assert notes == (
        "not the official list of 553 prompts: 2 others",
        "no prompt of two_object, colors, position, color_attr: a mean over the other tags",
    )


@pytest.mark.parametrize(
    "bad",
    [
        None, {}, record("other", CAT), record("colors"), record("colors", entry("unicorn")),
        record("colors", entry("cat", color="beige")), record("position", entry("dog", position=["near", 0])),
        record("position", entry("dog", position=["left of", 0])), record("colors", {"class": "cat"}),
        record("position", CAT, entry("dog", position=["left of", -1])), {"tag": "colors", "include": ["cat"]},
    ],
)  # fmt: skip
def test_records_of_something_else_are_refused(bad: dict[str, Any] | None) -> None:
    with pytest.raises(BadPrompts, match="prompt 00001: found the record"):
        geneval.check(prompts(record("single_object", CAT), bad))
