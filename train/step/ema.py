"""The exponential moving average (EMA) of the weights, which pictures are made with, and the
power-function averages from which others are made after the run: each rank holds its part of them,
a fraction of the memory, and exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .engine import Engine
from .profiles import exponent, new_share


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


class PowerEmas:
    """Averages of the partitions of this rank by power functions, one of each relative length
    (`profiles`). None of them has initial weights in it."""

    def __init__(self, weights: Sequence[Tensor], lengths: Sequence[float]) -> None:
        self.exponents = {kind_of(length): exponent(length) for length in lengths}
        self.parts = {kind: [torch.zeros_like(w) for w in weights] for kind in self.exponents}

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], number: int) -> None:
        """Takes in the weights after update `number` of the run, which counts from 1."""
        for kind, parts in self.parts.items():
            share = new_share(number, self.exponents[kind])
            torch._foreach_lerp_(parts, list(weights), share)

    def load(self, flats: Mapping[str, Sequence[Tensor]]) -> None:
        """Replaces the averages by those of a checkpoint."""
        self.parts = {kind: list(flats[kind]) for kind in self.parts}

    def halves(self) -> dict[str, list[Tensor]]:
        """Returns the averages in half precision; a partition that holds a value out of its range
        stays in fp32."""
        return {kind: [_half(part) for part in parts] for kind, parts in self.parts.items()}


def kind_of(length: float) -> str:
    """Returns the name of a power average in state files."""
    return f"power-{length:g}"


def _half(part: Tensor) -> Tensor:
    half = part.half()
    return half if half.isfinite().all() else part
