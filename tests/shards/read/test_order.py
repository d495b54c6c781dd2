"""The order of samples: properties for any sizes, and literal rows, so that it can never change unnoticed."""

from __future__ import annotations

import numpy as np
import pytest

from shards import Order, OrderError
from shards.read.order import key, nth_set_bit, permute
from tests.shards.properties import FAR, PROPERTIES, by_number, rows_of, run, words_of

EXAMPLES = {name: 20 for name in PROPERTIES} | {"shares of a mixture": 4, "batch sizes agree": 8}


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    run(name, EXAMPLES[name])


def test_permutations_are_even() -> None:
    """Each image as often as every other, over 4,000 keys; 3.29 deviations are passed once in a thousand."""
    for n in (3, 10, 33, 64):
        keys = key(np.arange(4000), 9)
        images = permute(np.tile(np.arange(n), 4000), n, np.repeat(keys, n), 6).reshape(-1, n)
        counts = np.stack([np.bincount(column, minlength=n) for column in images.T])
        freedom = (n - 1) ** 2  # rows and columns of the table both add up to 4,000
        chi = ((counts - 4000 / n) ** 2 / (4000 / n)).sum()
        assert abs(chi - freedom) / np.sqrt(2 * freedom) < 3.29


def test_nth_set_bit() -> None:
    word = 0x80010106
    places = [i for i in range(32) if word >> i & 1]
    words = np.full(len(places), word, np.uint32)
    assert nth_set_bit(words, np.arange(len(places))).tolist() == places


SMALL = np.array([0xFFFFFFFF, 0, 0x0F0F0F0F, 0x80000001, 0xFFFFFFFF], np.uint32)


LITERAL_CHOICES = [0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0]  # made by plain Python integers


def test_literal_rows() -> None:
    """Made by another implementation. If this fails, runs can no longer be resumed: never update the numbers."""
    order = Order([SMALL], seed=0, lanes=4)
    assert order(0, 24)[1].tolist() == [
        12, 6, 8, 18, 9, 3, 72, 23, 74, 28, 25, 24, 82, 91, 134, 138, 130, 83, 144, 147, 143, 157, 159, 146
    ]  # fmt: skip
    assert order(FAR // 8 * 8, 8)[1].tolist() == [64, 65, 133, 136, 155, 7, 26, 14]
    order = Order([SMALL], seed=7, lanes=8, window=3)
    assert order(0, 24)[1].tolist() == [
        0, 1, 3, 10, 11, 12, 21, 20, 23, 30, 31, 64, 74, 75, 81, 129, 128, 130, 138, 139, 142, 149, 148, 151
    ]  # fmt: skip
    assert order(FAR // 8 * 8, 8)[1].tolist() == [64, 83, 4, 14, 25, 130, 141, 150]
    source, rows, samples = Order([SMALL, SMALL], 3, 2, 0, [1, 3])(0, 16)
    assert source.tolist() == [0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    assert rows.tolist() == [12, 65, 132, 80, 20, 1, 6, 12, 130, 138, 143, 141, 27, 135, 88, 26]
    assert samples.tolist() == [*range(0, 16, 2), *range(1, 16, 2)]


def test_seeds_and_epochs_differ() -> None:
    words = words_of(0, 40, 0.9)
    order = Order([words], 0, 4)
    first, second = np.split(by_number(order, 0, 2 * order.epoch_samples), 2)
    assert (first != second).mean() > 0.9
    assert (first != by_number(Order([words], 1, 4), 0, len(first))).mean() > 0.9


def test_a_window_keeps_rows_together() -> None:
    """With windows of 32, any 64 samples of a lane come from few blocks; without, from many."""
    words = np.full(512, 0xFFFFFFFF, np.uint32)
    near, wide = (
        Order([words], 5, 4, window)(0, 1024)[1].reshape(4, -1) // 32 for window in (32, 0)
    )
    for lane in range(4):
        assert len(set(near[lane, 64:128].tolist())) <= 4
        assert len(set(wide[lane, 64:128].tolist())) > 30


@pytest.mark.parametrize("weights", [None, [1, 3], [0.5, 0.3, 0.2]])
def test_mixture_shares_and_epochs(weights: list[float] | None) -> None:
    sources = len(weights) if weights else 2
    words = [words_of(s, 6 + 5 * s, 0.9) for s in range(sources)]
    lanes = 4
    order = Order(words, 11, lanes, 16, weights)
    source, rows, samples = order(0, 4096 * lanes)
    sizes = [len(rows_of(w)) // lanes for w in words]
    share = np.array(weights or sizes, float) / sum(weights or sizes)
    np.testing.assert_allclose(np.bincount(source) / source.size, share, atol=1.01 / 4096)
    for s, n in enumerate(sizes):
        for epoch in range(3):  # each source has epochs of its own: every row once
            epoch_rows = [
                rows[(source == s) & (samples % lanes == lane)][epoch * n : (epoch + 1) * n]
                for lane in range(lanes)
            ]  # samples of a lane are listed in order
            assert len(set(np.concatenate(epoch_rows).tolist())) == n * lanes
    parts = [Order(words, 11, lanes, 16, weights)(FAR, 16, 4, r) for r in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), order(FAR, 16))


def test_captions_are_chosen_by_sample_number_alone() -> None:
    order, samples = Order([SMALL], 5, 2), FAR + np.arange(20_000)
    chosen = order.choose(samples, [0.2, 0.5, 0.3])
    share = np.bincount(chosen) / chosen.size
    np.testing.assert_allclose(share, [0.2, 0.5, 0.3], atol=0.012)  # over 3 deviations
    other = Order([SMALL[:3]], 5, 4, 7)  # other rows, lanes and window: the same captions
    for start in (0, 7, 19_990):
        part = other.choose(samples[start : start + 10], [0.2, 0.5, 0.3])
        np.testing.assert_array_equal(part, chosen[start : start + 10])
    assert (Order([SMALL], 6, 2).choose(samples, [0.2, 0.5, 0.3]) != chosen).mean() > 0.4
    # as the rate of one grows, no sample goes back to another
    grown = order.choose(samples, [0.4, 0.3, 0.3])
    assert (grown[chosen == 0] == 0).all()
    # literal: if this fails, runs that mix captions can no longer be resumed
    assert order.choose(np.arange(16), [0.5, 0.5]).tolist() == LITERAL_CHOICES
    assert not order.choose(samples, [1.0]).any()


def test_refusals() -> None:
    order = Order([SMALL], lanes=4)
    with pytest.raises(OrderError, match="batch 6 and position 0 must be multiples of the 4 lanes"):
        order(0, 6)
    with pytest.raises(OrderError, match="batch 8 and position 2 must be multiples of the 4 lanes"):
        order(2, 8)
    for position, batch in ((-4, 8), (0, 0), (0, -4), (2**60, 8)):
        with pytest.raises(OrderError, match="from 0 and global batch"):
            order(position, batch)
    for world in (3, 0, 16):
        with pytest.raises(OrderError, match=f"a world of {world} ranks does not divide"):
            order(0, 8, world, 0)
    for rank in (-1, 2):
        with pytest.raises(OrderError, match=f"rank {rank} is not one of the 2"):
            order(0, 8, 2, rank)
    with pytest.raises(OrderError, match="82 valid rows cannot fill 100 lanes"):
        Order([SMALL], lanes=100)
    with pytest.raises(OrderError, match="0 valid rows"):
        Order([np.zeros(4, np.uint32)], lanes=1)
    for lanes, window, seed in ((0, 0, 0), (1, -1, 0), (1, 0, -1), (1, 0, 2**64)):
        with pytest.raises(OrderError, match="expected"):
            Order([SMALL], seed, lanes, window)
    with pytest.raises(OrderError, match="source 0 has 0.0001 of the weight: at least 1 / 8192"):
        Order([SMALL, SMALL], lanes=2, weights=[1e-4, 1])
    for weights in ([1.0], [1, 0], [1, -1], [1, 1, 1], [float("nan"), 1], [1, float("inf")]):
        with pytest.raises(OrderError, match="one above 0 for each of 2 sources"):
            Order([SMALL, SMALL], lanes=2, weights=weights)


def test_identity_tells_orders_apart() -> None:
    changed = SMALL.copy()
    changed[0] ^= 1
    identities = [
        Order([SMALL], 0, 4).identity(),
        Order([SMALL], 1, 4).identity(),
        Order([SMALL], 0, 2).identity(),
        Order([SMALL], 0, 4, 8).identity(),
        Order([changed], 0, 4).identity(),
        Order([SMALL[[0, 2, 1, 3, 4]]], 0, 4).identity(),  # the same words, other rows
    ]
    assert len({repr(i) for i in identities}) == len(identities)
    assert Order([SMALL], 0, 4).identity() == identities[0]
