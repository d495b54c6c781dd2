"""Improved precision and recall (Kynkaanniemi et al. 2019): whose features lie among whose.

A set covers the balls around its pictures that reach to their third neighbour of the same set.
Precision is the share of generated pictures that real ones cover, recall the share of real pictures
that generated ones cover. Pairs are compared a block at a time: memory grows with the pictures, not
with their square.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .frechet import ROWS, Features, Floats

NEIGHBOURS = 3  # the paper's k
LEAST = NEIGHBOURS + 2  # pictures of a set, so that without one the others have their neighbours
NEGLIGIBLE = 1e-12  # of the squared norms: a squared distance that is 0 but for rounding

Ints = NDArray[np.int64]


def precision_influence(a: Features, b: Features) -> tuple[float, Floats]:
    """Returns the share of a (N, D) that b (M, D) covers, and each picture's influence on it (N,).

    b is fixed, so a picture adds whether it is covered, less the mean.
    """
    origin = b.mean(0, dtype=np.float64)
    radii = nearest(b, origin)[0][:, NEIGHBOURS - 1]
    covered = np.zeros(len(a), bool)
    for rows, columns, squares in _pairs(a, b, origin):
        covered[rows] |= (squares <= radii[columns]).any(1)
    return float(covered.mean()), covered - covered.mean()


def recall_influence(a: Features, b: Features) -> tuple[float, Floats]:
    """Returns the share of b (M, D) that a (N, D) covers, and each picture of a's influence on it (N,).

    The influence is what leaving the picture out takes away, times N - 1. Its ball goes, and the
    balls that it bounded grow to the next neighbour.
    """
    origin = b.mean(0, dtype=np.float64)
    squares_of, neighbours = nearest(a, origin)
    radii, wider = squares_of[:, NEIGHBOURS - 1], squares_of[:, NEIGHBOURS]
    balls = np.zeros(len(b), np.int64)  # that hold each of b
    last = np.zeros(len(b), np.int64)  # the centre of one of them
    near_rows, near_centres = [], []  # pairs of b and a ball that would hold it if it grew
    for rows, columns, squares in _pairs(b, a, origin):
        inside = squares <= radii[columns]
        balls[rows] += inside.sum(1)
        last[rows] = np.where(inside.any(1), columns.start + inside.argmax(1), last[rows])
        row, column = np.nonzero(~inside & (squares <= wider[columns]))
        near_rows.append(rows.start + row)
        near_centres.append(columns.start + column)
    row, centre = np.concatenate(near_rows), np.concatenate(near_centres)
    # (row of b, picture of a): the row would be covered, or stay so, if the picture were left out
    pairs = np.stack([np.repeat(row, NEIGHBOURS), neighbours[centre, :NEIGHBOURS].ravel()])
    row, picture = np.unique(pairs, axis=1)
    change = np.bincount(picture[balls[row] == 0], minlength=len(a))
    alone = balls == 1
    alone[row[alone[row] & (last[row] == picture)]] = False
    change -= np.bincount(last[alone], minlength=len(a))
    influences = -(len(a) - 1) / len(b) * change
    return float((balls > 0).mean()), influences - influences.mean()


def nearest(features: Features, origin: Floats) -> tuple[Floats, Ints]:
    """Returns squared distances to the NEIGHBOURS + 1 nearest others (N, NEIGHBOURS + 1), ascending,
    and which those are.
    """
    count = NEIGHBOURS + 1
    best = np.full((len(features), count), np.inf)
    names = np.zeros((len(features), count), np.int64)
    for rows, columns, squares in _pairs(features, features, origin):
        if rows == columns:
            np.fill_diagonal(squares, np.inf)
        numbers = np.broadcast_to(np.arange(columns.start, columns.stop), squares.shape)
        values = np.concatenate([best[rows], squares], 1)
        candidates = np.concatenate([names[rows], numbers], 1)
        order = np.argpartition(values, count - 1, axis=1)[:, :count]
        values, candidates = (np.take_along_axis(c, order, 1) for c in (values, candidates))
        order = np.argsort(values, axis=1, kind="stable")
        best[rows] = np.take_along_axis(values, order, 1)
        names[rows] = np.take_along_axis(candidates, order, 1)
    return best, names


def _pairs(x: Features, y: Features, origin: Floats) -> Iterator[tuple[slice, slice, Floats]]:
    """Yields rows of x, rows of y, and the squared distances between them, a block at a time."""
    for i in range(0, len(x), ROWS):
        rows = slice(i, min(i + ROWS, len(x)))
        p = x[rows] - origin
        for j in range(0, len(y), ROWS):
            columns = slice(j, min(j + ROWS, len(y)))
            q = y[columns] - origin
            norms = np.square(p).sum(1)[:, None] + np.square(q).sum(1)
            squares = norms - 2 * p @ q.T
            squares[squares <= NEGLIGIBLE * norms] = 0
            yield rows, columns, squares
