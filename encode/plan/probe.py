"""How fast encoders are on this hardware, tried on real rows of the source for a few seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import Layout
from shards.column import chunked, compress
from shards.format import calibrate_rows, channel_scale, quantise, quantise_rows

from ..config import EngineConfig
from ..models.encoder import CaptionEncoder, Encoder, ImageEncoder
from ..source.images import decode, transform

CALLS = 25  # measured calls at most; the median of so many is steady
SHARE = 8  # of the time: a call is to take no more than this part of it


@dataclass(frozen=True, slots=True)
class Rate:
    """Rows a second of one device; decoded pictures a second of one thread; stored bytes by bytes
    of values, where a codec is asked for.
    """

    rows_per_s: float
    decoded_per_s: float | None
    ratio: float
    calls: int


def timed(call: Callable[[int], Any], max_rows: int, seconds: float) -> tuple[float, int, Any]:
    """Returns the median of rows a second of a call for n rows, the measured calls, the last result.

    The first calls, of one row and then of as many as fit into a part of the time, are not counted:
    they load kernels and show how many rows to give.
    """
    start = time.perf_counter()
    call(1)
    begin = time.perf_counter()
    result = call(1)
    duration = max(time.perf_counter() - begin, 1e-9)
    rows = max(1, min(max_rows, int(seconds / SHARE / duration)))
    if rows > 1:
        result = call(rows)
    rates: list[float] = []
    while len(rates) < CALLS and (not rates or time.perf_counter() - start < seconds):
        begin = time.perf_counter()
        result = call(rows)
        rates.append(rows / max(time.perf_counter() - begin, 1e-9))
    return statistics.median(rates), len(rates), result


def probe(
    encoder: Encoder, layout: Layout, rows: Sequence[Any], engine: EngineConfig, seconds: float
) -> Rate | None:
    """Tries an encoder on pictures (as bytes) or captions; None where there is none to try on."""
    if isinstance(encoder, CaptionEncoder) and rows:
        rate, calls, values = timed(
            lambda count: encoder.rows(spread(rows, count), engine.tokens),
            min(1_024, max(len(rows), 64)), seconds,
        )  # fmt: skip
        return Rate(rate, None, ratio_of(layout, values), calls)
    crops: list[NDArray[np.uint8]] = []

    def load(count: int) -> None:
        assert isinstance(encoder, ImageEncoder)
        for data in spread(rows, count):
            image, _ = decode(data)
            if image is not None:
                crop = transform(image, encoder.view.resolution)
                crops.extend([crop] if len(crops) < 4 * engine.batch else [])

    if rows:
        decoded, _, _ = timed(load, min(32, len(rows)), seconds / 4)
    if not crops:
        return None
    assert isinstance(encoder, ImageEncoder)
    rate, calls, values = timed(
        lambda count: encoder.rows(np.stack(spread(crops, count))), engine.batch, seconds * 3 / 4
    )
    return Rate(rate, decoded, ratio_of(layout, [values]), calls)


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """Returns `count` of some rows, evenly over all; rows repeat where there are fewer."""
    return [rows[i * len(rows) // count % len(rows)] for i in range(count)]


def ratio_of(layout: Layout, values: Sequence[NDArray[Any]]) -> float:
    """Returns the bytes that a codec makes of a byte of these values; 1 without one."""
    if not layout.codec:
        return 1.0
    array = layout.arrays()[layout.kind]
    if layout.quantised and not layout.ragged:
        rows = np.concatenate(values)
        channel = np.array(calibrate_rows(rows, layout)["channel"], np.float32)
        values = [quantise_rows(rows, layout, channel)]
    elif layout.quantised:
        channel = channel_scale(np.concatenate(values))
        values = [quantise(row, channel) for row in values]
    chunks = [chunk.copy() for chunk in chunked(values, array)]
    return sum(len(compress(c)) for c in chunks) / max(1, sum(c.nbytes for c in chunks))


def hours(rows: float, rate: Rate, gpus: int, threads: int) -> float:
    """Returns the hours that rows take on some devices with some decoding threads each."""
    slowest = min(rate.rows_per_s, (rate.decoded_per_s or math.inf) * threads)
    return rows / max(slowest, 1e-9) / gpus / 3_600


def decode_bound(rate: Rate, threads: int) -> int | None:
    """Returns the threads a device needs so that its encoder need not wait for decoding; None where
    it does not wait.
    """
    if rate.decoded_per_s is None or rate.decoded_per_s * threads >= rate.rows_per_s:
        return None
    return math.ceil(rate.rows_per_s / rate.decoded_per_s)
