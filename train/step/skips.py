"""Steps whose loss or gradient is not finite: their rows are written down, and the step is left out,
or ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from shards import Batch, JoinedColumns, atomic_write, canonical_json

from ..config import GuardConfig
from ..ranks.world import World

log = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is not finite; the weights are as the step before left them."""

    exit_code = 3


class Skips:
    """The steps in a row that moved no weight, and how many of them a run bears."""

    def __init__(self, guard: GuardConfig, run: Path, sources: JoinedColumns, world: World) -> None:
        self.guard = guard
        self.folder = run
        self.several_sources = len(sources.by_source) > 1
        self.world = world
        self.count = 0

    def add(
        self, step: int, batch: Batch, losses: Tensor, kind: str, weights: Sequence[Tensor], updates: int
    ) -> None:  # fmt: skip
        """Writes down the rows of this rank's `batch`; then counts the step as skipped, or raises
        NonFiniteLoss. Collective.

        `losses`: of each row; `weights`: this rank's part of them, after `updates`."""
        name = f"nonfinite-step-{step:08d}-rank-{self.world.rank:05d}.json"
        rows, bad = batch.rows.tolist(), (~losses.isfinite()).tolist()
        record = {
            "step": step, "position": batch.position, "what": kind, "rows": rows,
            "rows_with_such_a_loss": [row for row, b in zip(rows, bad, strict=True) if b],
        }  # fmt: skip
        if self.several_sources:
            record["sources"] = batch.sources.tolist()
        self.world.together(self.world.check_lock)
        atomic_write(self.folder / name, canonical_json(record))
        self.count += 1
        spoiled = any(self.world.sum([not part.isfinite().all() for part in weights]))
        state = (
            "the weights were not finite before it, so an earlier step has spoiled them"
            if spoiled
            else f"it left the weights as they were after {updates} updates"
        )
        message = (
            f"the {kind} of step {step} is not finite on some rank; {state}. The rows of this rank's "
            f"batch are in {self.folder / name}"
        )
        if self.guard.nonfinite == "stop":
            raise NonFiniteLoss(f"{message}. Resume with a smaller optim.lr, or look at those rows")
        if self.count > self.guard.skips:
            raise NonFiniteLoss(
                f"{message}. {self.count} such steps in a row are more than guard.skips. Resume with a smaller "
                "optim.lr, or look at the rows of those steps"
            )
        log.warning("%s. Skipped, %d in a row", message, self.count)
