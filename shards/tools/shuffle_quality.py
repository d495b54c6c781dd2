"""How well an order mixes: variance of the mean of consecutive batches, against independent draws.

Rows that are near each other are often alike: they come from one site, album or crawl. Suppose a
share `icc` of a value's variance lies between units of adjacent rows. The mean of n samples, of
which n_u lie in unit u that holds the share p_u of all rows, then has the variance

    icc * sum over units (n_u / n - p_u)^2 + (1 - icc) * sum over rows (n_r / n - p_r)^2

about the mean of the data, which for independent draws is (icc * (1 - sum p_u^2) + ...) / n. The
quotient of the two needs no values and no simulation, only the rows that the order gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import OrderError
from ..format.layout import BLOCK
from ..read.order import Ints, Order

SPANS = (1, 8, 64)  # consecutive batches whose mean is looked at
ICC = 0.1  # share of the variance that lies between units


@dataclass(frozen=True, slots=True)
class BatchVariance:
    """Variance of the mean of `batches` batches, 1 = independent draws; units of `unit` rows."""

    unit: int
    batches: int
    order: float
    shuffled: float  # of a full shuffle of the same rows


def batch_variances(
    order: Order, batch: int, shard_rows: int, icc: float = ICC, spans: Sequence[int] = SPANS,
    places: int = 16,
) -> list[BatchVariance]:  # fmt: skip
    """Returns the variances for units of 32 rows, 256 rows and a shard, and each span of batches
    that fits an epoch, averaged over spans that begin at `places` places of the first epoch.

    Raises OrderError if not even one batch fits.
    """
    shuffle = Order([_valid_mask(order, s) for s in range(len(order.sources))], order.seed + 1, 1, 0,
                    order.weights)  # fmt: skip
    spans = [span for span in spans if span * batch <= order.epoch_samples]
    if not spans:
        raise OrderError(
            f"a batch of {batch} is more than an epoch ({order.epoch_samples} samples)"
        )
    results = []
    for unit in (BLOCK, 8 * BLOCK, shard_rows):
        inflation = [_inflation(o, batch, unit, icc, spans, places) for o in (order, shuffle)]
        for span, variance, shuffled_variance in zip(spans, *inflation, strict=True):
            results.append(BatchVariance(unit, span, variance, shuffled_variance))
    return results


def table(results: Sequence[BatchVariance]) -> str:
    """Returns them as text: a line a unit, a column a span, each `order (full shuffle)`."""
    spans = list(dict.fromkeys(m.batches for m in results))
    lines = ["unit        " + "".join(f"{f'{span} batches':>18}" for span in spans)]
    for unit in dict.fromkeys(m.unit for m in results):
        cells = [f"{m.order:.2f} ({m.shuffled:.2f})" for m in results if m.unit == unit]
        lines.append(f"{unit:6,} rows " + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _valid_mask(order: Order, source: int) -> NDArray[np.uint32]:
    """Returns the valid-row bits of a source."""
    blocks = order.sources[source].blocks
    mask = np.zeros(int(blocks[-1]) + 1, np.uint32)
    mask[blocks] = order.sources[source].valid_mask
    return mask


def _inflation(
    order: Order, batch: int, unit: int, icc: float, spans: Sequence[int], places: int
) -> list[float]:
    """Returns the variance of the mean of each span of batches, relative to independent draws."""
    longest = max(spans) * batch
    room = (order.epoch_samples - longest) // batch
    excess: dict[int, list[float]] = {span: [] for span in spans}
    units = _Units(order, unit)
    rows, row_squares = _row_shares(order)
    alone = icc * (1 - units.squares) + (1 - icc) * (1 - row_squares)
    for start in np.linspace(0, room, places).astype(int).tolist():
        source, row = order.at(start * batch + np.arange(longest))
        for span in spans:
            n = span * batch
            for first in range(0, longest - n + 1, n):
                s, r = source[first : first + n], row[first : first + n]
                between_units = distance(
                    s, r // unit, units.shares[units.starts[s] + r // unit], units.squares
                )
                between_rows = distance(s, r, rows[s], row_squares)
                excess[span].append((icc * between_units + (1 - icc) * between_rows) * n / alone)
    return [float(np.mean(excess[span])) for span in spans]


def distance(source: Ints, unit: Ints, expected: NDArray[np.float64], squares: float) -> float:
    """Returns the sum over all units of (share among these samples - share in a long run) squared.

    `expected`: the long run's share of each sample's unit; `squares`: their sum over all units.
    """
    _, counts = np.unique((source << 48) + unit, return_counts=True)
    return float(np.square(counts / source.size).sum() - 2 * expected.mean()) + squares


class _Units:
    """Which share of a long run's samples each unit has: `shares[starts[source] + unit]`."""

    def __init__(self, order: Order, unit: int) -> None:
        counts = [np.bincount(s.blocks // (unit // BLOCK), s.counts) for s in order.sources]
        weights = _weights(order)
        self.shares = np.concatenate(
            [c / c.sum() * w for c, w in zip(counts, weights, strict=True)]
        )
        self.starts = np.cumsum([0, *(c.size for c in counts)])
        self.squares = float(np.square(self.shares).sum())


def _row_shares(order: Order) -> tuple[NDArray[np.float64], float]:
    """Returns the share of a row of each source, and the sum of the squares over all rows."""
    valid = np.array([source.valid for source in order.sources], float)
    weights = _weights(order)
    return weights / valid, float((weights**2 / valid).sum())


def _weights(order: Order) -> NDArray[np.float64]:
    weights = np.array(order.weights or [source.valid for source in order.sources], float)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares
