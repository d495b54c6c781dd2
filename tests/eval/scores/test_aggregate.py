"""Scores from items: hand-worked means, and intervals against their closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.errors import OtherImages
from eval.prompts.prompts import Prompt, Prompts
from eval.report.report import report
from eval.score import line
from eval.scores.aggregate import (
    Sums,
    aggregate,
    difference,
    difference_and_share,
    difference_estimates,
    estimates,
    pooled,
)
from eval.scores.results import Item
from eval.scores.seeds import over_seeds
from tests.eval.sets import make_items, make_score, make_set


def items(values: dict[str, list[float]], groups: dict[str, tuple[str, ...]]) -> list[Item]:
    return [
        Item(prompt, k, value, groups.get(prompt, ()))
        for prompt, actual in values.items()
        for k, value in enumerate(actual)
    ]


VALUES = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}


def test_mean_of_prompts_and_mean_of_groups() -> None:
    groups = {"a": ("x",), "b": ("x",), "c": ("y",)}
    value, each = aggregate(items(VALUES, groups))
    assert value.value == pytest.approx(0.5)
    assert (each["x"].value, each["y"].value) == (0.75, 0.0)
    assert (value.count, each["x"].count, each["y"].count) == (3, 2, 1)
    value, _ = aggregate(items(VALUES, groups), overall="groups", unit=100)
    assert value.value == pytest.approx(37.5)


def test_a_prompt_in_two_groups_counts_once_in_the_whole() -> None:
    groups = {"a": ("counting", "advanced"), "b": ("basic",), "c": ("advanced",)}
    value, each = aggregate(items(VALUES, groups))
    assert value.value == pytest.approx(0.5)
    assert each["advanced"].value == pytest.approx(0.25)
    assert len(Sums.of(items(VALUES, groups)).strata()) == 1


def test_interval_is_that_of_a_mean_of_prompts() -> None:
    """The pictures of a prompt agree, so the standard error is that of prompts, not of pictures."""
    random = np.random.default_rng(3)
    drawn = random.normal(0, 1, 400)
    value, _ = aggregate(items({str(i): [float(x)] * 4 for i, x in enumerate(drawn)}, {}))
    error = drawn.std() / 20
    assert value.low is not None
    assert value.high is not None
    assert value.high - value.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_within_groups_the_differences_between_them_do_not_widen_the_interval() -> None:
    values = {str(i): [float(i % 2)] for i in range(100)}
    groups = {str(i): ("even" if i % 2 == 0 else "odd",) for i in range(100)}
    value, _ = aggregate(items(values, groups))
    assert (value.low, value.value, value.high) == (0.5, 0.5, 0.5)
    value, _ = aggregate(items(values, {}))
    assert value.low is not None
    assert value.low < 0.45


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    random = np.random.default_rng(4)
    hard = {str(i): float(x) for i, x in enumerate(random.normal(0, 1, 300))}
    a = items({name: [x] for name, x in hard.items()}, {})
    b = items({name: [x + 0.05] for name, x in reversed(hard.items())}, {})
    actual, _ = difference(a, b)
    assert (actual.low, actual.high) == (pytest.approx(0.05), pytest.approx(0.05))
    first, second = aggregate(a)[0], aggregate(b)[0]
    assert first.high is not None
    assert second.low is not None
    assert first.high > second.low


def test_other_prompts_are_not_compared() -> None:
    with pytest.raises(OtherImages, match="not the same ones"):
        difference(items({"a": [1.0]}, {}), items({"b": [1.0]}, {}))


def test_parts_that_cut_through_prompts_are_pooled_under_the_same_resamples() -> None:
    """Each part is what `aggregate` gives it alone, where it is about all prompts."""
    random = np.random.default_rng(5)
    parts = {
        name: items({str(i): list(random.normal(0, 1, 1 + i % 3)) for i in range(40)}, {})
        for name in ("colour", "count")
    }
    actual = pooled(parts, unit=100)
    for name, some in parts.items():
        alone, _ = aggregate(some, unit=100)
        for end in ("value", "low", "high", "count"):
            assert getattr(actual[name], end) == pytest.approx(getattr(alone, end))
    few = pooled({"all": parts["colour"], "two": items({"0": [1.0], "1": [0.0, 0.0]}, {})})
    assert few["two"].value == pytest.approx(1 / 3)
    assert (few["two"].count, few["two"].low, few["two"].high) == (2, 0.0, 1.0)


def test_one_prompt_alone_has_no_interval() -> None:
    """Of the whole none where a stratum has one prompt, of a group or part none where it has one."""
    alone, _ = aggregate(items({"a": [1.0, 0.0]}, {}))
    assert (alone.value, alone.low, alone.high, alone.count) == (0.5, None, None, 1)
    groups = {"a": ("x",), "b": ("x",), "c": ("y",)}
    value, each = aggregate(items(VALUES, groups))
    assert (value.low, value.high, each["y"].low, each["y"].high) == (None,) * 4
    assert each["x"].low is not None
    value, each = aggregate(items(VALUES, groups | {"b": ("x", "y", "z")}))  # one stratum of three
    assert value.low is not None
    assert (each["y"].low is None, each["z"].low is None) == (False, True)
    actual = pooled({"all": items(VALUES, {}), "one": items({"b": [1.0, 0.0]}, {})})
    assert actual["all"].low is not None
    assert (actual["one"].low, actual["one"].high, actual["one"].value) == (None, None, 0.5)
    a, b = items({"a": [0.0]}, {}), items({"a": [1.0]}, {})
    found_, _, share = difference_and_share(a, b)
    assert (found_.value, found_.low, found_.high, share) == (1.0, None, None, None)


def test_groups_are_paired_by_name() -> None:
    """Of items in another order, and of sets of which one has more groups or other prompts in one."""
    groups = {"a": ("x",), "b": ("x",), "c": ("y",), "d": ("y",)}
    values = {"a": [1.0], "b": [2.0], "c": [3.0], "d": [5.0]}
    more = {"a": [1.0], "b": [2.0], "c": [13.0], "d": [15.0]}
    a, b = items(values, groups), items(more, groups)[::-1]
    for overall in ("prompts", "groups"):
        value, each = difference(a, b, overall)
        assert value.value == pytest.approx(5)
        assert {name: actual.value for name, actual in each.items()} == {"x": 0.0, "y": 10.0}
        assert [actual.count for actual in (value, *each.values())] == [4, 2, 2]
    wider = items(more, {name: (*kept, "z") for name, kept in groups.items()})[::-1]
    moved = items(more, groups | {"b": ("y",)})
    assert set(difference(a, wider)[1]) == {"x", "y"}
    assert difference(a, moved)[1] == {}
    assert difference(a, wider)[0] == difference(a, b)[0]  # drawn within the first's groups
    for other in (wider, moved):
        with pytest.raises(OtherImages, match="the groups x, y and"):
            difference(a, other, "groups")


def test_sets_of_one_prompt_are_shown_without_a_verdict(tmp_path: Path) -> None:
    prompts = Prompts("bench", (Prompt("0", "a cat", "x"),))
    folders = [make_set(tmp_path / name, prompts=prompts) for name in ("a", "b")]
    for folder, value in zip(folders, (0.25, 0.75), strict=True):
        score = make_score(folder, "judge", make_items([value], prompts))
        assert line(folder, score) == f"{folder}: judge {value}"
    (section,) = report(folders, tmp_path / "r.html")["sections"]
    (actual,) = section["comparisons"][0]["differences"]
    assert (actual["value"]["value"], actual["groups"]["x"]["low"]) == (0.5, None)
    assert (actual["resolved"], actual["favours"], actual["share"]) == (None, None, None)
    assert "no interval" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("overall", ["prompts", "groups"])
def test_an_influence_is_how_a_prompts_weight_moves_the_score(overall: str) -> None:
    """By a finite difference of weighted means, of prompts with one to three pictures, in groups of three and two."""
    random = np.random.default_rng(2)
    groups = {"a": ("x",), "b": ("x",), "c": ("x",), "d": ("y",), "e": ("y",)}
    values = {name: random.normal(size=1 + i % 3).tolist() for i, name in enumerate(groups)}

    def score(weights: dict[str, float]) -> float:
        parts = [list(groups)] if overall == "prompts" else [["a", "b", "c"], ["d", "e"]]
        return 100 * float(np.mean([
            sum(weights[p] * sum(values[p]) for p in part) / sum(weights[p] * len(values[p]) for p in part)
            for part in parts
        ]))  # fmt: skip

    whole, each = estimates(items(values, groups), overall, unit=100)
    even = dict.fromkeys(groups, 1.0)
    assert whole.value == pytest.approx(score(even))
    steps = [(score(even | {name: 1 + 1e-6}) - score(even)) / 1e-6 for name in groups]
    assert whole.influences == pytest.approx(steps, rel=1e-4, abs=1e-4)
    assert [stratum.tolist() for stratum in whole.strata] == [[0, 1, 2], [3, 4]]
    assert each["y"].prompts == ("d", "e")
    assert sum(each["y"].influences) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("overall", ["prompts", "groups"])
def test_influences_and_resamples_give_the_same_interval(overall: str) -> None:
    """Of a difference over 150 prompts in groups of 100 and 50, each with two pictures."""
    random = np.random.default_rng(5)
    groups = {f"{i}": ("x" if i < 100 else "y",) for i in range(150)}
    a, b = (
        items({name: random.normal(shift, 1, 2).tolist() for name in groups}, groups)
        for shift in (0, 0.3)
    )
    resampled, by_group = difference(a, b, overall)
    whole, each = difference_estimates(a, b, overall)
    for actual, expected in [
        (over_seeds([whole])[0], resampled),
        *((over_seeds([each[name]])[0], by_group[name]) for name in each),
    ]:
        assert actual.value == pytest.approx(expected.value)
        assert actual.count == expected.count
        assert None not in (actual.low, actual.high, expected.low, expected.high)
        assert actual.high - actual.low == pytest.approx(expected.high - expected.low, rel=0.05)
