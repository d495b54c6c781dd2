"""`python -m train page RUN`: a run on one self-contained page, RUN/page.html: what it trains on, and its curves.

Scores of its checkpoints are shown too, where `python -m eval watch` left them in RUN/eval/metrics.jsonl.
"""

import argparse
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import ConfigError, read_yaml
from shards import atomic_write
from shards.format.atomic import LINES_BYTES, parse_json, read_file
from shards.format.records import anything, finite, having, integer, listed, optional, table, text
from shards.places import local_path
from shards.printing import printable

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 64, 24  # of a chart, and its margins, in pixels
MOST = 400  # points of a curve
COLOURS = ("#2a7fb8", "#d2691e", "#3a9a5b", "#9355b5", "#b8922a", "#c0486a", "#4a9c9c", "#777777")
STYLE = """:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
figure{display:inline-block;margin:0 20px 20px 0;max-width:100%}figcaption{font-weight:600}
svg{background:#8881;max-width:100%;height:auto}text{font:11px system-ui,sans-serif;fill:currentColor}"""

COUNT = integer(0, 1 << 64)
FIGURE = optional(finite)  # null where it was not
LEVELS = optional(listed(FIGURE, 8, 8))
START = {
    "mix": table(text(), finite, 1 << 16), "epoch_samples": COUNT, "parameters": table(text(), COUNT, 1 << 16),
    "world": integer(1, 1 << 30), "device": text(),
}  # fmt: skip
STEP = {"loss": FIGURE, "data_wait": finite, "samples_per_second": finite, "epoch": finite}
RECORD = having(
    {"step": COUNT},
    {
        **STEP, "position": COUNT, "loss_by_level": LEVELS, "grad_norm": FIGURE, "mfu": FIGURE,
        "start": having({}, START), "validation": having({"loss": FIGURE, "normalised": FIGURE}, {"levels": LEVELS}),
    },
)  # fmt: skip
WHOLE_STEP, WHOLE_START = having(STEP), having({}, {"start": having(START)})  # what a page shows
CONFIG = having(
    {"data": having({"latents": anything, "text": anything}), "steps": COUNT, "global_batch": COUNT, "seed": COUNT}
)  # fmt: skip

Line = tuple[str, Sequence[tuple[float, float]]]  # a name, and its points


def page(run: Path) -> str:
    """From metrics.jsonl and config.yaml; ConfigError if the folder is no run."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"found no metrics.jsonl in {run}, expected the folder of a run")
    records = read(path)
    config = read_yaml(run / "config.yaml")
    try:
        CONFIG(config)
    except ValueError as error:
        raise ConfigError(f"{run / 'config.yaml'} is not the config of a run: {error}") from None
    try:
        for record in records:
            (WHOLE_STEP if "loss" in record else WHOLE_START)(record)
    except ValueError as error:
        raise ConfigError(f"{path} is not of a run: step {record['step']}: {error}") from None
    found = [*curves(records), *scores(run / "eval" / "metrics.jsonl")]
    charts = "".join(chart(title, lines) for title, lines in found if any(p for _, p in lines))
    facts = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in described(config, records)
    )
    name = html.escape(run.resolve().name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{name}</title><style>{STYLE}</style>'
        f"<h1>{name}</h1><table>{facts}</table>{charts}</html>\n"
    )  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, none where there is no file; a last line that is being written is left.

    ConfigError where a line is no record."""
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        for line in read_file(path, LINES_BYTES).split(b"\n")[:-1]:
            record = parse_json(line)
            RECORD(record)
            records.append(record)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: line {len(records) + 1} is no record of a run: {error}. Restore the file, or move it away"
        ) from None
    return records


def described(config: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run is, and where it stands."""
    starts = [r["start"] for r in records if "start" in r]
    steps = [r for r in records if "loss" in r]
    checks = [r["validation"] for r in records if "validation" in r]
    found = [
        ("latents", str(config["data"]["latents"])),
        ("text", str(config["data"]["text"])),
        ("batch", f"{config['global_batch']:,} samples, seed {config['seed']}"),
    ]
    if starts:
        last = starts[-1]
        mix = ", ".join(f"{name} {share:.3f}" for name, share in last["mix"].items())
        found[:0] = [
            ("data mix", f"{mix} of the samples; {last['epoch_samples']:,} samples an epoch"),
            ("model", f"{sum(last['parameters'].values()):,} parameters"),
            ("machines", f"{last['world']} x {last['device']}, started {len(starts)} times"),
        ]
    if steps:
        last = steps[-1]
        mfu = "" if last.get("mfu") is None else f", MFU {last['mfu']:.1%}"
        speed = (
            f"{last['samples_per_second']:,.1f} samples/s, data wait {last['data_wait']:.1%}{mfu}"
        )
        found.append(
            ("step", f"{last['step']:,} of {config['steps']:,}, epoch {last['epoch']:.3f}")
        )
        found.append(("last interval", f"loss {_figure(last['loss'])}, {speed}"))
    if checks:
        loss, share = checks[-1]["loss"], checks[-1]["normalised"]
        found.append(("validation", f"{_figure(loss)}, {_figure(share)} of the target's variance"))
    shares = [share for r in [*steps, *checks] if (share := r.get("initial_share")) is not None]
    if steps and not shares and "ema" in config:  # of an older run: one decay for all its updates
        updates = steps[-1]["step"] - sum(r.get("not_finite", 0) for r in steps)
        shares = [config["ema"]["decay"] ** updates]
    if shares:
        found.append(("average", f"{min(shares):.1%} of it are the initial weights"))
    return found


def curves(records: Sequence[dict[str, Any]]) -> list[tuple[str, list[Line]]]:
    """The charts: a title, and lines over steps."""
    steps = [r for r in records if "loss" in r]
    checks = [{"step": r["step"], **r["validation"]} for r in records if "validation" in r]

    def over(
        rows: Sequence[dict[str, Any]], key: str, level: int | None = None
    ) -> list[tuple[float, float]]:
        found = [
            (r["step"], r.get(key) if level is None else (r.get(key) or {level: None})[level])
            for r in rows
        ]
        return [(step, value) for step, value in found if value is not None]

    def by_level(rows: Sequence[dict[str, Any]], key: str) -> list[Line]:
        return [(f"{i}/8", over(rows, key, i)) for i in range(8)]

    return [
        ("Loss", [("training", over(steps, "loss")), ("validation, averaged weights", over(checks, "loss"))]),
        ("Validation loss, by noise level from much to little", by_level(checks, "levels")),
        ("Training loss, by noise level from much to little", by_level(steps, "loss_by_level")),
        ("Norm of the gradient", [("", over(steps, "grad_norm"))]),
        ("Samples a second", [("", over(steps, "samples_per_second"))]),
        ("Data wait, share of the time", [("", over(steps, "data_wait"))]),
    ]  # fmt: skip


def scores(path: Path) -> list[tuple[str, list[Line]]]:
    """A chart for each scorer that looked at checkpoints; none where this file, which is not the trainer's, is odd."""
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        for record in read(path):
            for scorer, value in record["scores"].items():
                found.setdefault(scorer, []).append((record["step"], float(value["value"])))
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(scorer, [("", line)]) for scorer, line in sorted(found.items())]


def chart(title: str, lines: Sequence[Line]) -> str:
    """Lines over a common scale, as SVG."""
    points = [p for _, line in lines for p in line]
    last, low, high = (
        max(x for x, _ in points),
        min(y for _, y in points),
        max(y for _, y in points),
    )
    first, span = min(x for x, _ in points), (high - low) or abs(high) or 1.0

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - 8) * (x - first) / ((last - first) or 1)
        return f"{right:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 8) * (y - low) / span:.1f}"

    drawn = []
    for i, (name, line) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in thinned(line))
        drawn.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'
        )
        if len(line) == 1:
            x, y = place(*line[0]).split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        if name:
            text = (
                f'<text x="{WIDTH - 8}" y="{16 + 13 * i}" text-anchor="end" style="fill:{colour}">'
            )
            drawn.append(f"{text}{html.escape(name)}</text>")
    for value in (low, high):
        height = float(place(first, value).split(",")[1]) + 4
        drawn.append(
            f'<text x="{LEFT - 6}" y="{height:.1f}" text-anchor="end">{_figure(value)}</text>'
        )
    for value, anchor in ((first, "start"), (last, "end")):
        x = place(value, low).split(",")[0]
        drawn.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:,.0f}</text>')
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )  # fmt: skip


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST points, each the mean of its neighbours."""
    size = math.ceil(len(line) / MOST) or 1
    groups = [line[i : i + size] for i in range(0, len(line), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.4g}"


def write_page(run: Path) -> Path:
    path = run / "page.html"
    atomic_write(path, printable(page(run)).encode())
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m train page`."""
    parser.add_argument("run", type=local_path, help="the folder of a run, in progress or done")


def run_page(args: argparse.Namespace) -> int:
    print(write_page(args.run))
    return 0
