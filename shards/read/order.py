"""The order of samples: a pure function of (seed, position), the same for every world size, batch
size and restart.

1. blocks: 32 adjacent rows, one uint32 of valid-row bits each; blocks without a valid row drop out
2. stream: each epoch permutes the blocks and lays their valid rows end to end
3. lanes: lane l is ranks l*n .. (l+1)*n-1 of the stream, n = valid rows // lanes; the rest (fewer
   than lanes) sits the epoch out
4. windows: a lane is cut into equal parts of at most `window` samples (0: one part), and each part
   is permuted
5. sample g of the run, counted over all epochs, is sample g // lanes of lane g % lanes

A batch at position p is samples p .. p+B-1, listed lane by lane, of which rank r of R takes the
r-th of R equal slices. Nothing is stored for each sample: both permutations are computed at a point
(`permute`), and a rank in the stream is found by bisection in the cumulative counts of the permuted
blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OrderError
from ..format.atomic import Json
from ..format.layout import BLOCK

ROUNDS = 8  # even, so that halves of unequal width come back to their places
FAREST = 2**56  # samples a run may come to: all sums below stay within 64 bits
MINIMUM_BITS = 6  # below, the permutation is visibly uneven (chi-square)
PERIOD = 4096  # mixture weights are multiples of 1 / PERIOD
# Odd, so that j * STRIDE % PERIOD visits every slot, and near PERIOD / golden ratio, so that any
# stretch of it is even (an additive recurrence of low discrepancy): the slots of each source are
# spread over the period.
STRIDE = 2531
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's increment
BLOCKS, WINDOW, SOURCE, CAPTION = 1, 2, 3, 4  # what a key is for
SHARE_BITS = 53  # rates are cut to multiples of 2**-53, as a double holds them

Ints = NDArray[np.int64]
U64 = np.uint64
M1, M2 = U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)
S30, S27, S31 = U64(30), U64(27), U64(31)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns splitmix64's finaliser of each number (Steele, Lea and Flood 2014, with Stafford's
    constants "mix 13"): integers only, so the same on every platform and numpy version.
    """
    x = x ^ (x >> S30)
    x *= M1
    x ^= x >> S27
    x *= M2
    x ^= x >> S31
    return x


def key(*parts: Any) -> NDArray[np.uint64]:
    """Returns a 64-bit key of integers or integer arrays (broadcast)."""
    state = np.zeros(1, U64)
    for part in parts:
        state = mix((state ^ np.asarray(part).astype(U64)) + U64(GOLDEN))
    return state


def permute(x: Any, n: Any, keys: Any, bits: int) -> Ints:
    """Returns the image of each x < n under the permutation of range(n) that its key names.

    A Feistel network (Luby and Rackoff 1988) with `mix` as its round function permutes 2**bits
    numbers; cycle walking (Black and Rogaway 2002), which applies it again until the result is below
    n, makes a permutation of range(n) of that. 2**bits >= n; up to 2n, two steps are expected at
    most. The caller fixes `bits`: taken from the n of one call, the result would depend on what else
    is in the call.
    """
    low, high = bits // 2, bits - bits // 2
    x, n, keys = (np.array(a, U64) for a in np.broadcast_arrays(x, n, keys))
    walking = np.arange(x.size)
    while walking.size:
        # the left half has a bits, the right b
        value, seed, a, b = x[walking], keys[walking], high, low
        left, right = value >> U64(b), value & U64((1 << b) - 1)
        for r in range(ROUNDS):  # (L, R) -> (R, L xor F(R, key of the round))
            f = mix(right ^ (seed + U64(r * GOLDEN % 2**64))) & U64((1 << a) - 1)
            left, right, a, b = right, left ^ f, b, a
        x[walking] = value = (left << U64(b)) | right
        walking = walking[value >= n[walking]]
    image: Ints = x.astype(np.int64)
    return image


def nth_set_bit(blocks: NDArray[np.uint32], n: Ints) -> Ints:
    """Returns the place of the n-th (from 0) set bit of each block of 32."""
    octets = blocks.astype("<u4").view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, bitorder="little")
    place: Ints = (bits.cumsum(1, dtype=np.uint8) == (n + 1)[:, None]).argmax(1)
    return place


class SourceOrder:
    """The order of one source's rows, lane by lane and epoch by epoch."""

    def __init__(self, valid_mask: NDArray[np.uint32], seed: int, lanes: int, window: int) -> None:
        self.blocks = np.flatnonzero(valid_mask).astype(np.uint32)
        self.valid_mask, self.seed, self.lanes = valid_mask[self.blocks], seed, lanes
        self.digest = hashlib.sha256(
            self.blocks.astype("<u4").tobytes() + self.valid_mask.astype("<u4").tobytes()
        ).hexdigest()
        self.counts = np.bitwise_count(self.valid_mask)
        self.valid = int(self.counts.sum(dtype=np.int64))
        self.lane_samples = self.valid // lanes  # of a lane in an epoch
        if not self.lane_samples:
            raise OrderError(
                f"{self.valid} valid rows cannot fill {lanes} lanes. Use fewer lanes, or more data"
            )
        self.windows = -(-self.lane_samples // window) if window else 1
        largest = -(-self.lane_samples // self.windows)
        self._window_bits = max(MINIMUM_BITS, (largest - 1).bit_length())
        self._epochs: dict[int, tuple[NDArray[np.uint32], Ints]] = {}

    def rows_beyond(self, valid_mask: NDArray[np.uint32]) -> int:
        """Returns how many of the rows are not among those of another mask."""
        known = self.blocks < valid_mask.size
        admitted = np.zeros_like(self.valid_mask)
        admitted[known] = valid_mask[self.blocks[known]]
        return int(np.bitwise_count(self.valid_mask & ~admitted).sum(dtype=np.int64))

    def _epoch(self, epoch: int) -> tuple[NDArray[np.uint32], Ints]:
        """Permuted blocks, and the stream rank at which each ends: 12 bytes a block. Two epochs are
        kept, for a batch may lie across their border.
        """
        if epoch not in self._epochs:
            self._epochs = dict(list(self._epochs.items())[-1:])
            m = self.blocks.size
            bits = max(MINIMUM_BITS, m.bit_length())
            order = permute(np.arange(m), m, key(self.seed, BLOCKS, epoch), bits).astype(np.uint32)
            self._epochs[epoch] = order, np.cumsum(self.counts[order], dtype=np.int64)
        return self._epochs[epoch]

    def rows(self, lane: Ints, sample: Ints) -> Ints:
        """Returns the row id of sample `sample` (counted over all epochs) of each lane."""
        n = self.lane_samples
        epochs, i = np.divmod(sample, n)
        # window w is [w*n // windows, (w+1)*n // windows)
        window = ((i + 1) * self.windows - 1) // n
        start = window * n // self.windows
        size = (window + 1) * n // self.windows - start
        keys = key(self.seed, WINDOW, epochs, lane, window)
        i = start + permute(i - start, size, keys, self._window_bits)
        rows = np.empty(sample.size, np.int64)
        for epoch in np.unique(epochs):
            at = np.flatnonzero(epochs == epoch)
            order, ends = self._epoch(int(epoch))
            rank = lane[at] * n + i[at]
            place = np.searchsorted(ends, rank, "right")
            block = order[place]
            bit = nth_set_bit(self.valid_mask[block], rank - ends[place] + self.counts[block])
            rows[at] = self.blocks[block].astype(np.int64) * BLOCK + bit
        return rows


class Union:
    """Rows of several sources laid end to end, so that one order runs over all of them.

    valid_masks: valid-row bits of each source, (row ids / 32,) uint32.
    """

    def __init__(self, valid_masks: Sequence[NDArray[np.uint32]]) -> None:
        self.valid_mask = valid_masks[0] if len(valid_masks) == 1 else np.concatenate(valid_masks)
        self._starts = BLOCK * np.cumsum([0, *(w.size for w in valid_masks)])

    def split(self, rows: Ints) -> tuple[Ints, Ints]:
        """Returns (source, row id in it) of row ids of the union."""
        source: Ints = np.searchsorted(self._starts, rows, "right") - 1
        return source, rows - self._starts[source]


class Order:
    """The samples of a run over one or more sources.

    valid_masks: valid-row bits of each source, (row ids / 32,) uint32. weights: share of each source
    in the run, rounded to 1 / 4,096; None is in proportion to size. Raises OrderError for a source
    with fewer valid rows than lanes.
    """

    def __init__(
        self,
        valid_masks: Sequence[NDArray[np.uint32]],
        seed: int = 0,
        lanes: int = 64,
        window: int = 0,
        weights: Sequence[float] | None = None,
    ) -> None:
        if lanes < 1 or window < 0 or not 0 <= seed < 2**64:
            raise OrderError(
                f"lanes {lanes} >= 1, window {window} >= 0 and seed {seed} from 0 to 2^64 - 1 expected"
            )
        if weights is not None and (
            len(weights) != len(valid_masks) or not all(0 < w < float("inf") for w in weights)
        ):
            raise OrderError(
                f"weights {list(weights)}: one above 0 for each of {len(valid_masks)} sources expected"
            )
        seeds = [seed, *(int(key(seed, SOURCE, s)[0]) for s in range(1, len(valid_masks)))]
        pairs = zip(valid_masks, seeds, strict=True)
        self.sources = [SourceOrder(mask, number, lanes, window) for mask, number in pairs]
        self.seed, self.lanes, self.window = seed, lanes, window
        self.weights = list(weights) if weights is not None else None
        share = np.array(weights or [s.lane_samples for s in self.sources], float)
        cuts = np.rint(np.cumsum(share / share.sum()) * PERIOD).astype(int)
        if (absent := np.flatnonzero(np.diff(cuts, prepend=0) == 0)).size:
            raise OrderError(
                f"source {absent[0]} has {share[absent[0]] / share.sum():.2g} of the weight: at least 1 / "
                f"{2 * PERIOD} expected, else none of its samples come. Give it more, or leave it out"
            )
        self._pattern = np.searchsorted(cuts, np.arange(PERIOD) * STRIDE % PERIOD, "right")
        # slots of each source before slot j of the period, (PERIOD + 1, sources)
        slots = np.eye(len(valid_masks), dtype=int)[self._pattern]
        self._before = np.vstack([np.zeros(len(valid_masks), int), np.cumsum(slots, 0)])

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch; with several sources, of all their epochs together."""
        return sum(source.lane_samples for source in self.sources) * self.lanes

    def identity(self) -> Json:
        """Returns what the order depends on: part of a run's identity, compared on resume."""
        return {
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
            "weights": self.weights,
            "valid": [source.digest for source in self.sources],
        }

    def check(self, position: int, batch: int, world: int = 1) -> None:
        """Raises OrderError unless position and batch are multiples of the lanes and the world
        divides the batch.
        """
        if not 0 <= position <= FAREST or not 1 <= batch <= FAREST:
            raise OrderError(
                f"position {position} from 0 and global batch {batch} from 1 to {FAREST} expected"
            )
        if batch % self.lanes or position % self.lanes:
            raise OrderError(
                f"global batch {batch} and position {position} must be multiples of the "
                f"{self.lanes} lanes (--lanes, data.lanes)"
            )
        if world < 1 or batch % world:
            raise OrderError(f"a world of {world} ranks does not divide the global batch {batch}")

    def __call__(
        self, position: int, batch: int, world: int = 1, rank: int = 0
    ) -> tuple[Ints, Ints, Ints]:
        """Returns (source, row id, sample number) of one rank's part of the global batch at
        `position`, lane by lane.
        """
        self.check(position, batch, world)
        samples = position + self.places(batch, world, rank)
        return *self.at(samples), samples

    def places(self, batch: int, world: int = 1, rank: int = 0) -> Ints:
        """Returns which samples of a global batch are a rank's, counted from the batch's position, in
        the order in which a batch lists them: lane by lane.
        """
        self.check(0, batch, world)
        if not 0 <= rank < world:
            raise OrderError(f"rank {rank} is not one of the {world} ranks 0..{world - 1}")
        places: Ints = np.arange(batch).reshape(-1, self.lanes).T.ravel()
        return places[rank * batch // world : (rank + 1) * batch // world]

    def at(self, samples: Ints) -> tuple[Ints, Ints]:
        """Returns (source, row id) of any sample numbers. A call costs about as much for 1,000 as
        for one, so ask for many batches at once.
        """
        i, lane = np.divmod(samples, self.lanes)
        if len(self.sources) == 1:
            return np.zeros(samples.size, np.int64), self.sources[0].rows(lane, i)
        phase = lane * PERIOD // self.lanes  # each lane starts elsewhere in the period
        source: Ints = self._pattern[(i + phase) % PERIOD]
        rows = np.empty(samples.size, np.int64)
        for s, order in enumerate(self.sources):
            at = np.flatnonzero(source == s)
            turn = self._slots(s, i[at] + phase[at]) - self._slots(s, phase[at])
            rows[at] = order.rows(lane[at], turn)
        return source, rows

    def _slots(self, source: int, slot: Ints) -> Ints:
        """Returns how many of a lane's slots 0 .. slot-1 belong to a source."""
        whole, rest = np.divmod(slot, PERIOD)
        slots: Ints = whole * self._before[-1, source] + self._before[rest, source]
        return slots

    def choose(self, samples: Ints, rates: Sequence[float]) -> Ints:
        """Returns which of several captions each sample takes, (B,): the k-th at `rates[k]` of them.
        A function of (seed, sample number) alone.
        """
        if len(rates) == 1:
            return np.zeros(samples.size, np.int64)
        cuts = np.rint(np.cumsum(rates) / np.sum(rates) * 2.0**SHARE_BITS).astype(U64)
        number = key(self.seed, CAPTION, samples) >> U64(64 - SHARE_BITS)
        choice: Ints = np.searchsorted(cuts[:-1], number, "right")
        return choice
