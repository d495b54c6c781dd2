"""The order of samples: properties for any sizes, and literal rows, so that it can never change unnoticed."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards import Order, OrderError
from shards.order import key, nth_set_bit, permute

FAR = 10**9


def words_of(seed: int, blocks: int, density: float) -> NDArray[np.uint32]:
    """Valid-row bits with the given share of rows."""
    bits = np.random.default_rng(seed).random((blocks, 32)) < density
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").ravel().astype(np.uint32)


def rows_of(words: NDArray[np.uint32]) -> set[int]:
    return {32 * b + i for b, w in enumerate(words.tolist()) for i in range(32) if w >> i & 1}


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.uint32], int, int, int]:
    """(words, seed, lanes, window) with at least one row a lane."""
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    density = draw(st.sampled_from([0.05, 0.5, 0.97, 1.0]))
    words = words_of(draw(st.integers(0, 1000)), draw(st.integers(1, 40)), density)
    words[0] |= np.uint32((1 << lanes) - 1)  # an epoch of one sample a lane, at the least
    return words, draw(st.integers(0, 2**40)), lanes, draw(st.sampled_from([0, 1, 3, 16, 64, 1000]))


def first_samples(order: Order, count: int) -> NDArray[np.int64]:
    """Rows of samples 0 .. count-1 by sample number."""
    _, rows, samples = order(0, count)
    by_number = np.empty(count, np.int64)
    by_number[samples] = rows
    return by_number


@settings(max_examples=60, deadline=None)
@given(cases())
def test_each_epoch_has_every_valid_row_once(
    case: tuple[NDArray[np.uint32], int, int, int],
) -> None:
    words, seed, lanes, window = case
    order, valid = Order([words], seed, lanes, window), rows_of(words)
    epoch = order.epoch_samples
    assert epoch % lanes == 0
    assert 0 <= len(valid) - epoch < lanes
    rows = first_samples(order, 3 * epoch)
    for start in (0, epoch, 2 * epoch):
        seen = set(rows[start : start + epoch].tolist())
        assert len(seen) == epoch
        assert seen <= valid


@settings(max_examples=10, deadline=None)
@given(cases(), st.integers(0, 10**7))
def test_worlds_restarts_and_batches_agree(
    case: tuple[NDArray[np.uint32], int, int, int], step: int
) -> None:
    words, seed, lanes, window = case
    position, batch = step * lanes, 24 * lanes  # a multiple of every world below
    whole = Order([words], seed, lanes, window)(position, batch)
    assert sorted(whole[2].tolist()) == list(range(position, position + batch))
    for world in (2, 3, 4, 8):
        parts = [
            Order([words], seed, lanes, window)(position, batch, world, r) for r in range(world)
        ]
        assert all(len(rows) == batch // world for _, rows, _ in parts)
        for gathered, expected in zip(zip(*parts, strict=True), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(gathered), expected)
        if lanes % world == 0:  # then a lane is read by one rank alone
            owned = [set((samples % lanes).tolist()) for _, _, samples in parts]
            assert not any(a & b for a, b in itertools.combinations(owned, 2))
    by_number = dict(zip(whole[2].tolist(), whole[1].tolist(), strict=True))
    order = Order([words], seed, lanes, window)
    for start in range(0, batch, 8 * lanes):  # smaller batches, from another start
        _, rows, samples = order(position + start, 8 * lanes)
        assert [by_number[g] for g in samples.tolist()] == rows.tolist()


@settings(max_examples=20, deadline=None)
@given(cases())
def test_far_on_is_the_same_from_anew(case: tuple[NDArray[np.uint32], int, int, int]) -> None:
    words, seed, lanes, window = case
    far = FAR // lanes * lanes
    travelled = Order([words], seed, lanes, window)
    for position in (0, 5 * lanes, far - 4 * lanes):
        travelled(position, 4 * lanes)
    fresh = Order([words], seed, lanes, window)(far, 4 * lanes)
    np.testing.assert_array_equal(travelled(far, 4 * lanes), fresh)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 3))
def test_permute_is_a_bijection(n: int, seed: int, spare: int) -> None:
    bits = max(6, (n - 1).bit_length()) + spare
    assert sorted(permute(np.arange(n), n, key(seed), bits).tolist()) == list(range(n))


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
    one, two = np.split(first_samples(order, 2 * order.epoch_samples), 2)
    assert (one != two).mean() > 0.9
    assert (one != first_samples(Order([words], 1, 4), len(one))).mean() > 0.9


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
            seen = [
                rows[(source == s) & (samples % lanes == lane)][epoch * n : (epoch + 1) * n]
                for lane in range(lanes)
            ]  # samples of a lane are listed in order
            assert len(set(np.concatenate(seen).tolist())) == n * lanes
    parts = [Order(words, 11, lanes, 16, weights)(FAR, 16, 4, r) for r in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), order(FAR, 16))


def test_refusals() -> None:
    order = Order([SMALL], lanes=4)
    with pytest.raises(OrderError, match="batch 6 and position 0 must be multiples of the 4 lanes"):
        order(0, 6)
    for position, batch in ((2, 8), (-4, 8), (0, 0), (0, -4)):
        with pytest.raises(OrderError, match="multiples of the 4 lanes"):
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
    for lanes, window, seed in ((0, 0, 0), (1, -1, 0), (1, 0, -1)):
        with pytest.raises(OrderError, match="expected"):
            Order([SMALL], seed, lanes, window)
    for weights in ([1.0], [1, 0], [1, -1], [1, 1, 1]):
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
