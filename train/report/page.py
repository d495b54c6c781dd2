"""`python -m train page RUN`: a run on one self-contained page, RUN/page.html: what it trains on,
and its curves. Scores of its checkpoints are shown too, where `python -m eval watch` left them in
RUN/eval/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import html
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from configs import ConfigError, read_yaml
from shards import atomic_write, charts
from shards.console import counted, duration_text, next_text
from shards.format.checks import Count, Fields, check
from shards.places import local_path
from shards.printing import printable

from .records import read_records

Record = dict[str, Any]
log = logging.getLogger(__name__)
REFERENCE_NOTE = (
    "The linear reference is what the best linear model of training rows loses on the validation rows at a noise "
    "level: below 1 a run has learned more than that, above 1 less. Each latent column has its own, so the ratio ranks "
    "nothing by itself: it says how far training has come, not which pictures are better."
)


class _Columns(Fields):
    latents: Any
    text: Any


class _Ema(Fields):
    decay: Annotated[float, Field(ge=0, lt=1)]


class _Config(Fields):
    """What the page shows of config.yaml, of this version or an older one."""

    data: _Columns
    steps: Count
    global_batch: Count
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    ema: _Ema | None = None


def page(run: Path) -> str:
    """Returns the HTML, from metrics.jsonl and config.yaml; ConfigError if the folder is no run."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"found no metrics.jsonl in {run}, expected the folder of a run")
    records = read_records(path)
    values = read_yaml(run / "config.yaml")
    try:
        config: _Config = check(_Config, values)
    except ValueError as error:
        raise ConfigError(f"{run / 'config.yaml'} is not the config of a run: {error}") from None
    facts = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in facts_of(config, records)
    )
    hours = hours_of(records)
    figures = [
        *(
            charts.curves(title, lines, log=log, hours=hours)
            for title, lines, log in curves(records)
        ),
        *(
            charts.curves(scorer, [("", line)], bands=[(0, band)], hours=hours)
            for scorer, line, band in scores(run / "eval" / "metrics.jsonl")
        ),
    ]
    compared = any((r.get("validation") or {}).get("levels_over_reference") for r in records)
    note = f'<p class="note">{REFERENCE_NOTE}</p>' if compared else ""
    text = html.escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return charts.document(
        f"Run: {run.resolve().name}",
        f'<div class="wide facts" role="region" tabindex="0" aria-label="The run"><table>{facts}</table></div>'
        f'<div class="curves-grid">{"".join(figures)}</div>{note}'
        f"<details><summary>Config</summary><pre>{text}</pre></details>",
    )


def facts_of(config: _Config, records: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the rows of the table: what the run is, and how far it is."""
    starts = [r["start"] for r in records if r.get("start") is not None]
    steps = [r for r in records if "loss" in r]
    checks = [r["validation"] for r in records if r.get("validation") is not None]
    facts = [
        ("latents", str(config.data.latents)),
        ("text", str(config.data.text)),
        ("batch", f"{counted(config.global_batch, 'sample')}, seed {config.seed}"),
    ]
    if starts:
        start = starts[-1]
        mix = ", ".join(f"{name} {share:.3f}" for name, share in start.get("mix", {}).items())
        facts[:0] = [
            ("data mix", f"{mix} of the samples; {start.get('epoch_samples', 0):,} an epoch"),
            ("model", f"{sum(start.get('parameters', {}).values()):,} parameters"),
            ("machines", f"{start.get('world', 1)} x {start.get('device', '')}, started "
             f"{counted(len(starts), 'time')}"),
            ("commit", start.get("commit") or "unknown"),
        ]  # fmt: skip
        if (shift := start.get("shift")) is not None:
            output = start.get("prediction", "velocity")
            facts.append(("noise levels", f"shift {shift:.4g}; the model's output is the {output}"))
        if count := start.get("image_tokens"):
            values, positions = start.get("token_values", 0), start.get("positions", "")
            facts.append(
                ("tokens of a picture", f"{count:,} of {values:,} values, positions {positions}")
            )
    if steps:
        last = steps[-1]
        mfu = "" if last.get("mfu") is None else f", MFU {last['mfu']:.1%}"
        facts += [
            (
                "step",
                f"{last['step']:,} of {config.steps:,}, epoch {_figure(last.get('epoch'))}"
                + (
                    f", {duration_text(3600 * hours[-1][1])}"
                    if (hours := hours_of(records))
                    else ""
                ),
            ),
            (
                "last interval",
                f"loss {_figure(last['loss'])}, {_figure(last.get('samples_per_second'))} samples/s, "
                f"data wait {last.get('data_wait') or 0:.1%}{mfu}",
            ),
        ]
    if checks:
        loss, part = checks[-1].get("loss"), checks[-1].get("normalised")
        text = f"{_figure(loss)}, {_figure(part)} of the target's variance"
        if (ratio := checks[-1].get("over_reference")) is not None:
            text += f", {_figure(ratio)} of the linear reference"
        facts.append(("validation", text))
    shares = [s for r in [*steps, *checks] if (s := r.get("initial_share")) is not None]
    if steps and not shares and config.ema:  # of an older run: one decay for all its updates
        updates = steps[-1]["step"] - sum(r.get("not_finite", 0) for r in steps)
        shares = [config.ema.decay**updates]
    if shares:
        facts.append(("average", f"{min(shares):.1%} of it are the initial weights"))
    return facts


def hours_of(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Returns the hours that the steps up to each took; saving, validating and starting are left out.

    Steps of which the rate is not known count for nothing.
    """
    line, position, hours = [(0.0, 0.0)], 0, 0.0
    for record in records:
        rate = record.get("samples_per_second")
        if rate and "position" in record and record["position"] >= position:
            hours += (record["position"] - position) / rate / 3600
            position = record["position"]
            line.append((record["step"], hours))
    return line if hours else []


def curves(records: Sequence[Record]) -> list[tuple[str, list[charts.Curve], bool]]:
    """Returns of each chart its title, its curves over steps, and whether its axis is logarithmic."""
    steps = [r for r in records if "loss" in r]
    checks = [{"step": r["step"], **r["validation"]} for r in records if r.get("validation")]

    def curve(
        rows: Sequence[Record], name: str, key: str, level: int | None = None
    ) -> charts.Curve:
        values = [
            r.get(key) if level is None else (r.get(key) or {level: None})[level] for r in rows
        ]
        pairs = zip(rows, values, strict=True)
        return name, [(r["step"], value) for r, value in pairs if value is not None]

    def by_level(rows: Sequence[Record], key: str) -> list[charts.Curve]:
        return [curve(rows, f"{i}/8", key, i) for i in range(8)]

    waits = [(step, 100 * share) for step, share in curve(steps, "", "data_wait")[1]]
    return [
        (
            "Loss, mean squared error",
            [
                curve(steps, "training", "loss"),
                curve(checks, "validation, averaged weights", "loss"),
            ],
            True,
        ),
        (
            "Validation loss at eight fixed noise levels, from much to little, mean squared error",
            by_level(checks, "levels"),
            True,
        ),
        (
            "Validation loss over the linear reference, at the same noise levels",
            by_level(checks, "levels_over_reference"),
            True,
        ),
        (
            "Training loss, by eighth of the run's own noise levels, mean squared error",
            by_level(steps, "loss_by_level"),
            True,
        ),
        ("Norm of the gradient", [curve(steps, "", "grad_norm")], True),
        ("Samples a second", [curve(steps, "", "samples_per_second")], False),
        ("Data wait, % of the time", [("", waits)], False),
    ]


Points = list[tuple[float, float]]
Ends = list[tuple[float, float, float]]


def scores(path: Path) -> list[tuple[str, Points, Ends]]:
    """Returns of each scorer its values over steps, and their intervals where they have any; nothing
    where eval's file is not as expected.
    """
    points, bands = dict[str, Points](), dict[str, Ends]()
    try:
        for record in read_records(path):
            for scorer, value in record["scores"].items():
                points.setdefault(scorer, []).append((record["step"], float(value["value"])))
                if value.get("low") is not None and value.get("high") is not None:
                    ends = record["step"], float(value["low"]), float(value["high"])
                    bands.setdefault(scorer, []).append(ends)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(scorer, line, bands.get(scorer, [])) for scorer, line in sorted(points.items())]


def _figure(value: float | None) -> str:
    return "not finite" if value is None else charts.figure(value)


def write_page(run: Path) -> Path:
    """Writes the page of a run and returns its path."""
    path = run / "page.html"
    atomic_write(path, printable(page(run)).encode())
    return path


def what_follows(run: Path) -> str:
    """Returns where the page of a run that has ended is, and the command that makes pictures."""
    words = ("--checkpoint", run, "--prompts", "prompts.txt", "--save_dir", f"images/{run.name}")
    note = "prompts.txt: one a line"
    return f"its curves: {run / 'page.html'}\n{next_text('eval', 'generate', *words, note=note)}"


def write_last_page(run: Path) -> None:
    """Writes the page at the end of a run, whose checkpoint is saved: a full disk is a warning, and so
    are records that are damaged or, for want of room, were never written.
    """
    try:
        write_page(run)
    except (OSError, ConfigError) as error:
        log.warning("%s. Put it right, then: python -m train page %s", error, run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m train page`."""
    parser.add_argument("run", type=local_path, help="the folder of a run, in progress or done")


def run_page(args: argparse.Namespace) -> int:
    """Runs `python -m train page`."""
    print(write_page(args.run))
    return 0
