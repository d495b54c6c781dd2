"""Learning rates: a pure function of the step, right from the first one."""

import math
from collections.abc import Callable

from ..config import OptimConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of a run of `steps` updates; the first update is never idle."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / (optim.warmup + 1)
    return optim.lr * DECAYS[optim.schedule]((step - optim.warmup) / max(1, steps - optim.warmup))
