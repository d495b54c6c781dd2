"""Features and latents of int8: what is stored, read and lost, beside numpy by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from shards import (
    Column,
    ColumnSpec,
    Layout,
    Norm,
    ShardsError,
    ShardWriter,
    Status,
    create_column,
    open_join,
    put_complete,
)
from shards.format.int8 import calibrate_rows, dequantise_rows, quantise_rows, stored_rows
from shards.read.stream import Stream, read_rows
from shards.tools.convert import convert
from shards.tools.diff import diff
from shards.tools.info import as_text, information
from shards.tools.verify import verify
from tests.shards.tools.test_commands import command
from tests.shards.toy import SHARD_ROWS, tokens_spec, write_column

ROWS = 70
# kind, shape of a row, scales of a row, and the axis of channels of (n, *shape)
SHAPES = {
    "few channels": ("latents", (16, 6, 4), 1, 1),
    "many channels": ("latents", (160, 3, 5), 15, 1),
    "tokens": ("features", (7, 192), 7, 2),
    "narrow tokens": ("features", (7, 48), 1, 2),
    "pooled": ("features", (256,), 1, 1),
}
ANY = pytest.mark.parametrize("name", SHAPES)
STORED = [{}, {"codec": "blosc"}, {"backend": "webdataset"}]


def values_of(name: str, rows: int = ROWS) -> NDArray[np.float16]:
    """Channels of other size, some far from zero, and a place that is eight times as large."""
    _, shape, _, axis = SHAPES[name]
    chance = np.random.default_rng(0)
    along = [n if i + 1 == axis else 1 for i, n in enumerate(shape)]
    values = chance.normal(size=(rows, *shape)) + chance.normal(size=along)
    values *= np.exp(chance.normal(size=along))
    if len(shape) > 1:
        places = values.swapaxes(axis, -1).reshape(rows, -1, values.shape[axis])  # a view or a copy
        places[:, 1] *= 8
        other = list(values.swapaxes(axis, -1).shape)
        values = places.reshape(other).swapaxes(axis, -1)
    return values.astype(np.float16)


def layout_of(name: str, element: str = "int8", **storage: Any) -> Layout:
    kind, shape, _, _ = SHAPES[name]
    return Layout(kind, shape, 1, SHARD_ROWS, element, **storage)


def channel_of(name: str) -> NDArray[np.float32]:
    """Root mean square of each channel over all rows."""
    axis = SHAPES[name][3]
    axes = tuple(i for i in range(values_of(name).ndim) if i != axis)
    return np.sqrt(np.square(values_of(name).astype(np.float64)).mean(axes)).astype(np.float32)


def written(path: Path, name: str, status: NDArray[np.uint8] | None = None) -> Path:
    """A float16 column."""
    kind, shape, _, _ = SHAPES[name]
    identity = {"kind": kind, "encoder": {"weights": "w"}, "source": "s", "dtype": "float16"}
    norm = Norm((0.5,), (2.0,)) if kind == "latents" else None
    spec = ColumnSpec(identity, Layout(kind, shape, 1, SHARD_ROWS), norm)
    digest = create_column(path, spec)
    with ShardWriter(path, spec, digest, 0, ROWS, "index 0") as writer:
        writer.put_block(values_of(name), np.zeros(ROWS, np.uint8) if status is None else status)
        writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    return path


def by_hand(name: str, stored: NDArray[Any], channel: NDArray[np.float32]) -> NDArray[np.float16]:
    """What docs/format.md says of a row, written out value by value of an axis."""
    _, shape, scales, axis = SHAPES[name]
    result = []
    for row in stored:
        words, ends = row[: -4 * scales].reshape(shape), row[-4 * scales :].copy().view("<f4")
        values = words.astype(np.float32)
        lines = values if axis == 1 and len(shape) > 1 else np.moveaxis(values, axis - 1, 0)
        flat = lines.reshape(len(channel), -1)  # (channels, places)
        flat = (
            flat * ends[None] * channel[:, None] if scales > 1 else flat * ends * channel[:, None]
        )
        lines = flat.reshape(lines.shape)
        result.append(lines if axis == 1 and len(shape) > 1 else np.moveaxis(lines, 0, axis - 1))
    return np.array(result, np.float16)


@ANY
def test_what_is_stored_of_a_row(name: str) -> None:
    _, shape, scales, axis = SHAPES[name]
    layout, values, channel = layout_of(name), values_of(name), channel_of(name)
    stored = quantise_rows(values, layout, channel)
    assert stored.shape == (ROWS, int(np.prod(shape)) + 4 * scales)
    assert stored.dtype == np.int8
    read = dequantise_rows(stored, layout, channel)
    np.testing.assert_array_equal(read, by_hand(name, stored, channel))
    # off by half a step at most, and by the rounding of float16
    along = np.expand_dims(channel, [i for i in range(values.ndim - 1) if i + 1 != axis])
    scaled = np.abs(values.astype(np.float32) / along)
    axes = axis if scales > 1 else tuple(range(1, values.ndim))
    step = scaled.max(axes, keepdims=True) / 127 * along
    gap = np.abs(read.astype(np.float32) - values.astype(np.float32))
    assert (gap <= 0.501 * step + np.abs(values.astype(np.float32)) / 1024).all()


@ANY
def test_the_loss_is_measured(name: str) -> None:
    values, layout, axis = values_of(name), layout_of(name), SHAPES[name][3]
    record = calibrate_rows(values, layout)
    channel = np.array(record["channel"], np.float32)
    np.testing.assert_allclose(channel, channel_of(name), rtol=1e-6)
    numbers = values.astype(np.float64)
    gap = dequantise_rows(quantise_rows(values, layout, channel), layout, channel) - numbers
    axes = tuple(i for i in range(values.ndim) if i != axis)
    of_channels = np.sqrt(np.square(gap).sum(axes) / np.square(numbers).sum(axes))
    np.testing.assert_allclose(record["channel_error"], of_channels, atol=1e-6)
    whole = np.linalg.norm(gap) / np.linalg.norm(numbers)
    np.testing.assert_allclose(record["relative_error"], whole, atol=1e-6)
    assert record["rows"] == ROWS


def test_a_scale_of_each_place_helps_where_there_are_many_channels() -> None:
    """A place of large values would take the others' steps; of few channels its price is too high."""
    values = values_of("many channels")
    quiet = np.delete(values.reshape(ROWS, 160, 15), 1, axis=2).astype(np.float64)

    def loss(layout: Layout) -> float:
        channel = channel_of("many channels")
        read = dequantise_rows(quantise_rows(values, layout, channel), layout, channel)
        part = np.delete(read.reshape(ROWS, 160, 15), 1, axis=2)
        return float(np.linalg.norm(part - quiet) / np.linalg.norm(quiet))

    class OneScale(Layout):
        @property
        def scales(self) -> int:
            return 1

    layout = layout_of("many channels")
    one = OneScale("latents", (160, 3, 5), 1, SHARD_ROWS, "int8")
    assert loss(layout) < 0.01
    assert loss(one) > 3 * loss(layout)
    for name in SHAPES:
        halves = layout_of(name, "float16").unit_bytes
        assert layout_of(name).unit_bytes <= halves * (0.5 + 1 / 64) + 4


@ANY
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_column_is_converted_checked_and_read(
    tmp_path: Path, name: str, stored: dict[str, Any]
) -> None:
    status = np.zeros(ROWS, np.uint8)
    status[3], status[9] = Status.IMAGE_MISSING, Status.TRUNCATED
    source = Column.open(written(tmp_path / "a", name, status))
    column = convert(tmp_path / "a", tmp_path / "b", element="int8", processes=1, **stored)
    assert verify(tmp_path / "b") == []
    assert column.spec.identity == {**source.spec.identity, "dtype": "int8"}
    ids = np.array([40, 9, 0, 69])
    assert column.status(np.arange(ROWS)).tolist() == status.tolist()
    channel = np.array((column.spec.quantisation or {})["channel"], np.float32)
    words = column.read(ids, check=True)
    read = column.decoded(words)
    np.testing.assert_array_equal(read, by_hand(name, words, channel))
    assert np.isnan(column.decoded(column.read(np.array([0, 69])))).sum() == 0
    if column.layout.backend == "zarr":
        plain = zarr.open_group(tmp_path / "b", mode="r")[column.layout.kind]
        np.testing.assert_array_equal(plain[:][ids], words)
        assert plain.attrs["scale"].startswith(f"the last {4 * SHAPES[name][2]} bytes of a row")
    difference = diff(tmp_path / "a", tmp_path / "b")
    measured = (column.spec.quantisation or {})["relative_error"]
    np.testing.assert_allclose(difference.relative, measured, rtol=0.02)
    back = convert(tmp_path / "b", tmp_path / "c", element="float16", processes=1)
    assert back.spec.quantisation is None
    assert back.spec.identity["dtype"] == "float16, from int8"
    np.testing.assert_array_equal(back.read(ids), read)
    assert back.status(np.arange(ROWS)).tolist() == status.tolist()
    assert verify(tmp_path / "c") == []


def test_batches_have_latents_and_features_as_float16(tmp_path: Path) -> None:
    text = write_column(tmp_path / "text", tokens_spec(1, "s"), (ROWS,))
    columns = {}
    for name in ("many channels", "tokens"):
        written(tmp_path / "plain" / name, name)
        columns[name] = convert(
            tmp_path / "plain" / name, tmp_path / name, element="int8", processes=1
        )
    extra = {"f": tmp_path / "tokens"}
    join = open_join(tmp_path / "many channels", text, extra=extra)
    assert join.latent_shape == (160, 3, 5)
    with Stream(join, join.order(0, 8), position=0, global_batch=16) as stream:
        for _ in range(3):
            batch = next(stream)
            rows = batch.rows.numpy()
            assert batch.moments.dtype == torch.float16
            expected = columns["many channels"].decoded(columns["many channels"].read(rows))
            np.testing.assert_array_equal(batch.moments.numpy(), expected)
            expected = columns["tokens"].decoded(columns["tokens"].read(rows))
            np.testing.assert_array_equal(batch.extra["f"].numpy(), expected)
            moments, tokens, _ = read_rows(join, rows, check=True)
            assert torch.equal(moments, batch.moments)
            assert torch.equal(tokens, batch.tokens)


def test_values_that_are_not_finite_or_too_large_for_float16(tmp_path: Path) -> None:
    layout = Layout("features", (2, 130), 1, SHARD_ROWS, "int8")
    values = np.random.default_rng(0).normal(size=(4, 2, 130)).astype(np.float32)
    values[1, 0, 5], values[2, 1, 7] = np.inf, 1e5
    words = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    scales = calibrate_rows(words, layout)
    assert scales["rows"] == 2
    spec = ColumnSpec({"source": "s"}, layout, quantisation=scales)
    digest = create_column(tmp_path, spec)
    with ShardWriter(tmp_path, spec, digest, 0, 4, "index") as writer:
        writer.put_block(stored_rows(spec, words), np.zeros(4, np.uint8))
        writer.commit({})
    put_complete(tmp_path, digest, 1, allow_failed=False)
    column = Column.open(tmp_path)
    assert column.status(np.arange(4)).tolist() == [0, Status.NON_FINITE, Status.NON_FINITE, 0]
    assert np.isnan(column.decoded(column.read(np.array([1, 2])))).all()
    assert verify(tmp_path) == []


def test_info_shows_what_is_lost_and_where_most(tmp_path: Path) -> None:
    written(tmp_path / "a", "few channels")
    result = command("convert", tmp_path / "a", tmp_path / "b", "--element", "int8")
    assert result.returncode == 0, result.stderr
    info = information(tmp_path / "b")
    errors = info["quantisation"]["channel_error"]
    worst = f"{100 * max(errors):.2f} % in channel {np.argmax(errors)}, the worst"
    assert worst in result.stdout.replace("\n", " ")
    assert worst in " ".join(as_text(info).split())
    plain = information(tmp_path / "a")
    np.testing.assert_allclose(info["latents"]["std"], plain["latents"]["std"], rtol=0.01)
    half = plain["row_shape"]
    assert info["row_shape"] == half
    assert info["bytes"] < 0.75 * plain["bytes"]  # small rows: statuses and checksums count


def test_a_damaged_row_is_found_and_its_shard_put_aside(tmp_path: Path) -> None:
    written(tmp_path / "a", "many channels")
    convert(tmp_path / "a", tmp_path / "b", element="int8", processes=1)
    path = tmp_path / "b/latents/c/0/0"
    data = bytearray(path.read_bytes())
    data[5 * (160 * 15 + 60) + 7] ^= 1  # a value of row 5
    path.write_bytes(bytes(data))
    faults = verify(tmp_path / "b")
    assert any(fault.shard == 0 for fault in faults)
    assert command("repair", tmp_path / "b", "--yes").returncode == 0
    assert not (tmp_path / "b/commits/00000.json").exists()


def test_norms_are_measured_of_what_is_read(tmp_path: Path) -> None:
    written(tmp_path / "a", "few channels")
    column = convert(tmp_path / "a", tmp_path / "b", element="int8", processes=1)
    result = command("norm", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    values = column.decoded(column.read(np.arange(ROWS))).astype(np.float64)
    deviations = np.sqrt(values.var((0, 2, 3)))
    assert f"{deviations.min():.4g} to {deviations.max():.4g}" in result.stdout


def test_what_cannot_become_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moments of int8"):
        Layout("moments", (4, 2, 2), 1, SHARD_ROWS, "int8")
    with pytest.raises(ValueError, match="need the scale of each channel"):
        ColumnSpec({}, layout_of("tokens"))
    good = calibrate_rows(values_of("tokens"), layout_of("tokens"))
    for name in ("channel", "channel_error"):
        with pytest.raises(ValueError, match=f"quantisation.{name}: found 191, expected 192"):
            ColumnSpec({}, layout_of("tokens"), quantisation={**good, name: good[name][:-1]})
    written(tmp_path / "a", "tokens")
    layout = Layout("features", (3,), 1, SHARD_ROWS, "bfloat16")
    digest = create_column(tmp_path / "wide", ColumnSpec({"source": "s"}, layout))
    with ShardWriter(
        tmp_path / "wide", ColumnSpec({"source": "s"}, layout), digest, 0, 2, "index"
    ) as writer:
        writer.put_block(np.full((2, 3), 0x4800, np.uint16), np.zeros(2, np.uint8))  # 131,072
        writer.commit({})
    put_complete(tmp_path / "wide", digest, 1, allow_failed=False)
    with pytest.raises(ShardsError, match="2 of 2 rows that were looked at hold values beyond"):
        convert(tmp_path / "wide", tmp_path / "b", element="int8")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ShardsError, match="cannot become bfloat16"):
        convert(tmp_path / "a", tmp_path / "b", element="bfloat16")
