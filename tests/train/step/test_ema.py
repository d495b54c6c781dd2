"""Power-function averages: shares of updates, closed forms, and how far a combination is off; by numpy sums alone."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from train.config import EmaConfig
from train.step.ema import PowerEmas, kind_of
from train.step.profiles import (
    FARTHEST,
    Profile,
    combination,
    exponent,
    new_share,
    snapshots_needed,
)


def shares(updates: int, length: float, total: int | None = None) -> np.ndarray:
    """The share of each update in an average, from the integral of (g+1) s^g over its interval."""
    ends = np.arange(updates + 1) / updates
    held = np.diff(ends ** (exponent(length) + 1))
    return np.pad(held, (0, (total or updates) - updates))


@pytest.mark.parametrize("length", [0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25])
def test_the_length_is_the_deviation_of_the_profile(length: float) -> None:
    middles = (np.arange(1_000_000) + 0.5) / 1_000_000
    held = shares(1_000_000, length)
    assert held.sum() == pytest.approx(1, abs=1e-9)
    mean = (held * middles).sum()
    assert np.sqrt((held * (middles - mean) ** 2).sum()) == pytest.approx(length, rel=1e-5)


def test_exponents_of_the_paper() -> None:
    """EDM2 gives 16.97 and 6.94 for its two tracked lengths."""
    assert [round(exponent(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_an_average_is_the_sum_of_its_shares(length: float) -> None:
    """Of 300 weights that wander, in fp64 by numpy; what the average begins with is not in it."""
    chance = np.random.default_rng(0)
    path = 1 + 0.1 * chance.standard_normal((300, 50)).cumsum(0)
    averages = PowerEmas([torch.full((50,), 1e6)], [length])
    for number, weights in enumerate(path, 1):
        averages.update([torch.tensor(weights, dtype=torch.float32)], number)
        if number in (1, 2, 37, 300):
            expected = shares(number, length) @ path[:number]
            part = averages.parts[kind_of(length)][0]
            assert np.allclose(part, expected, rtol=2e-6)


def test_the_newest_share_has_no_cancellation() -> None:
    """1 - (1 - 1/t)^(g+1), against Python's integers: of g + 1 = 18 it is (t^18 - (t-1)^18) / t^18."""
    for t in (1, 2, 10, 10**6, 10**9):
        assert new_share(t, 17.0) == pytest.approx((t**18 - (t - 1) ** 18) / t**18, rel=1e-12)


@pytest.mark.parametrize(
    ("count", "length"), [(16, 0.04), (16, 0.07), (16, 0.15), (32, 0.03), (32, 0.2), (4, 0.2)]
)
def test_the_distance_is_that_of_the_shares(count: int, length: float) -> None:
    """Of 64,000 updates, summed by numpy; no other weights that add up to 1 come nearer."""
    total = 64_000
    kept = [(total * (i + 1) // count, each) for i in range(count) for each in (0.05, 0.1)]
    result = combination(
        [Profile(n, exponent(each)) for n, each in kept], Profile(total, exponent(length))
    )
    assert sum(result.weights) == pytest.approx(1, abs=1e-9)
    held, wanted = np.array([shares(n, x, total) for n, x in kept]), shares(total, length)
    difference = np.array(result.weights) @ held - wanted
    distance = np.linalg.norm(difference) / np.linalg.norm(wanted)
    assert distance == pytest.approx(result.distance, rel=0.01)
    # at the least-squares solution the gradient is the same along all weights, the condition's multiplier
    gradient = held @ difference
    assert np.ptp(gradient) < 1e-6 * np.linalg.norm(wanted) * np.linalg.norm(held, axis=1).max()


@pytest.mark.parametrize(
    ("lengths", "count", "length", "close"),
    [
        ((0.05, 0.1), 32, 0.03, True), ((0.05, 0.1), 64, 0.02, True), ((0.2, 0.25), 16, 0.15, True),
        ((0.2, 0.25), 32, 0.07, False), ((0.2, 0.25), 100, 0.02, False), ((0.1, 0.2), 100, 0.03, False),
    ],
)  # fmt: skip
def test_snapshots_whose_rounding_would_show_are_not_combined(
    lengths: tuple[float, float], count: int, length: float, close: bool
) -> None:
    """Of weights that wander as in a training, where the profiles are near enough in all cases: averages of
    near lengths make one of another by large shares of both signs, which add up the snapshots' rounding."""
    total, chance = 2000, np.random.default_rng(0)
    pace = 1e-3 / np.sqrt(1 + np.arange(total) / 50)[:, None]
    start = 0.02 * chance.standard_normal(500)
    weights = start + np.cumsum(pace * chance.standard_normal((total, 500)), 0)
    kept = [(total * (i + 1) // count, each) for i in range(count) for each in lengths]
    result = combination(
        [Profile(n, exponent(each)) for n, each in kept], Profile(total, exponent(length))
    )
    assert result.distance < FARTHEST
    assert result.close is close
    averages = np.array([shares(n, each, total) @ weights for n, each in kept])
    averages[:-2] = averages[:-2].astype(np.float16)  # the last two are of the checkpoint
    wanted = shares(total, length) @ weights
    error = np.linalg.norm(result.weights @ averages - wanted) / np.linalg.norm(wanted)
    assert bool(error < 2e-3) is close
    assert error == pytest.approx(result.rounding, rel=0.3, abs=2e-4)


def test_how_many_snapshots_lengths_need() -> None:
    """16 do for 0.05 to 0.15, 32 for 0.03 to 0.20; the count that is named is enough, one less is not."""
    needed = {x: snapshots_needed((0.05, 0.1), x) for x in np.arange(3, 21) / 100}
    assert max(n or 999 for x, n in needed.items() if 0.05 <= x <= 0.15) <= 16
    assert max(n or 999 for n in needed.values()) <= 32
    assert (needed[0.05], needed[0.1]) == (1, 1)
    assert snapshots_needed((0.05, 0.1), 0.001) is None
    for length in (0.02, 0.25):
        count = snapshots_needed((0.05, 0.1), length)
        assert count is not None
        for n, enough in ((count, True), (count - 1, False)):
            kept = [Profile((i + 1) / n, exponent(x)) for i in range(n) for x in (0.05, 0.1)]
            distance = combination(kept, Profile(1, exponent(length))).distance
            assert (distance <= FARTHEST) is enough


def test_half_precision_keeps_what_it_cannot_hold() -> None:
    averages = PowerEmas([torch.tensor([1.0, -0.3]), torch.tensor([1e5, 1.0])], [0.05])
    averages.update([torch.tensor([1.0, -0.3]), torch.tensor([1e5, 1.0])], 1)
    small, large = averages.halves()[kind_of(0.05)]
    assert (small.dtype, large.dtype) == (torch.float16, torch.float32)
    assert large.tolist() == [1e5, 1.0]


@pytest.mark.parametrize(
    "power", [[0.1, 0.05], [0.1, 0.1], [0.005, 0.1], [0.05, 0.26], [0.05], [0.05, float("nan")]]
)
def test_other_lengths_are_refused(power: list[float]) -> None:
    with pytest.raises(ValidationError):
        EmaConfig(power=power)  # type: ignore[arg-type]  # as YAML gives it
    assert EmaConfig().power is None
