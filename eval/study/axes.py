"""What a study tries: the steps that are scored, and the values of settings of which one is chosen for each
entry, with the names that they have in folders, and what learning rates are chosen by: the loss of each run's last
validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from configs import ConfigError
from train.config import EmaConfig, TrainConfig
from train.report import read_records

from ..images.flags import plain

Json = dict[str, Any]
METRICS = "metrics.jsonl"
DECADE = 10  # the scored steps are spread over the last factor of this many samples
MORE_SNAPSHOTS = (64, 128, 256)  # of averages, that are tried where fewer do not suffice


def scored_steps(points: int | Sequence[int], steps: int) -> tuple[int, ...]:
    """Returns the scored steps: those given, or so many that are equally spaced in log samples over
    the last decade, the last being the last step.
    """
    if not isinstance(points, int):
        return tuple(sorted(points))
    shares = [DECADE ** (i / (points - 1) - 1) for i in range(points)] if points > 1 else [1.0]
    return tuple(sorted({max(1, round(steps * share)) for share in shares}))


def with_rate(entry: str, rate: float) -> str:
    """Returns the name of an entry's training with a learning rate."""
    return f"{entry}-lr-{plain(rate)}"


def setting_names(setting: Mapping[str, float]) -> list[str]:
    """Returns what names a setting in a folder's name: guidance_scale-3, ema-0.1."""
    return [f"{name}-{plain(value)}" for name, value in setting.items()]


def averages_of(config: TrainConfig, scored: Sequence[int], lengths: Sequence[float]) -> EmaConfig:
    """Returns what a run keeps of its averages: as its config says; or, where a length is to be chosen
    and the config keeps nothing for it, so many snapshots that each length can be made at each scored
    step. Where even most do not suffice, `flags.generate_settings` refuses the lengths.
    """
    if not lengths or not scored or config.ema.power is not None:
        return config.ema
    from train.checkpoints.snapshots import EmaLengthRefused, refuse_planned  # loads torch

    for snapshots in (config.ema.snapshots, *MORE_SNAPSHOTS):
        values = {"power": (min(lengths), max(lengths)), "snapshots": snapshots}
        averages = EmaConfig.model_validate(config.ema.model_dump() | values)
        try:
            for step, length in product(scored, lengths):
                refuse_planned(averages, config.steps, min(step, config.steps), length)
        except EmaLengthRefused:
            continue
        break
    return averages


def loss_at(run: Path, step: int) -> float | None:
    """Returns the loss of a run's validation at a step; None where its metrics have none, or one that is
    not finite.
    """
    try:
        records = read_records(run / METRICS)
    except ConfigError:
        return None
    losses = [
        record["validation"].get("loss")
        for record in records
        if record.get("validation") and record["step"] == step
    ]
    return losses[-1] if losses else None


def other_validation(manifest: Json, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Returns in what the rows are others that a run validated on, wherever they lie: losses of other rows
    choose no learning rate.
    """
    recorded = manifest["config"].get("validation") or {}
    if recorded.get("source") is None:  # it goes on for a loss of the rows that are wanted
        return {}
    there, now = (
        {"source": _name(each.get("source")), "mask": _name(each.get("mask")), "rows": each.get("rows")}
        for each in (recorded, config.validation.model_dump(mode="json"))
    )  # fmt: skip
    return {f"validation.{key}": (there[key], now[key]) for key in now if there[key] != now[key]}


def _name(place: str | list[str] | None) -> Any:
    """Returns the last part of a place, or of several."""
    if isinstance(place, list):
        return [_name(each) for each in place]
    return place and place.rstrip("/").rpartition("/")[2]
