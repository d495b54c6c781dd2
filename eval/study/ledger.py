"""What a study cost: encoding once, training, evaluating, by entry; and encoding in every step instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.format.atomic import read_json

from ..report.cost import encoding_cost, generation_cost, training_cost
from ..report.entries import ScoredSet

Json = dict[str, Any]
PARTS = ("encode", "train", "generate", "score")


def ledger(
    runs: Mapping[str, Sequence[Path]],
    sets: Mapping[str, Sequence[ScoredSet]],
    logs: Path,
    price: float | None,
) -> Json:
    """Returns what is known of the cost, by entry, from its training runs and its sets.

    Seconds of training are of its steps, of generating by one rank; GPU hours are of all ranks.
    Money is `price` times the GPU hours of training and generating.
    """
    entries = [_entry(name, runs[name], sets[name], price) for name in runs]
    return {
        "price": price,
        "entries": entries,
        "total": {key: _sum(entry[key] for entry in entries) for key in (*PARTS, "gpu_hours", "money")},
        "online": _online(entries),
        "processes": processes(logs),
    }  # fmt: skip


def _entry(name: str, runs: Sequence[Path], sets: Sequence[ScoredSet], price: float | None) -> Json:
    trainings = [cost for run in runs if (cost := training_cost(run))]
    columns = {cost["column"]: cost for run in runs if (cost := encoding_cost(run))}
    generations = [cost for scored in sets if (cost := generation_cost(scored))]
    hours = [cost["gpu_hours"] for cost in trainings]
    hours += [
        cost["seconds"] * (cost["ranks"] or 1) / 3600
        for cost in generations
        if cost["seconds"] and str(cost["device"]).startswith("cuda")
    ]
    devices = dict.fromkeys(device for cost in trainings for device in cost["devices"])
    return {
        "entry": name,
        "runs": len(trainings),
        "sets": len(sets),
        "samples": sum(cost["samples"] for cost in trainings),
        "devices": list(devices),
        "rows": _sum(cost["rows"] for cost in columns.values()),
        "encode": _sum(cost["seconds"] for cost in columns.values()),
        "train": _sum(cost["seconds"] for cost in trainings),
        "generate": _sum(cost["seconds"] for cost in generations),
        "score": _sum(score.seconds for scored in sets for score in scored.scores.values()),
        "gpu_hours": sum(hours),
        "money": None if price is None else price * sum(hours),
    }


def _sum(numbers: Iterable[float | None]) -> float | None:
    """Returns the sum of what is known; None where nothing is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _online(entries: Sequence[Json]) -> Json | None:
    """Returns the seconds of the VAE's encoder in every step of all trainings, at the rate at which
    the columns were encoded; None where that rate is not known of each entry.
    """
    if not entries or any(not (e["encode"] and e["rows"] and e["samples"]) for e in entries):
        return None
    seconds = sum(e["encode"] / e["rows"] * e["samples"] for e in entries)
    return {"seconds": seconds, "times": seconds / sum(e["encode"] for e in entries)}


def processes(logs: Path) -> Json:
    """Returns the seconds that the nodes' processes took, by kind, from their records.

    A node that ran several times counts with its last time.
    """
    seconds: Json = {}
    for path in sorted(logs.rglob("*.json")):
        try:
            record = read_json(path)
            kind = path.relative_to(logs).as_posix().partition("-")[0].partition("/")[0]
            seconds[kind] = seconds.get(kind, 0.0) + float(record["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a node that is running, or was killed
    return seconds
