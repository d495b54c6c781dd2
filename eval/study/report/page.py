"""`python -m eval study report STUDY.yaml`: OUT/study.json, OUT/study.csv and OUT/report.html, the
verdict first, on one self-contained page. It works at any time, also while the study runs: what is missing is said.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards import atomic_write, charts
from shards.printing import printable

from ...report.page import page_of
from ...report.report import PICTURES, refuse_other_files
from ...scores.deviation import MOST_SEEDS
from ..graph import nodes_of
from . import losses
from .analysis import FORMAT, VERSION, analyse
from .exports import as_csv, downloads, latex, refuse_other_csv
from .figures import colours_of, difference_of, forests, over_steps, settled, whole_set
from .panel import panel
from .pictures import Pictures, pictures_of

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]


def report(study: Study, pictures: int = PICTURES) -> Json:
    """Writes OUT/study.json, its table study.csv and OUT/report.html; returns what the JSON holds.

    `pictures` is how many prompts are shown. Raises BadReport before anything is written where
    another file has the name of the JSON or the table.
    """
    path = study.out / "study.json"
    refuse_other_files(path, FORMAT, VERSION)
    refuse_other_csv(path.with_suffix(".csv"))
    analysis = analyse(study)
    shown = pictures_of(study, analysis, pictures)
    data = analysis.data | {
        "panel": panel(study, analysis.data["scores"]),
        "validation": losses.validations(study),
        "commands": [shlex.join(node.command) for node in nodes_of(study)],
        "shown": [record["id"] for record in shown.same.pictures],
        "shown_seed": shown.seed,
    }
    page = render(data, shown, losses.over_steps(study))
    study.out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(data, indent=1, ensure_ascii=False).encode())
    atomic_write(path.with_suffix(".csv"), as_csv(data).encode())
    atomic_write(study.out / "report.html", printable(page).encode())
    return data


def render(data: Json, shown: Pictures | None = None, curves: Sequence[str] = ()) -> str:
    """Returns the page of what the JSON holds, with its pictures and the curves of the trainings."""
    names = [entry["name"] for entry in data["entries"]]
    return page_of(
        Path(__file__).with_name("study.html.j2"), f"Study: {data['name']}",
        s=data, shown=shown or Pictures(), losses=[*losses.by_sigma(data), *curves],
        names=names,
        colour={name: i % charts.COLOURS for name, i in colours_of(data).items()},
        forests=forests(data), settled=settled(data), whole=whole_set(data),
        steps=over_steps(data), latex=latex(data), downloads=downloads(data),
        missing=_missing(data), warnings=_warnings(data), notes=_notes(data), needed=_needed(data),
        figure=charts.figure, prompts=Path(data["benchmark"]).name, follow=_follow(data),
    )  # fmt: skip


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
        difference = difference_of(data, entry["name"], data["primary"]["scorer"])
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
