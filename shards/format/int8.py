"""int8 captions: half the bytes of bfloat16, within about 1 % of each value's row.

value = int8 * token scale * channel scale. The scale of a channel is fixed for a column (its root
mean square over a sample of rows, so that channels of outliers do not rob the others of their
bits); that of a token is chosen so that its largest value is 127. float8 (e4m3) loses three times
as much at the same size, so it is not offered.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import Json
from .layout import SCALE_BYTES, ColumnSpec

log = logging.getLogger(__name__)

Words = NDArray[np.uint16]  # bfloat16 bits, (n, D)
Floats = NDArray[np.float32]

LEVELS = 127
WARN_ABOVE = 0.01  # relative error


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
    """Returns rows of bfloat16 bits as the column stores them: quantised where it is of int8."""
    if not spec.layout.quantised:
        return rows
    assert spec.quantisation
    channel = np.array(spec.quantisation["channel"], np.float32)
    return [quantise(row, channel) for row in rows]


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
