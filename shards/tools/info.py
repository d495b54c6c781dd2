"""What `python -m shards info` says of a column."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import read_commit, read_failures, valid_rows
from ..format.atomic import Json
from ..format.int8 import WARN_ABOVE
from ..format.layout import Norm
from ..read.column import Column
from ..store.base import Place

SAMPLE_ROWS = 2_048
SAMPLE_BYTES = 1 << 28  # of values that are read for statistics
GROUP = 32  # rows of them at once
TOLERANCE = 0.25  # of mean and deviation of normalised latents
CHANNEL_TOLERANCE = 0.5  # of those of one channel, which has a shift and scale of its own


def information(url: Place) -> Json:
    """Schema, identity, rows by status, sizes, and token lengths or latent statistics (of up to
    2,048 rows).
    """
    column = Column.open(url, partial=True)
    complete = any(name.endswith(".json") for name, _ in column.store.list("complete"))
    snapshot, layout = column.snapshot, column.layout
    done = [s for s, content in enumerate(snapshot.content) if content is not None]
    objects: dict[str, int] = {}
    for shard in done:
        objects |= {name: size for name, size, _ in read_commit(column.store, shard).objects}
    rows, size = sum(snapshot.rows), sum(objects.values())
    found: Json = {
        "column": column.path,
        "kind": layout.kind,
        "complete": complete,
        "shards": layout.shards,
        "shard_rows": layout.shard_rows,
        "committed": len(done),
        "failed": sorted(read_failures(column.store).keys() - set(done)),
        "rows": rows,
        "statuses": snapshot.counts,
        "row_shape": list(layout.row_shape),
        "element": layout.element,
        "backend": layout.backend,
        "codec": layout.codec,
        "bytes": size,
        "bytes_per_row": size // max(rows, 1),
        "digest": column.digest,
        "generation": snapshot.digest,
        "identity": column.spec.identity,
        "norm": column.spec.record()["norm"],
        "empty_tokens": column.spec.empty_tokens,
        "warnings": [],
    }
    if column.spec.quantisation:
        error = float(column.spec.quantisation["relative_error"])
        found["quantisation"] = {
            k: v for k, v in column.spec.quantisation.items() if k != "channel"
        }
        if error > WARN_ABOVE:
            found["warnings"].append(
                f"int8 loses {100 * error:.2f} % of these tokens (relative error); 1 % is usual"
            )
    ids = _some_valid_rows(column)
    if len(ids) and layout.ragged:
        found["lengths"] = _lengths(column.lengths(ids), layout.row_shape[0])
    elif len(ids) and layout.kind in ("moments", "latents"):
        found["latents"] = _latents(column, ids, column.spec.norm, found["warnings"])
    column.close()
    return found


def _some_valid_rows(column: Column) -> NDArray[np.int64]:
    """Up to 2,048 valid row ids spread over the column; fewer where rows are large."""
    ids = valid_rows(column.words())
    count = min(SAMPLE_ROWS, len(ids))
    if not column.layout.ragged:  # of others, the lengths alone are read
        count = min(count, max(1, SAMPLE_BYTES // column.layout.unit_bytes))
    return ids.take(np.linspace(0, len(ids) - 1, count).astype(int))


def _lengths(lengths: NDArray[np.int64], most: int) -> Json:
    counts, edges = np.histogram(lengths, bins=8)
    return {
        "rows": len(lengths),
        "mean": float(lengths.mean()),
        "p99": float(np.percentile(lengths, 99)),
        "max": int(lengths.max()),
        "limit": most,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _latents(
    column: Column, ids: NDArray[np.int64], norm: Norm | None, warnings: list[str]
) -> Json:
    """Per-channel mean and deviation of sampled latents; with a norm, a warning where it does not
    normalise them.
    """
    drawn = column.layout.kind == "moments"  # else they stand in the column
    channels = column.layout.row_shape[0] // (2 if drawn else 1)
    values = len(ids) * column.layout.row_shape[1]
    total, square, noise = np.zeros((3, channels))
    for start in range(0, len(ids), GROUP):
        mean = column.read(ids[start : start + GROUP]).astype(np.float64)
        if drawn:
            mean, logvar = np.split(mean, 2, axis=1)
            noise += np.exp(logvar.clip(-30, 20)).sum((0, 2, 3))
        total += mean.sum((0, 2, 3))
        square += np.square(mean).sum((0, 2, 3))
    values *= column.layout.row_shape[2]
    channel = total / values
    deviation = np.sqrt(np.maximum(square / values - channel**2, 0) + noise / values)
    found: Json = {"rows": len(ids), "mean": channel.tolist(), "std": deviation.tolist()}
    if norm is None:
        warnings.append("no shift and scale are recorded")
        return found
    shift, scale = np.array(norm.shift), np.array(norm.scale)
    means, spreads = (channel - shift) * scale, deviation * scale
    centre, spread = float(means.mean()), float(np.sqrt((spreads**2).mean()))
    found["normalised"] = {
        "mean": centre, "std": spread,
        "channel_mean": means.tolist(), "channel_std": spreads.tolist(),
    }  # fmt: skip
    if abs(centre) > TOLERANCE or abs(spread - 1) > TOLERANCE:
        warnings.append("the VAE's shift and scale do not normalise these latents")
    if max(shift.size, scale.size) > 1:  # a shift and scale of its own for each channel
        far = (np.abs(means) > CHANNEL_TOLERANCE) | (np.abs(spreads - 1) > CHANNEL_TOLERANCE)
        if far.any():
            warnings.append(
                f"the VAE's shift and scale do not normalise channels {np.flatnonzero(far).tolist()}"
            )
    return found


def describe(url: Place) -> str:
    """The information as text."""
    found = information(url)
    state = "complete" if found["complete"] else "NOT complete"
    stored = [found["element"], found["backend"], *([found["codec"]] if found["codec"] else [])]
    lines = [
        f"column      {found['column']} ({found['kind']}, {state})",
        f"shards      {found['committed']} of {found['shards']} committed, "
        f"{len(found['failed'])} failed",
        f"rows        {found['rows']:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in found["statuses"].items()),
        f"row         {found['row_shape']} {', '.join(stored)}",
        f"bytes       {found['bytes']:,} ({found['bytes_per_row']:,} a row)",
        "identity    " + json.dumps(found["identity"], indent=2).replace("\n", "\n            "),
    ]
    if "quantisation" in found:
        scales = found["quantisation"]
        lines.append(
            f"quantised   {scales['scheme']}; relative error {100 * scales['relative_error']:.2f} % "
            f"over {scales['rows']} rows"
        )
    if "lengths" in found:
        lines += _length_lines(found["lengths"])
    if "latents" in found:
        lines += _latent_lines(found["latents"])
    return "\n".join([*lines, *(f"WARNING     {warning}" for warning in found["warnings"])])


def _length_lines(found: Json) -> list[str]:
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges"]
    bars = [
        f"            {int(a):4d}-{int(b):<4d} {'#' * int(40 * n / max(counts)):40s} {n}"
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    summary = f"mean {found['mean']:.1f}, 99 % below {found['p99']:.0f}, most {found['max']}"
    return [f"tokens      {summary}", *bars]


def _latent_lines(found: Json) -> list[str]:
    def numbers(values: Any) -> str:
        return " ".join(f"{value:.2f}" for value in values)

    lines = [
        f"latents     mean {numbers(found['mean'])}",
        f"            std  {numbers(found['std'])}",
    ]
    if "normalised" in found:
        whole = found["normalised"]
        lines += [
            f"normalised  mean {whole['mean']:.3f}, std {whole['std']:.3f} (0 and 1 expected); by "
            "channel",
            f"            mean {numbers(whole['channel_mean'])}",
            f"            std  {numbers(whole['channel_std'])}",
        ]
    return lines


def run_info(url: str, as_json: bool) -> int:
    """`python -m shards info`."""
    print(json.dumps(information(url), indent=2) if as_json else describe(url))
    return 0
