"""What a set of pictures cost: training, encoding, generating, scoring. Only what was measured and written down."""

from pathlib import Path
from typing import Any

from configs import read_yaml
from shards.format.atomic import read_json
from train.report.records import read_records

from .entries import Scored

Json = dict[str, Any]


def cost_of(scored: Scored) -> Json:
    """Seconds of each part: training, encoding, generation, and scoring by scorer; None where nothing is known."""
    run, step = scored.run, scored.settings.get("step")
    return {
        "encoding": encoding_cost(run) if run else None,
        "training": training_cost(run, step if isinstance(step, int) else None) if run else None,
        "generation": generation_cost(scored),
        "scoring": {name: score.seconds for name, score in scored.scores.items()},
    }


def generation_cost(scored: Scored) -> Json | None:
    """As `generate` noted in the manifest: of the session and rank that recorded the set, which made the last of it."""
    keys = ("seconds", "pictures_per_second", "device", "ranks")
    found = {key: scored.provenance.get(key) for key in keys}
    return found if any(value is not None for value in found.values()) else None


def training_cost(run: Path, until: int | None = None) -> Json | None:
    """Seconds of the steps up to `until`, from a run's metrics.jsonl: the samples of each log interval over its rate.

    Saving, validating and starting are left out. GPU hours are seconds times the ranks of that time, on a GPU.
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
            took = (record["position"] - position) / rate
            seconds += took
            gpu_seconds += took * ranks * (devices[-1:] != ["cpu"])
            position, step = record["position"], record["step"]
    if not seconds:
        return None
    return {
        "seconds": seconds, "gpu_hours": gpu_seconds / 3600, "samples": position, "step": step, "ranks": ranks,
        "devices": devices, "run": str(run),
    }  # fmt: skip


def encoding_cost(run: Path) -> Json | None:
    """Seconds of the encode run that made the latent column, where its report.json stands beside the column's source:
    of reading, decoding and the VAE, added over workers."""
    try:
        latents = read_yaml(run / "config.yaml")["data"]["latents"]
        column = Path(latents).resolve()
        for folder in list(column.parents)[:3]:
            if (folder / "report.json").is_file():
                columns = read_json(folder / "report.json")
                made = next(v for k, v in columns.items() if Path(k).resolve() == column)
                return {
                    "seconds": float(sum(made["seconds"].values())), "rows": made.get("rows"), "column": str(column),
                }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        pass  # another machine, an object store, several columns: nothing is known
    return None
