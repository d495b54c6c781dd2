"""Columns that may be joined, the rows that are valid in all, and refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import (
    CorruptColumn,
    IdentityMismatch,
    IncompleteColumn,
    NotAColumn,
    ShardWriter,
    SourceMismatch,
    create_column,
    open_join,
    put_complete,
)

from .toy import (
    NORM,
    ROWS,
    SHAPE,
    SHARD_ROWS,
    TOKENS,
    WIDTH,
    caption_status,
    image_status,
    moments_spec,
    row_ids,
    small_moments,
    small_tokens,
    tokens_spec,
    write_column,
)

ALL = np.concatenate([row_ids(s) for s in range(3)])


def test_rows_valid_in_both(toy: Path) -> None:
    join = open_join(toy / "vae", toy / "text")
    expected = ALL[(image_status(ALL) == 0) & (caption_status(ALL) == 0)]
    np.testing.assert_array_equal(join.valid_rows, expected)
    assert join.words.size == 3 * SHARD_ROWS // 32
    assert (join.latent_shape, join.text_width, join.max_tokens) == (
        (SHAPE[0] // 2, *SHAPE[1:]),
        WIDTH,
        TOKENS,
    )
    assert join.norm == NORM


def test_truncated_pictures_only_if_asked(toy: Path) -> None:
    join = open_join(toy / "vae", toy / "text", truncated=True)
    expected = ALL[(image_status(ALL) <= 1) & (caption_status(ALL) == 0)]
    np.testing.assert_array_equal(join.valid_rows, expected)
    assert len(expected) > len(open_join(toy / "vae", toy / "text").valid_rows)


def test_also_joins_statuses_of_columns_that_are_not_read(toy: Path, tmp_path: Path) -> None:
    spec = moments_spec(weights="another vae")
    also = write_column(tmp_path / "other", spec)
    plain = open_join(toy / "vae", toy / "text").identity()
    join = open_join(toy / "vae", toy / "text", [also])
    assert join.identity() != plain
    assert join.identity()["also.0"]["identity"] == spec.identity
    # A column in which rows 0..9 of shard 0 came to nothing takes them from all runs.
    path, spec = tmp_path / "bad", moments_spec(weights="a third")
    digest = create_column(path, spec)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(path, spec, digest, shard, rows, f"index {shard}")
        for start in range(0, rows, 1024):
            values = np.ones((min(1024, rows - start), *SHAPE), np.float16)
            if shard == start == 0:
                values[:10] = np.inf
            writer.put_block(values, np.zeros(len(values), np.uint8))
        writer.commit({})
    put_complete(path, digest, 3, allow_failed=False)
    fewer = open_join(toy / "vae", toy / "text", [also, path]).valid_rows
    np.testing.assert_array_equal(fewer, join.valid_rows[join.valid_rows >= 10])


def test_another_source(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", tokens_spec(source="other tars"))
    with pytest.raises(
        SourceMismatch, match=r"made from source other tars, but .*vae from fingerprint"
    ):
        open_join(toy / "vae", path)
    with pytest.raises(SourceMismatch, match="other tars"):
        open_join(toy / "vae", toy / "text", [path])


def test_other_readings_of_the_source(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", tokens_spec(), index="another reading")
    with pytest.raises(
        SourceMismatch, match=r"shards \[0, 1, 2\] were read from tars that held different rows"
    ):
        open_join(toy / "vae", path)


def test_other_row_ids(toy: Path, tmp_path: Path) -> None:
    spec = tokens_spec()
    path = write_column(tmp_path / "c", replace(spec, layout=replace(spec.layout, shard_rows=4096)))
    with pytest.raises(SourceMismatch, match="4096 rows a shard, but .* has 2048"):
        open_join(toy / "vae", path)


def test_the_wrong_kind(toy: Path) -> None:
    with pytest.raises(
        IdentityMismatch, match="text: found a column of tokens, expected one of moments"
    ):
        open_join(toy / "text", toy / "vae")
    with pytest.raises(
        IdentityMismatch, match="vae: found a column of moments, expected one of tokens"
    ):
        open_join(toy / "vae", toy / "vae")


def test_a_column_without_norm(toy: Path, tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", replace(moments_spec(), norm=None))
    with pytest.raises(IdentityMismatch, match="records no shift and scale"):
        _ = open_join(path, toy / "text").norm


def test_absent_unfinished_and_damaged(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAColumn, match="nothing: no such folder"):
        open_join(toy / "vae", tmp_path / "nothing")
    create_column(tmp_path / "new", moments_spec())
    with pytest.raises(IncompleteColumn, match="new: no COMPLETE record"):
        open_join(tmp_path / "new", toy / "text")
    path = small_moments(tmp_path / "c")
    bits = next((path / "complete").glob("*.valid"))
    bits.write_bytes(bits.read_bytes()[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(CorruptColumn, match="the valid-row bits do not fit"):
        open_join(path, small_tokens(tmp_path / "t"))
