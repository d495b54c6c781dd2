"""What a study cost: encoding once, training, evaluating, by entry; and encoding in every step instead.

A ledger has: price (of a GPU hour, or null); entries[], one each and in their order, and total (of all):
encode, train, generate, score (seconds, null where nothing is known), gpu_hours, money (null without
a price), of an entry also runs, sets, samples (of all its trainings) and devices; online: seconds that
the VAEs and the text encoder would take in the steps of all trainings, without reading and decoding
pictures, and times (as many as encoding once took with all its stages: what caching saves at least),
null where it is not known; processes: {kind of node: seconds by the wall clock}. What `study online` has measured is
added as measured, see eval/study/plan/online.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.format.atomic import read_json

from ...report.cost import column_cost, generation_cost, training_cost
from ...report.entries import ScoredSet

Json = dict[str, Any]
PARTS = ("encode", "train", "generate", "score")


@dataclass(frozen=True)
class Training:
    """A run of one entry, seed and phase, and the columns that it reads, folders or urls; of each
    kind a sample reads one.
    """

    run: Path
    steps: int  # that the study has of it: a run made by hand may be longer
    latents: tuple[str, ...]
    text: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.latents, *self.text)


def ledger(
    trainings: Mapping[str, Sequence[Training]],
    sets: Mapping[str, Sequence[ScoredSet]],
    logs: Path,
    price: float | None,
) -> Json:
    """Returns the ledger of a study's entries, from what their runs, sets and columns recorded.

    A column that several entries share counts for each of them, and once in the total.
    """
    columns = {c: column_cost(Path(c)) for of in trainings.values() for t in of for c in t.columns}
    entries = [_entry(name, trainings[name], sets[name], columns, price) for name in trainings]
    total = {key: _sum(entry[key] for entry in entries) for key in (*PARTS, "gpu_hours", "money")}
    total["encode"] = _sum(cost["seconds"] for cost in columns.values() if cost)
    online = [entry.pop("online") for entry in entries]
    return {
        "price": price,
        "entries": entries,
        "total": total,
        "online": {"seconds": sum(online), "times": sum(online) / total["encode"]}
        if None not in online and total["encode"]
        else None,
        "processes": processes(logs),
    }


def _entry(
    name: str,
    trainings: Sequence[Training],
    sets: Sequence[ScoredSet],
    columns: Mapping[str, Json | None],
    price: float | None,
) -> Json:
    costs = [
        (training, cost)
        for training in trainings
        if (cost := training_cost(training.run, training.steps))
    ]
    read = dict.fromkeys(column for training in trainings for column in training.columns)
    generations = [cost for scored in sets if (cost := generation_cost(scored))]
    hours = [cost["gpu_hours"] for _, cost in costs]
    hours += [
        cost["seconds"] * (cost["ranks"] or 1) / 3600
        for cost in generations
        if cost["seconds"] and str(cost["device"]).startswith("cuda")
    ]
    online = [
        _online([columns[column] for column in kind], cost["samples"])
        for training, cost in costs
        for kind in (training.latents, training.text)
    ]
    return {
        "entry": name,
        "runs": len(costs),
        "sets": len(sets),
        "samples": sum(cost["samples"] for _, cost in costs),
        "devices": list(dict.fromkeys(device for _, cost in costs for device in cost["devices"])),
        "encode": _sum(cost["seconds"] for column in read if (cost := columns[column])),
        "train": _sum(cost["seconds"] for _, cost in costs),
        "generate": _sum(cost["seconds"] for cost in generations),
        "score": _sum(score.seconds for scored in sets for score in scored.scores.values()),
        "gpu_hours": sum(hours),
        "money": None if price is None else price * sum(hours),
        "online": None if not online or None in online else _sum(online),
    }


def _sum(numbers: Iterable[float | None]) -> float | None:
    """Returns the sum of what is known; None where nothing is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _online(columns: Sequence[Json | None], samples: int) -> float | None:
    """Returns the seconds of an encoder alone on so many samples, at the rate measured when its columns
    were made.
    """
    if any(cost is None or not cost["rows"] for cost in columns):
        return None
    seconds, rows = (sum(cost[key] for cost in columns if cost) for key in ("encoder", "rows"))
    return float(seconds / rows * samples)


def processes(logs: Path) -> Json:
    """Returns the seconds that the nodes' processes took, by kind, from their records.

    A node that ran several times counts with its last time.
    """
    seconds: Json = {}
    for path in sorted(logs.rglob("*.json")):
        try:
            record = read_json(path)
            kind = str(record["id"]).partition("/")[0]
            seconds[kind] = seconds.get(kind, 0.0) + float(record["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a node that is running, or was killed
    return seconds
