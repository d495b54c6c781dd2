"""Entries of several training seeds: how they are told, paired, and what their differences say together."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t, ttest_1samp

from eval.errors import OtherImages
from eval.scores.results import Value
from eval.scores.seeds import (
    Estimate,
    Floats,
    Variances,
    error_level,
    grouped,
    half_width,
    holm,
    over_seeds,
    variances,
)

SETS = st.lists(st.tuples(st.none() | st.sampled_from("ab"), st.none() | st.integers(0, 3)))


def test_seeds_of_one_entry_are_grouped() -> None:
    actual = grouped([("a", 0), ("b", 1), ("a", 2), (None, 0), ("b", 0), ("a", 0), (None, None)])
    assert actual == [{0: 0, 2: 2}, {1: 1, 0: 4}, {0: 3}, {0: 5}, {None: 6}]


@given(SETS)
def test_every_set_is_in_one_entry_and_no_entry_has_two_keys(
    sets: list[tuple[str | None, int | None]],
) -> None:
    actual = grouped(sets)
    assert sorted(index for entry in actual for index in entry.values()) == list(range(len(sets)))
    for entry in actual:
        keys = {sets[index][0] for index in entry.values()}
        assert len(keys) == 1
        assert len(entry) == 1 or None not in keys
        assert all(sets[index][1] == seed for seed, index in entry.items())
    firsts = [next(iter(entry.values())) for entry in actual]
    assert all(a < b for a, b in pairwise(firsts))


def estimates(d: Floats, additive: bool = True) -> list[Estimate]:
    """The differences of seeds (S, P) as means over prompts."""
    prompts = tuple(map(str, range(d.shape[1])))
    return [
        Estimate(
            value=float(row.mean()),
            prompts=prompts,
            influences=(row - row.mean()) / len(row),
            strata=(np.arange(len(row)),),
            additive=additive,
        )
        for row in d
    ]


def test_the_interval_by_hand() -> None:
    """Two-way table of three seeds and four prompts: mean squares of seeds, prompts and the rest."""
    d = np.array([[1.0, 2, 3, 6], [2, 2, 5, 7], [3, 5, 4, 8]])
    value, parts = over_seeds(estimates(d))
    rest = d - d.mean(0) - d.mean(1)[:, None] + d.mean()
    assert (parts.count, parts.seeds, parts.prompts, parts.residual) == pytest.approx(
        (3, np.var([3, 4, 5], ddof=1) / 3, np.var([2, 3, 4, 7], ddof=1) / 4, np.square(rest).sum() / 6 / 12)
    )  # fmt: skip
    half = sqrt(4.3026527**2 / 3 + 1.959964**2 * (14 / 12 - np.square(rest).sum() / 72))
    assert (value.value, value.low, value.high) == pytest.approx((4, 4 - half, 4 + half))
    assert value.count == 4
    _, distance = over_seeds(estimates(d, additive=False))
    assert (distance.seeds, distance.prompts, distance.residual) == (parts.seeds, parts.prompts, 0)


def test_one_seed_has_an_interval_over_prompts_alone() -> None:
    d = np.array([[1.0, 2, 3, 6]])
    value, parts = over_seeds(estimates(d))
    assert (parts.seeds, parts.prompts) == (None, pytest.approx(d.var(ddof=1) / 4))
    assert value.high == pytest.approx(3 + 1.959964 * d.std(ddof=1) / 2)


def test_where_nothing_is_known_of_prompts_the_interval_is_students_over_seeds() -> None:
    value, parts = over_seeds([Estimate(value=v) for v in (0.1, 0.4, 0.4)])
    half = 4.3026527 * 0.1732051 / sqrt(3)
    assert (value.value, value.low, value.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert (value.count, parts.prompts) == (None, None)
    assert over_seeds([Estimate(value=0.3)])[0] == Value(0.3)


def test_prompts_that_explain_less_than_chance_add_nothing() -> None:
    assert Variances(count=3, seeds=1.0, prompts=0.1, residual=0.3).of_prompts == 0
    assert half_width(Variances(count=3, seeds=1.0, prompts=0.1, residual=0.3)) == pytest.approx(
        4.3026527
    )


def test_the_draw_of_subsets_adds_the_variance_of_its_mean() -> None:
    """As of KID: the same subsets in every seed, so the mean over seeds of each subset varies."""
    subsets = np.array([[1.0, 2, 6], [3, 2, 4]])
    plain = estimates(np.array([[1.0, 2, 3, 6], [2, 2, 5, 7]]), additive=False)
    drawn = [replace(e, subsets=row) for e, row in zip(plain, subsets, strict=True)]
    before, after = (over_seeds(each)[1].prompts for each in (plain, drawn))
    assert before is not None
    assert after == pytest.approx(before + np.var([2.0, 2, 5], ddof=1) / 3)


def test_the_level_at_which_an_interval_ends_at_0() -> None:
    """Over seeds alone p is that of Student's paired test, over prompts alone that of a normal one."""
    numbers = [0.1, 0.4, 0.5]
    p = error_level(*over_seeds([Estimate(value=v) for v in numbers]))
    assert p == pytest.approx(ttest_1samp(numbers, 0).pvalue, rel=1e-6)
    assert error_level(Value(2.0, 1.0, 3.5), Variances(count=1, seeds=None, prompts=1.0)) == (
        pytest.approx(2 * norm.sf(2 * 1.959964), rel=1e-6)
    )
    for value in (Value(1.0, 0.0, 2.0), Value(-1.0, -4.0, 0.0)):
        assert error_level(value, Variances(count=1, seeds=None, prompts=1.0)) == pytest.approx(
            0.05
        )
    none = Variances(count=3, seeds=0.0, prompts=0.0)
    assert error_level(Value(0.0, 0.0, 0.0), none) == 1
    assert error_level(Value(0.1, 0.1, 0.1), none) == 0
    assert error_level(Value(1.0, 0.0, 2.0), Variances(count=2, seeds=0.1, prompts=0.1)) is None
    assert error_level(Value(1.0), Variances(count=1, seeds=None, prompts=None)) is None


@given(st.integers(3, 9), st.floats(-9, 9), st.floats(0, 9), st.floats(0, 9))
def test_the_level_and_the_interval_agree(
    count: int, d: float, seeds: float, prompts: float
) -> None:
    parts = Variances(count=count, seeds=seeds, prompts=prompts)
    half = half_width(parts)
    if abs(abs(d) - half) < 1e-6 or seeds + prompts < 1e-9:
        return
    p = error_level(Value(d, d - half, d + half), parts)
    assert p is not None
    assert (p < 0.05) == (abs(d) > half)
    if 1e-90 < p < 0.999:
        assert half_width(parts, p) == pytest.approx(abs(d), rel=1e-6)
    elif 0.999 <= p < 1:  # such a level's quantile is exact only to the root of a rounding
        beside = Value(half_width(parts, p), -half, half)
        assert error_level(beside, parts) == pytest.approx(p, rel=1e-6)


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.03, "b": 0.01, "d": 0.04})
    assert adjusted == {"a": 0.06, "b": 0.03, "d": 0.06}
    adjusted = holm({"a": 0.03, "b": 0.01, "c": None, "d": 0.04})  # of four, one yet to come
    assert adjusted == {"a": 0.09, "b": 0.04, "c": None, "d": 0.09}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({}) == {}


@given(st.lists(st.tuples(st.floats(1e-9, 1.0), st.booleans()), min_size=1, max_size=6))
def test_a_verdict_is_not_weaker_once_the_other_entries_are_there(
    levels: list[tuple[float, bool]],
) -> None:
    """Whatever p those get that an unfinished study does not have yet."""
    early = holm({str(i): p if done else None for i, (p, done) in enumerate(levels)})
    late = holm({str(i): p for i, (p, _) in enumerate(levels)})
    for name, p in early.items():
        final = late[name]
        assert final is not None
        assert p is None or final <= p * (1 + 1e-12)


def test_other_prompts_are_refused_and_another_order_is_not() -> None:
    a, b = estimates(np.array([[1.0, 2, 3], [4, 5, 9]]))
    turned = replace(b, prompts=b.prompts[::-1], influences=b.influences[::-1])
    assert np.array_equal((b - a).influences, (turned - a).influences)
    assert over_seeds([a, turned]) == over_seeds([a, b])
    for other in (replace(b, prompts=("0", "1", "x")), Estimate(value=1.0)):
        with pytest.raises(OtherImages, match="not the same ones"):
            other - a
        with pytest.raises(OtherImages, match="not the same ones"):
            over_seeds([a, other])


# Coverage by simulation: each row a study whose true difference is 0 -----------------------------------------------

PROMPTS, STUDIES = 100, 3000
# deviations over studies of the part that seeds, and that prompts, have in the mean of one seed
CELLS = {
    "seeds only": (0.1, 0.0),
    "equal": (0.1, 0.1),
    "prompts only": (0.0, 0.1),
    "seeds three times prompts": (0.3, 0.1),
}


def studies(cell: str, seeds: int, of_both: float = 1.0) -> Floats:
    """Differences (STUDIES, S, P); `of_both` is the deviation of a seed and a prompt together."""
    chance = np.random.default_rng(seeds)
    of_seeds, of_prompts = CELLS[cell]
    return np.asarray(
        of_seeds * chance.standard_normal((STUDIES, seeds, 1))
        + of_prompts * sqrt(PROMPTS) * chance.standard_normal((STUDIES, 1, PROMPTS))
        + of_both * chance.standard_normal((STUDIES, seeds, PROMPTS))
    )


def held(d: Floats, seeds_quantile: float, prompts_quantile: float) -> float:
    """The share of studies whose interval holds 0."""
    values = d.mean(-1)
    influences = (d - values[..., None]) / PROMPTS
    of_seeds, of_prompts, residual = variances(values, influences, [np.arange(PROMPTS)], True)
    half = np.sqrt(
        seeds_quantile**2 * of_seeds + prompts_quantile**2 * np.maximum(0, of_prompts - residual)
    )
    return float((np.abs(values.mean(-1)) <= half).mean())


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    shares = {
        (seeds, cell, of_both): held(studies(cell, seeds, of_both), t.ppf(0.975, seeds - 1), 1.96)
        for seeds in (2, 3, 5, 10)
        for cell in CELLS
        for of_both in (0.3, 1.0)
    }
    assert {key: share for key, share in shares.items() if share < 0.93} == {}
    assert np.mean(list(shares.values())) <= 0.99


def test_other_intervals_do_not_hold_it() -> None:
    """Of three seeds: a bootstrap of them, 1.96 in place of t, and t without the prompts."""
    draws = np.array(list(product(range(3), repeat=3)))  # all 27, equally likely
    means = studies("seeds only", 3, 0.0).mean(-1)[:, draws].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=-1)
    assert 0.6 < np.mean((low <= 0) & (high >= 0)) < 0.75  # 67 %
    assert held(studies("seeds only", 3), 1.96, 1.96) < 0.88  # 81 % by t alone
    assert held(studies("prompts only", 3, 0.1), t.ppf(0.975, 2), 0.0) < 0.3
