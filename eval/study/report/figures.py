"""The drawings of a study's page, from what study.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from shards import charts

from ...report.page import change

Json = dict[str, Any]
SETTINGS = {
    "guidance_scale": "guidance scale", "ema": "length of the average", "shift": "sampling shift",
    "lr": "learning rate",
}  # fmt: skip
AXES = ("steps", "samples", "FLOPs", "hours")  # what scores are drawn over, if it is known of all
HALF_A, HALF_B = (
    "-half-a",
    "-half-b",
)  # end the names of scores that settings are chosen by, and that are reported
MOST_NUMBERS = 8  # that have room below a chart


def colours_of(data: Json) -> dict[str, int]:
    """Returns each entry's colour, by its name."""
    return {entry["name"]: i for i, entry in enumerate(data["entries"])}


def difference_of(data: Json, entry: str, scorer: str) -> Json | None:
    """Returns the difference of an entry from the baseline by a score, if there is one."""
    differences: list[Json] = [
        difference
        for comparison in data["comparisons"]
        if comparison["other"] == entry
        for difference in comparison["differences"]
        if difference["scorer"] == scorer
    ]
    return differences[0] if differences else None


def forests(data: Json) -> list[Json]:
    """Returns a figure a score: all entries' differences from the baseline, each seed as a ring."""
    figures = []
    for score in data["scores"]:
        rows = []
        for name, colour in colours_of(data).items():
            difference = difference_of(data, name, score["scorer"])
            if difference is None:
                continue
            value = difference["value"]
            points = [value_["value"] for value_ in difference["by_seed"].values()]
            text = change(value) if value else "no paired difference"
            rows.append(charts.Row(name, text, value, points, colour))
        if rows:
            title = f"{score['scorer']}: differences from {data['baseline']}"
            drawing = charts.forest(title, rows, higher=score["better"] == "higher")
            figures.append({"score": score, "drawing": drawing})
    return figures


# Scores over steps --------------------------------------------------------------------------------


def over_steps(data: Json) -> list[dict[str, str]]:
    """Returns of each score a chart an axis: a line an entry, behind it a band from its lowest to its
    highest seed, and of the primary score where each entry has the quality that the baseline has.
    """
    by_scorer: dict[str, list[Json]] = {}
    for line in data["over_steps"]:
        by_scorer.setdefault(line["scorer"], []).append(line)
    order = [score["scorer"] for score in data["scores"]]
    costs = data["step_costs"]
    axes = [axis for axis in AXES if costs and all(axis in cost for cost in costs.values())]
    return [
        {axis: _over(data, scorer, by_scorer[scorer], axis) for axis in axes}
        for scorer in sorted(by_scorer, key=lambda name: order.index(name) if name in order else 99)
    ]


def _over(data: Json, scorer: str, records: list[Json], axis: str) -> str:
    colour, scale = colours_of(data), {e: cost[axis] for e, cost in data["step_costs"].items()}
    title = axis
    if axis == "hours":
        title, parts = charts.unit_of_time(data["step"] * max(scale.values()))
        scale = {name: hours * parts for name, hours in scale.items()}
    lines, bands = [], []
    for record in records:
        name, points = record["entry"], record["points"]
        places = [scale[name] * point["step"] for point in points]
        values = [point["over_seeds"]["value"] for point in points]
        lines.append((name, list(zip(places, values, strict=True))))
        seeds = [[value["value"] for value in point["by_seed"].values()] for point in points]
        if any(len(numbers) > 1 for numbers in seeds):
            band = [(x, min(n), max(n)) for x, n in zip(places, seeds, strict=True)]
            bands.append((colour[name], band))
    return charts.curves(
        scorer, lines, log_x=True, colours=[colour[name] for name, _ in lines], bands=bands,
        meetings=_meetings(data, axis, scale) if scorer == data["primary"]["scorer"] else [],
        axis=title,
    )  # fmt: skip


def _meetings(data: Json, axis: str, scale: Mapping[str, float]) -> list[charts.Meeting]:
    """Returns where the baseline and each entry are at the level that both reach, at the mean over seeds.

    The interval is that of how many times as much the baseline takes, from the baseline's place.
    """
    meetings, colour, baseline = [], colours_of(data), data["baseline"]
    for record in data["time_to_quality"]:
        units = {unit["unit"]: unit for unit in record["units"]}
        if axis not in units:
            continue
        level = fmean(seed["level"] for seed in record["by_seed"].values())
        name, ratio = record["entry"], units[axis]["ratio"]
        start = units["steps"]["baseline"] * scale[baseline]
        place = {
            "value": start / ratio["value"],
            "low": start / ratio["high"],
            "high": start / ratio["low"],
        }
        meetings.append(charts.Meeting(level, (colour[baseline], start), (colour[name], place)))
    return meetings


# What was chosen for each entry -------------------------------------------------------------------


def settled(data: Json) -> Json | None:
    """Returns what the page says of settings that were chosen for each entry; None where none were.

    Fields: by, prompts (the score, and the prompts of half A), settings (keys of sets and trainings), axes[]:
    axis, title, by (what it was chosen by), better, drawing, entries[], one an entry in the page's order: entry, value,
    score (a Value), edge, accepted, tried (the least and the most); null where nothing is chosen yet.
    """
    records = {record["entry"]: record for record in data.get("settled") or ()}
    if not records:
        return None
    axes: dict[str, dict[str, Json]] = {}
    for entry, record in records.items():
        for axis in record["axes"]:
            axes.setdefault(axis["axis"], {})[entry] = {**record, **axis}
    first = max(records.values(), key=lambda record: record["prompts"] is not None)  # not of a loss
    return {
        "by": first["scorer"].removesuffix(HALF_A),
        "prompts": first["prompts"],
        "settings": ["optim.lr" if axis == "lr" else axis for axis in axes],
        "axes": [_axis(data, axis, by_entry) for axis, by_entry in axes.items()],
    }


def _axis(data: Json, axis: str, by_entry: Mapping[str, Json]) -> Json:
    colour, lines, bands, marks = colours_of(data), [], [], []
    for entry, record in by_entry.items():
        tried = list(zip(record["values"], record["over_seeds"], strict=True))
        lines.append((entry, [(x, value["value"]) for x, value in tried if value]))
        band = [(x, v["low"], v["high"]) for x, v in tried if v and v["low"] is not None]
        if band:
            bands.append((colour[entry], band))
        x, best = tried[record["chosen"]]
        marks.append((colour[entry], x, best["value"]))
    values = sorted({x for record in by_entry.values() for x in record["values"]})
    title = SETTINGS.get(axis, axis)
    record = next(iter(by_entry.values()))
    score = record["scorer"].removesuffix(HALF_A)
    return {
        "axis": axis,
        "title": title,
        "by": score,
        "better": record["better"],
        "drawing": charts.curves(
            score, lines, log_x=True, colours=[colour[entry] for entry, _ in lines], bands=bands,
            marks=marks, numbers=values if len(values) <= MOST_NUMBERS else (), axis=title,
        ),
        "entries": [
            (r := by_entry.get(name))
            and {
                "entry": name, "value": r["values"][r["chosen"]], "score": r["over_seeds"][r["chosen"]],
                "edge": r["edge"], "accepted": r["accepted"], "tried": [min(r["values"]), max(r["values"])],
            }
            for name in colour
        ],
    }  # fmt: skip


def whole_set(data: Json) -> list[Json]:
    """Returns a record a score and entry of all prompts, in an order for a table: scorer, better, entry, value,
    difference (a Value, null of the baseline); none where all scores are of all prompts.
    """
    whole = data.get("whole")
    if not whole:
        return []
    rows = []
    for score in whole["scores"]:
        for name, values in zip(colours_of(data), score["entries"], strict=True):
            difference = difference_of(whole, name, score["scorer"])
            rows.append(
                {
                    "scorer": score["scorer"], "better": score["better"], "entry": name,
                    "value": values["over_seeds"], "difference": difference and difference["value"],
                }
            )  # fmt: skip
    return rows
