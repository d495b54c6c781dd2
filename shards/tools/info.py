"""What `python -m shards info` says of a column."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import charts
from ..column.commits import Commit, Snapshot, valid_rows
from ..column.mask import Mask, read_mask
from ..column.statistics import LEAST
from ..console import say_next
from ..errors import Unreadable
from ..format.atomic import Json, atomic_write
from ..format.int8 import loss_text, warns
from ..format.norm import Norm
from ..printing import printable
from ..read.column import Column
from ..read.compatible import check_mask
from ..store.base import Place
from ..tables import terminal_width, wrapped
from .describe import describe

Floats = NDArray[np.float64]
SAMPLE_ROWS = 2_048
SAMPLE_BYTES = 1 << 28  # of values that are read for statistics
GROUP = 32  # rows of them at once
BARS = 8  # of the histogram of token lengths, at most
TOLERANCE = 0.25  # of mean and deviation of normalised latents
SPREAD = 2.0  # of the channels' deviations, the largest over the smallest
CHANNEL_TOLERANCE = 0.5  # of those of one channel, which has a shift and scale of its own


def information(url: Place, masks: Sequence[Place] = ()) -> Json:
    """Returns schema, identity, rows by status, sizes, and token lengths or latent statistics (of up
    to 2,048 rows); and how many rows each mask leaves. SourceMismatch for a mask of another source.
    """
    about = describe(url)
    about.refuse_damage()
    spec, layout = about.spec, about.spec.layout
    snapshot = Snapshot.of(about.digest, layout.shards, list(about.commits.values()), {})
    column = Column(about.store, spec, about.digest, snapshot)
    info: Json = {
        "column": column.path,
        "kind": layout.kind,
        "complete": bool(about.complete),
        "shards": layout.shards,
        "shard_rows": layout.shard_rows,
        "committed": len(about.commits),
        "failed": sorted(about.failed),
        "rows": about.rows,
        "statuses": about.counts,
        "row_shape": list(layout.row_shape),
        "element": layout.element,
        "backend": layout.backend,
        "codec": layout.codec,
        "bytes": about.bytes,
        "bytes_per_row": about.bytes // max(about.rows, 1),
        "digest": about.digest,
        "generation": snapshot.digest,
        "identity": spec.identity,
        "norm": spec.norm and spec.norm.summary(),
        "empty_tokens": spec.empty_tokens,
        "warnings": [],
    }
    if sources := _norm_sources(about.commits.values()):
        info["norm_source"] = sources
    if spec.quantisation:
        info["quantisation"] = {k: v for k, v in spec.quantisation.items() if k != "channel"}
        if warns(spec.quantisation):
            error = float(spec.quantisation["relative_error"])
            info["warnings"].append(
                f"int8 loses {100 * error:.2f} % of these {layout.kind} (relative error); 1 % is usual"
            )
    info |= {"masks": [_masked(read_mask(mask), column) for mask in masks]} if masks else {}
    ids = _some_valid_rows(column)
    if len(ids) and layout.ragged:
        info["lengths"] = _lengths(column.lengths(ids), layout.row_shape[0])
    elif len(ids) and layout.kind in ("moments", "latents"):
        info["latents"] = _latents(column, ids, spec.norm, info["warnings"])
    column.close()
    return info


def _norm_sources(commits: Iterable[Commit]) -> list[str]:
    """Returns where shift and scale came from when shards were encoded; older shards do not say it."""
    sources = (commit.provenance.get("norm_source") for commit in commits)
    return sorted({source for source in sources if isinstance(source, str) and source})


def _masked(mask: Mask, column: Column) -> Json:
    """Returns how many rows a mask names, and how many of them are valid in the column."""
    check_mask(mask, column)
    valid = int(np.bitwise_count(mask.row_bits() & column.valid_mask()).sum())
    return {"path": mask.path, "kept": mask.kept, "valid": valid, "made": mask.made}


def _some_valid_rows(column: Column) -> NDArray[np.int64]:
    """Up to 2,048 valid row ids spread over the column; fewer where rows are large."""
    ids = valid_rows(column.valid_mask())
    count = min(SAMPLE_ROWS, len(ids))
    if not column.layout.ragged:  # of others, the lengths alone are read
        count = min(count, max(1, SAMPLE_BYTES // column.layout.unit_bytes))
    return ids.take(np.linspace(0, len(ids) - 1, count).astype(int))


def _lengths(lengths: NDArray[np.int64], most: int) -> Json:
    """Returns figures of token lengths. A bar of the histogram has the lengths from its edge up to
    the one before the next edge; all bars have equally many of them.
    """
    least, values = int(lengths.min()), int(np.ptp(lengths)) + 1
    step = -(-values // BARS)
    edges = least + step * np.arange(-(-values // step) + 1)
    counts, _ = np.histogram(lengths, edges)
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
    """Returns mean and deviation of each channel over sampled latents; with a norm, adds a warning
    where it does not bring them near 0 and 1.
    """
    moments = (
        column.layout.kind == "moments"
    )  # mean and log variance of what latents are drawn from
    channels, height, width = column.layout.row_shape
    shape = (channels // 2 if moments else channels, height, width)
    total, square, noise = np.zeros((3, *shape))
    for start in range(0, len(ids), GROUP):
        mean = column.decoded(column.read(ids[start : start + GROUP])).astype(np.float64)
        if moments:
            mean, logvar = np.split(mean, 2, axis=1)
            noise += np.exp(logvar.clip(-30, 20)).sum(0)
        total += mean.sum(0)
        square += np.square(mean).sum(0)
    means, deviations = _of_channels(total, square, noise, len(ids))
    latents: Json = {"rows": len(ids), "mean": means.tolist(), "std": deviations.tolist()}
    valid = int(np.bitwise_count(column.valid_mask()).sum())
    latents["measurable"] = valid >= LEAST["measured"]  # whether `shards norm` takes the column
    if norm is None:
        warnings.append("no shift and scale are recorded")
        return latents
    shift, scale = norm.arrays
    # of (x - shift) * scale, place by place
    square = (square - 2 * shift * total + len(ids) * shift.astype(np.float64) ** 2) * scale**2
    total = (total - len(ids) * shift) * scale
    means, deviations = _of_channels(total, square, noise * scale**2, len(ids))
    centre, spread = float(means.mean()), float(np.sqrt((deviations**2).mean()))
    latents["normalised"] = {
        "mean": centre, "std": spread,
        "channel_mean": means.tolist(), "channel_std": deviations.tolist(),
    }  # fmt: skip
    if abs(centre) > TOLERANCE or abs(spread - 1) > TOLERANCE:
        warnings.append("the VAE's shift and scale do not normalise these latents")
    if max(len(shift), len(scale)) > 1:  # a shift and scale of its own for each channel
        far = np.maximum(np.abs(means), np.abs(deviations - 1)) > CHANNEL_TOLERANCE
        if far.any():
            warnings.append(
                f"the VAE's shift and scale do not normalise channels {np.flatnonzero(far).tolist()}"
            )
    elif (most := float(deviations.max())) > SPREAD * (least := float(deviations.min())):
        remedy = (
            f"`python -m shards norm {column.path}` measures them, and a run with data.norm=measured "
            "gives each the deviation 1"
        )
        if not latents["measurable"]:
            remedy = f"They can be measured from {LEAST['measured']} valid rows on, found {valid}"
        warnings.append(
            f"normalised channels have deviations from {least:.2f} to {most:.2f}, so noise hides some "
            f"before others. {remedy}"
        )
    return latents


def _of_channels(total: Floats, square: Floats, noise: Floats, rows: int) -> tuple[Floats, Floats]:
    """Returns mean and deviation of each channel, (C,), from the sums over rows of values, squares and
    variances of the noise, (C, H, W).
    """
    values = rows * total[0].size
    means = total.sum((1, 2)) / values
    variances = np.maximum(square.sum((1, 2)) / values - means**2, 0) + noise.sum((1, 2)) / values
    return means, np.sqrt(variances)


def as_text(info: Json) -> str:
    """Returns the information for a reader."""
    state = "complete" if info["complete"] else "NOT complete"
    storage = [info["element"], info["backend"], *([info["codec"]] if info["codec"] else [])]
    lines = [
        f"column      {info['column']} ({info['kind']}, {state})",
        f"shards      {info['committed']} of {info['shards']} committed, "
        f"{len(info['failed'])} failed",
        f"rows        {info['rows']:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in info["statuses"].items()),
        f"row         {info['row_shape']} {', '.join(storage)}",
        f"bytes       {info['bytes']:,} ({info['bytes_per_row']:,} a row)",
        "identity    " + json.dumps(info["identity"], indent=2).replace("\n", "\n            "),
    ]
    lines += [f"norm        {source}" for source in info.get("norm_source", ())]
    lines += [
        f"mask        {mask['path']}: {mask['kept']:,} rows, of which {mask['valid']:,} are ok here"
        for mask in info.get("masks", ())
    ]
    if scales := info.get("quantisation"):
        lines.append(f"quantised   {scales['scheme']}; {loss_text(scales)}")
    if lengths := info.get("lengths"):
        counts, edges = lengths["histogram"]["counts"], lengths["histogram"]["edges"]
        longest = max(1, terminal_width(74) - 34)  # of the bars
        lines.append(
            f"tokens      mean {lengths['mean']:.1f}, 99 % at most {lengths['p99']:.0f}, most "
            f"{lengths['max']}"
        )
        lines += [
            f"            {a:4d}-{b - 1:<4d} {'#' * int(longest * n / max(counts)):{longest}s} {n:,}"
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    if latents := info.get("latents"):
        lines += [
            f"latents     mean {_numbers(latents['mean'])}",
            f"            std  {_numbers(latents['std'])}",
        ]
        if scaled := latents.get("normalised"):
            lines += [
                f"normalised  mean {scaled['mean']:.3f}, std {scaled['std']:.3f} (0 and 1 expected); by "
                "channel",
                f"            mean {_numbers(scaled['channel_mean'])}",
                f"            std  {_numbers(scaled['channel_std'])}",
            ]
    lines += [f"WARNING     {warning}" for warning in info["warnings"]]
    return "\n".join(wrapped("\n".join(lines), " " * 12))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def as_page(info: Json) -> str:
    """Returns the information as a page of HTML that needs nothing else."""
    state = "complete" if info["complete"] else "not complete"
    storage = [info["element"], info["backend"], *([info["codec"]] if info["codec"] else [])]
    facts = [
        ("column", f"{info['column']} ({info['kind']}, {state})"),
        (
            "shards",
            f"{info['committed']} of {info['shards']} committed, {len(info['failed'])} failed",
        ),
        ("rows", f"{info['rows']:,}"),
        *((f"rows {name}", f"{count:,}") for name, count in info["statuses"].items()),
        ("row", f"{' x '.join(map(str, info['row_shape']))} {', '.join(storage)}"),
        ("bytes", f"{info['bytes']:,} ({info['bytes_per_row']:,} a row)"),
        ("digest", info["digest"]),
    ]
    facts += [("norm from", source) for source in info.get("norm_source", ())]
    facts += [
        ("mask", f"{mask['path']}: {mask['kept']:,} rows, of which {mask['valid']:,} are ok here")
        for mask in info.get("masks", ())
    ]
    if scales := info.get("quantisation"):
        facts.append(("quantised", f"{scales['scheme']}; {loss_text(scales)}"))
    if lengths := info.get("lengths"):
        tokens = (
            f"mean {lengths['mean']:.1f}, 99 % at most {lengths['p99']:.0f}, most {lengths['max']}"
        )
        facts.append(("tokens", tokens))
    if latents := info.get("latents"):
        facts.append(("latents", f"figures of {latents['rows']:,} rows, evenly apart"))
    facts += [("warning", warning) for warning in info["warnings"]]
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(str(text))}</td></tr>'
        for name, text in facts
    )
    identity = html.escape(json.dumps(info["identity"], indent=2))
    return charts.document(
        f"Column: {info['column']}",
        f'<div class="wide facts" role="region" tabindex="0" aria-label="The column"><table>{rows}</table></div>'
        f'<div class="curves-grid">{"".join(_figures(info))}</div>'
        f"<details open><summary>Identity</summary><pre>{identity}</pre></details>",
    )


def _figures(info: Json) -> list[str]:
    """Returns charts of token lengths, or of mean and deviation by channel."""
    if lengths := info.get("lengths"):
        counts, edges = lengths["histogram"]["counts"], lengths["histogram"]["edges"]
        middles = [(a + b - 1) / 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
        points = list(zip(middles, counts, strict=True))
        return [charts.curves("Rows by number of tokens", [("rows", points)], axis="tokens")]
    latents = info.get("latents", {})
    series = {"Stored latents by channel": (latents.get("mean"), latents.get("std"))}
    if scaled := latents.get("normalised"):
        by_channel = scaled["channel_mean"], scaled["channel_std"]
        series["Normalised latents by channel (0 and 1 expected)"] = by_channel
    return [
        charts.curves(
            title,
            [("mean", list(enumerate(mean))), ("deviation", list(enumerate(deviation)))],
            axis="channel",
        )
        for title, (mean, deviation) in series.items()
        if mean
    ]


def run_info(args: argparse.Namespace) -> int:
    """`python -m shards info`."""
    page: Path | None = args.html
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise Unreadable(f"{page}: expected the name of a page in a folder that exists")
    info = information(args.column, args.mask)
    if page is not None:
        atomic_write(page, printable(as_page(info)).encode())
    print(json.dumps(info, indent=2) if args.json else as_text(info))
    latents = info.get("latents", {})
    lossy = "quantisation" in info and warns(info["quantisation"])  # other warnings are of the norm
    misfit = "normalised" in latents and len(info["warnings"]) > lossy
    if misfit and latents["measurable"] and info["complete"] and not args.json:
        say_next("shards", "norm", info["column"], note="then data.norm=measured of a run")
    return 0
