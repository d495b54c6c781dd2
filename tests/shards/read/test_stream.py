"""Batches hold what the row ids say, from any position; no buffer is overwritten under a tensor; errors surface."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards import (
    Column,
    ColumnSpec,
    CorruptColumn,
    JoinedColumns,
    Layout,
    Order,
    OrderError,
    ShardWriter,
    create_column,
    open_join,
    open_sources,
    put_complete,
    put_empty,
)
from shards.format.int8 import channel_scale, quantise
from shards.read import objects as handles
from shards.read.join import SourceColumns
from shards.read.stream import Batch, Stream, empty_caption, pad_text, read_rows
from tests.shards.toy import (
    EMPTY,
    ROWS,
    SHARD_ROWS,
    SOURCE,
    TOKENS,
    WIDTH,
    caption_spec,
    length_of,
    moments_of,
    moments_spec,
    row_ids,
    small_moments,
    small_tokens,
    tokens_of,
    tokens_spec,
    write_column,
)


@pytest.fixture(scope="module")
def join(toy: Path) -> JoinedColumns:
    return open_join(toy / "vae", toy / "text")


def words(tokens: torch.Tensor) -> NDArray[np.uint16]:
    return tokens.view(torch.uint16).numpy()


def check(batch: Batch, captions: Any = None) -> None:
    """`captions`: the number of each sample's caption, if not 0."""
    rows = batch.rows.numpy()
    captions = np.zeros(len(rows), int) if captions is None else captions
    np.testing.assert_array_equal(batch.moments.numpy(), moments_of(rows))
    assert batch.lengths.tolist() == batch.cu_seqlens.diff().tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    for i, row in enumerate(rows.tolist()):
        caption = batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        np.testing.assert_array_equal(words(caption), tokens_of(row, int(captions[i])))


def test_contents_follow_from_the_rows(join: JoinedColumns) -> None:
    order = join.order(seed=1, lanes=8)
    with Stream(join, order, position=0, global_batch=64) as stream:
        for k, batch in zip(range(5), stream, strict=False):
            assert batch.position == 64 * k
            _, rows, samples = order(64 * k, 64)
            assert batch.rows.tolist() == rows.tolist()
            assert batch.samples.tolist() == samples.tolist()
            check(batch)


def test_the_state_is_one_integer(join: JoinedColumns) -> None:
    """Four ranks with another batch, from where a run of one rank stopped, in the second epoch too."""
    for position in (3 * 64, join.order(1, 8).epoch_samples + 64):
        streams = [
            Stream(join_again(join), join.order(1, 8), position=position, global_batch=32,
                   world=4, rank=rank)
            for rank in range(4)
        ]  # fmt: skip
        parts = [[next(s) for _ in range(2)] for s in streams]
        for stream in streams:
            stream.close()
        rows_by_sample = {
            int(g): int(row)
            for batches in parts for b in batches for g, row in zip(b.samples, b.rows, strict=True)
        }  # fmt: skip
        _, rows, samples = join.order(1, 8)(position, 64)
        assert rows_by_sample == dict(zip(samples.tolist(), rows.tolist(), strict=True))
        for batches in parts:
            for batch in batches:
                check(batch)


def join_again(join: JoinedColumns) -> JoinedColumns:
    return open_join(join.latents.path, join.text.path)


def test_reads_ahead_but_not_far(toy: Path) -> None:
    read: list[int] = []

    class Counted(Column):
        def gather(self, rows: NDArray[np.int64], *rest: Any) -> None:
            read.append(len(rows))
            super().gather(rows, *rest)

    join = JoinedColumns([SourceColumns(Counted.open(toy / "vae"), Column.open(toy / "text"))])
    with Stream(join, join.order(0, 8), position=0, global_batch=8, prefetch=3) as stream:
        deadline = time.monotonic() + 60
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 4  # three in the queue, one in hand
        next(stream)


def test_pack_and_pad(join: JoinedColumns) -> None:
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
    return [t for t in threading.enumerate() if t.name == "stream"]


def test_close_ends_the_thread_and_the_batches(join: JoinedColumns) -> None:
    stream = Stream(join, join.order(0, 8), position=0, global_batch=8)
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
def test_a_row_is_compared_when_it_is_first_read(
    tmp_path: Path, kind: str, name: str, size: int
) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    row = 21
    start = size * row if size else 6 * sum(1 + r % 4 for r in range(row) if r % 53 != 7)

    def flip() -> None:  # in its place: a reading thread must not see the file cut short
        with (tmp_path / kind / name).open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, start + 1)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0x04]), start + 1)

    flip()
    join = open_join(tmp_path / "vae", tmp_path / "text")
    order = join.order(0, 8)
    with (
        Stream(join, order, position=0, global_batch=order.epoch_samples) as stream,
        pytest.raises(CorruptColumn, match=rf"{kind}: row 21 of shard 0 \(row id 21\)"),
    ):
        next(stream)
    flip()
    with Stream(join, order, position=0, global_batch=order.epoch_samples) as stream:
        assert row in next(stream).rows
        flip()
        assert row in next(stream).rows  # it has been compared; later epochs trust it


def test_what_the_first_epoch_did_not_choose_is_compared_too(tmp_path: Path) -> None:
    rows = (70, 3, 3)
    write_column(tmp_path / "vae", moments_spec(), rows)
    for caption in (0, 1):
        write_column(tmp_path / str(caption), caption_spec(f"{caption}.txt"), rows, caption=caption)
    join = open_join(tmp_path / "vae", {tmp_path / "0": 0.5, tmp_path / "1": 0.5})
    order = join.order(0, 1)
    samples = np.arange(order.epoch_samples)
    first = order.at(samples)[1][order.choose(samples, join.by_source[0].rates) == 0]
    row = int(first[first < 70][0])  # its second caption's turn comes in a later epoch
    file = tmp_path / "1/tokens/c/0/0"
    data = bytearray(file.read_bytes())
    data[6 * sum(length_of(r, 1) for r in range(row) if r % 53 != 7)] ^= 1
    file.write_bytes(data)
    with Stream(join, order, position=0, global_batch=order.epoch_samples) as stream:
        next(stream)
        with pytest.raises(CorruptColumn, match=rf"1: row {row} of shard 0"):
            list(zip(range(12), stream, strict=False))


def test_two_streams_over_one_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each opens what the other has just closed."""
    monkeypatch.setattr(handles, "OPEN_FILES", 1)
    monkeypatch.setattr(handles.resource, "getrlimit", lambda _: (1, 1))
    write_column(tmp_path / "vae", moments_spec(20), (10,) * 20)
    write_column(tmp_path / "text", tokens_spec(20), (10,) * 20)
    join = open_join(tmp_path / "vae", tmp_path / "text")
    order = join.order(0, 8)
    descriptors = len(os.listdir("/proc/self/fd"))
    streams = [
        Stream(join, order, position=0, global_batch=32, world=2, rank=rank) for rank in (0, 1)
    ]
    for _ in range(40):
        for stream in streams:
            check(next(stream))
    for stream in streams:
        stream.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_errors_surface_and_later_calls_do_not_hang(tmp_path: Path) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    (tmp_path / "vae/moments/c/0/0/0/0").unlink()
    join = open_join(tmp_path / "vae", tmp_path / "text")
    with Stream(join, join.order(0, 8), position=0, global_batch=8) as stream:
        for _ in range(3):
            with pytest.raises(
                CorruptColumn, match="the object is missing though its shard is committed"
            ):
                next(stream)
    assert not readers()


def test_refused_before_anything_is_read(join: JoinedColumns) -> None:
    order = join.order(0, 8)
    with pytest.raises(OrderError, match="multiples"):
        Stream(join, order, position=4, global_batch=8)
    with pytest.raises(OrderError, match="world"):
        Stream(join, order, position=0, global_batch=8, world=3)
    with pytest.raises(OrderError, match="an order of 2 sources for columns of 1"):
        Stream(join, Order([join.valid_mask, join.valid_mask], 0, 8), position=0, global_batch=8)
    for wrong in ({"prefetch": 0}, {"prefetch": 700}, {"ahead": -1}):
        with pytest.raises(OrderError, match="expected"):
            Stream(join, order, position=0, global_batch=8, **wrong)
    assert not readers()


def test_an_order_of_other_rows_is_refused(join: JoinedColumns, toy: Path) -> None:
    """What an order has beyond the join's rows would be read as rows of zeros."""
    more = open_join(toy / "vae", toy / "text", truncated=True)
    count = more.by_source[0].rows - join.by_source[0].rows
    assert count > 0
    with pytest.raises(OrderError, match=f"has {count} rows that are not valid"):
        Stream(join, more.order(0, 8), position=0, global_batch=8)
    Stream(more, join.order(0, 8), position=0, global_batch=8).close()  # fewer are no fault
    longer = Order([np.append(join.valid_mask, np.uint32(1))], 0, 8)
    with pytest.raises(OrderError, match="has 1 rows that are not valid"):
        Stream(join, longer, position=0, global_batch=8)


# What is mixed ------------------------------------------------------------------------------------


def test_captions_mixed_by_rate(toy: Path, tmp_path: Path) -> None:
    long = write_column(tmp_path / "long", caption_spec("txt"))
    short = write_column(tmp_path / "short", caption_spec("short.txt"), caption=1)
    join = open_join(toy / "vae", {long: 0.6, short: 0.4})
    order, chosen = join.order(3, 8), list[int]()
    with Stream(join, order, position=64, global_batch=64) as stream:
        for _, batch in zip(range(20), stream, strict=False):
            captions = order.choose(batch.samples.numpy(), join.by_source[0].rates)
            check(batch, captions)
            chosen += captions.tolist()
    assert abs(np.mean(chosen) - 0.4) < 0.05
    parts = [Stream(join, order, position=64, global_batch=64, world=2, rank=r) for r in (0, 1)]
    for rank, stream in enumerate(parts):
        batch = next(stream)
        check(batch, np.array(chosen[32 * rank : 32 * rank + 32]))
        stream.close()
    assert torch.equal(empty_caption(join), empty_caption(open_join(toy / "vae", long)))


@pytest.mark.parametrize("weights", [None, [0.7, 0.3]])
def test_several_sources(toy: Path, tmp_path: Path, weights: list[float] | None) -> None:
    other = "more tars"
    write_column(tmp_path / "vae", moments_spec(source=other), shift=1.0)
    write_column(tmp_path / "text", tokens_spec(source=other), caption=2)
    sources = open_sources(
        [toy / "vae", tmp_path / "vae"], [toy / "text", tmp_path / "text"], weights=weights
    )
    order, samples = sources.order(1, 8), list[tuple[int, int]]()
    with Stream(sources, order, position=0, global_batch=64) as stream:
        for _ in range(order.epoch_samples // 64):
            batch = next(stream)
            source = batch.sources.numpy()
            moments = batch.moments.clone()
            moments[torch.from_numpy(source == 1), 2] -= 1.0
            plain = replace(batch, moments=moments)
            check(plain, 2 * source)
            samples += zip(source.tolist(), batch.rows.tolist(), strict=True)
    if weights:
        assert abs(np.mean([s for s, _ in samples]) - 0.3) < 0.01
    else:
        assert len(set(samples)) == len(samples)


def test_extra_columns_ride_along(toy: Path, tmp_path: Path) -> None:
    spec = ColumnSpec(
        {"source": SOURCE}, Layout("features", (2, 3), 3, SHARD_ROWS, element="bfloat16")
    )
    digest = create_column(tmp_path / "dino", spec)
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(tmp_path / "dino", spec, digest, shard, rows, f"index {shard}")
        ids = row_ids(shard)
        for start in range(0, rows, 1024):
            block = ids[start : start + 1024].astype(np.uint16)
            values = np.broadcast_to(block[:, None, None], (len(block), 2, 3))
            writer.put_block(np.ascontiguousarray(values), np.zeros(len(block), np.uint8))
        writer.commit({})
    put_complete(tmp_path / "dino", digest, 3, allow_failed=False)
    join = open_join(toy / "vae", toy / "text", extra={"dino": tmp_path / "dino"})
    with Stream(join, join.order(0, 8), position=0, global_batch=8) as stream:
        batch = next(stream)
    check(batch)
    features = batch.extra["dino"]
    assert (features.dtype, features.shape) == (torch.bfloat16, (8, 2, 3))
    assert (features.view(torch.int16) == batch.rows[:, None, None]).all()


def test_int8_captions_arrive_as_bfloat16(toy: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sample = torch.from_numpy(generator.normal(size=(64, WIDTH))).bfloat16()
    channel = channel_scale(words(sample))
    layout = replace(tokens_spec().layout, element="int8")
    quantisation = {
        "scheme": "int8",
        "channel": channel.tolist(),
        "relative_error": 0.01,
        "rows": 64,
    }
    spec = ColumnSpec(tokens_spec().identity, layout, None, 1, quantisation)
    digest = create_column(tmp_path / "t", spec)
    put_empty(tmp_path / "t", spec, EMPTY)
    truth: dict[int, torch.Tensor] = {}
    for shard, rows in enumerate(ROWS):
        writer = ShardWriter(tmp_path / "t", spec, digest, shard, rows, f"index {shard}")
        ids = row_ids(shard).tolist()
        for row in ids:
            values = generator.normal(size=(1 + row % TOKENS, WIDTH))
            truth[row] = torch.from_numpy(values).bfloat16()
        for start in range(0, rows, 1024):
            block = [quantise(words(truth[row]), channel) for row in ids[start : start + 1024]]
            writer.put_block(block, np.zeros(len(block), np.uint8))
        writer.commit({})
    put_complete(tmp_path / "t", digest, 3, allow_failed=False)
    join = open_join(toy / "vae", tmp_path / "t")
    with Stream(join, join.order(0, 8), position=0, global_batch=512) as stream:
        batch = next(stream)  # more tokens than are turned at once
    expected = torch.cat([truth[row] for row in batch.rows.tolist()])
    assert batch.tokens.dtype == torch.bfloat16
    error = (batch.tokens.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.02
    _, tokens, ends = read_rows(join, batch.rows.numpy())
    assert torch.equal(tokens.view(torch.int16), batch.tokens.view(torch.int16))
    assert torch.equal(ends, batch.cu_seqlens)


# Buffers ------------------------------------------------------------------------------------------


def test_what_is_held_is_never_overwritten(join: JoinedColumns) -> None:
    """A whole batch, and parts that keep its buffer only through views of views."""
    order, pointers = join.order(1, 8), set[int]()
    with Stream(join, order, position=0, global_batch=64) as stream:
        first = next(stream)
        batch = next(stream)
        rows = batch.rows.clone()
        row, tail = batch.moments[5:6, 1:][0], batch.tokens[-3:].view(torch.int16).numpy()
        small = batch.sources, batch.samples
        del batch
        for _ in range(30):
            later = next(stream)
            check(later)
            pointers.add(later.moments.data_ptr())
            del later
        check(first)
        assert not any(place % 64 for place in pointers)  # where copies are fast
        np.testing.assert_array_equal(row.numpy(), moments_of(rows.numpy()[5:6])[0, 1:])
        last = int(rows[-1])
        np.testing.assert_array_equal(tail.view(np.uint16)[-1], tokens_of(last)[-1])
        assert small[1].tolist() == order(64, 64)[2].tolist()
    assert len(pointers) <= 8  # and what is not held is used again
    check(first)  # also when the stream is closed


def test_many_batches_held_and_let_go(join: JoinedColumns) -> None:
    """A user may keep an epoch; the memory goes when the tensors do, but for a few buffers."""
    stream = Stream(join, join.order(1, 8), position=0, global_batch=64)
    with stream:
        batches = [next(stream) for _ in range(25)]
        assert len({batch.moments.data_ptr() for batch in batches}) == 25
        for batch in batches:
            check(batch)
        del batches, batch
        for _ in range(3):
            next(stream)


@pytest.mark.gpu
def test_pinned_batches(join: JoinedColumns) -> None:
    order = join.order(1, 8)
    with Stream(join, order, position=0, global_batch=64, pin=True) as stream:
        copies = []
        for _ in range(20):
            batch = next(stream)
            assert batch.moments.is_pinned()
            assert batch.tokens.is_pinned()
            copies.append((batch.rows, batch.moments.to("cuda", non_blocking=True)))
            check(batch)
        for rows, moments in copies:
            np.testing.assert_array_equal(moments.cpu().numpy(), moments_of(rows.numpy()))
