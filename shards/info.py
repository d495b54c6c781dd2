"""What `python -m shards info` prints of a column."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .commits import committed, read_commit, valid_rows
from .reader import Column
from .schema import Norm

SAMPLE_ROWS = 2_048
TOLERANCE = 0.25  # of mean and deviation of normalised latents


def describe(path: Path) -> str:
    """Identity, layout, rows by status, sizes, and token lengths or latent statistics (of up to
    2,048 rows).
    """
    column = Column.open(path, partial=True)
    complete = any((path / "complete").glob("*.json"))
    generation, layout = column.generation, column.layout
    done = committed(path, layout.shards)
    size = sum(size for shard in done for _, size, _ in read_commit(path, shard).objects)
    rows = sum(generation.rows)
    lines = [
        f"column      {path} ({layout.kind}, {'complete' if complete else 'NOT complete'})",
        f"shards      {len(done)} of {layout.shards} committed, {len(generation.failed)} failed",
        f"rows        {rows:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in generation.counts.items()),
        f"row         {list(layout.row_shape)} {'bfloat16' if layout.ragged else 'float16'}",
        f"bytes       {size:,} ({size // max(rows, 1):,} a row)",
        "identity    " + json.dumps(column.spec.identity, indent=2).replace("\n", "\n            "),
    ]
    ids = _some_valid_rows(column)
    if len(ids):
        lines += _lengths(column, ids) if layout.ragged else _latents(column, ids, column.spec.norm)
    return "\n".join(lines)


def _some_valid_rows(column: Column) -> NDArray[np.int64]:
    """Up to 2,048 valid row ids spread over the column."""
    ids = valid_rows(column.words())
    return ids.take(np.linspace(0, len(ids) - 1, min(SAMPLE_ROWS, len(ids))).astype(int))


def _lengths(column: Column, ids: NDArray[np.int64]) -> list[str]:
    lengths = column.lengths(ids)
    counts, edges = np.histogram(lengths, bins=8)
    widest = counts.max()
    bars = [
        f"            {int(a):4d}-{int(b):<4d} {'#' * int(40 * n / widest):40s} {n}"
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    quantile = np.percentile(lengths, 99)
    return [
        f"tokens      mean {lengths.mean():.1f}, 99 % below {quantile:.0f}, most {lengths.max()}",
        *bars,
    ]


def _latents(column: Column, ids: NDArray[np.int64], norm: Norm | None) -> list[str]:
    """Per-channel mean and deviation of sampled latents; with a norm, a warning where it does not
    normalise them.
    """
    moments = column.read(ids).astype(np.float64)
    mean, logvar = np.split(moments, 2, axis=1)
    channel = mean.mean((0, 2, 3))
    deviation = np.sqrt(mean.var((0, 2, 3)) + np.exp(logvar.clip(-30, 20)).mean((0, 2, 3)))
    lines = [
        "latents     mean " + " ".join(f"{m:.2f}" for m in channel),
        "            std  " + " ".join(f"{s:.2f}" for s in deviation),
    ]
    if norm is None:
        return [*lines, "WARNING     no shift and scale are recorded"]
    centre = float(((channel - np.array(norm.shift)) * np.array(norm.scale)).mean())
    spread = float(np.sqrt(((deviation * np.array(norm.scale)) ** 2).mean()))
    lines.append(f"normalised  mean {centre:.3f}, std {spread:.3f} (0 and 1 expected)")
    if abs(centre) > TOLERANCE or abs(spread - 1) > TOLERANCE:
        lines.append("WARNING     the VAE's shift and scale do not normalise these latents")
    return lines
