"""int8 captions, features and latents without posterior: half the bytes of 16-bit numbers, within
about 1 % of each value's row.

value = int8 * token scale * channel scale. The scale of a channel is fixed for a column (its root
mean square over a sample of rows, so that channels of outliers do not rob the others of their
bits); that of a token is chosen so that its largest value is 127. float8 (e4m3) loses three times
as much at the same size, so it is not offered.

A row of one shape is its values as they lie in `row_shape`, then its scales. Each place of features
or latents of 128 channels or more has a scale as a token has, so that a place of large values does
not rob the others (`Layout.scales`); of fewer channels, where such scales would take more than a
thirty-second of the bytes, the row has one.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import Json
from .layout import SCALE_BYTES, ColumnSpec, Layout

log = logging.getLogger(__name__)

Words = NDArray[np.uint16]  # bfloat16 bits, (n, D)
Floats = NDArray[np.float32]

LEVELS = 127
WARN_ABOVE = 0.01  # relative error of tokens
WARN_ROWS_ABOVE = (
    0.02  # of rows of one shape: a Gaussian of 200,000 values with one scale loses 1.1 %
)
GROUP = 32  # rows that are float32 at once
HALF_MOST = 65_504  # the largest float16


def to_floats(words: Words) -> Floats:
    """Converts bfloat16 bits to float32, exactly."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_words(values: Floats) -> Words:
    """Rounds float32 to the nearest bfloat16 (ties to even) and returns its bits; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def channel_scale(words: Words) -> Floats:
    """Returns the root mean square of each channel over a sample of tokens, (n, D) -> (D,); 1 for one of zeros."""
    values = to_floats(words).astype(np.float64)
    finite = values[np.isfinite(values).all(1)]
    scale = np.sqrt(np.square(finite).mean(0)) if len(finite) else np.ones(words.shape[1])
    return np.where(scale > 0, scale, 1).astype(np.float32)


def quantise(words: Words, channel: Floats) -> NDArray[np.int8]:
    """Converts (n, D) bfloat16 bits to (n, D + 4) int8: values, then the token's float32 scale. A
    token that is not finite gets the scale NaN.
    """
    values = to_floats(words) / channel
    scale = np.abs(values).max(1, initial=0) / np.float32(LEVELS)
    nonzero = np.isfinite(scale) & (scale > 0)
    steps = np.zeros_like(values)
    np.divide(values, scale[:, None], out=steps, where=nonzero[:, None])
    scale = np.where(np.isfinite(scale), scale, np.nan).astype("<f4")
    tokens = np.empty((len(words), words.shape[1] + SCALE_BYTES), np.int8)
    tokens[:, :-SCALE_BYTES] = np.rint(steps)
    tokens[:, -SCALE_BYTES:] = scale.view(np.int8).reshape(-1, SCALE_BYTES)
    return tokens


def dequantise(tokens: NDArray[np.int8], channel: Floats) -> Words:
    """Converts (n, D + 4) int8 to (n, D) bfloat16 bits: the inverse of `quantise`, up to rounding."""
    scale = np.ascontiguousarray(tokens[:, -SCALE_BYTES:]).view("<f4")
    return to_words(tokens[:, :-SCALE_BYTES] * scale * channel)


def stored_rows(spec: ColumnSpec, rows: Any) -> Any:
    """Returns rows of 16-bit numbers as the column stores them: quantised where it is of int8."""
    if not spec.layout.quantised:
        return rows
    assert spec.quantisation
    channel = np.array(spec.quantisation["channel"], np.float32)
    if not spec.layout.ragged:
        return quantise_rows(rows, spec.layout, channel)
    return [quantise(row, channel) for row in rows]


def read_rows(spec: ColumnSpec, stored: NDArray[Any]) -> NDArray[Any]:
    """Returns stored tokens as bfloat16 bits, and int8 rows of one shape as float16; others as they
    are. The inverse of `stored_rows` up to rounding, but tokens are end to end.
    """
    if not spec.quantisation:
        return stored
    channel = np.array(spec.quantisation["channel"], np.float32)
    if spec.layout.ragged:
        return dequantise(stored, channel)
    return dequantise_rows(stored, spec.layout, channel)


def calibrate(words: Words, rows: int) -> Json:
    """Returns the `quantisation` of a column, from a sample of its tokens (of `rows` rows): scheme,
    channel scales and the error measured with them. Warns above 1 %.
    """
    channel = channel_scale(words)
    error = relative_error(words, channel)
    if error > WARN_ABOVE:
        log.warning(
            "int8 loses %.1f %% of these captions (relative L2 error): more than the 1 %% that is "
            "usual. bfloat16 would be safer",
            100 * error,
        )
    return {
        "scheme": "int8, a scale a channel and a scale a token",
        "channel": channel.tolist(),
        "relative_error": round(error, 6),
        "rows": rows,
    }


def relative_error(words: Words, channel: Floats) -> float:
    """Returns the L2 norm of the error of quantised tokens over that of their values."""
    values = to_floats(words).astype(np.float64)
    finite = np.isfinite(values).all(1)
    error = to_floats(dequantise(quantise(words, channel), channel))[finite] - values[finite]
    return float(np.linalg.norm(error) / max(float(np.linalg.norm(values[finite])), 1e-300))


def loss_text(quantisation: Json) -> str:
    """Returns what is lost, for people: in all and, where it is known, of the channel that loses most."""
    text = f"relative error {100 * quantisation['relative_error']:.2f} % over {quantisation['rows']} rows"
    errors = quantisation.get("channel_error")
    if not errors:
        return text
    worst = int(np.argmax(errors))
    return f"{text}, {100 * errors[worst]:.2f} % in channel {worst}, the worst"


def warns(quantisation: Json) -> bool:
    """Returns whether more is lost than is usual."""
    usual = WARN_ROWS_ABOVE if "channel_error" in quantisation else WARN_ABOVE
    return float(quantisation["relative_error"]) > usual


# Rows of one shape ---------------------------------------------------------------------------------


def quantise_rows(rows: NDArray[Any], layout: Layout, channel: Floats) -> NDArray[np.int8]:
    """Converts (n, *row_shape) float16, or bfloat16 bits, to (n, values + 4 * scales) int8. Where a value
    is not finite, or larger than float16 holds, the scale is NaN.
    """
    result = np.empty((len(rows), *layout.unit_shape), np.int8)
    for first in range(0, len(rows), GROUP):
        values = _numbers(rows[first : first + GROUP]) / _along_channels(layout, channel)
        scale = np.abs(values).max(_axes(layout), keepdims=True) / np.float32(LEVELS)
        scale = np.where(_holds(rows[first : first + GROUP], layout), scale, np.float32(np.nan))
        steps = np.zeros_like(values)
        np.divide(values, scale, out=steps, where=scale > 0)
        part = result[first : first + GROUP]
        part[:, : -layout.scale_bytes] = np.rint(steps).reshape(len(part), -1)
        scales = np.ascontiguousarray(scale.reshape(len(part), -1), "<f4")
        part[:, -layout.scale_bytes :] = scales.view(np.int8)
    return result


def dequantise_rows(
    stored: NDArray[np.int8], layout: Layout, channel: Floats
) -> NDArray[np.float16]:
    """Converts (n, values + 4 * scales) int8 to (n, *row_shape) float16: the inverse of
    `quantise_rows`, up to rounding; NaN where a scale is.
    """
    result = np.empty((len(stored), *layout.row_shape), np.float16)
    for first in range(0, len(stored), GROUP):
        part = stored[first : first + GROUP]
        shape = (len(part), *layout.row_shape)
        scale = np.ascontiguousarray(part[:, -layout.scale_bytes :]).view("<f4")
        scale = scale.reshape([1 if i in _axes(layout) else n for i, n in enumerate(shape)])
        values = part[:, : -layout.scale_bytes].reshape(shape) * scale
        values *= _along_channels(layout, channel)
        result[first : first + GROUP] = np.clip(values, -HALF_MOST, HALF_MOST)
    return result


def calibrate_rows(rows: NDArray[Any], layout: Layout) -> Json:
    """Returns the `quantisation` of a column from a sample of its rows, (n, *row_shape): scheme, channel
    scales, and the error measured with them, in all and of each channel. Rows that are not finite, or
    larger than float16 holds, do not count. Warns above 2 %.
    """
    rows = rows[[bool((np.abs(_numbers(row)) <= HALF_MOST).all()) for row in rows]]
    axes = tuple(i for i in range(len(layout.row_shape) + 1) if i != _channel_axis(layout))
    square, lost = np.zeros((2, layout.channels))
    for first in range(0, len(rows), GROUP):
        square += np.square(_numbers(rows[first : first + GROUP]), dtype=np.float64).sum(axes)
    count = max(1, len(rows) * int(np.prod(layout.row_shape)) // layout.channels)
    channel = np.sqrt(square / count)
    channel = np.where(channel > 0, channel, 1).astype(np.float32)
    for first in range(0, len(rows), GROUP):
        part = rows[first : first + GROUP]
        back = dequantise_rows(quantise_rows(part, layout, channel), layout, channel)
        lost += np.square(back - _numbers(part), dtype=np.float64).sum(axes)
    error = float(np.sqrt(lost.sum() / max(float(square.sum()), 1e-300)))
    of_channels = np.sqrt(lost / np.where(square > 0, square, 1))
    if error > WARN_ROWS_ABOVE:
        log.warning(
            "int8 loses %.1f %% of these %s (relative L2 error): more than the 1 %% that is usual. "
            "float16 would be safer",
            100 * error, layout.kind,
        )  # fmt: skip
    places = "a place of a row" if layout.scales > 1 else "a row"
    return {
        "scheme": f"int8, a scale a channel and a scale {places}",
        "channel": channel.tolist(),
        "relative_error": round(error, 6),
        "rows": len(rows),
        "channel_error": np.round(of_channels, 6).tolist(),
    }


def _numbers(rows: NDArray[Any]) -> Floats:
    """Returns float16 numbers, or bfloat16 bits, as float32."""
    return to_floats(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


def _holds(rows: NDArray[Any], layout: Layout) -> NDArray[np.bool_]:
    """Returns whether the values of each scale are finite float16, with axes of one for theirs."""
    held: NDArray[np.bool_] = np.all(
        np.abs(_numbers(rows)) <= HALF_MOST, axis=_axes(layout), keepdims=True
    )
    return held


def _channel_axis(layout: Layout) -> int:
    """Returns the axis of channels of (n, *row_shape)."""
    return 1 if layout.kind == "latents" else len(layout.row_shape)


def _axes(layout: Layout) -> tuple[int, ...]:
    """Returns the axes of (n, *row_shape) that share a scale."""
    if layout.scales > 1:
        return (_channel_axis(layout),)
    return tuple(range(1, len(layout.row_shape) + 1))


def _along_channels(layout: Layout, channel: Floats) -> Floats:
    """Returns channel scales with axes that broadcast to (n, *row_shape)."""
    shape = [1] * (len(layout.row_shape) + 1)
    shape[_channel_axis(layout)] = -1
    return channel.reshape(shape)
