"""Precision and recall against plain loops; influences against leaving a picture out."""

from __future__ import annotations

import numpy as np
import pytest

from eval.distances.neighbours import precision_influence, recall_influence


def sets(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    spread = [2, 0.5, 0.5, 0.5]  # wider in one direction: some of either set are not covered
    return generator.normal(0.5, spread, (n, 4)), generator.normal(size=(m, 4))


def covered(points: np.ndarray, centres: np.ndarray) -> float:
    """The share of points within reach of a centre: as far as its third neighbour among the centres."""
    reach = []
    for i, centre in enumerate(centres):
        others = [np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i]
        reach.append(sorted(others)[2])
    count = sum(
        any(np.linalg.norm(point - c) <= r for c, r in zip(centres, reach, strict=True))
        for point in points
    )
    return count / len(points)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (17, 40), (40, 17), (5, 5)])
def test_against_plain_loops(n: int, m: int) -> None:
    a, b = sets(n, m)
    precision, recall = precision_influence(a, b)[0], recall_influence(a, b)[0]
    assert precision == pytest.approx(covered(a, b), rel=1e-12)
    assert recall == pytest.approx(covered(b, a), rel=1e-12)
    if n == m == 30:
        assert 0 < precision < 1
        assert 0 < recall < 1


def test_influence_is_what_leaving_a_picture_out_takes_away() -> None:
    generator = np.random.default_rng(8)
    a = generator.normal(0.5, [2, 0.3], (20, 2))
    b = generator.normal(size=(25, 2))
    for slow, influence in (
        (lambda x: covered(x, b), precision_influence),
        (lambda x: covered(b, x), recall_influence),
    ):
        taken = 19 * np.array([slow(a) - slow(np.delete(a, i, 0)) for i in range(20)])
        np.testing.assert_allclose(influence(a, b)[1], taken - taken.mean(), atol=1e-9)
        assert np.ptp(taken) > 0.1


def test_blocks_of_pairs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sets(50, 33)
    whole = precision_influence(a, b), recall_influence(a, b)
    monkeypatch.setattr("eval.distances.neighbours.ROWS", 7)
    for (value, influences), part in zip(
        whole, (precision_influence(a, b), recall_influence(a, b)), strict=True
    ):
        assert part[0] == value
        np.testing.assert_allclose(part[1], influences, atol=1e-12)


def test_copies_and_constant_sets() -> None:
    a, b = sets(20, 20)
    for influence in (precision_influence, recall_influence):
        assert influence(a, a)[0] == 1  # each lies in its own ball
        assert influence(a + 1e4, b)[0] == 0
        assert influence(a, a + 1e6)[0] == 0
    assert precision_influence(a + 1e6, a + 1e6)[0] == 1
    # one picture again and again, that is a real one: precise, and of one picture only
    same = np.repeat(b[:1], 12, 0)
    assert precision_influence(same, b)[0] == 1
    assert recall_influence(same, b)[0] == 1 / 20
    assert precision_influence(b, same)[0] == 1 / 20
    assert not recall_influence(same, b)[1].any()


def test_a_set_without_variety_has_precision_and_no_recall() -> None:
    """What the pair is for: half of the modes are missing, and no picture is a bad one."""
    generator = np.random.default_rng(1)
    modes = np.array([[0.0, 0], [9, 0]])
    real = np.concatenate([generator.normal(mode, 1, (100, 2)) for mode in modes])
    generated = generator.normal(modes[0], 0.8, (200, 2))
    assert precision_influence(generated, real)[0] > 0.95
    assert recall_influence(generated, real)[0] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("influence", [precision_influence, recall_influence])
def test_intervals_cover_what_other_draws_give(influence) -> None:  # type: ignore[no-untyped-def]  # one of two
    """That of precision is a share's; recall's counts neighbours that change, and is too wide."""
    generator = np.random.default_rng(6)
    reference = generator.normal(size=(120, 6))
    spread = [2, 1.3, 1, 0.6, 0.6, 0.6]
    values, halves = np.empty((2, 200))
    for i in range(200):
        values[i], influences = influence(generator.normal(0.4, spread, (120, 6)), reference)
        halves[i] = 1.96 * influences.std(ddof=1) / np.sqrt(120)
    assert np.mean(np.abs(values - values.mean()) < halves) >= 0.9
    assert 0.8 < halves.mean() / (1.96 * values.std(ddof=1)) < 3
