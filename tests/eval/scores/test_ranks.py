"""Rank correlations beside scipy's, and how often their intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from eval.scores.ranks import joint, rank_correlation


def test_it_is_spearmans_with_ties_too() -> None:
    chance = np.random.default_rng(0)
    for ties in (False, True):
        a, b = chance.normal(size=(2, 11))
        if ties:
            a, b = np.round(a), np.round(b)
        result = rank_correlation(a.tolist(), b.tolist())
        assert result is not None
        assert result.value == pytest.approx(spearmanr(a, b).statistic)
        assert result.entries == 11


def test_the_interval_holds_the_truth() -> None:
    """Of Gaussians with correlation r the rank correlation is 6 / pi asin(r / 2)."""
    chance, r, runs = np.random.default_rng(1), 0.6, 400
    truth, held = 6 / math.pi * math.asin(r / 2), 0
    for _ in range(runs):
        a, b = chance.normal(size=(2, 12))
        result = rank_correlation(a.tolist(), (r * a + math.sqrt(1 - r * r) * b).tolist())
        assert result is not None
        assert result.low is not None
        assert result.high is not None
        held += result.low <= truth <= result.high
    assert 0.92 <= held / runs <= 0.99


def test_what_has_no_correlation_or_no_interval() -> None:
    assert rank_correlation([1.0], [2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    three = rank_correlation([1.0, 2.0, 3.0], [5.0, 4.0, 6.0])
    assert three is not None
    assert (three.value, three.low, three.entries) == (pytest.approx(0.5), None, 3)
    same = rank_correlation([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 9.0])
    assert same is not None
    assert (same.value, same.low) == (pytest.approx(1), None)
    with pytest.raises(ValueError, match="not finite"):
        rank_correlation([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="expected one of each"):
        rank_correlation([1.0, 2.0, 3.0], [1.0, 2.0])


def test_joint_ranks() -> None:
    assert joint({"a": [0.1, 0.3, 0.2], "b": [5.0, 5.0, 9.0]}) == [1.25, 2.25, 2.5]
