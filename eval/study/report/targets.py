"""What the models of a study predict, beside the size of their latents: a target that suits latents of one
dimension need not suit those of another.

targets in study.json: {entry: prediction ("velocity" or "latent"), channels, values (of a latent, in all places)}, null
where the training's record does not say it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...report.compare import Entry

Json = dict[str, Any]
OUTPUTS = {"velocity": "the velocity", "latent": "the latent without noise"}


def targets_of(entries: Mapping[str, Entry]) -> dict[str, Json]:
    """Returns the targets of those entries whose trainings are recorded, from the first seed of each."""
    trained = {name: entry.first.trained for name, entry in entries.items()}
    return {name: _target(run.training) for name, run in trained.items() if run and run.training}


def _target(training: Json) -> Json:
    model, tokens = training.get("model", {}), training.get("tokens")
    channels, patch = model.get("in_channels"), model.get("patch_size")
    known = None not in (channels, patch, tokens)
    return {
        "prediction": training.get("flow", {}).get("prediction", "velocity"),
        "channels": channels,
        "values": channels * patch**2 * tokens if known else None,
    }


def target_lines(targets: Mapping[str, Json]) -> tuple[list[str], list[str]]:
    """Returns what verdicts cover and what they leave open of the targets; nothing where latents and
    target are alike.
    """
    sizes = {(target["channels"], target["values"]) for target in targets.values()}
    predictions = {name: _output(target) for name, target in targets.items()}
    if len(set(predictions.values())) > 1:
        each = "; ".join(f"{name}: {output}" for name, output in predictions.items())
        return (
            [f"each entry with its own target of the model ({each})"],
            [
                "how much of a difference is the target's (flow.prediction), and how much the latents'"
            ],
        )
    if len(sizes) > 1:
        output = next(iter(predictions.values()))
        each = "; ".join(f"{name}: {_size(target)}" for name, target in targets.items())
        return (
            [f"one target for all, {output}, though the latents differ in dimension ({each})"],
            [
                "another target (flow.prediction), which may suit latents of another dimension better"
            ],
        )
    return [], []


def _output(target: Json) -> str:
    return OUTPUTS.get(target["prediction"], str(target["prediction"]))


def _size(target: Json) -> str:
    values = "" if target["values"] is None else f", {target['values']:,} values"
    return f"{target['channels']} channels{values}"
