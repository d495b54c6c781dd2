"""Validation loss of the averaged weights on held-out rows, at fixed timesteps and noise.

Each row is seen at 8 noise levels with noise keyed by (row, level), so the figure moves only with
the weights. The levels are stratified at shift 3, whatever shift a run trains with, so that the
losses at one level may be set side by side. Micro-batches do not depend on the world size, and losses are summed in row
order in fp64: any world gives the same bits. The total divided by the variance of the target
compares epochs of one run; it does not compare VAEs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import BadRows, IdentityMismatch, JoinedColumns, open_join
from shards.format import without_figures
from shards.read import draw, normal, read_rows

from ..config import TrainConfig, column_name, files_of
from ..model.flow import LEVELS, SHIFT, interpolate, losses, noise_levels, target
from ..ranks.world import World
from .ema import Ema
from .engine import Engine
from .linear_reference import over, reference_of_run
from .online_text import TextEncoder, encoded

Rows = NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    loss: float
    normalised: float  # loss / variance of the target about its channel means
    levels: tuple[float, ...]  # loss at each noise level, from much noise to little
    levels_normalised: tuple[float, ...]  # each by the variance of its own targets
    reference: tuple[float, ...] | None = None  # what a linear model loses at each level

    @property
    def over_reference(self) -> float | None:
        """The loss over the linear reference, both averaged over the levels."""
        return None if self.reference is None else sum(self.levels) / sum(self.reference)

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "loss": self.loss, "normalised": self.normalised, "levels": list(self.levels),
            "levels_normalised": list(self.levels_normalised),
        }  # fmt: skip
        if self.reference is not None:
            levels = list(over(self.levels, self.reference))
            record |= {"over_reference": self.over_reference, "levels_over_reference": levels}
        return record

    def line(self, step: int, share: float, seconds: float) -> str:
        """Returns what the screen shows; `share` are the initial weights in the average."""
        ratio = self.over_reference
        reference = "" if ratio is None else f", {ratio:.3f} of the linear reference"
        return (
            f"step {step:,}  validation {self.loss:.4f}, {self.normalised:.4f} of the target's "
            f"variance{reference}, {share:.1%} initial weights in the average ({seconds:.1f} s)"
        )


def open_held_out(config: TrainConfig, training: JoinedColumns) -> JoinedColumns | None:
    """Returns the columns of the held-out source with the names of the (first source's) training
    columns; None if no source is named.

    IdentityMismatch if another encoder or preprocessing made them."""
    source = config.validation.source
    if source is None:
        return None
    latents, text = (f"{source.rstrip('/')}/{column_name(url)}" for url in config.data.first)
    masks = files_of(config.validation.mask)
    join = open_join(latents, text, truncated=config.data.truncated, masks=masks)
    for column, expected in ((join.latents, training.latents), (join.text, training.text)):
        a, b = (
            {**without_figures(c.spec.identity), "source": None, "norm": c.spec.norm}
            for c in (column, expected)
        )
        if wrong := sorted(key for key in a | b if a.get(key) != b.get(key)):
            raise IdentityMismatch(
                f"{column.path}: made otherwise than {expected.path}; different: {', '.join(wrong)}. Encode the "
                "held-out source with the config of the training source"
            )
    join.measured = training.measured
    if not len(join.valid_rows):
        raise BadRows(
            f"{source}: found no row that is ok in {join.latents.name} and {join.text.name}, expected some to "
            "validate on. Name another source, or leave validation.source out"
        )
    rows = join.valid_rows[: config.validation.rows]
    if count := _trained_on(join, rows, training):
        log.warning(
            "validation.source: %s of the %s rows of %s that are validated on are trained on too, so their loss says "
            "little of others. Name a source of its own, or by data.mask and validation.mask other rows for each",
            f"{count:,}", f"{len(rows):,}", source,
        )  # fmt: skip
    return join


def _trained_on(join: JoinedColumns, rows: Rows, training: JoinedColumns) -> int:
    """Returns how many rows of a held-out source are trained on."""
    name = join.latents.spec.identity["source"]
    same = [s for s in training.by_source if s.latents.spec.identity["source"] == name]
    return sum(int(np.isin(rows, source.valid_rows).sum()) for source in same)


class Validator:
    def __init__(
        self,
        config: TrainConfig,
        join: JoinedColumns,
        world: World,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.config, self.join, self.world = config, join, world
        self.reference: tuple[float, ...] | None = None
        self.text_encoder = text_encoder
        rows = join.valid_rows[: config.validation.rows]
        self.chunks = np.split(
            rows, range(config.validation.batch, len(rows), config.validation.batch)
        )

    def due(self, step: int) -> bool:
        return step % self.config.validation.every == 0 or step == self.config.steps

    def missing(self, step: int, recorded: bool) -> bool:
        """Whether a run that goes on from a step was stopped before its validation was `recorded`,
        which the first rank knows; collective."""
        return step > 0 and self.due(step) and not all(self.world.gather(recorded))

    def prepare(self, run: Path, training: JoinedColumns) -> None:
        """Finds the linear reference of the rows, kept in the run's folder, on the first rank."""
        if self.config.validation.reference and self.world.rank == 0:
            reference = reference_of_run(self.config, run, training, self.join)
            if reference is not None:
                self.reference = reference.losses(self.config.flow)

    @torch.no_grad()
    def __call__(
        self, engine: Engine, ema: Ema, stop: Callable[[], bool] = bool
    ) -> Validation | None:
        """Returns the same losses on all ranks, each of which takes every world-th chunk of rows;
        collective. All call `stop` before each chunk; None if it is true."""
        engine.model.eval()
        try:
            with ema.in_place_of_weights(engine):
                results = []
                for first in range(0, len(self.chunks), self.world.size):
                    self.world.phase(f"validation, chunk {first} of {len(self.chunks)}")
                    if stop():
                        return None
                    if first + self.world.rank < len(self.chunks):
                        results.append(self._chunk(engine, self.chunks[first + self.world.rank]))
        finally:
            engine.model.train()
        by_rank, size = self.world.gather(results), self.world.size
        chunks = [by_rank[i % size][i // size] for i in range(len(self.chunks))]  # rows in order
        loss, mean, square = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        variance = (square.mean((0, 1)) - mean.mean((0, 1)).square()).mean()
        by_level = (square.mean(0) - mean.mean(0).square()).mean(1)
        total, levels = loss.mean(), loss.mean(0)
        return Validation(
            float(total), float(total / variance), tuple(levels.tolist()),
            tuple((levels / by_level).tolist()), self.reference,
        )  # fmt: skip

    def _chunk(self, engine: Engine, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, by row and level, loss (b, 8), mean and mean square of the target by channel (b,
        8, C); fp64 on the CPU."""
        config, device = self.config, self.world.device
        moments, tokens, cu_seqlens = read_rows(self.join, rows)
        tokens = encoded(self.text_encoder, tokens.to(device), cu_seqlens)
        keys, shape = rows.tolist(), self.join.latent_shape
        sample = None
        if self.join.posterior:
            sample = normal(config.seed, "validation-posterior", keys, shape)
        latents = draw(moments, self.join.norm, sample)
        results = []
        for level in range(LEVELS):
            u = torch.full((len(keys),), (level + 0.5) / LEVELS)
            sigma, timestep = noise_levels(u, SHIFT)
            noise = normal(config.seed, f"validation-flow-{level}", keys, shape)
            noisy = interpolate(latents, noise, sigma).to(device)
            predicted = engine(noisy, timestep.to(device), tokens, cu_seqlens).cpu()
            velocity = target(latents, noise).double().flatten(2)
            loss = losses(config.flow, predicted, latents, noise, sigma)
            results.append((loss.double(), velocity.mean(2), velocity.square().mean(2)))
        loss, mean, square = (torch.stack(parts, 1) for parts in zip(*results, strict=True))
        return loss, mean, square
