"""int8 captions against torch's bfloat16 and against what they may lose."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import (
    Column,
    ColumnSpec,
    Layout,
    ShardWriter,
    Status,
    create_column,
    put_complete,
    put_empty,
)
from shards.format.int8 import (
    WARN_ABOVE,
    calibrate,
    channel_scale,
    dequantise,
    quantise,
    relative_error,
    stored_rows,
    to_floats,
    to_words,
)
from shards.tools.verify import verify


def words_of(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_bfloat16_as_torch_rounds_it(values: list[float]) -> None:
    expected = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    words = to_words(np.array(values, np.float32))
    actual = torch.from_numpy(words).view(torch.bfloat16)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual[~actual.isnan()], expected[~expected.isnan()])
    np.testing.assert_array_equal(to_floats(words), actual.float().numpy())


def test_outlier_channels_take_nothing_from_the_others() -> None:
    """Hidden states have a few channels a hundred times larger than the rest."""
    torch.manual_seed(0)
    states = torch.randn(400, 256)
    states[:, [3, 77, 200]] *= 150
    words = words_of(states)
    channel = channel_scale(words)
    assert relative_error(words, channel) < WARN_ABOVE
    quiet = np.delete(np.arange(256), [3, 77, 200])
    error = to_floats(dequantise(quantise(words, channel), channel)) - to_floats(words)
    assert np.linalg.norm(error[:, quiet]) / np.linalg.norm(to_floats(words)[:, quiet]) < 0.012
    ones = np.ones(256, np.float32)  # a token's scale alone would not do
    error = to_floats(dequantise(quantise(words, ones), ones)) - to_floats(words)
    assert np.linalg.norm(error[:, quiet]) / np.linalg.norm(to_floats(words)[:, quiet]) > 0.3


def test_layout_of_a_token() -> None:
    """By hand: channel scales 1 and 2, values 127 and -254, so steps of 1 and 2."""
    words = words_of(torch.tensor([[127.0, -254.0], [0.0, 0.0]]))
    tokens = quantise(words, np.array([1, 2], np.float32))
    assert tokens.shape == (2, 6)
    assert tokens[0, :2].tolist() == [127, -127]
    assert tokens[:, 2:].copy().view("<f4").ravel().tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(dequantise(tokens, np.array([1, 2], np.float32)), words)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite(bad: float) -> None:
    words = words_of(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    channel = channel_scale(words)
    np.testing.assert_allclose(channel, [1, 2])
    back = to_floats(dequantise(quantise(words, channel), channel))
    assert np.isnan(back[0]).all()
    np.testing.assert_allclose(back[1], [1, 2], rtol=0.01)


def test_a_column_of_int8(tmp_path: Path) -> None:
    """Stored, checked and read like any other; a token that is not finite makes its row NON_FINITE."""
    torch.manual_seed(1)
    rows = [words_of(torch.randn(n, 8)) for n in (3, 1, 4, 2)]
    rows[1][0, 5] = 0x7F80  # infinity
    scales = calibrate(np.concatenate([rows[0], rows[2], rows[3]]), 3)
    assert 0 < scales["relative_error"] < WARN_ABOVE
    layout = Layout("tokens", (4, 8), 1, 1024, "int8")
    spec = ColumnSpec({"source": "s"}, layout, empty_tokens=1, quantisation=scales)
    digest = create_column(tmp_path, spec)
    put_empty(tmp_path, spec, rows[3][:1])
    with ShardWriter(tmp_path, spec, digest, 0, 4, "index") as writer:
        writer.put_block(stored_rows(spec, rows), np.zeros(4, np.uint8))
        writer.commit({})
    put_complete(tmp_path, digest, 1, allow_failed=False)
    assert verify(tmp_path) == []
    column = Column.open(tmp_path)
    assert column.status(np.arange(4)).tolist() == [0, Status.NON_FINITE, 0, 0]
    values = to_floats(column.decoded(column.read(np.array([2, 1, 0]), check=True)))
    np.testing.assert_allclose(values[:4], to_floats(rows[2]), atol=0.05)
    assert np.isnan(values[4]).all()
    np.testing.assert_allclose(values[5:], to_floats(rows[0]), atol=0.05)
    tokens = zarr.open_group(tmp_path, mode="r")["tokens"][:3]  # by hand, from the arrays alone
    by_hand = tokens[:, :8] * tokens[:, 8:].copy().view("<f4") * np.array(scales["channel"], "f4")
    np.testing.assert_array_equal(to_words(by_hand), column.decoded(column.read(np.array([0]))))


def test_int8_without_scales_and_scales_without_int8() -> None:
    layout = Layout("tokens", (4, 8), 1, 1024, "int8")
    with pytest.raises(ValueError, match="need the scale of each channel"):
        ColumnSpec({}, layout)
    with pytest.raises(ValueError, match="need the scale of each channel"):
        ColumnSpec({}, Layout("tokens", (4, 8), 1, 1024), quantisation={"channel": [1.0] * 8})


def test_a_warning_where_int8_loses_too_much(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(words_of(torch.randn(50, 8)), 1)
    assert not caplog.records
    wild = torch.randn(50, 256)
    wild[torch.arange(50), torch.randint(256, (50,))] = 30  # leaves the others few steps
    calibrate(words_of(wild), 1)
    assert "int8 loses" in caplog.text
