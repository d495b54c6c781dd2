"""Settings that are chosen for each entry, in simulation: what a study says that chooses on one half of the prompts and
reports the other, beside one of a single setting, and one that reports the half that it chose on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.prompts.prompts import halves
from eval.scores.choose import best_mean, edge_of
from eval.scores.results import Value
from eval.scores.seeds import Estimate, over_seeds

SCALES = (1.5, 2.0, 3.0, 4.5, 6.0, 9.0)
SEEDS, PROMPTS = 3, 80
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Model:
    """An entry whose score is best at a guidance scale, and falls with the squared log distance from it."""

    best: float
    scale: float
    curvature: float = 0.2

    def truth(self, scale: float) -> float:
        return self.best - self.curvature * (log(scale) - log(self.scale)) ** 2


def draw(
    random: np.random.Generator, model: Model, prompts: Floats, scatter: float = 0.02
) -> Floats:
    """Returns scores (settings, seeds, prompts): the truth, what prompts add for every entry, what a seed adds,
    and what a setting does to a prompt, alike in all seeds, and noise.
    """
    truth = np.array([model.truth(scale) for scale in SCALES])
    shape = len(SCALES), SEEDS, PROMPTS
    return (
        truth[:, None, None] + prompts
        + scatter * random.normal(size=(1, SEEDS, 1))
        + 0.3 * random.normal(size=(len(SCALES), 1, PROMPTS))
        + 0.3 * random.normal(size=shape)
    )  # fmt: skip


def estimates(scores: Floats, ids: Floats) -> list[Estimate]:
    """Returns the score of each seed over some prompts; scores (seeds, prompts)."""
    part = scores[:, ids]
    return [
        Estimate(
            value=float(values.mean()), prompts=tuple(map(str, ids)),
            influences=(values - values.mean()) / len(ids), strata=(np.arange(len(ids)),), additive=True,
        )
        for values in part
    ]  # fmt: skip


def chosen(scores: Floats, ids: Floats) -> int:
    return best_mean(scores[:, :, ids].mean(2).tolist(), "higher")


def difference(a: Floats, b: Floats, ids: Floats) -> Value:
    """Returns b minus a over seeds and prompts; scores (seeds, prompts)."""
    pairs = zip(estimates(a, ids), estimates(b, ids), strict=True)
    return over_seeds([after - before for before, after in pairs])[0]


def both_halves() -> tuple[Floats, Floats]:
    a, b = halves([(str(number), None) for number in range(PROMPTS)])
    return np.array(sorted(map(int, a))), np.array(sorted(map(int, b)))


def test_the_order_turns_with_the_scale_and_a_settled_study_says_so() -> None:
    """At 1.5 the first entry is better by 0.5, each at its own best scale the second by 0.3."""
    early, late = Model(1.0, 1.5), Model(1.3, 9.0)
    assert late.truth(1.5) - early.truth(1.5) == pytest.approx(-0.34, abs=0.01)
    half_a, half_b = both_halves()
    everything = np.arange(PROMPTS)
    at_one_scale, settled = [], []
    for study in range(60):
        random = np.random.default_rng(study)
        prompts = random.normal(size=PROMPTS)
        a, b = (draw(random, model, prompts) for model in (early, late))
        at_one_scale.append(difference(a[0], b[0], everything))
        settled.append(difference(a[chosen(a, half_a)], b[chosen(b, half_a)], half_b))
    assert np.mean([value.high < 0 for value in at_one_scale]) > 0.6  # type: ignore[operator]
    assert np.mean([value.low > 0 for value in settled]) > 0.6  # type: ignore[operator]
    assert not any(value.low > 0 for value in at_one_scale)  # type: ignore[operator]
    assert not any(value.high < 0 for value in settled)  # type: ignore[operator]


def test_reporting_the_half_that_was_chosen_on_is_optimistic_and_the_other_half_is_not() -> None:
    """Six equal settings: the best of them is the best by luck. Of 400 studies the mean error of half A is many
    standard errors above 0, that of half B within three; the interval of half B holds the truth as often as it says.
    """
    flat = Model(1.0, 3.0, curvature=0.0)
    half_a, half_b = both_halves()
    errors_a, errors_b, covered_a, covered_b = [], [], [], []
    for study in range(400):
        random = np.random.default_rng(study)
        prompts = 0.2 * random.normal(size=PROMPTS)
        scores = draw(random, flat, prompts, scatter=0.002)
        best = scores[chosen(scores, half_a)]
        for ids, errors, covered in (
            (half_a, errors_a, covered_a),
            (half_b, errors_b, covered_b),
        ):
            value = over_seeds(estimates(best, ids))[0]
            errors.append(value.value - 1.0)
            assert value.low is not None
            assert value.high is not None
            covered.append(value.low <= 1.0 <= value.high)
    standard_error = np.std(errors_b) / np.sqrt(len(errors_b))
    assert np.mean(errors_a) > 10 * standard_error
    assert abs(np.mean(errors_b)) < 3 * standard_error
    assert np.mean(covered_b) >= 0.93
    assert np.mean(covered_a) < np.mean(covered_b)


@pytest.mark.parametrize(
    ("name", "values", "index", "edge"),
    [
        ("guidance_scale", (1.5, 3, 6), 0, "smallest"),
        ("guidance_scale", (1.0, 3, 6), 0, None),  # there is nothing below no guidance
        ("guidance_scale", (0.0, 3, 6), 0, None),
        ("guidance_scale", (1.5, 3, 6), 1, None),
        ("guidance_scale", (1.5, 3, 6), 2, "largest"),
        ("ema", (0.05, 0.1), 0, "smallest"),
        ("ema", (0.05, 0.1), 1, "largest"),
        ("lr", (1e-4, 1e-3, 1e-2), 1, None),
    ],
)
def test_a_best_value_at_an_end_is_an_edge(
    name: str, values: tuple[float, ...], index: int, edge: str | None
) -> None:
    assert edge_of(name, values, index) == edge


def test_the_best_mean_is_over_seeds_and_of_equal_ones_the_first() -> None:
    values = [[0.9, 0.1], [0.6, 0.6], [0.5, 0.7]]
    assert best_mean(values, "higher") == 1
    assert best_mean(values, "lower") == 0
