"""From a batch of columns to what the model and the loss take, with all the randomness of its
samples.

Every random number is keyed by (seed, sample number, purpose): the same on any rank, in any
micro-batch, after any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shards import Batch, Norm
from shards.read import Int8Tokens, draw, normal, uniform

from ..model.flow import FlowConfig, density, interpolate, noise_levels


@dataclass(frozen=True)
class Int8Captions:
    """int8 captions of which some gave way to the empty one, which is bf16."""

    stored: Int8Tokens
    places: Tensor  # (m,) int64, among the tokens: those of empty captions
    empty: Tensor  # (m, Dt) bf16

    def dequantised(self) -> Tensor:
        """Returns the tokens (T, Dt) bf16."""
        return self.stored.dequantised().index_copy_(0, self.places, self.empty)

    def each(self, act: Callable[[Tensor], Tensor]) -> Int8Captions:
        return Int8Captions(self.stored.each(act), act(self.places), act(self.empty))


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # (B, C, H, W) fp32, normalised
    noise: Tensor  # (B, C, H, W) fp32
    sigma: Tensor  # (B,) fp32
    timestep: Tensor  # (B,) fp32, in (0, 1000]
    text: Tensor | Int8Captions  # captions back to back, `tokens` or what they are made of
    cu_seqlens: Tensor  # (B + 1,) int32, where each caption starts; the last is the end

    @property
    def tokens(self) -> Tensor:
        """(T, Dt), captions back to back."""
        return self.text if isinstance(self.text, Tensor) else self.text.dequantised()

    @property
    def noisy(self) -> Tensor:
        return interpolate(self.latents, self.noise, self.sigma)

    def to(self, device: torch.device) -> Inputs:
        """Returns copies on another device, where int8 is multiplied: half the bytes travel.
        cu_seqlens stays, for its numbers are wanted here: a GPU would have to be waited for."""
        moved = self._each(lambda values: values.to(device, non_blocking=True))
        return replace(moved, text=moved.tokens)

    def pinned(self) -> Inputs:
        """Returns copies in page-locked memory, from which `to` copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, act: Callable[[Tensor], Tensor]) -> Inputs:
        text = act(self.text) if isinstance(self.text, Tensor) else self.text.each(act)
        latents, noise, sigma, timestep = map(
            act, (self.latents, self.noise, self.sigma, self.timestep)
        )
        return Inputs(latents, noise, sigma, timestep, text, self.cu_seqlens)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of a rank takes."""

    batch: Batch  # this rank's part of the global batch
    part: Batch  # the rows of it that are in this micro-batch
    inputs: Inputs
    last: bool  # of its batch


def micro_batches(
    batches: Iterable[Batch], size: int, make: Callable[[Batch], Inputs]
) -> Iterator[MicroBatch]:
    """Yields all batches, cut into micro-batches of `size` samples and made ready for the model."""
    for batch in batches:
        for start, part in enumerate(cut(batch, size)):
            yield MicroBatch(batch, part, make(part), (start + 1) * size >= len(batch.rows))


def training_inputs(
    batch: Batch, norm: Norm, empty: Tensor, flow: FlowConfig, dropout: float, seed: int,
    posterior: bool = True,
) -> Inputs:  # fmt: skip
    """Returns one sample of the posterior, one noise and one noise level for each row; some
    captions give way to `empty`, for classifier-free guidance (arXiv 2207.12598).

    `posterior` False: the batch holds latents, of an encoder that has none, and nothing is drawn.
    """
    keys = batch.samples.tolist()
    channels, *size = batch.moments.shape[1:]
    shape = (channels // 2 if posterior else channels, *size)
    sample = normal(seed, "posterior", keys, shape) if posterior else None
    latents = draw(batch.moments, norm, sample)
    sigma, timestep = noise_levels(
        density(flow, normal(seed, "timestep", keys, ())), flow.timestep_shift
    )
    drop = uniform(seed, "caption-drop", keys) < dropout
    captions = drop_captions(batch.text, batch.cu_seqlens, drop, empty)
    return Inputs(latents, normal(seed, "flow", keys, shape), sigma, timestep, *captions)


def drop_captions(
    text: Tensor | Int8Tokens, cu_seqlens: Tensor, where: Tensor, empty: Tensor
) -> tuple[Tensor | Int8Captions, Tensor]:
    """Returns (text, cu_seqlens) with captions at `where` (B,) replaced by `empty` (n, Dt)."""
    if isinstance(text, Tensor):
        return replace_captions(text, cu_seqlens, where, empty)
    count = len(empty)  # rows of zeros hold its place
    stored, ends = replace_captions(
        text.stored, cu_seqlens, where, text.stored.new_zeros(count, text.stored.shape[1])
    )
    column, _ = replace_captions(text.column, cu_seqlens, where, text.column.new_zeros(count))
    starts = ends[:-1][where].long()
    places = (starts[:, None] + torch.arange(count)).flatten()
    tokens = Int8Tokens(stored, text.channels, column)
    return Int8Captions(tokens, places, empty.repeat(len(starts), 1)), ends


def replace_captions(
    tokens: Tensor, cu_seqlens: Tensor, where: Tensor, by: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (tokens, cu_seqlens) with captions at `where` (B,) replaced by `by` (n, D)."""
    captions = torch.split(tokens, cu_seqlens.diff().tolist())
    pairs = zip(captions, where.tolist(), strict=True)
    captions = tuple(by if drop else caption for caption, drop in pairs)
    lengths = torch.tensor([0, *(len(c) for c in captions)], dtype=torch.int32)
    return torch.cat(captions), lengths.cumsum(0, dtype=torch.int32)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Yields a rank's part of a global batch in parts of `size` samples."""
    for start in range(0, len(batch.rows), size):
        at = slice(start, start + size)
        cu = batch.cu_seqlens[start : start + size + 1]
        yield Batch(
            batch.position, batch.samples[at], batch.rows[at], batch.moments[at],
            batch.text[int(cu[0]) : int(cu[-1])], cu - cu[0], batch.sources[at],
            {name: values[at] for name, values in batch.extra.items()},
        )  # fmt: skip
