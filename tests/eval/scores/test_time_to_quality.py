"""Time to quality: the fits, the crossing, and in simulation that nothing favours either entry and the
interval holds the truth as often as it says.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import exp, log, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import isotonic_regression
from scipy.stats import t

from eval.errors import OtherImages
from eval.scores.seeds import Estimate, Floats
from eval.scores.time_to_quality import (
    Crossing,
    NoFigure,
    crossing,
    isotonic,
    log_ratios,
    outcome_of,
    reach,
    time_to_quality,
)

STEPS = [100, 139, 193, 268, 373, 518, 720, 1000]  # eight, equally spaced over a decade
POSITIONS = np.log(10) * (np.arange(8) / 7 - 1)  # log of the share of the last step
SEEDS = 3
# exponent and floor of scores over steps: a distance that falls by half in a decade, one that falls to
# two thirds, one that comes near its end
SHAPES = [(0.3, 0.0), (0.18, 0.0), (0.5, 0.5)]


def simulated(
    ratio: float, variation: float, shared: float, shape: tuple[float, float], studies: int
) -> Floats:
    """Returns curves (studies, seeds, 2, checkpoints) of a distance times -1: the entry has each value
    of the baseline at 1/ratio of its steps. `shared` is the part of a seed's variance that moves all
    checkpoints of both entries alike.
    """
    generator = np.random.default_rng(18)
    exponent, floor = shape
    means = [
        floor + (1 - floor) * np.exp(-exponent * (POSITIONS + lead)) for lead in (0, log(ratio))
    ]
    own = generator.standard_normal((studies, SEEDS, 2, 8))
    common = generator.standard_normal((studies, SEEDS, 1, 1))
    noise = sqrt(1 - shared) * own + sqrt(shared) * common
    return np.asarray(-np.stack(means) * (1 + variation * noise), np.float64)


def check_simulation(
    ratio: float, variation: float, shared: float, shape: tuple[float, float], studies: int
) -> None:
    """Asserts coverage and mean: of the interval before it is widened to a spacing, but where noise is
    so small that interpolating between checkpoints is most of the error.
    """
    ratios = log_ratios(POSITIONS, simulated(ratio, variation, shared, shape, studies))
    mean, deviation = ratios.mean(-1), ratios.std(-1, ddof=1)
    half = t.isf(0.025, SEEDS - 1) * deviation / sqrt(SEEDS)
    if variation < 0.01:
        half = np.maximum(half, (POSITIONS[1] - POSITIONS[0]) / 2)
    assert (np.abs(mean - log(ratio)) <= half).mean() >= 0.92
    if ratio == 1:
        assert exp(mean.mean()) == pytest.approx(1, abs=0.01)
    else:  # the ends of a curve are noisy, and pull a ratio a little towards 1
        assert 0.85 <= mean.mean() / log(ratio) <= 1.01


@pytest.mark.parametrize(
    ("ratio", "variation", "shared"), [*product((1.0, 1.5), (0.015, 0.05), (0.0, 0.5))]
)
def test_the_interval_holds_the_ratio(ratio: float, variation: float, shared: float) -> None:
    check_simulation(ratio, variation, shared, SHAPES[0], 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("ratio", "variation", "shared"),
    [*product((1 / 1.5, 1.0, 1.2, 1.5, 2.0), (0.005, 0.015, 0.05), (0.0, 0.3, 0.8))],
)
def test_the_interval_holds_the_ratio_for_all_curves(
    ratio: float, variation: float, shared: float, shape: tuple[float, float]
) -> None:
    check_simulation(ratio, variation, shared, shape, 8_000)


@pytest.mark.parametrize(("variation", "bias"), [(0.015, 1.05), (0.05, 1.15)])
def test_first_reach_of_the_final_score_is_biased_and_this_is_not(
    variation: float, bias: float
) -> None:
    curves = simulated(1, variation, 0, SHAPES[1], 4_000)
    final, best = curves[..., 0, -1], np.maximum.accumulate(curves[..., 1, :], -1)
    reached = best[..., -1] >= final
    naive = -reach(POSITIONS, best, final)  # log(1 / share of the last step)
    assert exp(naive[reached].mean()) > bias
    assert exp(log_ratios(POSITIONS, curves).mean()) == pytest.approx(1, abs=0.01)


@given(arrays(np.float64, st.integers(1, 9), elements=st.floats(-100, 100, width=32)))
def test_fits_are_those_of_scipy(values: Floats) -> None:
    assert isotonic(values) == pytest.approx(isotonic_regression(values).x, abs=1e-9)


@given(arrays(np.float64, (3, 2, 6), elements=st.floats(-10, 10, width=32)))
def test_swapped_entries_change_the_sign_alone(curves: Floats) -> None:
    positions = np.arange(6.0)
    assert log_ratios(positions, curves) == pytest.approx(
        -log_ratios(positions, curves[:, ::-1]), abs=1e-9
    )
    assert not log_ratios(positions, np.repeat(curves[:, :1], 2, 1)).any()


def test_a_level_is_reached_between_checkpoints_and_in_the_middle_of_a_plateau() -> None:
    positions = np.array([0.0, 1, 2, 3, 4])
    fit = np.array([0.0, 1, 5, 5, 5])
    assert reach(positions, fit, np.array(0.25)) == pytest.approx(0.25)
    assert reach(positions, fit, np.array(5.0)) == 3  # the mean of 2, 3 and 4
    assert reach(positions, fit, np.array(3.0)) == 2  # half way from 1 to 3
    assert reach(positions, fit, np.array(-1.0)) == 0


def curve(values: Floats | list[float]) -> list[Estimate]:
    return [Estimate(value=float(value)) for value in values]


def rising(lead: float = 0.0) -> list[float]:
    return [log(step) + lead for step in STEPS]


def test_a_ratio_of_exact_curves_is_exact_and_no_finer_than_the_checkpoints() -> None:
    by_seed = {
        seed: crossing(STEPS, curve(rising()), curve(rising(log(1.5))), "higher")
        for seed in range(3)
    }
    actual = time_to_quality(by_seed)
    assert actual.by_seed[0].level == pytest.approx(log(1000))
    assert actual.by_seed[0].baseline == pytest.approx(1000)
    assert actual.by_seed[0].entry == pytest.approx(1000 / 1.5)
    spacing = sqrt(720 / 518)  # around the entry's crossing, the wider of the two
    ratio = actual.ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (1.5, 1.5 / spacing, 1.5 * spacing)
    )
    assert outcome_of(ratio) == "sooner"
    assert actual.times(2).value == pytest.approx(3)
    later = {s: crossing(STEPS, curve(rising(0.7)), curve(rising()), "higher") for s in range(3)}
    assert outcome_of(time_to_quality(later).ratio) == "later"
    small = {s: crossing(STEPS, curve(rising()), curve(rising(0.1)), "higher") for s in range(3)}
    assert outcome_of(time_to_quality(small).ratio) == "not resolved"


def test_lower_is_better_is_the_mirror_image() -> None:
    up = crossing(STEPS, curve(rising()), curve(rising(0.3)), "higher")
    down = crossing(STEPS, curve([-v for v in rising()]), curve([-v for v in rising(0.3)]), "lower")
    assert down.log_ratio.value == pytest.approx(up.log_ratio.value)
    assert down.level == pytest.approx(-up.level)


@pytest.mark.parametrize(
    ("steps", "baseline", "entry", "message"),
    [
        (STEPS[:1], [1.0], [2.0], "two checkpoints at least"),
        (STEPS, rising(), [1.0] * 8, r"the entry does not get better from step 100 to 1,000"),
        (STEPS, rising()[::-1], rising(), "the baseline does not get better"),
        (STEPS, rising(), rising(9.0), "the entry has the level at step 100 already"),
        (STEPS, [*rising()[:7], nan], rising(), "the baseline has a score that is not finite, at step 1,000"),
    ],
)  # fmt: skip
def test_curves_that_say_nothing_of_time(
    steps: list[int], baseline: list[float], entry: list[float], message: str
) -> None:
    with pytest.raises(NoFigure, match=message):
        crossing(steps, curve(baseline), curve(entry), "higher")


@pytest.mark.parametrize(
    ("count", "message"), [(0, "0 training seeds are"), (1, "1 training seed is"), (2, "2 training seeds are")]
)  # fmt: skip
def test_fewer_than_three_seeds_give_no_figure(count: int, message: str) -> None:
    one = crossing(STEPS, curve(rising()), curve(rising(0.5)), "higher")
    with pytest.raises(NoFigure, match=f"{message} too few, 3 are the least"):
        time_to_quality(dict.fromkeys(range(count), one))


# Prompts ------------------------------------------------------------------------------------------


def of_prompts(values: Floats) -> Estimate:
    """Returns the mean over prompts (P,)."""
    names = tuple(map(str, range(len(values))))
    mean = float(values.mean())
    influences = (values - mean) / len(values)
    return Estimate(
        value=mean, prompts=names, influences=influences, strata=(np.arange(len(values)),)
    )


def study_of_prompts(
    generator: np.random.Generator, ratio: float, prompts: int = 60
) -> list[Crossing]:
    """Returns the crossings of three seeds whose scores are means over prompts: how hard a prompt is,
    and which entry it suits, is the same in all seeds and at all checkpoints.
    """
    means = -np.stack([np.exp(-0.3 * (POSITIONS + lead)) for lead in (0, log(ratio))])
    suits = 0.9 * generator.standard_normal((2, 1, prompts))
    crossings = []
    for _ in range(SEEDS):
        own = 0.3 * generator.standard_normal((2, 8, prompts))
        runs = 0.015 * generator.standard_normal((2, 8, 1))
        values = means[..., None] * (1 + suits + own + runs)
        baseline, entry = ([of_prompts(row) for row in side] for side in values)
        crossings.append(crossing(STEPS, baseline, entry, "higher"))
    return crossings


def test_prompts_widen_the_interval_as_far_as_it_must_be() -> None:
    generator = np.random.default_rng(5)
    held = seeds_alone = studies = 0
    for _ in range(300):
        try:
            by_seed = dict(enumerate(study_of_prompts(generator, 1.5)))
        except NoFigure:
            continue
        studies += 1
        actual = time_to_quality(by_seed)
        held += abs(actual.log_mean - log(1.5)) <= actual.log_half
        ratios = np.array([c.log_ratio.value for c in by_seed.values()])
        half = t.isf(0.025, 2) * ratios.std(ddof=1) / sqrt(3)
        seeds_alone += abs(ratios.mean() - log(1.5)) <= half
    assert studies > 250
    assert held >= 0.92 * studies
    assert seeds_alone < 0.8 * studies


def test_influences_are_the_log_ratio_s_change_with_a_prompt_s_weight() -> None:
    generator = np.random.default_rng(1)
    values = np.array([rising(), rising(0.6)])[..., None] + generator.normal(0, 0.02, (2, 8, 50))
    baseline, entry = ([of_prompts(row) for row in side] for side in values)
    actual = crossing(STEPS, baseline, entry, "higher").log_ratio
    weights = np.ones(50)
    weights[7] += 0.5
    weighted = (values * weights).sum(-1) / weights.sum()
    positions = np.log(np.array(STEPS, float))
    change = float(log_ratios(positions, weighted) - log_ratios(positions, values.mean(-1)))
    assert actual.influences[7] * 0.5 == pytest.approx(change, rel=0.1)


def test_scores_of_other_prompts_are_refused() -> None:
    row = of_prompts(np.arange(4.0))
    other = replace(row, prompts=("a", "b", "c", "d"))
    estimates = [replace(row, value=value) for value in rising()]
    with pytest.raises(OtherImages):
        crossing(STEPS, estimates, [*estimates[:7], replace(other, value=7.5)], "higher")


def test_scores_without_prompts_have_an_interval_over_seeds_alone() -> None:
    leads = (0.4, 0.5, 0.9)
    actual = time_to_quality(
        {
            i: crossing(STEPS, curve(rising()), curve(rising(x)), "higher")
            for i, x in enumerate(leads)
        }
    )
    assert actual.prompts is None
    assert actual.log_mean == pytest.approx(0.6)
    assert actual.log_half == pytest.approx(t.isf(0.025, 2) * np.std(leads, ddof=1) / sqrt(3))
