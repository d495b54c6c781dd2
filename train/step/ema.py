"""The exponential moving average (EMA) of the weights, which pictures are made with: each rank
holds its part of it, a fraction of the memory, and exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import Engine


class Ema:
    """Averages the fp32 partitions of this rank: `parts` are as `engine.weights()`."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.initial_share = 1.0  # of the first weights in the average: the product of all decays
        self.parts = [w.detach().clone() for w in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Sets average = decay * average + (1 - decay) * weights, in one fused operation."""
        torch._foreach_lerp_(self.parts, list(weights), 1 - self.decay)
        self.initial_share *= self.decay

    @contextmanager
    def in_place_of_weights(self, engine: Engine) -> Iterator[None]:
        """Lets the model compute with the averaged weights within the block."""
        weights = [w.detach().clone() for w in engine.weights()]
        engine.set_weights(self.parts)
        try:
            yield
        finally:
            engine.set_weights(weights)
