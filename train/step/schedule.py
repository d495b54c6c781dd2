"""Learning rates as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import OptimConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Returns the rate of update `step` (from 0) of `steps`; the first is above 0."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / (optim.warmup + 1)
    return optim.lr * DECAYS[optim.schedule]((step - optim.warmup) / max(1, steps - optim.warmup))
