"""Frechet distances against closed forms and clean-fid; influences against derivatives and repeated draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.distances.frechet import Floats, Gaussian, distance, frechet_features, influence


def frechet(mu1: Floats, sigma1: Floats, mu2: Floats, sigma2: Floats) -> float:
    return distance(Gaussian(mu2, sigma2, 0), Gaussian(mu1, sigma1, 0))


def gaussian(seed: int, width: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(width, rank))
    return generator.normal(size=width), a @ a.T / rank


def test_commuting_gaussians_have_a_closed_form() -> None:
    generator = np.random.default_rng(0)
    q, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    s1, s2 = generator.uniform(0.1, 4, 6), generator.uniform(0.1, 4, 6)
    s1[0], s2[3] = 0, 0  # each without full rank
    mu1, mu2 = generator.normal(size=6), generator.normal(size=6)
    by_hand = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum()
    actual = frechet(mu1, (q * s1) @ q.T, mu2, (q * s2) @ q.T)
    assert actual == pytest.approx(by_hand, rel=1e-12)


def test_a_shifted_sample_is_at_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(50, 8))
    assert frechet_features(features, features + 1) == pytest.approx(8.0, abs=1e-12)


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 64),
    ranks=st.tuples(st.integers(1, 80), st.integers(1, 80)),
)
def test_ranks_below_the_width_cost_no_digits(
    seed: int, width: int, ranks: tuple[int, int]
) -> None:
    """Tr (S1 S2)^(1/2) from the factors that the covariances are made of: it is the sum of the singular values of
    A1^T A2, which takes no root of an eigenvalue that is 0 but for rounding.
    """
    (mu1, s1), (mu2, s2) = gaussian(seed, width, ranks[0]), gaussian(seed + 1, width, ranks[1])
    a1, a2 = (
        np.random.default_rng(seed + i).normal(size=(width, rank)) / np.sqrt(rank)
        for i, rank in enumerate(ranks)
    )
    root = np.linalg.svd(a1.T @ a2, compute_uv=False).sum()
    traces = np.square(a1).sum() + np.square(a2).sum()
    expected = np.square(mu1 - mu2).sum() + traces - 2 * root
    actual = frechet(mu1, s1, mu2, s2)
    # rounding is D eps of the traces that are subtracted, and a little more where an eigenvalue is small
    assert actual == pytest.approx(expected, abs=1e-11 * traces, rel=1e-12)
    assert frechet(mu2, s2, mu1, s1) == pytest.approx(actual, abs=1e-12 * traces, rel=1e-12)
    assert frechet(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-12 * traces)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
@pytest.mark.parametrize("rank", [32, 200])
def test_equal_to_clean_fid(rank: int) -> None:
    """clean-fid takes the root of S1 S2 itself: in place of each of its D - rank eigenvalues of 0, rounding leaves up
    to D eps |S1| |S2|, and the root of that in the trace.
    """
    from cleanfid import fid

    (mu1, s1), (mu2, s2) = gaussian(1, 64, 200), gaussian(2, 64, rank)
    theirs = fid.frechet_distance(mu1, s1, mu2, s2)
    left = 64 * np.finfo(float).eps * np.linalg.norm(s1, 2) * np.linalg.norm(s2, 2)
    rounding = 2 * max(64 - rank, 0) * np.sqrt(left)
    assert frechet(mu1, s1, mu2, s2) == pytest.approx(theirs, rel=1e-11, abs=rounding)


@pytest.mark.parametrize("count", [6, 3_000])
def test_fitted_in_parts(count: int) -> None:
    features = np.random.default_rng(1).normal(5, 2, (count, 7)).astype(np.float32)
    actual = Gaussian.fitted(features)
    np.testing.assert_allclose(actual.mean, features.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        actual.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_influence_is_the_derivative_by_a_pictures_weight() -> None:
    generator = np.random.default_rng(2)
    x, reference = generator.normal(0.3, 1.2, (40, 5)), Gaussian(*gaussian(3, 5, 9), 99)

    def weighted(weights: np.ndarray) -> float:
        mean = weights @ x
        covariance = ((x - mean).T * weights) @ (x - mean) * 40 / 39
        return distance(Gaussian(mean, covariance, 40), reference)

    value, each = influence(x, reference)
    even, step = np.full(40, 1 / 40), 1e-6
    assert value == pytest.approx(weighted(even), rel=1e-10)
    for i in (0, 17, 39):
        more = (1 - step) * even + step * np.eye(40)[i]
        less = (1 + step) * even - step * np.eye(40)[i]
        slope = (weighted(more) - weighted(less)) / (2 * step)
        assert each[i] == pytest.approx(slope, abs=0.03 * np.abs(each).max())
    assert each.mean() == pytest.approx(0, abs=1e-12)


def test_influences_of_fewer_pictures_than_features() -> None:
    """Without a covariance: for C centred features and C1 C2^T = U s V^T, c^T T c of picture i is U s U^T at (i, i)."""
    generator = np.random.default_rng(5)
    x, y = generator.normal(0.2, 1.5, (20, 64)), generator.normal(size=(30, 64))
    value, each = influence(x, Gaussian.fitted(y))
    c1, c2 = x - x.mean(0), y - y.mean(0)
    u, s, _ = np.linalg.svd(c1 @ c2.T / np.sqrt(19 * 29))
    carried = 19 * (u**2 @ np.pad(s, (0, 20 - len(s))))
    expected = 2 * c1 @ (x.mean(0) - y.mean(0)) + np.square(c1).sum(1) - carried
    np.testing.assert_allclose(
        each, expected - expected.mean(), atol=1e-11 * np.abs(expected).max()
    )
    assert value == pytest.approx(frechet_features(x, y), rel=1e-12)


def test_pictures_that_are_all_the_same() -> None:
    same, others = np.ones((6, 5)), np.random.default_rng(0).normal(size=(9, 5))
    apart = np.square(others.mean(0) - 1).sum() + others.var(0, ddof=1).sum()
    assert frechet_features(same, others) == pytest.approx(apart, rel=1e-12)
    value, each = influence(same, Gaussian.fitted(others))
    assert value == pytest.approx(apart, rel=1e-12)
    np.testing.assert_array_equal(each, 0)
    assert frechet_features(same, same) == 0


def test_rounding_makes_no_distance_negative() -> None:
    """Of equal sets it leaves a few 1e-15 to either side of 0."""
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=(30, 8)).astype(np.float32)
        assert 0 <= frechet_features(x, x.copy()) < 1e-12


@pytest.mark.parametrize(
    ("shift", "count", "coverage"),
    [(0.3, 400, (0.9, 0.99)), (0.3, 24, (0.9, 1.0)), (0.0, 400, (0.95, 1.0))],
)
def test_intervals_cover_what_other_draws_give(
    shift: float, count: int, coverage: tuple[float, float]
) -> None:
    """Known Gaussians: about 95 %; more where the distributions agree or pictures are hardly more than features."""
    generator = np.random.default_rng(4)
    deviation = 1 / np.arange(1, 17) ** 0.75
    reference = Gaussian(np.zeros(16), np.diag(deviation**2), 0)
    draws, halves = [], []
    for _ in range(200):
        x = (generator.normal(size=(count, 16)) * (1 + shift) + shift) * deviation
        value, each = influence(x, reference)
        draws.append(value)
        halves.append(1.96 * each.std(ddof=1) / np.sqrt(count))
    apart = np.abs(np.array(draws) - np.mean(draws))
    assert coverage[0] <= np.mean(apart < halves) <= coverage[1]
