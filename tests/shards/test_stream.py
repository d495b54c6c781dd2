"""Batches hold what the row ids say, from any position, and errors of the reading thread surface."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards import CorruptColumn, Join, Order, OrderError, open_join
from shards.stream import Batch, Stream, empty_caption, pad_text

from .toy import EMPTY, moments_of, small_moments, small_tokens, tokens_of


@pytest.fixture(scope="module")
def join(toy: Path) -> Join:
    return open_join(toy / "vae", toy / "text")


def words(tokens: torch.Tensor) -> NDArray[np.uint16]:
    return tokens.view(torch.uint16).numpy()


def check(batch: Batch) -> None:
    rows = batch.rows.numpy()
    np.testing.assert_array_equal(batch.moments.numpy(), moments_of(rows))
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    for i, row in enumerate(rows.tolist()):
        caption = batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        np.testing.assert_array_equal(words(caption), tokens_of(row))


def test_contents_follow_from_the_rows(join: Join) -> None:
    order = Order([join.words], seed=1, lanes=8)
    with Stream(join, order, position=0, global_batch=64) as stream:
        for k, batch in zip(range(5), stream, strict=False):
            assert batch.position == 64 * k
            _, rows, samples = order(64 * k, 64)
            assert batch.rows.tolist() == rows.tolist()
            assert batch.samples.tolist() == samples.tolist()
            check(batch)


def test_the_state_is_one_integer(join: Join) -> None:
    """Four ranks with another batch, from where a run of one rank stopped, in the second epoch too."""
    for position in (3 * 64, Order([join.words], 1, 8).epoch_samples + 64):
        streams = [
            Stream(join_again(join), Order([join.words], 1, 8), position=position, global_batch=32,
                   world=4, rank=rank)
            for rank in range(4)
        ]  # fmt: skip
        parts = [[next(s) for _ in range(2)] for s in streams]
        for stream in streams:
            stream.close()
        found = {
            int(g): int(row)
            for batches in parts for b in batches for g, row in zip(b.samples, b.rows, strict=True)
        }  # fmt: skip
        _, rows, samples = Order([join.words], 1, 8)(position, 64)
        assert found == dict(zip(samples.tolist(), rows.tolist(), strict=True))
        for batches in parts:
            for batch in batches:
                check(batch)


def join_again(join: Join) -> Join:
    return open_join(join.latents.path, join.text.path)


def test_reads_ahead_but_not_far(join: Join) -> None:
    read: list[int] = []

    class Counted(Order):
        def __call__(self, position: int, *rest: int) -> tuple[Any, Any, Any]:
            read.append(position)
            return super().__call__(position, *rest)

    with Stream(
        join, Counted([join.words], 0, 8), position=0, global_batch=8, prefetch=3
    ) as stream:
        deadline = time.monotonic() + 10
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4  # three in the queue, one in hand
        next(stream)


def test_pack_and_pad(join: Join) -> None:
    tokens = torch.arange(12, dtype=torch.bfloat16).view(4, 3)
    ends = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    text, mask = pad_text(tokens, ends)
    assert (text.dtype, mask.dtype, text.shape) == (torch.float32, torch.int64, (3, 3, 3))
    assert mask.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert text[0].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert text[2].tolist() == [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
    wide, mask = pad_text(tokens, ends, 5)
    assert wide.shape == (3, 5, 3)
    assert torch.equal(wide[:, :3], text)
    assert mask.sum(1).tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match="a caption of 3 tokens does not fit 2"):
        pad_text(tokens, ends, 2)
    np.testing.assert_array_equal(words(empty_caption(join)), EMPTY)


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if "_read" in t.name]


def test_close_ends_the_thread_and_the_batches(join: Join) -> None:
    stream = Stream(join, Order([join.words], 0, 8), position=0, global_batch=8)
    next(stream)
    assert len(readers()) == 1
    stream.close()
    stream.close()
    assert not readers()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize(
    ("kind", "name", "size"), [("vae", "moments/c/0/0/0/0", 32), ("text", "tokens/c/0/0", 0)]
)
def test_a_damaged_row_in_the_first_epoch(tmp_path: Path, kind: str, name: str, size: int) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    row = 21
    start = size * row if size else 6 * sum(1 + r % 4 for r in range(row) if r % 53 != 7)
    data = bytearray((tmp_path / kind / name).read_bytes())
    data[start + 1] ^= 0x04
    (tmp_path / kind / name).write_bytes(data)
    join = open_join(tmp_path / "vae", tmp_path / "text")
    order = Order([join.words], 0, 8)
    with (
        Stream(join, order, position=0, global_batch=order.epoch_samples) as stream,
        pytest.raises(CorruptColumn, match=rf"{kind}: row 21 of shard 0 \(row id 21\)"),
    ):
        next(stream)
    epoch = order.epoch_samples
    with Stream(join, order, position=epoch, global_batch=epoch) as stream:
        assert row in next(stream).rows  # it has been looked at once; later epochs trust it


def test_errors_surface_and_later_calls_do_not_hang(tmp_path: Path) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    (tmp_path / "vae/moments/c/0/0/0/0").unlink()
    join = open_join(tmp_path / "vae", tmp_path / "text")
    with Stream(join, Order([join.words], 0, 8), position=0, global_batch=8) as stream:
        for _ in range(3):
            with pytest.raises(
                CorruptColumn, match="the object is missing though its shard is committed"
            ):
                next(stream)
    assert not readers()


def test_refused_before_anything_is_read(join: Join) -> None:
    order = Order([join.words], 0, 8)
    with pytest.raises(OrderError, match="multiples"):
        Stream(join, order, position=4, global_batch=8)
    with pytest.raises(OrderError, match="world"):
        Stream(join, order, position=0, global_batch=8, world=3)
    with pytest.raises(OrderError, match="one source"):
        Stream(join, Order([join.words, join.words], 0, 8), position=0, global_batch=8)
    assert not readers()
