"""Models to sample from: a run of ours or one of its steps, or a folder of the reference's.

`--type` says which; the reference's folder is read as it is, with nothing written beside it.
"""

from __future__ import annotations

import logging
from contextlib import suppress
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
from train.checkpoints.checkpoint import CheckpointError, load_for_sampling, verified
from train.checkpoints.folders import steps
from train.checkpoints.identity import initial_share, training_of
from train.checkpoints.norm import FILE as NORM_FILE
from train.checkpoints.norm import read_norm
from train.checkpoints.reference import STATES, read
from train.checkpoints.snapshots import digest_of_length, load_of_length
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


def load_ours(where: Path, tag: int | None, ema: bool | float) -> Checkpoint:
    """Returns the step `tag` of a run, or its last, or `where` itself if it is a step; with its own
    average, with an average of another length, or with its weights.

    CheckpointError names what is wrong, EmaLengthRefused what a length needs. Of imported weights
    the reference's config says which hidden state they take, which counts where no column does.
    """
    model, manifest, weights, measured = _load(where, tag, ema)
    if tag is not None and manifest["step"] != tag:
        raise CheckpointError(
            f"{where}: found step {manifest['step']}, expected step {tag}. Leave out --tag, or name the run"
        )
    share = initial_share(manifest) if ema is True else 0.0 if ema else None
    try:
        latents, norm, text = _columns(manifest.get("data"))
        if measured is not None and measured != norm:
            raise ValueError(f"data.latents.norm: found another norm than that of {NORM_FILE}")
        run = Run(weights, training_of(manifest), share)
        if run.flow.shift == "auto":
            raise ValueError("flow.shift: found auto, expected a number")
        reference = manifest.get("reference") or {}
        check(_Reference, reference)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: its manifest: {error}") from None
    hidden_state = reference.get("text_hidden_states_index", -1)
    return Checkpoint(model, manifest["step"], weights, latents, norm, text, run, hidden_state)


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


def _load(where: Path, tag: int | None, ema: bool | float) -> tuple[DiT, Json, str, Norm | None]:
    """Returns a model, its manifest, the digest of its weights, and its norm where that was measured; of
    what `ema` names, only the files that are read are checked."""

    def load(path: Path) -> tuple[DiT, Json, str, Norm | None]:
        if not isinstance(ema, bool):
            model, manifest, digest = load_of_length(path, ema)
        else:
            model, manifest = load_for_sampling(path, ema)
            name = "ema.safetensors" if ema else "weights.safetensors"
            digest = manifest["files"][name]["sha256"]
        return model, manifest, digest, _measured(path, manifest)

    *newest_first, last = _steps(where, tag)
    for path in newest_first:
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s. Falling back to the checkpoint before it", error)
    return load(last)


def _measured(path: Path, manifest: Json) -> Norm | None:
    """Returns the measured norm in a step's folder; None where the run has the norm of its columns."""
    if NORM_FILE not in manifest["files"]:
        return None
    verified(path, [NORM_FILE])
    try:
        return read_norm(path / NORM_FILE)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def check_ema(where: Path, tag: int | None, length: float) -> None:
    """Raises EmaLengthRefused where the step that `load_ours` takes has kept too little for an average
    of a length."""
    for path in _steps(where, tag):
        with suppress(CheckpointError):  # it would fall back, or say what is wrong
            digest_of_length(path, length)
            return


def _steps(where: Path, tag: int | None) -> list[Path]:
    """Returns the steps that may be taken, the first one that is whole."""
    folder = where / "checkpoints" if (where / "checkpoints").is_dir() else where
    names = {path.name.removeprefix("step-"): path for path in steps(folder)}
    paths = {int(number): path for number, path in names.items() if number.isdigit()}
    if tag is not None and tag not in paths and not (where / "manifest.json").is_file():
        present = f"steps {', '.join(map(str, sorted(paths)))}" if paths else "no steps"
        raise CheckpointError(f"{where}: found {present}, expected step {tag}. Name one with --tag")
    if tag in paths:
        return [paths[tag]]
    return [paths[number] for number in sorted(paths, reverse=True)] or [where]


def load_reference(where: Path, tag: int | None, ema: bool | float) -> Checkpoint:
    """Returns the step `tag` of a reference's folder, or its last; BadReference names faults."""
    config, state = read(where, tag, bool(ema))
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
