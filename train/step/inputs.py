"""From a batch of columns to what the model and the loss take, with all the randomness of its samples.

Every random number is keyed by (seed, sample number, purpose): the same on any rank, in any micro-batch, after any
restart.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shards import Norm
from shards.read.latents import draw
from shards.read.randomness import normal, uniform
from shards.read.stream import Batch

from ..model.flow import FlowConfig, density, interpolate, noise_levels


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # (B, C, H, W) fp32, normalised
    noise: Tensor  # (B, C, H, W) fp32
    sigma: Tensor  # (B,) fp32
    timestep: Tensor  # (B,) fp32, in (0, 1000]
    tokens: Tensor  # (T, Dt), captions back to back
    cu_seqlens: Tensor  # (B + 1,) int32, where each caption starts; the last is the end

    @property
    def noisy(self) -> Tensor:
        return interpolate(self.latents, self.noise, self.sigma)

    def to(self, device: torch.device) -> "Inputs":
        """On another device; cu_seqlens stays, for its numbers are wanted here: a GPU would have to be waited for."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return Inputs(**{**moved, "cu_seqlens": self.cu_seqlens})

    def pinned(self) -> "Inputs":
        """In page-locked memory, from which `to` copies without waiting."""
        moved = {f.name: getattr(self, f.name).pin_memory() for f in fields(self)}
        return Inputs(**{**moved, "cu_seqlens": self.cu_seqlens})


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch."""

    batch: Batch  # this rank's part of the global batch, of which it is
    part: Batch
    inputs: Inputs
    last: bool  # of its batch


def micro_batches(
    batches: Iterable[Batch], size: int, make: Callable[[Batch], Inputs]
) -> Iterator[MicroBatch]:
    """All batches, cut into micro-batches of `size` samples and made ready for the model."""
    for batch in batches:
        for start, part in enumerate(cut(batch, size)):
            yield MicroBatch(batch, part, make(part), (start + 1) * size >= len(batch.rows))


def training_inputs(
    batch: Batch, norm: Norm, empty: Tensor, flow: FlowConfig, dropout: float, seed: int,
    posterior: bool = True,
) -> Inputs:  # fmt: skip
    """One sample of the posterior, one noise and one noise level for each row; some captions give way to `empty`.

    `posterior` False: the batch holds latents, of an encoder that has none, and nothing is drawn.
    """
    keys = batch.samples.tolist()
    channels, *size = batch.moments.shape[1:]
    shape = (channels // 2 if posterior else channels, *size)
    drawn = normal(seed, "posterior", keys, shape) if posterior else None
    latents = draw(batch.moments, norm, drawn)
    sigma, timestep = noise_levels(density(flow, normal(seed, "timestep", keys, ())))
    drop = uniform(seed, "caption-drop", keys) < dropout
    captions = replace_captions(batch.tokens, batch.cu_seqlens, drop, empty)
    return Inputs(latents, normal(seed, "flow", keys, shape), sigma, timestep, *captions)


def replace_captions(
    tokens: Tensor, cu_seqlens: Tensor, where: Tensor, by: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed captions with those at `where` (B,) replaced by the tokens `by` (n, D)."""
    captions = torch.split(tokens, cu_seqlens.diff().tolist())
    captions = tuple(
        by if drop else own for own, drop in zip(captions, where.tolist(), strict=True)
    )
    lengths = torch.tensor([0, *(len(c) for c in captions)], dtype=torch.int32)
    return torch.cat(captions), lengths.cumsum(0, dtype=torch.int32)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Yields a rank's part of a global batch in parts of `size` samples."""
    for start in range(0, len(batch.rows), size):
        at = slice(start, start + size)
        cu = batch.cu_seqlens[start : start + size + 1]
        yield Batch(
            batch.position, batch.samples[at], batch.rows[at], batch.moments[at],
            batch.tokens[int(cu[0]) : int(cu[-1])], cu - cu[0], batch.sources[at],
            {name: values[at] for name, values in batch.extra.items()},
        )  # fmt: skip
