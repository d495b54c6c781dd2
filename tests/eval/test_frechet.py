"""Frechet distances against closed forms and clean-fid; influences against derivatives and repeated draws."""

import numpy as np
import pytest

from eval.frechet import Gaussian, distance, frechet, frechet_features, influence
from eval.influences import NORMAL


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
    found = frechet(mu1, (q * s1) @ q.T, mu2, (q * s2) @ q.T)
    assert found == pytest.approx(by_hand, rel=1e-7)


def test_a_shifted_sample_is_at_the_squared_shift() -> None:
    features = np.random.default_rng(0).normal(size=(50, 8))
    assert frechet_features(features, features + 1) == pytest.approx(8.0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
@pytest.mark.parametrize("rank", [32, 200])
def test_equal_to_clean_fid(rank: int) -> None:
    from cleanfid import fid

    (mu1, s1), (mu2, s2) = gaussian(1, 64, 200), gaussian(2, 64, rank)
    theirs = fid.frechet_distance(mu1, s1, mu2, s2)
    assert frechet(mu1, s1, mu2, s2) == pytest.approx(theirs, rel=1e-5)
    assert frechet(mu2, s2, mu1, s1) == pytest.approx(frechet(mu1, s1, mu2, s2), rel=1e-9)


@pytest.mark.parametrize("count", [6, 3_000])
def test_fitted_in_parts(count: int) -> None:
    features = np.random.default_rng(1).normal(5, 2, (count, 7)).astype(np.float32)
    found = Gaussian.fitted(features)
    np.testing.assert_allclose(found.mean, features.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12
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
        halves.append(NORMAL * each.std(ddof=1) / np.sqrt(count))
    apart = np.abs(np.array(draws) - np.mean(draws))
    assert coverage[0] <= np.mean(apart < halves) <= coverage[1]
