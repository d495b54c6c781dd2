"""The demo's verdict, against cases worked by hand."""

import numpy as np
import pytest

from eval.demo.score import Judged, compare, encoding_cost, verdict
from eval.scores.intervals import Interval

NOTHING, UP, DOWN = Interval(0.1, -0.1, 0.3), Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1)


@pytest.mark.parametrize(
    ("accuracy", "distance", "begins"),
    [
        (NOTHING, NOTHING, "No difference shown between a and b"),
        (UP, NOTHING, "b trained the better model by demo-acc"),
        (NOTHING, UP, "a trained the better model by demo-fd"),
        (UP, DOWN, "b trained the better model by demo-acc and demo-fd"),
        (DOWN, UP, "a trained the better model by demo-acc and demo-fd"),
        (UP, UP, "No winner"),
    ],
)
def test_verdict(accuracy: Interval, distance: Interval, begins: str) -> None:
    said = verdict("a", "b", {"demo-acc": accuracy, "demo-fd": distance})
    assert said.startswith(begins)
    assert "b minus a" in said


def judged(right: int, shift: float) -> Judged:
    """200 pictures, so many of them right, features shifted by a constant."""
    features = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    return Judged(np.arange(200) < right, features + np.float32(shift))


def test_compare_finds_a_real_difference_and_only_that() -> None:
    real = judged(200, 0.0)
    found = compare({"a": judged(100, 1.0), "b": judged(180, 0.0)}, real)
    assert found["scores"]["a"]["demo-acc"]["value"] == 0.5
    assert found["scores"]["b"]["demo-acc"]["value"] == 0.9
    # Equal features but for a shift of 1 in each of 4 dimensions: the distance is 4.
    assert found["scores"]["a"]["demo-fd"]["value"] == pytest.approx(4.0, abs=1e-4)
    assert found["scores"]["b"]["demo-fd"]["value"] == pytest.approx(0.0, abs=1e-4)
    assert found["difference"]["demo-acc"]["value"] == pytest.approx(0.4)
    assert found["difference"]["demo-acc"]["low"] > 0.3
    assert found["verdict"].startswith("b trained the better model by demo-acc and demo-fd")

    same = compare({"a": judged(100, 1.0), "b": judged(100, 1.0)}, real)
    assert same["verdict"].startswith("No difference shown")


def test_encoding_cost_counts_the_decoding_once() -> None:
    seconds = {"read": 1.0, "decode": 3.0, "write": 9.0}
    report = {
        "/c/s/vae": {"rows": 100, "seconds": seconds | {"vae": 10.0}},
        "/c/s/text": {"rows": 100, "seconds": seconds | {"text": 6.0}},
        "/c/s/other": {"rows": 100, "seconds": seconds | {"other": 99.0}},
    }
    cost = encoding_cost(report, "vae", "text", samples=1000, training=50.0)
    assert cost["seconds_per_sample"] == pytest.approx(0.2)  # (10 + 6 + 1 + 3) / 100
    assert cost["once"] == pytest.approx(20.0)
    assert cost["every_step"] == pytest.approx(200.0)
