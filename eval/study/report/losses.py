"""The losses of a study's trainings: over steps, and of the validation by noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shards import charts
from train.report import read_records

from ...report.page import training_curves

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
Line = Sequence[tuple[float, float]]


def validations(study: Study) -> list[Json]:
    """Returns what study.json holds of the runs' validations, one a run that has any.

    Fields: entry, seed, step (of the last one up to the study's last step), sigmas (the noise levels, falling), levels
    (the squared error at each), levels_over_reference (each over the linear reference's; null where
    none is recorded), over_reference[] (step, and the same of the mean over levels).
    """
    from train.model import fixed_sigmas  # which loads torch

    records = []
    for name in study.entries:
        for seed in study.seeds:
            path = study.run_folder(name, seed) / "metrics.jsonl"
            checks = [
                {"step": record["step"], **check}
                for record in (read_records(path) if path.is_file() else ())
                if (check := record.get("validation")) and record["step"] <= study.steps[-1]
            ]
            if whole := [check for check in checks if _complete(check.get("levels"))]:
                last = whole[-1]
                ratios = last.get("levels_over_reference")
                over = [(c["step"], c["over_reference"]) for c in checks if c.get("over_reference")]
                records.append(
                    {
                        "entry": name,
                        "seed": seed,
                        "step": last["step"],
                        "sigmas": fixed_sigmas(),
                        "levels": last["levels"],
                        "levels_over_reference": ratios if _complete(ratios) else None,
                        "over_reference": [list(point) for point in over],
                    }
                )
    return records


def _complete(levels: Sequence[float | None] | None) -> bool:
    """Whether there is a finite loss at every level."""
    return levels is not None and None not in levels


def by_sigma(data: Json) -> list[str]:
    """Returns charts of the validations: over sigma the ratio to the linear reference and the squared
    error, and the ratio over steps. A line is the mean over training seeds, its band reaches from
    the lowest seed to the highest.
    """
    runs: list[Json] = data["validation"]
    recorded = [run for run in runs if run["levels_over_reference"]]
    steps = sorted({run["step"] for run in runs})
    at = f"at step {', '.join(f'{step:,}' for step in steps)}"
    figures = [
        _chart(data, f"Validation loss over the linear reference, by noise level, {at}", recorded,
               lambda run: _pairs(run["sigmas"], run["levels_over_reference"]), "sigma"),
        _chart(data, f"Validation loss by noise level, squared error, {at}", runs,
               lambda run: _pairs(run["sigmas"], run["levels"]), "sigma"),
        _chart(data, "Validation loss over the linear reference, over steps",
               [run for run in runs if len(run["over_reference"]) > 1],
               lambda run: [(step, value) for step, value in run["over_reference"]], "steps"),
    ]  # fmt: skip
    return [figure for figure in figures if figure]


def _pairs(sigmas: Sequence[float], values: Sequence[float]) -> Line:
    return sorted(zip(sigmas, values, strict=True))


def _chart(
    data: Json, title: str, runs: Sequence[Json], line_of: Callable[[Json], Line], axis: str
) -> str:
    """Returns a chart of an entry's mean over those places that all of its runs have."""
    colours, lines, bands = list[int](), list[charts.Curve](), list[charts.Band]()
    for i, entry in enumerate(data["entries"]):
        members: list[Mapping[float, float]] = [
            dict(line_of(run)) for run in runs if run["entry"] == entry["name"]
        ]
        places = sorted(set.intersection(*map(set, members))) if members else []
        values = [[member[place] for member in members] for place in places]
        if places:
            colours.append(i)
            means = [sum(numbers) / len(numbers) for numbers in values]
            lines.append((entry["name"], list(zip(places, means, strict=True))))
        if len(members) > 1:
            ends = [(x, min(n), max(n)) for x, n in zip(places, values, strict=True)]
            bands.append((i, ends))
    return charts.curves(title, lines, log=True, colours=colours, bands=bands, axis=axis)


def over_steps(study: Study) -> list[str]:
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
