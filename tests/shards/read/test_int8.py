"""int8 captions go to the device as they are stored, and are multiplied there to the bits of the column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards import (
    ColumnSpec,
    JoinedColumns,
    ShardWriter,
    create_column,
    open_join,
    open_sources,
    put_complete,
    put_empty,
)
from shards.format.int8 import dequantise, quantise
from shards.read.stream import Batch, Int8Tokens, Stream, read_rows
from tests.shards.toy import EMPTY, TOKENS, WIDTH, caption_spec, moments_spec, write_column

ROWS = 70


def bits(tokens: torch.Tensor) -> NDArray[np.int16]:
    return tokens.view(torch.int16).cpu().numpy()


def int8_column(path: Path, seed: int, member: str = "txt", source: str = "a") -> Path:
    """A shard of captions of 0 to TOKENS tokens, with channel scales of its own."""
    generator = np.random.default_rng(seed)
    channel = generator.uniform(0.1, 9, WIDTH).astype(np.float32)
    plain = caption_spec(member, source)
    layout = replace(plain.layout, shards=1, element="int8")
    notes = {"scheme": "int8", "channel": channel.tolist(), "relative_error": 0.01, "rows": 9}
    spec = ColumnSpec(plain.identity, layout, None, 1, notes)
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY)
    with ShardWriter(path, spec, digest, 0, ROWS, "index 0") as writer:
        rows = []
        for row in range(ROWS):
            values = torch.from_numpy(generator.normal(size=(row % (TOKENS + 1), WIDTH)))
            rows.append(quantise(values.bfloat16().view(torch.uint16).numpy(), channel))
        writer.put_block(rows, np.zeros(ROWS, np.uint8))
        writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    return path


def latents(path: Path, source: str = "a") -> Path:
    return write_column(path, moments_spec(1, source), (ROWS,))


def expected_tokens(join: JoinedColumns, batch: Batch, captions: NDArray[Any]) -> NDArray[Any]:
    """Words of each sample's caption, read one by one from its column."""
    words = []
    for source, row, caption in zip(batch.sources, batch.rows, captions, strict=True):
        column = join.by_source[int(source)].texts[int(caption)]
        words.append(column.decoded(column.read(np.array([int(row)]), check=True)))
    return np.concatenate(words).view(np.int16)


def stream_equals_columns(join: JoinedColumns, text: type) -> None:
    order = join.order(1, 8)
    rates = join.by_source[0].rates
    with Stream(join, order, position=0, global_batch=64) as stream:
        for _ in range(5):
            batch = next(stream)
            assert isinstance(batch.text, text)
            captions = order.choose(batch.samples.numpy(), rates)
            assert batch.tokens.dtype == torch.bfloat16
            np.testing.assert_array_equal(
                bits(batch.tokens), expected_tokens(join, batch, captions)
            )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("count", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_device_multiplies_as_numpy_does(
    device: str, count: int, width: int, columns: int
) -> None:
    generator = np.random.default_rng(count)
    stored = generator.integers(-127, 128, (count, width + 4), np.int8)
    scale = 2.0 ** generator.uniform(-60, 60, (count, 1))  # also what ends as 0 or infinite
    stored[:, width:] = scale.astype("<f4").view(np.int8)
    channels = (2.0 ** generator.uniform(-70, 70, (columns, width))).astype(np.float32)
    column = generator.integers(0, columns, count)
    tokens = Int8Tokens(*map(torch.from_numpy, (stored, channels, column)))
    on_device = tokens.each(lambda values: values.to(device)).dequantised()
    with np.errstate(over="ignore"):
        rows = [dequantise(stored[i : i + 1], channels[c]) for i, c in enumerate(column)]
    by_numpy = np.concatenate([np.zeros((0, width), np.uint16), *rows])
    np.testing.assert_array_equal(bits(on_device), by_numpy.view(np.int16))


def test_a_stream_hands_over_what_is_stored(tmp_path: Path) -> None:
    join = open_join(latents(tmp_path / "vae"), int8_column(tmp_path / "text", 0))
    stream_equals_columns(join, Int8Tokens)
    with Stream(join, join.order(0, 8), position=0, global_batch=64) as stream:
        batch = next(stream)
    assert isinstance(batch.text, Int8Tokens)
    assert batch.text.nbytes == int(batch.cu_seqlens[-1]) * (WIDTH + 4)
    _, tokens, ends = read_rows(join, batch.rows.numpy())
    np.testing.assert_array_equal(bits(tokens), bits(batch.tokens))
    assert torch.equal(ends, batch.cu_seqlens)


def test_columns_of_other_scales_in_one_batch(tmp_path: Path) -> None:
    """Two sources, of which each has two captions, and each column scales of its own."""

    def texts(source: str, seed: int) -> Mapping[Any, float]:
        long = int8_column(tmp_path / f"{source}-long", seed, "txt", source)
        return {
            long: 0.6,
            int8_column(tmp_path / f"{source}-short", seed + 1, "short.txt", source): 0.4,
        }

    join = open_sources(
        [latents(tmp_path / "a-vae", "a"), latents(tmp_path / "b-vae", "b")],
        [texts("a", 1), texts("b", 3)],
    )
    stream_equals_columns(join, Int8Tokens)


def test_int8_beside_bfloat16_is_multiplied_while_reading(tmp_path: Path) -> None:
    spec = caption_spec("short.txt", "a")
    plain = write_column(
        tmp_path / "b", replace(spec, layout=replace(spec.layout, shards=1)), (ROWS,)
    )
    text = {int8_column(tmp_path / "text", 7): 0.5, plain: 0.5}
    stream_equals_columns(open_join(latents(tmp_path / "vae"), text), torch.Tensor)
