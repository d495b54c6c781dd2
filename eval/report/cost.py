"""The cost of a set of pictures: encoding, training, generating, scoring. Only what was measured and
written down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import read_yaml
from shards.format.atomic import read_json
from train.report import read_records

from .entries import ScoredSet

Json = dict[str, Any]
BESIDE = {"read", "decode", "wait", "write"}  # stages of an encode run beside the encoder


def cost_of(scored: ScoredSet) -> Json:
    """Returns the seconds of each part, of scoring by scorer; None where nothing is known."""
    run, step = scored.run, scored.settings.get("step")
    return {
        "encoding": encoding_cost(run) if run else None,
        "training": training_cost(run, step if isinstance(step, int) else None) if run else None,
        "generation": generation_cost(scored),
        "scoring": {name: score.seconds for name, score in scored.scores.items()},
    }


def generation_cost(scored: ScoredSet) -> Json | None:
    """Returns what `generate` noted in the manifest: of the session and rank that recorded the set."""
    keys = ("seconds", "pictures_per_second", "device", "ranks")
    cost = {key: scored.provenance.get(key) for key in keys}
    return cost if any(value is not None for value in cost.values()) else None


def training_cost(run: Path, until: int | None = None) -> Json | None:
    """Returns the seconds of the steps up to `until`, from a run's metrics.jsonl: the samples of each
    log interval over its rate.

    Saving, validating and starting are left out. GPU hours are seconds times ranks on a GPU.
    """
    seconds = gpu_seconds = 0.0
    position, step, ranks, devices = 0, 0, 1, list[str]()
    for record in read_records(run / "metrics.jsonl"):
        if until is not None and record["step"] > until:
            break
        if isinstance(start := record.get("start"), dict):
            ranks = start.get("world", 1)
            if (device := start.get("device", "unknown")) not in devices:
                devices.append(device)
        rate = record.get("samples_per_second")
        if rate and "position" in record:
            interval = (record["position"] - position) / rate
            seconds += interval
            gpu_seconds += interval * ranks * (devices[-1:] != ["cpu"])
            position, step = record["position"], record["step"]
    if not seconds:
        return None
    return {
        "seconds": seconds, "gpu_hours": gpu_seconds / 3600, "samples": position, "step": step, "ranks": ranks,
        "devices": devices, "run": str(run),
    }  # fmt: skip


def encoding_cost(run: Path) -> Json | None:
    """Returns `column_cost` of a run's latent column."""
    try:
        return column_cost(Path(read_yaml(run / "config.yaml")["data"]["latents"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # several columns, or no run: nothing is known


def column_cost(column: Path) -> Json | None:
    """Returns the seconds that a column took, added over workers, where the report.json of its encode
    run lies in a folder above the column: of all stages, and of the encoder alone.
    """
    column = column.resolve()
    try:
        path = next(p for p in (f / "report.json" for f in list(column.parents)[:3]) if p.is_file())
        columns = read_json(path)
        report = next(value for key, value in columns.items() if Path(key).resolve() == column)
        stages = {name: float(seconds) for name, seconds in report["seconds"].items()}
        return {
            "seconds": sum(stages.values()),
            "encoder": sum(stages[name] for name in stages.keys() - BESIDE),
            "rows": report.get("rows"),
            "column": str(column),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None  # another machine, an object store: nothing is known
