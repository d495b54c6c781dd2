"""Which of several settings is taken: closed forms, and what choosing and reporting on one half would claim."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from eval.errors import OtherImages
from eval.prompts.prompts import halves
from eval.scores.choose import Edge, choose
from eval.scores.seeds import Estimate

Z = 1.959963984540054  # of a normal distribution: 95 % lie within


def estimate(values: np.ndarray) -> Estimate:
    """The mean of a value a prompt."""
    count = len(values)
    return Estimate(
        value=float(values.mean()), prompts=tuple(f"p{i}" for i in range(count)),
        influences=(values - values.mean()) / count, strata=(np.arange(count),), additive=True,
    )  # fmt: skip


def scales(*values: float) -> list[dict[str, float]]:
    return [{"guidance_scale": value} for value in values]


def test_the_best_is_taken_where_it_is_told_apart() -> None:
    """Differences that are the same in every prompt have no width, whatever prompts do to the scores."""
    prompts = np.random.default_rng(0).normal(0, 5, 40)
    estimates = [estimate(prompts + level) for level in (0.0, 0.5, 0.3)]
    choice = choose(scales(1.5, 2, 3), estimates, "higher")
    assert (choice.best, choice.chosen, choice.tied) == (1, 1, (False, True, False))
    assert [round(d.value, 12) for d in choice.differences] == [-0.5, 0.0, -0.2]
    assert choice.edges == ()
    choice = choose(scales(1.5, 2, 3), estimates, "lower")
    assert (choice.best, choice.chosen) == (0, 0)


def test_the_interval_of_a_tie_is_that_of_the_paired_difference() -> None:
    """Halves of the prompts differ by d and by -d + 2 g: the mean is g, its deviation known by hand."""
    count, d = 100, 1.0
    deviation = np.sqrt(count / (count - 1))  # of +-1 about their mean, with count - 1 below
    limit = Z * deviation / np.sqrt(count)
    base = np.random.default_rng(1).normal(0, 3, count)
    for gap, tied in ((limit * 0.99, True), (limit * 1.01, False)):
        ends = np.where(np.arange(count) % 2, d, -d)
        choice = choose(scales(2, 6), [estimate(base), estimate(base + gap + ends)], "higher")
        assert choice.tied == (tied, True)
        low, high = choice.differences[0].low, choice.differences[0].high
        assert low == pytest.approx(-gap - limit)
        assert high == pytest.approx(-gap + limit)
        assert choice.best == 1
        assert choice.chosen == (0 if tied else 1)


def test_of_ties_the_smallest_guidance_is_taken_and_of_these_the_best() -> None:
    noise = np.random.default_rng(2).normal(0, 1, (5, 30))
    noise -= noise.mean(1, keepdims=True)
    means = [0.00, 0.02, 0.01, 0.03, -9.0]
    settings = [
        {"guidance_scale": 3.0, "shift": 1.0},
        {"guidance_scale": 2.0, "shift": 1.0},
        {"guidance_scale": 2.0, "shift": 3.0},
        {"guidance_scale": 4.0, "shift": 2.0},
        {"guidance_scale": 1.5, "shift": 2.0},
    ]
    estimates = [estimate(row + mean) for row, mean in zip(noise, means, strict=True)]
    choice = choose(settings, estimates, "higher")
    assert (choice.best, choice.chosen) == (3, 1)
    assert choice.tied == (True, True, True, True, False)


def test_an_optimum_at_an_end_is_said() -> None:
    base = np.random.default_rng(3).normal(0, 1, 20)

    def edges(settings: list[dict[str, float]], levels: list[float]) -> tuple[Edge, ...]:
        return choose(settings, [estimate(base + level) for level in levels], "higher").edges

    largest = Edge(name="guidance_scale", value=6.0, end="largest", of="best")
    smallest = Edge(name="guidance_scale", value=1.5, end="smallest", of="best")
    assert edges(scales(1.5, 3, 6), [0, 1, 2]) == (largest,)
    assert edges(scales(1.5, 3, 6), [2, 1, 0]) == (smallest,)
    assert edges(scales(1.5, 3, 6), [0, 2, 1]) == ()
    assert edges(scales(1, 3, 6), [2, 1, 0]) == ()  # without guidance: nothing is smaller
    grid = [{"guidance_scale": g, "shift": s} for g in (1.0, 2.0, 3.0) for s in (1.0, 4.0)]
    assert edges(grid, [0, 0, 1, 2, 0, 0]) == (
        Edge(name="shift", value=4.0, end="largest", of="best"),
    )
    assert edges([{"guidance_scale": 2.0, "shift": s} for s in (1.0, 2.0, 4.0)], [0, 1, 0]) == ()


def test_a_tie_with_the_smallest_guidance_is_said_too() -> None:
    noise = np.random.default_rng(4).normal(0, 1, (3, 30))
    noise -= noise.mean(1, keepdims=True)
    estimates = [estimate(row + mean) for row, mean in zip(noise, (0.0, 0.1, -9), strict=True)]
    choice = choose(scales(1.5, 3, 6), estimates, "higher")
    assert (choice.best, choice.chosen) == (1, 0)
    assert choice.edges == (Edge(name="guidance_scale", value=1.5, end="smallest", of="chosen"),)
    assert choose(scales(0.5, 3, 6), estimates, "higher").edges == ()


def test_without_prompts_only_an_equal_score_is_tied() -> None:
    estimates = [Estimate(value=value) for value in (1.0, 2.0, 2.0)]
    choice = choose(scales(4, 3, 2), estimates, "higher")
    assert (choice.best, choice.chosen, choice.tied) == (1, 2, (False, True, True))
    assert choice.differences[0].low is None


def test_other_prompts_are_refused() -> None:
    a, b = estimate(np.arange(4.0)), estimate(np.arange(5.0))
    with pytest.raises(OtherImages):
        choose(scales(1, 2), [a, b], "higher")


def test_reporting_on_the_half_that_chose_is_optimistic_and_the_other_half_is_not() -> None:
    """Ten settings of the same true score 0, whose prompts vary each for itself: the one that looks best on a
    half is above 0 there by luck, and nowhere else.
    """
    chance, trials, half = np.random.default_rng(5), 400, 50
    same, other = [], []
    for _ in range(trials):
        values = chance.normal(0, 1, (10, 2 * half))
        choice = choose(scales(*range(2, 12)), [estimate(v[:half]) for v in values], "higher")
        same.append(values[choice.best, :half].mean())
        other.append(values[choice.best, half:].mean())
    error = 1 / np.sqrt(half * trials)  # of a mean of so many prompts
    # the expected maximum of ten normal numbers is 1.539 of their deviation
    assert np.mean(same) == pytest.approx(1.539 / np.sqrt(half), abs=5 * error)
    assert abs(np.mean(other)) < 4 * error


def test_halves_follow_from_the_ids_alone() -> None:
    prompts = [(f"{i:05d}", None) for i in range(101)]
    a, b = halves(prompts)
    assert len(a) == len(b) == 50
    assert not set(a) & set(b)
    assert halves(prompts[::-1]) == (a, b)
    ranked = sorted(
        (name for name, _ in prompts), key=lambda x: hashlib.sha256(x.encode()).hexdigest()
    )
    assert (a, b) == (ranked[0:100:2], ranked[1:100:2])


def test_each_group_is_halved() -> None:
    prompts = [(f"{i:03d}", "xyz"[i % 3]) for i in range(36)]
    group = dict(prompts)
    for half in halves(prompts):
        assert sorted(group[name] for name in half) == ["x"] * 6 + ["y"] * 6 + ["z"] * 6
