"""The bootstrap of a mean, whose interval is known."""

import numpy as np
import pytest

from eval.scores.intervals import bootstrap


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(lambda i: values[i].mean(), 400, resamples=4_000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.02
    )
    assert found.excludes_zero
    assert not bootstrap(lambda i: values[i].mean() - 3, 400, resamples=500).excludes_zero
