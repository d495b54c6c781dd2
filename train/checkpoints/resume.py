"""Whether a run may go on from a checkpoint: it must be one of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.format import differences
from shards.format.checks import Count, Fields, check

from ..model.config import LATER
from .checkpoint import CheckpointError, Manifest


class ResumeRefused(CheckpointError):
    """The checkpoint belongs to another run than the one that is asked for."""


class _Optimizer(Fields):
    step: Count
    skipped: Count = 0


class _Resumed(Fields):
    position: Count
    optimizer: _Optimizer


def refuse_other_run(path: Path, manifest: Manifest, record: Mapping[str, Any]) -> None:
    """Raises ResumeRefused unless the checkpoint has the columns, order, seed, model and objective
    of `record`."""
    earlier = dict(manifest)
    if manifest.get("order") == record["order"]:  # whose rows are then the same
        earlier["data"] = without_also(manifest.get("data"))
        record = {**record, "data": without_also(record["data"])}
    earlier["objective"], objective = map(_in_full, (earlier.get("objective"), record["objective"]))
    record = {**record, "objective": objective}
    fields = ("data", "order", "model", "objective")  # the order holds the seed
    changed = [
        line for field in fields for line in differences(earlier.get(field), record[field], field)
    ]
    # an average that begins later, or has another length, is none of all updates
    power, expected = (r.get("config", {}).get("ema", {}).get("power") for r in (earlier, record))
    changed += differences(power, expected, "ema.power")
    if changed:
        raise ResumeRefused(
            "\n  ".join([f"{path} belongs to another run (found there, expected now):", *changed])
            + "\nGo back to its columns and settings, or start another run: give the config another name, or set "
            f"runs=. It may start from these weights: init_from={path}"
        )
    try:
        check(_Resumed, manifest)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its manifest: {error}") from None


def _in_full(objective: Any) -> Any:
    """Returns an objective whose flow says what it leaves out, to be shown."""
    try:
        return {**objective, "flow": LATER | objective["flow"]}
    except (KeyError, TypeError):
        return objective


def without_also(data: Any) -> Any:
    """Returns the columns of a run but those of `also`, of which nothing is read but which rows are
    valid, and without its masks, which say the same."""
    if not isinstance(data, Mapping):
        return data
    more = {"more": [without_also(source) for source in data["more"]]} if "more" in data else {}
    return {k: v for k, v in data.items() if not k.startswith("also.") and k != "masks"} | more
