"""The variance of batch means: against values drawn at random, and against what is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from shards import Order, OrderError
from shards.tools.shuffle_quality import BatchVariance, batch_variances, table
from tests.shards.properties import words_of

FULL = np.full(4_096, 2**32 - 1, np.uint32)


def test_a_whole_lane_mixes_like_a_full_shuffle() -> None:
    for variance in batch_variances(Order([FULL], 1, 16), 256, 4_096, places=4):
        alone = 1 - variance.batches * 256 / (32 * FULL.size)  # without putting rows back
        assert variance.order == pytest.approx(alone, abs=0.03)
        assert variance.shuffled == pytest.approx(alone, abs=0.03)


def test_a_window_delays_what_its_blocks_share() -> None:
    """One batch: 1 + icc (B / L - 1) 31 / (W - 1); whole windows: 1 + 31 icc. 8 lanes, windows of 128."""
    single, _, all_of_it = (
        m.order
        for m in batch_variances(Order([FULL], 3, 8, 128), 128, 4_096, spans=(1, 4, 64), places=6)[
            :3
        ]
    )
    assert single == pytest.approx(1 + 0.1 * (128 / 8 - 1) * 31 / 127, abs=0.02)
    fill = 1 - 64 * 128 / (32 * FULL.size)
    assert all_of_it == pytest.approx((1 + 0.1 * 31) * fill, rel=0.05)


def test_against_values_that_were_drawn() -> None:
    """800 sets of values with a tenth of the variance between blocks of 32 rows; bad rows, two weighted sources."""
    words = [words_of(1, 300, 0.8), words_of(2, 100, 0.5)]
    order, batch = Order(words, 2, 4, 16, [1, 1]), 64
    generator = np.random.default_rng(0)
    starts = range(0, order.epoch_samples - batch, 9 * batch)
    picked = [order(start, batch)[:2] for start in starts]
    share = [0.5 / np.bitwise_count(w).sum() for w in words]
    valid = [np.unpackbits(w.view(np.uint8), bitorder="little").astype(bool) for w in words]
    squares, variances = [], []
    for _ in range(800):
        values = [
            np.sqrt(0.1) * np.repeat(generator.standard_normal(w.size), 32)
            + np.sqrt(0.9) * generator.standard_normal(32 * w.size)
            for w in words
        ]
        mean = sum(p * v[ok].sum() for p, v, ok in zip(share, values, valid, strict=True))
        variances.append(
            sum(p * np.square(v[ok] - mean).sum() for p, v, ok in zip(share, values, valid, strict=True))
        )  # fmt: skip
        for source, rows in picked:
            drawn = np.where(source == 0, values[0][rows % values[0].size], 0)
            drawn = np.where(source == 1, values[1][rows % values[1].size], drawn)
            squares.append((drawn.mean() - mean) ** 2)
    expected = np.mean(squares) / (np.mean(variances) / batch)
    variance = batch_variances(order, batch, 1_024, spans=(1,), places=40)[0]
    assert variance.order == pytest.approx(expected, rel=0.05)


def test_spans_that_do_not_fit_are_left_out() -> None:
    order = Order([FULL[:64]], 0, 4)
    assert {m.batches for m in batch_variances(order, 64, 1_024)} == {1, 8}
    with pytest.raises(OrderError, match="more than an epoch"):
        batch_variances(order, 4_096, 1_024)


def test_table() -> None:
    rows = [
        BatchVariance(32, 1, 1.0, 1.0),
        BatchVariance(32, 8, 1.37, 0.99),
        BatchVariance(2048, 1, 1.04, 1.0),
        BatchVariance(2048, 8, 2, 1),
    ]
    lines = table(rows).splitlines()
    assert lines[0].split() == ["unit", "1", "batches", "8", "batches"]
    assert lines[1].split() == ["32", "rows", "1.00", "(1.00)", "1.37", "(0.99)"]
    assert lines[2].split() == ["2,048", "rows", "1.04", "(1.00)", "2.00", "(1.00)"]
