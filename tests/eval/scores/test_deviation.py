"""How far seeds move a score, and how many resolve a gap: against scipy's tests and the published table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2, nct, t

from eval.scores.deviation import (
    Deviation,
    pooled_deviation,
    power,
    published_deviation,
    range_to_resolve,
    seeds_to_resolve,
)
from eval.scores.results import Score, Value


def test_variances_are_pooled_by_their_degrees_of_freedom() -> None:
    """The demo's Frechet distances of two VAEs and three seeds, and one entry of a single seed."""
    entries = [[2.41, 2.68, 2.58], [4.02, 4.66, 4.27], [9.0]]
    actual = pooled_deviation(entries)
    assert actual is not None
    variance = (2 * np.var(entries[0], ddof=1) + 2 * np.var(entries[1], ddof=1)) / 4
    assert (actual.value, actual.freedom) == (pytest.approx(variance**0.5), 4)
    # chi-squared of 4 degrees: 1.0636 and 7.7794 leave 10 % on either side
    assert actual.low == pytest.approx((4 * variance / 7.779440) ** 0.5)
    assert actual.high == pytest.approx((4 * variance / 1.063623) ** 0.5)
    assert actual.relative == pytest.approx(variance**0.5 / np.mean(entries[0] + entries[1]))
    assert pooled_deviation([[1.0], []]) is None
    same = pooled_deviation([[1.0, 1.0, 1.0]])
    assert same == Deviation(value=0.0, low=0.0, high=0.0, freedom=2, mean=1.0)


def test_the_interval_of_a_deviation_holds_it_in_four_of_five() -> None:
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        actual = pooled_deviation(chance.normal(5, 2, (2, 3)).tolist())
        assert actual is not None
        held += actual.low <= 2 <= actual.high
    assert held / 2000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("gap", "seeds"), [(0.5, 3), (2.0, 3), (2.0, 5), (1.0, 12), (0.2, 200)])
def test_power_is_that_of_students_test(gap: float, seeds: int, paired: bool) -> None:
    sides = 1 if paired else 2
    freedom, centre = sides * (seeds - 1), gap / (sides / seeds) ** 0.5
    quantile = t.ppf(0.975, freedom)
    expected = nct.sf(quantile, freedom, centre) + nct.cdf(-quantile, freedom, centre)
    assert power(gap, 1.0, seeds, paired=paired) == pytest.approx(expected, abs=1e-4)


def test_power_with_prompts_is_the_share_of_simulated_studies() -> None:
    chance = np.random.default_rng(0)
    gap, deviation, seeds, prompts = 1.5, 0.8, 4, 0.1
    spread = (deviation**2 / seeds + prompts) ** 0.5
    of_seeds = deviation**2 / seeds * chi2.rvs(seeds - 1, size=20_000, random_state=chance) / 3
    half = np.sqrt(t.ppf(0.975, 3) ** 2 * of_seeds + 1.96**2 * prompts)
    share = np.mean(np.abs(chance.normal(gap, spread, 20_000)) > half)
    assert power(gap, deviation, seeds, prompts) == pytest.approx(share, abs=0.012)


def test_seeds_that_resolve_a_gap() -> None:
    """Not paired, at a coefficient of variation of 1.26 %: gaps of 5, 3, 2 and 1 % take 3, 4, 8 and 26 a side."""
    assert [seeds_to_resolve(gap, 1.26, paired=False) for gap in (5, 3, 2, 1)] == [3, 4, 8, 26]
    for seeds, fewer in ((8, 7), (26, 25)):
        gap = 16 / seeds if seeds == 8 else 1
        assert power(gap, 1.26, seeds, paired=False) >= 0.8 > power(gap, 1.26, fewer, paired=False)
    assert seeds_to_resolve(-5, 1.26) == seeds_to_resolve(5, 1.26) == 3
    assert seeds_to_resolve(1, 0.0) == 3
    assert seeds_to_resolve(0, 1.0) is None
    assert seeds_to_resolve(0.01, 1.0) is None
    assert seeds_to_resolve(1, 0.01, prompts=0.2) is None  # the prompts alone hide it
    few, many = seeds_to_resolve(1, 0.3, prompts=0.01), seeds_to_resolve(1, 0.3, prompts=0.1)
    assert few is not None
    assert many is not None
    assert few < many
    deviation = Deviation(value=1.26, low=1.0, high=2.0, freedom=4, mean=100.0)
    assert range_to_resolve(2, deviation, paired=False) == (
        seeds_to_resolve(2, 1.0, paired=False),
        seeds_to_resolve(2, 2.0, paired=False),
    )


def test_what_is_published_is_said_of_fid_at_50_000_pictures_alone() -> None:
    score = Score(
        scorer="fid-clean-coco-val-1a2b3c4d", benchmark="coco", value=Value(9.0), better="lower", prompts=50_000,
        pictures=50_000, images="", prompt_list="", made_by={},
    )  # fmt: skip
    assert "2606.20536" in (published_deviation(score) or "")
    for other in ({"pictures": 30_000}, {"scorer": "kid-clean-coco"}, {"scorer": "demo-fd-bench"}):
        assert published_deviation(replace(score, **other)) is None
