"""The point half-way between a row's latent and its nearest neighbour's, as iFID takes it.

arXiv 2603.05630: the Frechet distance of pictures decoded there to real ones goes with the distance
of what a model trained on these latents generates. With z the normalised posterior mean, flattened:

    nearest    the reference row of the highest cosine, among at most `reference_rows` rows
    half-way   slerp at 1/2, (a + b) / (2 cos(t / 2)), t the angle between a and b
    drawn      the published variant: one of the ten nearest, with probability softmax(-mean((a - b)^2))

Reference rows are none of the evaluated ones, and the same for all columns of one source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Column, canonical_json, sha256
from shards.probe import common_rows, evenly
from shards.read import draw

from ..errors import BadRequest, OtherImages, TooFewImages

Ints = NDArray[np.int64]
BLOCK = 1_024  # reference rows that are compared at a time
PART_BYTES = 1 << 30  # of evaluated latents that are held at once
DRAWN = 64  # rows whose neighbours are read at a time
DRAW_SEED = 2603_05630  # of the drawn neighbours, with the row's id
LEAST_COSINE = -1 + 1e-6  # of two latents that have a point half-way


@dataclass(frozen=True)
class Interpolation:
    """Which neighbour a row has: `of` makes one."""

    reference: Column  # of the same encoder as the column that is evaluated
    rows: Ints  # of the reference, ascending, none of which is evaluated
    neighbours: int = 1
    draw: bool = False  # one of the neighbours; else the nearest

    @classmethod
    def of(
        cls, reference: Column, column: Column, evaluated: Ints, most: int = 50_000, neighbours: int = 1,
        draw: bool = False, also: Sequence[Column] = (),
    ) -> Interpolation:  # fmt: skip
        """Takes at most `most` `shared_rows` of the reference, evenly apart, without the evaluated ones where
        both columns are of one source.

        Raises OtherImages where the reference is of another encoder or norm than the column, or where this
        has no norm, TooFewImages where there are fewer of them than neighbours.
        """
        theirs, own = reference.identity, column.identity
        made_by = [(i.encoder.cls, i.encoder.weights, i.picture.resolution) for i in (theirs, own)]
        if made_by[0] != made_by[1] or reference.spec.norm != column.spec.norm:
            raise OtherImages(
                f"{reference.path}: made by another encoder, or normalised otherwise, than {column.path}. The "
                "reference rows must be of the same encoder: name its column of another source, or none for the rest "
                "of this one"
            )
        if column.spec.norm is None:
            raise OtherImages(
                f"{column.path}: records no shift and scale, and neighbours are those of normalised latents. Encode "
                "it with a `norm` of its encoder, or leave the scores of neighbours out"
            )
        rows = shared_rows(reference, also)
        if theirs.source == own.source:
            rows = rows[~np.isin(rows, evaluated)]
        if len(rows) < neighbours:
            raise TooFewImages(
                f"{reference.path}: found {len(rows)} rows beside the evaluated ones, expected at least {neighbours} "
                "to take neighbours from. Evaluate fewer (--count), or name a column of another source "
                "(--neighbours_of)"
            )
        if most < neighbours:
            raise BadRequest(
                f"found --reference_rows {most}, expected at least the {neighbours} neighbours"
            )
        return cls(reference, evenly(rows, most), neighbours, draw)

    @property
    def folder(self) -> str:
        """The folder of the pictures: both variants may be in one `save_dir`."""
        return "interpolation-drawn" if self.draw else "interpolation"

    @property
    def record(self) -> dict[str, Any]:
        """What the pictures depend on beside the evaluated rows."""
        return {
            "source": self.reference.identity.source,
            "rows": sha256(self.rows.astype("<i8").tobytes()),
            "count": len(self.rows),
            "neighbours": self.neighbours,
            "draw": self.draw,
        }

    @property
    def digest(self) -> str:
        return sha256(canonical_json(self.record))[:8]


def shared_rows(column: Column, also: Sequence[Column] = ()) -> Ints:
    """Returns the rows of a column that are valid in it and in those of `also` that are of its source,
    ascending: the same for all columns that are named so.
    """
    source = column.identity.source
    return common_rows([column, *(other for other in also if other.identity.source == source)])


def means(column: Column, rows: Ints) -> Tensor:
    """Returns the posterior means (or latents) of rows as a decoder takes them, (N, C, H, W) fp32."""
    stored = torch.from_numpy(column.decoded(column.read(rows, check=True))).float()
    return stored.chunk(2, 1)[0] if column.layout.kind == "moments" else stored


def normalised(column: Column, rows: Ints) -> Tensor:
    """Returns the normalised posterior means (or latents) of rows, (N, C, H, W) fp32; OtherImages where one
    is not finite.
    """
    norm = column.spec.norm
    assert norm is not None
    latents = draw(means(column, rows), norm, None)
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not finite.all():
        row = int(rows[int(finite.logical_not().nonzero()[0, 0])])
        raise OtherImages(
            f"{column.path}: row {row} holds values that are not finite. `python -m shards verify` names them all; "
            "encode the column again"
        )
    return latents


def nearest(queries: Tensor, blocks: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Returns indices into the reference (Q, count) and cosines, the nearest first; `queries` (Q, D), blocks
    (R, D) on the same device. Of equal cosines the earlier row is the nearer.
    """
    unit = torch.nn.functional.normalize(queries, dim=1)
    best = torch.full((len(unit), 0), -2.0, device=unit.device)
    index = torch.zeros((len(unit), 0), dtype=torch.int64, device=unit.device)
    start = 0
    for block in blocks:
        cosines = unit @ torch.nn.functional.normalize(block, dim=1).T
        numbers = torch.arange(start, start + len(block), device=unit.device).expand(len(unit), -1)
        both, which = torch.cat([best, cosines], 1), torch.cat([index, numbers], 1)
        order = torch.sort(both, dim=1, descending=True, stable=True).indices[:, :count]
        best, index = both.gather(1, order), which.gather(1, order)
        start += len(block)
    return index, best


def chosen(
    how: Interpolation, column: Column, rows: Ints, device: str = "cpu",
    advance: Callable[[int], Any] = lambda count: None,
) -> Ints:  # fmt: skip
    """Returns the reference row of each evaluated one; `advance` is called with numbers of reference rows,
    `passes` times over all of them.
    """
    size = part_rows(column)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return np.concatenate([_chosen(how, column, part, device, advance) for part in parts])


def part_rows(column: Column) -> int:
    """Returns how many evaluated rows are held at once."""
    return max(1, PART_BYTES // (4 * math.prod(column.layout.row_shape)))


def passes(column: Column, rows: int) -> int:
    """Returns how often the reference rows are read for so many evaluated ones."""
    return -(-rows // part_rows(column))


def _chosen(
    how: Interpolation, column: Column, rows: Ints, device: str, advance: Callable[[int], Any]
) -> Ints:
    def blocks() -> Iterator[Tensor]:
        for start in range(0, len(how.rows), BLOCK):
            part = how.rows[start : start + BLOCK]
            yield normalised(how.reference, part).flatten(1).to(device)
            advance(len(part))

    queries = normalised(column, rows).flatten(1)
    empty = (queries == 0).all(1)
    if empty.any():  # it has no direction, so no row is nearest to it
        raise OtherImages(
            f"{column.path}: the normalised latent of row {int(rows[int(empty.nonzero()[0, 0])])} is 0 in every place, "
            "so no row is nearest to it. Encode the column again, or leave the scores of neighbours out"
        )
    index, _ = nearest(queries.to(device), blocks(), how.neighbours)
    neighbours = how.rows[index.cpu().numpy()]
    if not how.draw:
        return np.asarray(neighbours[:, 0])
    picks = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), DRAWN):  # a row that is a neighbour of several is read once
        part = slice(start, start + DRAWN)
        ids, where = np.unique(neighbours[part], return_inverse=True)
        around = normalised(how.reference, ids).flatten(1)[where.reshape(-1, how.neighbours)]
        picks[part] = [
            drawn(int(r), q, n) for r, q, n in zip(rows[part], queries[part], around, strict=True)
        ]
    return np.asarray(neighbours[np.arange(len(rows)), picks])


def drawn(row: int, query: Tensor, around: Tensor) -> int:
    """Returns which of the neighbours (K, D) is drawn for a row: always the same, whatever else is drawn."""
    distances = (around.double() - query.double()).square().mean(1)
    ends = torch.softmax(-distances, 0).cumsum(0)
    number = np.random.default_rng([DRAW_SEED, row]).random()
    return min(int((ends <= number).sum()), len(ends) - 1)


def half_way(a: Tensor, b: Tensor) -> Tensor:
    """Returns the slerp at 1/2 of two batches of latents (N, C, H, W), each row one vector.

    sin(t / 2) / sin(t) is 1 / (2 cos(t / 2)), and cos(t / 2) the root of (1 + cos t) / 2. OtherImages for
    vectors that point away from each other, which have no point half-way.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())
    if bool((cosine < LEAST_COSINE).any()):
        raise OtherImages(
            "two latents point in opposite directions, and have no point half-way. Take more reference rows"
        )
    scale = 2 * ((1 + cosine) / 2).sqrt()
    return (a + b) / scale.float().view(-1, 1, 1, 1)
