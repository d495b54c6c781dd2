"""KID against clean-fid and double loops, CMMD against double loops; influences against what leaving one out does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from eval.distances.kernels import cmmd_influence, kid_features, kid_influence, kid_subsets


def sets(count: int, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return generator.normal(size=(count, width)), generator.normal(0.5, 1, (count, width))


def cubic(p: np.ndarray, q: np.ndarray) -> float:
    return float((sum(a * b for a, b in zip(p, q, strict=True)) / len(p) + 1) ** 3)


def rbf(p: np.ndarray, q: np.ndarray) -> float:
    p, q = p / np.sqrt((p**2).sum()), q / np.sqrt((q**2).sum())
    return float(np.exp(-((p - q) ** 2).sum() / 200))


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    n, m = len(x), len(y)
    xx = sum(cubic(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(cubic(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(cubic(p, q) for p in x for q in y) / (n * m)


def biased(x: np.ndarray, y: np.ndarray) -> float:
    """All pairs, times 1,000."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return sum(rbf(p, q) for p in a for q in b) / (len(a) * len(b))

    return 1_000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_kid_against_double_loops() -> None:
    x, y = sets(20)  # all of them are in every subset, so each subset gives the same number
    assert kid_features(x, y) == pytest.approx(unbiased(x, y), rel=1e-10)
    assert np.ptp(kid_subsets(x, y)) < 1e-12


def test_kid_is_clean_fids_after_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    from cleanfid import fid

    generator = np.random.default_rng(5)
    a, b = generator.normal(size=(105, 8)), generator.normal(0.2, 1, (110, 8))
    np.random.seed(7)
    theirs = fid.kernel_distance(a, b, max_subset_size=100)
    monkeypatch.setattr("eval.distances.kernels.SUBSET", 100)
    assert kid_features(a, b, seed=7) == pytest.approx(theirs, rel=1e-9)
    assert kid_features(a, b, seed=8) != pytest.approx(theirs, rel=1e-5)


def test_cmmd_against_double_loops() -> None:
    x, y = sets(20)
    value, _ = cmmd_influence(x.astype(np.float32), y[:15].astype(np.float32))
    assert value == pytest.approx(biased(x, y[:15]), rel=1e-5)
    assert value > 1
    assert cmmd_influence(x, x)[0] == pytest.approx(0, abs=1e-9)


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets(50)
    whole = cmmd_influence(x, y), kid_influence(x, y)
    monkeypatch.setattr("eval.distances.kernels.ROWS", 7)
    parts = cmmd_influence(x, y), kid_influence(x, y)
    assert parts[0][0] == pytest.approx(whole[0][0], rel=1e-10)
    np.testing.assert_allclose(parts[0][1], whole[0][1], atol=1e-10)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-10)


@pytest.mark.parametrize(
    ("slow", "influence"),
    [(unbiased, kid_influence), (biased, lambda x, y: cmmd_influence(x, y)[1])],
)
def test_influence_is_what_leaving_a_picture_out_takes_away(
    slow: Callable[..., float], influence: Callable[..., np.ndarray]
) -> None:
    x, y = sets(24)
    without = np.array([slow(np.delete(x, i, 0), y) for i in range(0, 24, 3)])
    taken = 23 * (slow(x, y) - without)
    each = influence(x, y)[::3]
    assert np.corrcoef(taken, each)[0, 1] > 0.999
    assert np.polyfit(each, taken, 1)[0] == pytest.approx(1, abs=0.1)


def test_influence_on_kid_from_some_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets(2_000, 3)
    whole = kid_influence(x, y)
    monkeypatch.setattr("eval.distances.kernels.COLUMNS", 1_000)
    some = kid_influence(x, y)
    assert not np.array_equal(some, whole)
    assert some.std() == pytest.approx(whole.std(), rel=0.1)
    assert np.corrcoef(some, whole)[0, 1] > 0.95


def test_intervals_cover_what_other_draws_give() -> None:
    """Known Gaussians against one fixed reference: about 95 % of other draws lie within an interval."""
    generator = np.random.default_rng(6)
    reference = generator.normal(size=(200, 8))
    kids, cmmds = list[tuple[float, float]](), list[tuple[float, float]]()
    for seed in range(120):
        x = generator.normal(0.4, 1.2, (100, 8))
        subsets = kid_subsets(x, reference, seed)
        drawn = subsets.var(ddof=1) / len(subsets)
        variance = kid_influence(x, reference).var(ddof=1) / 100 + drawn
        kids.append((subsets.mean(), 1.96 * np.sqrt(variance)))
        value, each = cmmd_influence(x + 0.5, reference + 0.5)
        cmmds.append((value, 1.96 * each.std(ddof=1) / 10))
    for actual in (kids, cmmds):
        values, halves = np.array(actual).T
        assert 0.88 <= np.mean(np.abs(values - values.mean()) < halves) <= 1
        assert halves.mean() < 3 * values.std()
