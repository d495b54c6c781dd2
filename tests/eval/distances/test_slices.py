"""MIND against closed forms, scipy and repeated samples; influences against leaving a picture out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from eval.distances.slices import directions, mind_influence, transport


def sets(n: int, m: int, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    return generator.normal(0.3, 1.2, (n, width)), generator.normal(size=(m, width))


def repeated(x: np.ndarray, y: np.ndarray) -> float:
    """The squared 2-Wasserstein distance on a line, of samples repeated until they are as many."""
    pairs = zip(np.sort(np.repeat(x, len(y))), np.sort(np.repeat(y, len(x))), strict=True)
    return float(np.mean([(p - q) ** 2 for p, q in pairs]))


def test_directions_are_unit_vectors_that_never_change() -> None:
    vectors = directions(3)
    assert vectors.shape == (1_000, 3)
    np.testing.assert_allclose(np.square(vectors).sum(1), 1, rtol=1e-12)
    # the first normal numbers of the Mersenne twister after the seed 0, as numpy has had them since 2006
    first = np.array([1.764052345967664, 0.4001572083672233, 0.9787379841057392])
    np.testing.assert_allclose(vectors[0], first / np.sqrt(first @ first), rtol=1e-12)


def test_a_shift_has_a_closed_form() -> None:
    """Every projection moves by u.d, so the mean of (u.d)^2 is left: |d|^2 / D of many directions."""
    x, _ = sets(70, 1)
    shift = np.array([0.5, -1, 2, 0, 0.1, 3])
    value, _ = mind_influence(x, np.random.default_rng(0).permutation(x + shift))
    along = [sum(u * shift) ** 2 for u in directions(6)]
    assert value == pytest.approx(3 * 6 * np.mean(along), rel=1e-10)
    assert value == pytest.approx(3 * shift @ shift, rel=0.2)  # of 1,000 directions: 4.5 % at 1 sd


def test_gaussians_have_a_closed_form() -> None:
    """Of N(m, s^2) and N(0, 1) along u: (u.m)^2 + (s - 1)^2."""
    generator, mean = np.random.default_rng(1), np.array([1.0, -2, 0.5])
    x, y = generator.normal(mean, 1.5, (4_000, 3)), generator.normal(size=(4_000, 3))
    expected = 3 * 3 * np.mean(np.square(directions(3) @ mean) + 0.25)
    assert mind_influence(x, y)[0] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 30), (30, 12), (13, 17), (1, 9), (9, 1)])
def test_transport_on_a_line(n: int, m: int) -> None:
    x, y = (np.sort(s.T) for s in sets(n, m))
    squares, _ = transport(x, y)
    np.testing.assert_allclose(
        squares, [repeated(a, b) for a, b in zip(x, y, strict=True)], rtol=1e-10
    )
    _, targets = transport(x, y + 100)  # all go up, so the mean way is the 1-Wasserstein distance
    ways = [wasserstein_distance(a, b + 100) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose((targets - x).mean(1), ways, rtol=1e-10)


def test_the_distance_is_the_mean_over_directions() -> None:
    x, y = sets(14, 21)
    expected = 3 * 6 * np.mean([repeated(x @ u, y @ u) for u in directions(6)])
    assert mind_influence(x, y)[0] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("m", [24, 31, 17])
def test_influence_is_what_leaving_a_picture_out_takes_away(m: int) -> None:
    x, y = sets(24, m)
    value, influences = mind_influence(x, y)
    taken = 23 * np.array([value - mind_influence(np.delete(x, i, 0), y)[0] for i in range(24)])
    assert np.corrcoef(taken, influences)[0, 1] > 0.99
    assert np.polyfit(influences, taken, 1)[0] == pytest.approx(1, abs=0.1)
    assert influences.mean() == pytest.approx(0, abs=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = sets(40, 50)
    value, influences = mind_influence(x, y)
    monkeypatch.setattr("eval.distances.slices.ROWS", 7)
    monkeypatch.setattr("eval.distances.slices.AT_ONCE", 300)
    parts = mind_influence(x, y)
    assert parts[0] == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(parts[1], influences, atol=1e-10)


def test_sets_that_are_equal_constant_or_far_from_zero() -> None:
    x, y = sets(20, 25)
    assert mind_influence(x, x[::-1])[0] == pytest.approx(0, abs=1e-12)
    value, influences = mind_influence(np.ones((8, 6)), np.ones((5, 6)))
    assert value == 0
    assert not influences.any()
    near, far = mind_influence(x, y), mind_influence(x + 1e8, y + 1e8)
    assert far[0] == pytest.approx(near[0], rel=1e-5)
    large = mind_influence(x * 1e30, y * 1e30)
    assert large[0] == pytest.approx(near[0] * 1e60, rel=1e-9)


def test_intervals_cover_what_other_draws_give() -> None:
    generator = np.random.default_rng(6)
    deviation = 1 / np.arange(1, 9) ** 0.75
    reference = generator.normal(size=(100, 8)) * deviation
    values, halves = np.empty((2, 150))
    for i in range(150):
        x = (generator.normal(size=(100, 8)) * 1.3 + 0.3) * deviation
        values[i], influences = mind_influence(x, reference)
        halves[i] = 1.96 * influences.std(ddof=1) / 10
    assert 0.88 <= np.mean(np.abs(values - values.mean()) < halves) <= 0.99
