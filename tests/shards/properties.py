"""What must hold of the order of samples for any sizes: plain functions of plain values.

`run(name, examples)` tries one of `PROPERTIES` on that many drawn cases.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards import Order
from shards.read.order import Union, key, permute

WORLDS, FAR = (2, 3, 4, 8), 10**9
Case = tuple[NDArray[np.uint32], int, int, int]  # words, seed, lanes, window


def words_of(seed: int, blocks: int, density: float) -> NDArray[np.uint32]:
    """Valid-row bits with the given share of rows."""
    bits = np.random.default_rng(seed).random((blocks, 32)) < density
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").ravel().astype(np.uint32)


def rows_of(words: NDArray[np.uint32]) -> set[int]:
    return {32 * b + i for b, w in enumerate(words.tolist()) for i in range(32) if w >> i & 1}


@st.composite
def sets_of_rows(draw: st.DrawFn, lanes: int) -> NDArray[np.uint32]:
    """Words with at least one row a lane."""
    density = draw(st.sampled_from([1.0, 0.97, 0.5, 0.05]))
    blocks = draw(st.integers(10, 40)) if draw(st.integers(0, 9)) else draw(st.integers(1, 10))
    words = words_of(draw(st.integers(0, 1000)), blocks, density)
    words[0] |= np.uint32((1 << lanes) - 1)
    return words


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    window = draw(st.sampled_from([0, 1, 3, 16, 64, 1000]))
    return draw(sets_of_rows(lanes)), draw(st.integers(0, 2**40)), lanes, window


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[NDArray[np.uint32]], int, int, int, list[float]]:
    """Two to four sources with their weights."""
    _, seed, _, window = draw(cases())
    lanes = draw(st.sampled_from([1, 2, 4]))
    weights = draw(st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0]), min_size=2, max_size=4))
    words = [words_of(draw(st.integers(0, 1000)), draw(st.integers(8, 40)), 0.8) for _ in weights]
    return words, seed, lanes, window, weights


def by_number(order: Order, position: int, count: int) -> NDArray[np.int64]:
    """Rows of samples position .. position+count-1 in order of their numbers."""
    _, rows, samples = order(position, count)
    result = np.empty(count, np.int64)
    result[samples - position] = rows
    return result


def each_epoch_once(case: Case, epochs: int = 3) -> None:
    """Every valid row once an epoch, but for fewer than a lane's number of rows."""
    words, seed, lanes, window = case
    order, valid = Order([words], seed, lanes, window), rows_of(words)
    epoch = order.epoch_samples
    assert epoch % lanes == 0
    assert 0 <= len(valid) - epoch < lanes
    rows = by_number(order, 0, epochs * epoch)
    for start in range(0, epochs * epoch, epoch):
        visited = set(rows[start : start + epoch].tolist())
        assert len(visited) == epoch
        assert visited <= valid


def late_epoch_once(case: Case, far: int) -> None:
    """The same of an epoch that far on."""
    words, seed, lanes, window = case
    order = Order([words], seed, lanes, window)
    epoch = order.epoch_samples
    rows = by_number(order, far // epoch * epoch, epoch).tolist()
    assert len(set(rows)) == epoch
    assert set(rows) <= rows_of(words)


def worlds_agree(case: Case, step: int) -> None:
    """Ranks of any world hold the parts of one global batch; where they can, whole lanes."""
    words, seed, lanes, window = case
    position, batch = step * lanes, math.lcm(24, lanes)  # 24: a multiple of every world
    full = Order([words], seed, lanes, window)(position, batch)
    assert sorted(full[2].tolist()) == list(range(position, position + batch))
    for world in WORLDS:
        order = Order([words], seed, lanes, window)
        parts = [order(position, batch, world, rank) for rank in range(world)]
        assert all(len(rows) == batch // world for _, rows, _ in parts)
        for gathered, expected in zip(zip(*parts, strict=True), full, strict=True):
            np.testing.assert_array_equal(np.concatenate(gathered), expected)
        if lanes % world == 0:  # then a lane is read by one rank alone
            owned = [set((samples % lanes).tolist()) for _, _, samples in parts]
            assert not any(a & b for a, b in itertools.combinations(owned, 2))


def batch_sizes_agree(case: Case, step: int, size: int) -> None:
    """A sample number is the same row in batches of any size, and where many are asked at once."""
    words, seed, lanes, window = case
    position, batch = step * lanes, size * lanes
    full = by_number(Order([words], seed, lanes, window), position, 6 * batch)
    order = Order([words], seed, lanes, window)
    for start in range(0, 6 * batch, batch):
        part = by_number(order, position + start, batch)
        np.testing.assert_array_equal(part, full[start : start + batch])
    shuffled = np.random.default_rng(step).permutation(6 * batch)
    np.testing.assert_array_equal(order.at(position + shuffled)[1], full[shuffled])


def restarts_agree(case: Case, step: int) -> None:
    """An order made anew at any position goes on as one that has travelled there."""
    words, seed, lanes, window = case
    position = step * lanes
    travelled = Order([words], seed, lanes, window)
    for before in (0, 5 * lanes, max(0, position - 4 * lanes)):
        travelled(before, 4 * lanes)
    fresh = Order([words], seed, lanes, window)(position, 4 * lanes)
    np.testing.assert_array_equal(travelled(position, 4 * lanes), fresh)


def union_once(case: Case, blocks: list[int]) -> None:
    """Sources laid end to end: each row of each of them once an epoch, under its own row id."""
    words, seed, lanes, window = case
    sources = [words, *(words_of(seed % 1000 + b, b, 0.7) for b in blocks)]
    union = Union(sources)
    order = Order([union.valid_mask], seed, lanes, window)
    epoch = order.epoch_samples
    source, row = union.split(by_number(order, epoch, epoch))
    visited = set(zip(source.tolist(), row.tolist(), strict=True))
    assert len(visited) == epoch
    assert visited <= {(s, r) for s, w in enumerate(sources) for r in rows_of(w)}
    assert sum(len(rows_of(w)) for w in sources) - epoch < lanes


def mixture_shares(
    mixture: tuple[list[NDArray[np.uint32]], int, int, int, list[float]], step: int
) -> None:
    """Weights hold over any 4,096 slots of a lane, and each source has epochs of its own."""
    words, seed, lanes, window, weights = mixture
    order = Order(words, seed, lanes, window, weights)
    lane, slots = step % lanes, step + np.arange(4096)
    source, _ = order.at(slots * lanes + lane)
    expected = np.array(weights) / sum(weights)
    result = np.bincount(source, minlength=len(words)) / source.size
    np.testing.assert_allclose(result, expected, atol=1.01 / 4096)
    source, rows, samples = order(0, 2048 * lanes)
    for s, w in enumerate(words):
        n = len(rows_of(w)) // lanes
        lane_rows = [rows[(source == s) & (samples % lanes == lane)] for lane in range(lanes)]
        full = min(len(r) for r in lane_rows) // n  # epochs that all lanes have ended
        for epoch in range(min(full, 3)):
            visited = np.concatenate([r[epoch * n : (epoch + 1) * n] for r in lane_rows]).tolist()
            assert len(set(visited)) == n * lanes
            assert set(visited) <= rows_of(w)
    for world in WORLDS:
        fresh = Order(words, seed, lanes, window, weights)
        batch = math.lcm(24, lanes)
        parts = [fresh(step * lanes, batch, world, rank) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), order(step * lanes, batch))


def permute_is_a_bijection(n: int, seed: int, spare: int) -> None:
    bits = max(6, (n - 1).bit_length()) + spare
    assert sorted(permute(np.arange(n), n, key(seed), bits).tolist()) == list(range(n))


steps = st.one_of(st.integers(0, 200), st.integers(0, FAR))
PROPERTIES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "each epoch once": (each_epoch_once, (cases(),)),
    "a late epoch once": (late_epoch_once, (cases(), st.integers(0, FAR))),
    "worlds agree": (worlds_agree, (cases(), steps)),
    "batch sizes agree": (batch_sizes_agree, (cases(), steps, st.integers(1, 5))),
    "restarts agree": (restarts_agree, (cases(), steps)),
    "a union once": (union_once, (cases(), st.lists(st.integers(1, 20), min_size=1, max_size=3))),
    "shares of a mixture": (mixture_shares, (mixtures(), steps)),
    "permute is a bijection": (
        permute_is_a_bijection,
        (st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 3)),
    ),
}


def run(name: str, examples: int) -> None:
    """Try a property on that many cases; raises AssertionError with the smallest that fails."""
    body, strategies = PROPERTIES[name]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(st.tuples(*strategies))
    def tried(drawn: tuple[Any, ...]) -> None:
        body(*drawn)

    tried()
