"""Models to sample from: a run of ours or one of its steps, or a folder of the reference's.

`--type` says which; the reference's folder is read as it is, with nothing written beside it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from encode.models import weights_digest
from shards import Norm
from shards.format import ColumnIdentity
from shards.format.atomic import read_json
from shards.format.checks import Fields, check
from train.checkpoints.checkpoint import CheckpointError, load_for_sampling, steps
from train.checkpoints.identity import initial_share, training_of
from train.checkpoints.reference import STATES, read
from train.model import DiT

from .runs import Run

Json = dict[str, Any]
log = logging.getLogger(__name__)


class _Latents(Fields):
    identity: dict[str, Any]
    norm: Norm


class _Text(Fields):
    identity: dict[str, Any]


class _Data(Fields):
    """What a manifest's `data` must say, so that pictures can be made of it."""

    latents: _Latents
    text: _Text
    text_encoder: dict[str, Any] = {}  # that ran in the step, where the column is of ids


class _Reference(Fields):
    text_hidden_states_index: Annotated[int, Field(ge=-1000, le=1000)] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode on the CPU, and what is known of it."""

    model: DiT
    step: int
    weights: str  # digest
    latents: ColumnIdentity | None  # of the column that it was trained on
    norm: Norm | None  # of that column
    text: ColumnIdentity | None  # of the encoder that made its text
    run: Run  # the training that made it
    hidden_state: int = -1  # of a text encoder that no column names


def load_ours(where: Path, tag: int | None, ema: bool) -> Checkpoint:
    """Returns the step `tag` of a run, or its last, or `where` itself if it is a step.

    CheckpointError names what is wrong. Of imported weights the reference's config says which
    hidden state they take, which counts where no column does.
    """
    model, manifest = _load(where, tag, ema)
    if tag is not None and manifest["step"] != tag:
        raise CheckpointError(
            f"{where}: found step {manifest['step']}, expected step {tag}. Leave out --tag, or name the run"
        )
    file = manifest["files"]["ema.safetensors" if ema else "weights.safetensors"]
    try:
        latents, norm, text = _columns(manifest.get("data"))
        run = Run(file["sha256"], training_of(manifest), initial_share(manifest) if ema else None)
        if run.flow.shift == "auto":
            raise ValueError("flow.shift: found auto, expected a number")
        reference = manifest.get("reference") or {}
        check(_Reference, reference)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: its manifest: {error}") from None
    hidden_state = reference.get("text_hidden_states_index", -1)
    return Checkpoint(
        model, manifest["step"], file["sha256"], latents, norm, text, run, hidden_state
    )


def _columns(
    data: Json | None,
) -> tuple[ColumnIdentity | None, Norm | None, ColumnIdentity | None]:
    """Returns identity and norm of the latent column, and the identity of what made the text.

    ValueError where they are none.
    """
    if not data:
        return None, None, None
    columns = check(_Data, data)
    latents = ColumnIdentity.of(columns.latents.identity)
    text = ColumnIdentity.of(columns.text_encoder or columns.text.identity)
    for number in (latents.picture.resolution, text.text.max_tokens):
        if not 0 < number <= 1 << 20:
            raise ValueError(f"found {number} pixels or tokens, expected 1 to {1 << 20}")
    return latents, columns.latents.norm, text


def _load(where: Path, tag: int | None, ema: bool) -> tuple[DiT, Json]:
    """Returns what `load_for_sampling` does, but checks only the file that is read."""
    folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    names = {path.name.removeprefix("step-"): path for path in steps(folder)}
    paths = {int(number): path for number, path in names.items() if number.isdigit()}
    if tag is not None and tag not in paths and not (where / "manifest.json").is_file():
        present = f"steps {', '.join(map(str, sorted(paths)))}" if paths else "no steps"
        raise CheckpointError(f"{where}: found {present}, expected step {tag}. Name one with --tag")
    newest_first = [paths[tag]] if tag in paths else [paths[n] for n in sorted(paths, reverse=True)]
    for path in newest_first[:-1]:
        try:
            return load_for_sampling(path, ema)
        except CheckpointError as error:
            log.warning("%s. Falling back to the checkpoint before it", error)
    return load_for_sampling(newest_first[-1] if newest_first else where, ema)


def load_reference(where: Path, tag: int | None, ema: bool) -> Checkpoint:
    """Returns the step `tag` of a reference's folder, or its last; BadReference names faults."""
    config, state = read(where, tag, ema)
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(state, assign=True)
    names = [path.parent.name for path in where.glob(f"*/{STATES}")]
    step = max(int(name) for name in names if name.isdigit()) if tag is None else tag
    fields = read_json(where / "config.json")
    hidden_state = fields.get("text_hidden_states_index", -1)
    weights = weights_digest(model)
    run = Run(weights, {"model": config.model_dump(mode="json"), "step": step})
    return Checkpoint(model.eval(), step, weights, None, None, None, run, hidden_state)


TYPES = {"latentbank": load_ours, "baseline-dit": load_reference}
