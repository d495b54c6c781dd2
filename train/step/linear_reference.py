"""What the best linear model would lose on the validation rows, computed once and kept beside the run.

RUN/linear_reference.json    a sealed record: of which columns and rows, and the reference by noise level

A validation loss over it says how much more or less than a linear model a run has learned at a noise
level. It does not rank latent columns: each has a reference of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter

from shards import JoinedColumns, ShardsError, atomic_write, canonical_json, seal, unseal
from shards.format.checks import check
from shards.probe import ColumnRows, evenly, held_out_reference, pooled_text

from ..config import TrainConfig
from ..model.flow import LOSS_WEIGHTS, FlowConfig, fixed_sigmas, schedule_sigmas

log = logging.getLogger(__name__)
NAME, FORMAT, VERSION = "linear_reference.json", "latentbank-linear-reference", 1
ROWS = 2048  # of the training columns
FAR_ROWS = 512  # where they are not on a disk: each is a request of its own
LEAST = 64  # training rows; and two a channel
QUANTILES = 32  # noise levels that stand for the run's own

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Eight = Annotated[tuple[Positive, ...], Field(min_length=8, max_length=8)]


@dataclass(frozen=True)
class LinearReference:
    """The reference as a mean squared error of the velocity, a value."""

    inputs: dict[str, Any]  # the columns by digest, the norm, the numbers of rows, the noise levels
    condition: Literal["caption", "nothing"]  # what the linear model knows beside the noisy latent
    levels: Eight  # at the fixed noise levels, from much noise to little
    schedule: Positive  # the mean over the noise levels that the run draws
    text_r2: float | None  # share of the variance that the captions explain in the validation rows

    def losses(self, flow: FlowConfig) -> tuple[float, ...]:
        """Returns the reference as the loss that a config has: weighted, or of the latent."""
        sigma = torch.tensor(fixed_sigmas(), dtype=torch.float64)
        scale = torch.ones_like(sigma)
        if flow.precondition and flow.prediction == "velocity":  # the error of z - s v
            scale = sigma.square()
        if weight := LOSS_WEIGHTS.get(flow.weighting):
            scale = scale * weight(sigma)
        return tuple((scale * torch.tensor(self.levels, dtype=torch.float64)).tolist())


REFERENCE = TypeAdapter(LinearReference)


def reference_of_run(
    config: TrainConfig, run: Path, training: JoinedColumns, held_out: JoinedColumns
) -> LinearReference | None:
    """Returns the reference of a run, read where it is of the same columns and rows, else computed and
    written; None, with a line of why, where there is none. By the first rank.
    """
    start = time.perf_counter()
    try:
        local = all(c.store.folder is not None for c in (training.latents, training.text))
        rows = evenly(training.by_source[0].valid_rows, ROWS if local else FAR_ROWS)
        validation = held_out.valid_rows[: config.validation.rows]
        inputs = {
            "training": _columns(training, len(rows)), "validation": _columns(held_out, len(validation)),
            "norm": training.norm.summary(), "flow": config.flow.identity(),
        }  # fmt: skip
        if (earlier := _read(run, inputs)) is not None:
            return earlier
        channels = training.latent_shape[0]
        if len(rows) < (least := max(LEAST, 2 * channels)):
            log.info("no linear reference: %s training rows, %s are needed", len(rows), least)
            return None
        reference = _computed(config, training, held_out, (rows, validation), inputs)
    except (ShardsError, ValueError) as error:  # a row that is damaged ends the run in its turn
        log.warning("no linear reference: %s", error)
        return None
    record = {"format": FORMAT, "version": VERSION, **asdict(reference)}
    atomic_write(run / NAME, seal(record))
    log.info(
        "linear reference of the validation rows, given %s: %.4f (%.1f s)",
        reference.condition, sum(reference.levels) / len(reference.levels), time.perf_counter() - start,
    )  # fmt: skip
    return reference


def _computed(
    config: TrainConfig, training: JoinedColumns, held_out: JoinedColumns,
    rows: tuple[Any, Any], inputs: dict[str, Any],
) -> LinearReference:  # fmt: skip
    sides = list(zip((training, held_out), rows, strict=True))
    norm = training.norm
    latents = [ColumnRows(join.latents, part, norm) for join, part in sides]
    texts = None
    if not training.ids:
        first, second = (pooled_text(join.text, part) for join, part in sides)
        texts = first, second
    fixed, drawn = fixed_sigmas(), schedule_sigmas(config.flow, QUANTILES)
    result = held_out_reference(latents[0], latents[1], [*fixed, *drawn], texts)
    levels, schedule = result.levels[: len(fixed)], result.levels[len(fixed) :]
    return check(  # type: ignore[no-any-return]
        REFERENCE,
        {
            "inputs": inputs, "condition": "nothing" if texts is None else "caption", "levels": levels,
            "schedule": sum(schedule) / len(schedule), "text_r2": result.text_r2,
        },
    )  # fmt: skip


def _columns(join: JoinedColumns, rows: int) -> dict[str, Any]:
    columns = {"latents": join.latents, "text": join.text}
    digests = {name: [c.digest, c.snapshot.digest] for name, c in columns.items()}
    masks = sorted(mask.digest for mask in join.by_source[0].masks)
    return {**digests, "rows": rows, "masks": masks, "truncated": join.by_source[0].truncated}


def _read(run: Path, inputs: dict[str, Any]) -> LinearReference | None:
    """Returns what is kept, if it is sound and of these inputs."""
    if not (run / NAME).is_file():
        return None
    try:
        reference: LinearReference = check(REFERENCE, unseal(run / NAME, FORMAT, VERSION))
    except (ShardsError, OSError, ValueError, KeyError, TypeError):
        return None
    same = canonical_json(reference.inputs) == canonical_json(inputs)
    return reference if same else None


def over(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, ...]:
    """Returns each loss over the reference of its level."""
    return tuple(loss / other for loss, other in zip(losses, reference, strict=True))
