"""Weights that a new run starts from: those of another run, of one of its steps, or imported ones
(`init_from`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from configs import ConfigError
from shards.format import differences

from ..config import TrainConfig
from ..model.dit import DiT, DiTConfig
from ..ranks.world import World
from . import checkpoint, folders
from .identity import initial_share, training_of, young_average

FREE = {"initializer_range"}  # of a model's config: it says nothing of weights that are there
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Initial:
    """A step folder whose weights fit the model, and its record in the new run's checkpoints."""

    folder: Path
    name: str  # of the file there
    record: dict[str, Any]

    def load(self, model: DiT, world: World) -> None:
        """Fills the model, once rank 0 has checked the file's digest; collective."""
        checkpoint.together(
            world,
            lambda: checkpoint.verified(self.folder, [self.name]) if world.rank == 0 else None,
        )
        model.load_state_dict(load_file(self.folder / self.name))
        log.info("starts from %s", self.folder / self.name)


def find_initial(config: TrainConfig, model: DiTConfig) -> Initial | None:
    """Returns what `init_from` names; CheckpointError or ConfigError, before memory is taken, if it
    cannot fill the model."""
    if config.init_from is None:
        return None
    folder, manifest = initial_step(config.init_from)
    name = checkpoint.WHOLE["ema" if config.init_ema else "weights"]
    if name not in manifest["files"]:
        raise checkpoint.CheckpointError(
            f"init_from: {folder} holds {', '.join(sorted(manifest['files']))}, expected {name}. "
            f"Say init_ema={str(not config.init_ema).lower()} for its other weights"
        )
    try:
        initial_model, training = DiTConfig.model_validate(manifest["model"]), training_of(manifest)
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"init_from: {folder} is damaged: its manifest: {error}. Name another step"
        ) from None
    lines = differences(
        initial_model.model_dump(exclude=FREE), model.model_dump(exclude=FREE), "model"
    )
    if lines:
        raise ConfigError(
            "\n  ".join(
                [
                    f"init_from: {folder} holds the weights of another model (found there, expected now):",
                    *lines,
                ]
            )
            + "\nin_channels, out_channels and text_width come from the columns, the rest from `model`. Start from "
            "weights of this model, or change the columns or `model` to theirs"
        )
    share = initial_share(manifest) if config.init_ema else None
    if young := young_average(share, manifest.get("init")):
        log.warning("init_from: %s: %s (init_ema=false)", folder, young)
    output = (training.get("flow") or {}).get("prediction", "velocity")
    if output != config.flow.prediction:
        log.warning(
            "init_from: %s: found a model whose output is the %s, expected the %s, which it has to learn anew. Say "
            "flow.prediction=%s to go on with what it has learned",
            folder, output, config.flow.prediction, output,
        )  # fmt: skip
    record = {
        "path": str(folder.resolve()), "file": name, "sha256": manifest["files"][name]["sha256"],
        "step": manifest["step"], "training": training,
    }  # fmt: skip
    return Initial(folder, name, record)


def initial_step(path: Path) -> tuple[Path, checkpoint.Manifest]:
    """Returns the step folder that a path leads to, by itself or as the newest of a run or an
    import, and its manifest."""
    candidates = [path, *folders.steps(path / "checkpoints"), *folders.steps(path)]
    folder = next((f for f in candidates if (f / "manifest.json").is_file()), None)
    if folder is None:
        raise checkpoint.CheckpointError(
            f"init_from: found no checkpoint in {path}, expected a run folder, one of its steps, or what "
            "`python -m train import` wrote"
        )
    try:
        return folder, checkpoint.manifest_of(folder)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"init_from: {error}. Name another step") from None
