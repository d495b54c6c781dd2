"""The training behind a set of pictures, in a record of its own beside the set's settings.

    <save_dir>/run.json     digest of the weights, the training (`train.checkpoints.identity`), and
                            how young their average was

It is neither in the pictures' digests nor compared when a set goes on: sets without it stay the
same.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import explained
from shards import FormatVersion, ShardsError, put_if_absent, seal, unseal
from shards.format.checks import Fields, Text
from shards.format.checks import check as check_fields
from train.checkpoints.identity import check, young_average
from train.model import FlowConfig

Json = dict[str, Any]
log = logging.getLogger(__name__)
FORMAT, VERSION, NAME = "latentbank-run", 1, "run.json"


class _Record(Fields):
    weights: Text
    training: dict[str, Any]
    initial_share: float | None


@dataclass(frozen=True)
class Run:
    """The training that made the weights of some pictures, as far as their checkpoint says it."""

    weights: str  # digest
    training: Json = field(default_factory=dict)  # by part; absent parts are unknown
    # of the initial weights in the average; None: unknown, or not averaged
    initial_share: float | None = None

    @property
    def seed(self) -> int | None:
        return self.training.get("seed")

    @property
    def flow(self) -> FlowConfig:
        """What the model was trained to say and at which noise levels; of imported weights, which do
        not record it, the reference's. ValueError where it is none."""
        values = self.training.get("flow", {})
        try:
            return FlowConfig.model_validate(values)
        except ValidationError as error:
            raise ValueError(
                explained(FlowConfig, values, error, above="flow", defaults=False)[0]
            ) from None

    def other_shift(self, shift: float | None) -> float | None:
        """Returns a timestep shift of the sampler where it is not the run's own."""
        return None if shift == self.flow.shift else shift

    def warnings(self, guidance: float) -> list[str]:
        """Returns what speaks against sampling these weights with this guidance."""
        young = young_average(self.initial_share, self.training.get("init"))
        warnings = [f"{young} (--no-ema_weights)"] if young else []
        if guidance > 1 and self.training.get("caption_dropout") == 0:
            warnings.append(
                f"--guidance_scale {guidance:g}: the model was trained without dropped captions "
                "(data.caption_dropout 0), so it has not learned what guidance leads away from. Use "
                "--guidance_scale 1, or train with dropped captions"
            )
        return warnings


def put(folder: Path, run: Run) -> None:
    """Writes the record, unless the folder has one; FormatVersion of another release's."""
    read(folder, run.weights)
    put_if_absent(folder / NAME, seal({"format": FORMAT, "version": VERSION, **asdict(run)}))


def read(folder: Path, weights: str | None) -> Run | None:
    """Returns the record of a set that was made of these weights; None where none can be read."""
    if not (folder / NAME).exists():
        return None
    try:
        record = unseal(folder / NAME, FORMAT, VERSION)
        check_fields(_Record, record)
        check(record["training"])
        run = Run(record["weights"], record["training"], record["initial_share"])
    except FormatVersion:
        raise
    except (ShardsError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: not read, so this training counts as unknown (%s)", folder / NAME, error)
        return None
    return run if run.weights == weights else None
