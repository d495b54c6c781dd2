"""`python -m eval study report STUDY.yaml`: OUT/study.json and OUT/report.html, the verdict first, on
one self-contained page. It works at any time, also while the study runs: what is missing is said.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards import atomic_write, charts
from shards.printing import printable

from ...report.gallery import gallery
from ...report.page import change, template, training_curves, value_text
from ...report.report import PICTURES, refuse_other_files
from ...scores.deviation import MOST_SEEDS
from ..graph import nodes_of
from .analysis import FORMAT, VERSION, Analysis, analyse
from .panel import panel

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]


def report(study: Study, pictures: int = PICTURES) -> Json:
    """Writes OUT/study.json and OUT/report.html; returns what the JSON holds.

    `pictures` is how many prompts are shown. Raises BadReport before anything is written where
    another file has the JSON's name.
    """
    path = study.out / "study.json"
    refuse_other_files(path, FORMAT, VERSION)
    analysis = analyse(study)
    seed, records = _gallery(analysis, pictures)
    data = analysis.data | {
        "panel": panel(study, analysis.data["scores"]),
        "commands": [shlex.join(node.command) for node in nodes_of(study)],
        "shown": [record["id"] for record in records],
        "shown_seed": seed,
    }
    page = render(data, records, _losses(study))
    study.out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(data, indent=1, ensure_ascii=False).encode())
    atomic_write(study.out / "report.html", printable(page).encode())
    return data


def _gallery(analysis: Analysis, most: int) -> tuple[int | None, list[Json]]:
    """Returns the training seed that most entries have, the first of several, and its pictures of the
    same prompts.
    """
    seeds = [seed for entry in analysis.last.values() for seed in entry.members]
    seed = max(seeds, key=seeds.count, default=None)
    sets = [(entry.name, entry.members.get(seed)) for entry in analysis.last.values()]
    shown = [(name, scored.images) for name, scored in sets if scored and scored.images]
    return seed, gallery(shown, most)


def render(data: Json, pictures: Sequence[Json], losses: Sequence[str] = ()) -> str:
    """Returns the page of what the JSON holds, with its pictures and the curves of the trainings."""
    names = [entry["name"] for entry in data["entries"]]
    shown_numbers = (
        [names.index(p["name"]) + 1 for p in pictures[0]["pictures"]] if pictures else []
    )
    return template(Path(__file__).with_name("study.html.j2")).render(
        s=data, pictures=pictures, losses=losses, style=charts.style(), names=names,
        script=charts.script(), shown_numbers=shown_numbers,
        colour={name: i % charts.COLOURS for i, name in enumerate(names)},
        forests=_forests(data), steps=_over_steps(data), latex=latex(data), missing=_missing(data),
        warnings=_warnings(data), notes=_notes(data), needed=_needed(data), figure=charts.figure,
        prompts=Path(data["benchmark"]).name, follow=_follow(data),
    )  # fmt: skip


# Figures ------------------------------------------------------------------------------------------


def _forests(data: Json) -> list[Json]:
    """Returns a figure a score: all entries' differences from the baseline, each seed as a ring."""
    figures = []
    for score in data["scores"]:
        rows = []
        for i, entry in enumerate(data["entries"]):
            difference = _difference(data, entry["name"], score["scorer"])
            if difference is None:
                continue
            value = difference["value"]
            points = [value_["value"] for value_ in difference["by_seed"].values()]
            text = change(value) if value else "no paired difference"
            rows.append(charts.Row(entry["name"], text, value, points, i))
        if rows:
            title = f"{score['scorer']}: differences from {data['baseline']}"
            drawing = charts.forest(title, rows, higher=score["better"] == "higher")
            figures.append({"score": score, "drawing": drawing})
    return figures


def _difference(data: Json, entry: str, scorer: str) -> Json | None:
    differences: list[Json] = [
        difference
        for comparison in data["comparisons"]
        if comparison["other"] == entry
        for difference in comparison["differences"]
        if difference["scorer"] == scorer
    ]
    return differences[0] if differences else None


def _over_steps(data: Json) -> list[str]:
    """Returns a chart a score: a line an entry, and behind it a band from its lowest to its highest seed."""
    colour = {entry["name"]: i for i, entry in enumerate(data["entries"])}
    by_scorer: dict[str, list[Json]] = {}
    for line in data["over_steps"]:
        by_scorer.setdefault(line["scorer"], []).append(line)
    order = [score["scorer"] for score in data["scores"]]
    figures = []
    for scorer in sorted(by_scorer, key=lambda name: order.index(name) if name in order else 99):
        lines, bands = [], []
        for line in by_scorer[scorer]:
            points = [(p["step"], p["over_seeds"]["value"]) for p in line["points"]]
            seeds = [
                (p["step"], [value["value"] for value in p["by_seed"].values()])
                for p in line["points"]
            ]
            lines.append((line["entry"], points))
            if any(len(values) > 1 for _, values in seeds):
                band = [(step, min(values), max(values)) for step, values in seeds]
                bands.append((colour[line["entry"]], band))
        colours = [colour[line["entry"]] for line in by_scorer[scorer]]
        figures.append(charts.curves(scorer, lines, colours=colours, bands=bands))
    return figures


def _losses(study: Study) -> list[str]:
    """Returns the losses of all trainings over steps, in the colours of their entries."""
    runs = {
        run: i
        for i, name in enumerate(study.entries)
        for seed in study.seeds
        if ((run := study.run_folder(name, seed)) / "metrics.jsonl").is_file()
    }
    colours = list(runs.values())
    figures = []
    for title, lines in training_curves(runs):
        named = [
            ("" if i in colours[:place] else study.entries[i], points)
            for place, (i, (_, points)) in enumerate(zip(colours, lines, strict=True))
        ]
        figures.append(charts.curves(title, named, log=True, colours=colours))
    return [drawing for drawing in figures if drawing]


# Text ---------------------------------------------------------------------------------------------


def _follow(data: Json) -> set[str]:
    """Returns the parts of the trainings that follow from the latents, of whichever entry."""
    trainings = [comparison["training"] for comparison in data["comparisons"]]
    return {key for training in trainings if training for key in training["follow"]}


def _missing(data: Json) -> list[str]:
    """Returns a line a kind of what does not exist yet: how many of it, and of which entries."""
    kinds: dict[str, list[Json]] = {}
    for record in data["missing"]:
        kinds.setdefault(record["what"], []).append(record)
    return [
        f"{'sets of pictures' if what == 'pictures' else f'scores by {what}'}: {len(records)} "
        f"({', '.join(dict.fromkeys(record['entry'] for record in records))})"
        for what, records in kinds.items()
    ]


def _warnings(data: Json) -> list[str]:
    """Returns what else than the entries may have moved a score."""
    lines = [
        f"{comparison['other']}, {difference['scorer']}: {warning}"
        for comparison in data["comparisons"]
        for difference in comparison["differences"]
        for warning in difference["warnings"]
    ]
    return list(dict.fromkeys(lines))


def _notes(data: Json) -> dict[str, list[str]]:
    """Returns the notes on sets of the last step, and of which entries and seeds they are."""
    notes: dict[str, list[str]] = {}
    for entry in data["entries"]:
        for record in entry["notes"]:
            seeds = ", ".join(map(str, record["seeds"]))
            every = len(record["seeds"]) == len(entry["sets"])
            owner = entry["name"] if every else f"{entry['name']} (seed {seeds})"
            notes.setdefault(record["note"], []).append(owner)
    return notes


def _needed(data: Json) -> list[tuple[str, float, str]]:
    """Returns of each entry the primary score's difference, and how many seeds would resolve it."""
    rows, most = [], f"more than {MOST_SEEDS:,}"
    for entry in data["entries"]:
        difference = _difference(data, entry["name"], data["primary"]["scorer"])
        if difference and (seeds := difference["seeds_needed"]):
            low, high = seeds["low"], seeds["high"]
            text = f"{low} to {high}"
            if low is None:
                text = most
            elif high is None:
                text = f"{low} to {most}"
            elif low == high:
                text = f"{low}"
            rows.append((entry["name"], difference["value"]["value"], text))
    return rows


def latex(data: Json) -> str:
    """Returns a table of the entries' values over seeds, a column a score, for LaTeX with booktabs."""
    scores = data["scores"]
    arrows = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}
    heads = [f"{_escaped(score['scorer'])} {arrows[score['better']]}" for score in scores]
    rows = []
    for i, entry in enumerate(data["entries"]):
        values = [score["entries"][i]["over_seeds"] for score in scores]
        cells = [value_text(value).replace("\u00a0", "~").replace("–", "--") for value in values]
        rows.append(" & ".join([_escaped(entry["name"]), *cells]) + r" \\")
    seeds = ", ".join(map(str, data["seeds"]))
    return "\n".join(
        [
            f"% mean over training seeds {seeds} with 95 % intervals over seeds and prompts",
            rf"\begin{{tabular}}{{l{'c' * len(scores)}}}",
            r"\toprule",
            " & ".join(["", *heads]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _escaped(text: str) -> str:
    """Returns text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
