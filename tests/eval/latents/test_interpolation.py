"""Neighbours and points half-way between latents, beside a plain loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.errors import BadRequest, OtherImages, TooFewImages
from eval.latents import interpolation
from eval.latents.interpolation import (
    DRAW_SEED,
    Interpolation,
    chosen,
    drawn,
    half_way,
    nearest,
    normalised,
    shared_rows,
)
from shards import Column, ColumnSpec, Norm, ShardWriter, Status, create_column, put_complete
from tests.shards.toy import SHAPE, moments_spec

COUNT = 60


def spec(weights: str = "vae") -> ColumnSpec:
    moments = moments_spec()
    encoder = {"class": "AutoencoderKL", "path": "vae", "weights": weights}
    preprocess = {"image": "jpg", "resolution": 32}
    return replace(
        moments, identity={**moments.identity, "encoder": encoder, "preprocess": preprocess}
    )


def random_column(path: Path, weights: str = "vae", absent: Sequence[int] = ()) -> Column:
    """One shard of 2 * COUNT rows of normal numbers; all are ok but those that are absent."""
    single = replace(spec(weights), layout=replace(spec().layout, shards=1))
    digest = create_column(path, single)
    writer = ShardWriter(path, single, digest, 0, 2 * COUNT, "index")
    chance = np.random.default_rng(len(weights))
    values = chance.standard_normal((2 * COUNT, *SHAPE)).astype(np.float16)
    status = np.full(2 * COUNT, Status.OK, np.uint8)
    status[list(absent)] = Status.IMAGE_UNDECODABLE
    values[list(absent)] = 0
    writer.put_block(values, status)
    writer.commit({"host": "toy"})
    put_complete(path, digest, 1, allow_failed=False)
    return Column.open(path)


@pytest.fixture(scope="module")
def column(tmp_path_factory: pytest.TempPathFactory) -> Column:
    return random_column(tmp_path_factory.mktemp("cache") / "vae")


NOTHING = np.array([], np.int64)


def setting(column: Column) -> tuple[np.ndarray, Interpolation]:
    """The evaluated rows, and the others of the column as reference."""
    evaluated = Interpolation.of(column, column, NOTHING).rows[:COUNT]
    return evaluated, Interpolation.of(column, column, evaluated)


def plain(column: Column, rows: np.ndarray) -> list[list[float]]:
    """Normalised means of rows, flattened, by Python alone."""
    norm = column.spec.norm
    assert norm is not None
    stored = column.read(rows).astype(np.float64)
    channels = stored.shape[1] // 2
    shift, scale = (np.broadcast_to(v, stored[0, :channels].shape) for v in norm.arrays)
    return [((row[:channels] - shift) * scale).ravel().tolist() for row in stored]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_neighbours_and_latents_equal_a_plain_loop(column: Column) -> None:
    evaluated, how = setting(column)
    assert not set(evaluated) & set(how.rows)
    queries, others = plain(column, evaluated), plain(column, how.rows)
    expected = [
        max(range(len(others)), key=lambda i: cosine(query, others[i])) for query in queries
    ]
    neighbours = chosen(how, column, evaluated)
    assert neighbours.tolist() == how.rows[expected].tolist()
    latents = half_way(normalised(column, evaluated), normalised(column, neighbours))
    for latent, a, b in zip(latents, queries, (others[i] for i in expected), strict=True):
        angle = math.acos(cosine(a, b))
        share = math.sin(angle / 2) / math.sin(angle)
        slerp = [share * x + share * y for x, y in zip(a, b, strict=True)]
        np.testing.assert_allclose(latent.ravel(), slerp, atol=1e-5)


def test_blocks_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, others = (torch.randn(n, 24, generator=generator) for n in (7, 50))
    others[40] = others[3]  # of two equal rows the earlier one is the nearer

    def blocks(size: int) -> Iterator[torch.Tensor]:
        return iter(others.split(size))

    whole, cosines = nearest(queries, blocks(50), 5)
    assert (cosines.diff(dim=1) <= 0).all()
    for size in (1, 7, 49):
        assert nearest(queries, blocks(size), 5)[0].tolist() == whole.tolist()
    index, _ = nearest(others[3:4], blocks(10), 2)
    assert index.tolist() == [[3, 40]]


def test_parts_of_the_evaluated_rows_change_nothing(
    column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, _ = setting(column)
    for neighbours in (1, 4):
        how = Interpolation.of(column, column, evaluated, 40, neighbours, neighbours > 1)
        whole = chosen(how, column, evaluated)
        with monkeypatch.context() as patch:
            patch.setattr(interpolation, "PART_BYTES", 13 * 4 * math.prod(column.layout.row_shape))
            patch.setattr(interpolation, "DRAWN", 5)
            counts: list[int] = []
            assert chosen(how, column, evaluated, "cpu", counts.append).tolist() == whole.tolist()
            assert sum(counts) == 40 * interpolation.passes(column, len(evaluated)) == 40 * 5
        assert (
            whole != chosen(Interpolation.of(column, column, evaluated, 40), column, evaluated)
        ).any() == how.draw


def test_columns_that_lack_other_rows_have_the_same_rows(tmp_path: Path) -> None:
    a = random_column(tmp_path / "a", "a", absent=[0, 7])
    b = random_column(tmp_path / "bb", "bb", absent=[3])
    kept = [row for row in range(2 * COUNT) if row not in (0, 3, 7)]
    assert shared_rows(a, [b]).tolist() == shared_rows(b, [a, b]).tolist() == kept
    assert shared_rows(a).tolist() == [row for row in range(2 * COUNT) if row not in (0, 7)]
    evaluated = shared_rows(a, [b])[:COUNT]
    one, two = (Interpolation.of(c, c, evaluated, also=[a, b]) for c in (a, b))
    assert one.rows.tolist() == two.rows.tolist() == kept[COUNT:]
    assert one.digest == two.digest
    assert Interpolation.of(a, a, evaluated).digest != Interpolation.of(b, b, evaluated).digest


def test_reference_rows_are_spread(column: Column) -> None:
    rows = Interpolation.of(column, column, NOTHING, 5).rows
    assert rows.tolist() == [0, 29, 59, 89, 119]


def test_the_draw_is_of_the_row_alone_and_as_often_as_its_share() -> None:
    query, around = torch.zeros(3), torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 0, 0]])
    weights = np.exp([-0.0, -1.0, -4 / 3])
    picks = [drawn(row, query, around) for row in range(3_000)]
    assert picks == [drawn(row, query, around) for row in range(3_000)]
    shares = np.bincount(picks, minlength=3) / len(picks)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=4 * 0.5 / math.sqrt(3_000))
    number = np.random.default_rng([DRAW_SEED, 11]).random()
    assert picks[11] == int(np.searchsorted(np.cumsum(weights / weights.sum()), number))


def test_half_way_has_half_the_angle() -> None:
    a = torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1)
    b = torch.tensor([0.0, 2, 0, 0]).view(1, 4, 1, 1)
    np.testing.assert_allclose(
        half_way(a, b).ravel(), [1 / math.sqrt(2), 2 / math.sqrt(2), 0, 0], atol=1e-7
    )
    assert torch.equal(half_way(a, a), a)
    with pytest.raises(OtherImages, match="opposite directions"):
        half_way(a, -a)


def test_what_cannot_be_a_reference(column: Column, tmp_path: Path) -> None:
    evaluated, how = setting(column)
    other = random_column(tmp_path / "other", "another")
    with pytest.raises(OtherImages, match="made by another encoder"):
        Interpolation.of(other, column, evaluated)
    everything = np.concatenate([evaluated, how.rows])
    with pytest.raises(TooFewImages, match="found 0 rows beside the evaluated ones"):
        Interpolation.of(column, column, everything)
    with pytest.raises(BadRequest, match="found --reference_rows 3, expected at least the 10"):
        Interpolation.of(column, column, evaluated, 3, 10, True)


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    column = random_column(tmp_path / "vae")
    values = column.read(np.array([7]))
    values[0, 0, 0, 0] = np.nan
    column.read = lambda *_, **__: values  # type: ignore[method-assign]
    with pytest.raises(OtherImages, match="row 7 holds values that are not finite"):
        normalised(column, np.array([7]))


def with_norm(column: Column, norm: Norm | None) -> Column:
    return Column(column.store, replace(column.spec, norm=norm), column.digest, column.snapshot)


def test_a_column_without_norm_has_no_neighbours(column: Column) -> None:
    bare = with_norm(column, None)
    with pytest.raises(OtherImages, match="records no shift and scale"):
        Interpolation.of(bare, bare, NOTHING)


def test_a_latent_without_direction_is_named(column: Column) -> None:
    """A cosine to it would be 0 / 0, and any neighbour made up."""
    evaluated, _ = setting(column)
    plain_norm = with_norm(column, Norm((0.0,), (1.0,)))
    read = plain_norm.read

    def empty_third(rows: np.ndarray, check: bool = False) -> np.ndarray:
        values = read(rows, check)
        values[rows == evaluated[2]] = 0
        return values

    plain_norm.read = empty_third  # type: ignore[assignment,method-assign]
    with pytest.raises(OtherImages, match=f"row {evaluated[2]} is 0 in every place"):
        chosen(Interpolation.of(plain_norm, plain_norm, evaluated), plain_norm, evaluated)
