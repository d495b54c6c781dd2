"""The page of a report: text, tables and charts of what its JSON holds, by the template report.html.j2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Column, Table

from shards import charts, console
from shards.console import brief, duration_text
from train.checkpoints.identity import leaves
from train.report import read_records

from .entries import RECONSTRUCTION
from .gallery import Gallery
from .sweeps import charts_of, scorers_of, setting_text

Json = dict[str, Any]
LONGEST = 100  # characters of a setting on the page
HARD = "\u00a0"  # a space at which no line ends


def render(
    data: Json,
    galleries: Sequence[Gallery],
    losses: Sequence[tuple[str, Sequence[charts.Curve]]] = (),
    note: str = "",
) -> str:
    """Returns the page of what the JSON holds, with pictures by section and curves of the trainings."""
    title = ", ".join(section["benchmark"] for section in data["sections"])
    return page_of(
        Path(__file__).with_name("report.html.j2"), f"Evaluation: {title}",
        r=data, galleries=galleries, note=note, verdicts=verdicts,
        plot=_plot, groups_plot=_groups_plot, forests=forests, trainings=trainings, settings=settings,
        sweep_charts=charts_of, sweep_scorers=scorers_of, setting_text=setting_text,
        charts=[
            charts.curves(title, lines, bands=bands)
            for title, lines, bands in _score_curves(data["curves"])
        ],
        losses=[figure for chart in losses if (figure := charts.curves(*chart, log=True))],
    )  # fmt: skip


def page_of(path: Path, title: str, **values: Any) -> str:
    """Returns a page: a template's header and main part within what all pages share."""
    return charts.page(title, template(path).render(title=title, **values))


def template(path: Path) -> jinja2.Template:
    """Returns a page's template, with filters for values, differences, seconds and settings."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "value": value_text, "change": change, "seconds": _seconds, "short": _short,
    }  # fmt: skip
    return environment.get_template(path.name)


def verdicts(section: Json) -> list[str]:
    """Returns a sentence a comparison: which entry is better by which scores, and what that leaves open."""
    sentences = [_verdict(comparison, section["kind"]) for comparison in section["comparisons"]]
    return [sentence for sentence in sentences if sentence]


def as_text(section: Json) -> str:
    """Returns the scores of a section's entries as a table, and its verdicts, for a terminal."""
    table = Table(Column("", overflow="fold"), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for score in section["scores"]:
        table.add_column(score["scorer"], justify="right", overflow="fold")
    for i, entry in enumerate(section["entries"]):
        values = (value_text(score["over_seeds"][i]) for score in section["scores"])
        table.add_row(entry["name"], *(text.replace(HARD, " ") for text in values))
    count = len(section["sets"])
    sets = f"{count} set{'s' * (count > 1)} of pictures"
    head = f"{section['benchmark']}: {sets}{'' if section['scores'] else ', none is scored'}"
    return console.render(head, *([table] if section["scores"] else []), *verdicts(section))


def _verdict(comparison: Json, kind: str) -> str:
    compared = [d for d in comparison["differences"] if d["resolved"] is not None]
    others = [d for d in comparison["differences"] if d["resolved"] is None]
    open_ = [
        f"No verdict by {d['scorer']}: {d['reason']}."
        if d["value"] is None
        else f"No verdict by {d['scorer']} {change(d['value'])}: its interval is not known."
        for d in others
    ]
    if not compared:
        return " ".join(open_)
    scores: dict[str, list[str]] = {}
    for difference in compared:
        title = "Equal in every prompt by" if difference["identical"] else "No difference shown by"
        if difference["resolved"]:
            winner, reason = difference["favours"], f"{difference['no_verdict']}"
            title = f"{winner} is better by" if winner else f"No verdict ({reason}) by"
        text = f"{difference['scorer']} {change(difference['value'])}"
        scores.setdefault(title, []).append(text)
    sentences = [f"{title} {', '.join(texts)}." for title, texts in scores.items()] + open_
    sentences.append(f"Values are {comparison['other']} minus {comparison['baseline']}.")
    if not comparison["paired"]:
        sentences.append(comparison["sentence"])
    if kind != RECONSTRUCTION and not all(d["covers_seeds"] for d in compared):
        sentences.append("Other training seeds are not covered.")
    return " ".join(sentences)


def training_curves(runs: Iterable[Path]) -> list[tuple[str, list[charts.Curve]]]:
    """Returns the losses of some runs over steps, a line a run.

    The validation loss is divided by the variance of its target. Latents of two VAEs are other
    targets, so the heights of their curves say nothing about each other.
    """
    training, validation = list[charts.Curve](), list[charts.Curve]()
    for run in runs:
        records = read_records(run / "metrics.jsonl")
        checks = [{"step": r["step"], **r["validation"]} for r in records if r.get("validation")]
        training.append((run.name, _points(records, "loss")))
        validation.append((run.name, _points(checks, "normalised")))
    title = "Validation loss over the variance of its target, averaged weights"
    return [("Training loss", training), (title, validation)]


def _points(records: Sequence[Json], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def _score_curves(
    curves: Sequence[Json],
) -> list[tuple[str, list[charts.Curve], list[charts.Band]]]:
    """Returns a chart a scorer, with a line a run and behind it the band of its intervals."""
    lines: dict[str, list[charts.Curve]] = {}
    bands: dict[str, list[charts.Band]] = {}
    for curve in curves:
        members = lines.setdefault(curve["scorer"], [])
        band = [
            (step, value["low"], value["high"])
            for step, value in curve["points"]
            if value.get("low") is not None and value.get("high") is not None
        ]
        bands.setdefault(curve["scorer"], []).append((len(members), band))
        points = [(step, value["value"]) for step, value in curve["points"]]
        members.append((Path(curve["run"]).name, points))
    return [(scorer, members, bands[scorer]) for scorer, members in lines.items()]


def forests(section: Json) -> list[Json]:
    """Returns figures of all differences from the baseline, each on one scale: one of all scores that
    lie between 0 and 1 and of which more is better, as shares do, and one of each other score.
    """
    figures: dict[str, list[tuple[str, str, Json]]] = {}
    direction: dict[str, str] = {}
    for score in section["scores"]:
        ends = [
            end
            for value in score["values"]
            if value
            for end in (value["value"], value["low"], value["high"])
            if end is not None
        ]
        share = score["better"] == "higher" and all(0 <= end <= 1 for end in ends)
        title = "Scores between 0 and 1" if share else score["scorer"]
        direction[title] = score["better"]
        figures.setdefault(title, []).extend(
            (score["scorer"], comparison["other"], difference)
            for comparison in section["comparisons"]
            for difference in comparison["differences"]
            if difference["scorer"] == score["scorer"] and difference["value"]
        )
    colours = {entry["name"]: i for i, entry in enumerate(section["entries"])}
    drawings = []
    for title, differences in figures.items():
        several = len({scorer for scorer, _, _ in differences}) > 1
        rows = [
            charts.Row(
                f"{scorer}: {other}" if several else other,
                change(difference["value"]),
                difference["value"],
                [value["value"] for value in difference["by_seed"].values()],
                colours[other],
            )
            for scorer, other, difference in differences
        ]
        if rows:
            heading = differences[0][0] if not several else title
            drawing = charts.forest(
                f"{heading}: differences", rows, higher=direction[title] == "higher"
            )
            drawings.append({"title": heading, "drawing": drawing})
    return drawings


def _plot(section: Json, score: Json) -> str:
    """Returns a line an entry; each training seed is a ring, where there are several."""
    entries, values = section["entries"], score["values"]
    names = [entry["name"] for entry in entries]
    lines = list(zip(names, score["over_seeds"], strict=True))
    seeds = [[values[i]["value"] for i in entry["sets"] if values[i]] for entry in entries]
    points = [numbers if len(numbers) > 1 else [] for numbers in seeds]
    return charts.intervals(f"{score['scorer']} with intervals", lines, points)


def _groups_plot(
    title: str, groups: Mapping[str, Sequence[Json | None]], sets: Sequence[Json]
) -> str:
    by_set = [
        {name: value for name, values in groups.items() if (value := values[i])}
        for i in range(len(sets))
    ]
    return charts.groups(title, list(groups), by_set, [s["entry"] for s in sets])


def trainings(section: Json) -> list[Json]:
    """Returns the parts of the trainings: key, values by set, whether they differ, and why they may."""
    by_set = [leaves(s["training"] or {}) for s in section["sets"]]
    shares = [s["initial_share"] for s in section["sets"]]
    rows = [
        {
            "key": "initial weights in the average",
            "badge": "",
            "differs": any(share is not None for share in shares),
            "values": ["unknown" if share is None else f"{share:.1%}" for share in shares],
        }
    ]
    compared = [c["training"] for c in section["comparisons"] if c["training"]]
    follow, beside = ({key for c in compared for key in c[kind]} for kind in ("follow", "differ"))
    for key in sorted(set[str]().union(*by_set)):
        values = [training[key] for training in by_set if key in training]
        differs = any(value != values[0] for value in values)
        badge = "differs" if key in beside else "follows the VAE" if key in follow else ""
        texts = [
            _short(training[key]) if key in training else "–" if training else "unknown"
            for training in by_set
        ]
        rows.append(
            {"key": key, "badge": badge if differs else "", "differs": differs, "values": texts}
        )
    return rows


def settings(section: Json) -> list[Json]:
    """Returns the settings of the sets as `trainings` does the parts of the trainings."""
    sets = section["sets"]
    rows = []
    for key in sorted(set[str]().union(*(s["settings"] for s in sets))):
        texts = [str(s["settings"].get(key)) for s in sets]
        values = [_short(s["settings"][key]) if key in s["settings"] else "–" for s in sets]
        differs = len(set(texts)) > 1
        badge = "differs" if differs else ""
        rows.append({"key": key, "badge": badge, "differs": differs, "values": values})
    digests = [_short(s["images"] or "–") for s in sets]
    for key, values in (
        ("digest of the pictures", digests), ("folder", [s["folder"] for s in sets]),
    ):  # fmt: skip
        rows.append({"key": key, "badge": "", "differs": False, "values": values})
    return rows


def value_text(value: Json | None) -> str:
    """Returns "0.512 [0.488, 0.536]", or without an interval "0.512"."""
    return "–" if value is None else _interval(value, charts.figure)


def change(value: Json) -> str:
    """Returns a difference with its sign: "+0.12 [+0.05, +0.19]"."""
    return _interval(value, "{:+,.3g}".format)


def _interval(value: Json, text: Callable[[float], str]) -> str:
    if value["low"] is None:
        return text(value["value"])
    return f"{text(value['value'])} [{text(value['low'])},{HARD}{text(value['high'])}]"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else duration_text(seconds)


def _short(value: Any) -> str:
    """Returns a setting as `brief` does, of at most LONGEST characters."""
    text = brief(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
