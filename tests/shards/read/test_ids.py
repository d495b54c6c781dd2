"""Token ids as the text of a join: read like tokens, int32 and without a width, by the thread of a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import (
    Column,
    CorruptColumn,
    IdentityMismatch,
    Layout,
    ShardWriter,
    create_column,
    open_join,
    open_sources,
    put_complete,
    put_empty,
)
from shards.read.join import SourceColumns
from shards.read.stream import Batch, Stream, empty_caption, read_rows
from tests.shards.toy import (
    EMPTY,
    EMPTY_IDS,
    ROWS,
    SHAPE,
    SHARD_ROWS,
    STORED,
    TOKENS,
    ids_of,
    ids_spec,
    moments_of,
    moments_spec,
    tokens_spec,
    write_column,
    write_shard,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Ids of two captions beside `toy`, and another source of 70 rows: its latents, and ids of one caption."""
    root = tmp_path_factory.mktemp("ids")
    (root / "vae").symlink_to(toy / "vae")
    write_column(root / "long", ids_spec())
    write_column(root / "short", ids_spec(member="short.txt"), caption=1)
    write_column(root / "other-vae", moments_spec(1, "other"), (70,))
    write_column(root / "other-ids", ids_spec(1, "other"), (70,))
    return root


def captions(batch: Batch) -> list[list[int]]:
    assert batch.tokens.dtype == torch.int32
    assert batch.tokens.ndim == 1
    return [part.tolist() for part in batch.tokens.split(batch.lengths.tolist())]


def test_what_a_join_of_ids_says(folder: Path) -> None:
    join = open_join(folder / "vae", folder / "long")
    assert (join.ids, join.text_width, join.max_tokens) == (True, None, TOKENS)
    assert (join.ids, join.text_width) == (True, None)
    empty = empty_caption(join)
    assert (empty.dtype, empty.tolist()) == (torch.int32, EMPTY_IDS.tolist())
    rows = np.array([1, 3, 700, 2 * SHARD_ROWS + 6])
    moments, ids, ends = read_rows(join, rows, check=True)
    np.testing.assert_array_equal(moments.numpy(), moments_of(rows))
    expected = [ids_of(row) for row in rows.tolist()]
    assert ids.dtype == torch.int32
    assert ids.tolist() == np.concatenate(expected).tolist()
    assert ends.tolist() == np.cumsum([0, *map(len, expected)]).tolist()


def test_several_sources_and_captions(folder: Path) -> None:
    texts: list[Any] = [
        {folder / "long": 0.75, folder / "short": 0.25}, {folder / "other-ids": 1.0}
    ]  # fmt: skip
    sources = open_sources([folder / "vae", folder / "other-vae"], texts, weights=[0.5, 0.5])
    order = sources.order(1, 8)
    chosen = [0, 0]
    with Stream(sources, order, position=64, global_batch=64) as stream:
        for _ in range(4):
            batch = next(stream)
            choice = order.choose(batch.samples.numpy(), (0.75, 0.25)).tolist()
            samples = zip(
                captions(batch), batch.sources.tolist(), batch.rows.tolist(), choice, strict=True
            )
            for ids, source, row, caption in samples:
                caption = caption if source == 0 else 0
                assert ids == ids_of(row, caption).tolist()
                chosen[caption] += 1
            np.testing.assert_array_equal(batch.moments.numpy(), moments_of(batch.rows.numpy()))
    assert min(chosen) > 10


@pytest.mark.parametrize("how", STORED)
def test_every_way_of_storing_them(folder: Path, tmp_path: Path, how: str) -> None:
    write_column(tmp_path / "ids", ids_spec(**STORED[how]), ROWS)
    join = open_join(folder / "vae", tmp_path / "ids")
    with Stream(join, join.order(0, 8), position=0, global_batch=512) as stream:
        for _ in range(5):  # more than an epoch
            batch = next(stream)
            assert captions(batch) == [ids_of(row).tolist() for row in batch.rows.tolist()]


def test_a_damaged_row_is_named_when_it_is_first_read(tmp_path: Path) -> None:
    write_column(tmp_path / "vae", moments_spec(1), (70,))
    write_column(tmp_path / "ids", ids_spec(1), (70,))
    file = tmp_path / "ids/ids/c/0"
    data = bytearray(file.read_bytes())
    data[4 * sum(len(ids_of(r)) for r in range(21) if r % 53 != 7)] ^= 1
    file.write_bytes(data)
    join = open_join(tmp_path / "vae", tmp_path / "ids")
    order = join.order(0, 8)
    with (
        Stream(join, order, position=0, global_batch=order.epoch_samples) as stream,
        pytest.raises(CorruptColumn, match=r"ids: row 21 of shard 0 \(row id 21\)"),
    ):
        next(stream)


def test_ids_and_tokens_are_no_pair(folder: Path, toy: Path, tmp_path: Path) -> None:
    vae, text, ids = (Column.open(p) for p in (folder / "vae", toy / "text", folder / "long"))
    with pytest.raises(IdentityMismatch, match="kind: found 'ids', expected 'tokens'"):
        SourceColumns(vae, [(text, 0.5), (ids, 0.5)])
    with pytest.raises(IdentityMismatch, match="vae: .* expected one of tokens or ids"):
        SourceColumns(vae, vae)
    spec = ids_spec(member="short.txt")
    digest = create_column(tmp_path / "c", spec)
    put_empty(tmp_path / "c", spec, EMPTY_IDS + 1)
    for shard in range(3):
        write_shard(tmp_path / "c", spec, digest, shard, caption=1)
    put_complete(tmp_path / "c", digest, 3, allow_failed=False)
    with pytest.raises(IdentityMismatch, match="the tokens of the empty caption differ"):
        SourceColumns(vae, [(ids, 0.5), (Column.open(tmp_path / "c"), 0.5)])


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_captions_without_any_token(tmp_path: Path, kind: str) -> None:
    """A batch of nothing but such rows is a batch like others."""
    write_column(tmp_path / "vae", moments_spec(1), (64,))
    spec = ids_spec(1) if kind == "ids" else tokens_spec(1)
    digest = create_column(tmp_path / "text", spec)
    put_empty(tmp_path / "text", spec, EMPTY_IDS if kind == "ids" else EMPTY)
    with ShardWriter(tmp_path / "text", spec, digest, 0, 64, "index 0") as writer:
        nothing = np.zeros((0, *spec.layout.row_shape[1:]), spec.layout.dtype)
        writer.put_block([nothing] * 64, np.zeros(64, np.uint8))
        writer.commit({})
    put_complete(tmp_path / "text", digest, 1, allow_failed=False)
    join = open_join(tmp_path / "vae", tmp_path / "text")
    order = join.order(0, 8)
    with Stream(join, order, position=0, global_batch=16) as stream:
        batch = next(stream)
    assert batch.tokens.shape == ((0,) if kind == "ids" else (0, EMPTY.shape[1]))
    assert batch.tokens.dtype == (torch.int32 if kind == "ids" else torch.bfloat16)
    assert batch.cu_seqlens.tolist() == [0] * 17
    assert batch.moments.shape == (16, *SHAPE)


def test_a_layout_of_ids() -> None:
    layout = Layout("ids", (TOKENS,), 1)
    assert (layout.unit_shape, layout.unit_bytes, layout.ragged) == ((), 4, True)
