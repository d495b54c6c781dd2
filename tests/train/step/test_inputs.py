"""The randomness of a sample depends on its number alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from shards import Norm
from shards.read.stream import Batch, Int8Tokens
from train.model.flow import FlowConfig
from train.step.inputs import (
    Inputs,
    Int8Captions,
    cut,
    micro_batches,
    replace_captions,
    training_inputs,
)


def batch_of(samples: list[int]) -> Batch:
    """Rows whose contents follow from the sample number."""
    g = torch.tensor(samples)
    lengths = [1 + s % 3 for s in samples]
    moments = (g[:, None, None, None] / 100).expand(-1, 4, 2, 2).half()
    tokens = torch.cat(
        [torch.full((n, 5), float(s)) for s, n in zip(samples, lengths, strict=True)]
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(0, g, g + 1000, moments, tokens.bfloat16(), cu_seqlens)


def inputs(batch: Batch, dropout: float = 0.5) -> Inputs:
    return training_inputs(
        batch, Norm((0.0,), (1.0,)), torch.full((2, 5), -1.0), FlowConfig(), dropout, seed=7
    )


def captions(x: Inputs) -> tuple[torch.Tensor, ...]:
    return x.tokens.split(x.cu_seqlens.diff().tolist())


def test_a_sample_gets_the_same_in_any_company() -> None:
    batch = inputs(batch_of([5, 6, 7, 8]))
    parts = [inputs(part) for part in cut(batch_of([8, 5, 7, 6]), 3)]
    at = {8: (0, 0), 5: (0, 1), 7: (0, 2), 6: (1, 0)}
    for i, sample in enumerate([5, 6, 7, 8]):
        part, j = at[sample]
        for field in ("latents", "noise", "sigma", "timestep", "noisy"):
            assert torch.equal(getattr(batch, field)[i], getattr(parts[part], field)[j])
        assert torch.equal(captions(batch)[i], captions(parts[part])[j])


def test_samples_get_different_noise() -> None:
    x = inputs(batch_of(list(range(100, 164))))
    assert len({round(float(n), 6) for n in x.noise[:, 0, 0, 0]}) == 64
    assert x.timestep.min() > 0
    assert x.timestep.max() <= 1000
    assert (x.timestep / 1000 - x.sigma).abs().max() < 1e-6
    dropped = sum(bool((caption == -1).all()) for caption in captions(x))
    assert 20 < dropped < 44  # half of 64, three standard deviations either way


def test_dropping_replaces_the_whole_caption() -> None:
    batch, empty = batch_of([2, 3, 4]), torch.full((2, 5), -1.0).bfloat16()  # 3, 1 and 2 tokens
    tokens, cu = replace_captions(
        batch.tokens, batch.cu_seqlens, torch.tensor([True, False, True]), empty
    )
    assert cu.tolist() == [0, 2, 3, 5]
    assert tokens[:, 0].tolist() == [-1, -1, 3, -1, -1]


def test_micro_batches_are_the_batch() -> None:
    parts = list(cut(batch_of([2, 3, 4, 5, 6]), 2))
    assert [p.rows.tolist() for p in parts] == [[1002, 1003], [1004, 1005], [1006]]
    assert [p.cu_seqlens.tolist() for p in parts] == [[0, 3, 4], [0, 2, 5], [0, 1]]
    assert torch.equal(torch.cat([p.tokens for p in parts]), batch_of([2, 3, 4, 5, 6]).tokens)


def test_micro_batches_are_the_batch_made_ready() -> None:
    batches = [batch_of([2, 3, 4, 5, 6]), batch_of([7, 8, 9, 10])]
    queue = list(micro_batches(iter(batches), 2, inputs))
    assert [piece.last for piece in queue] == [False, False, True, False, True]
    assert [piece.batch is batches[i > 2] for i, piece in enumerate(queue)] == [True] * 5
    parts = [part for batch in batches for part in cut(batch, 2)]
    for piece, part in zip(queue, parts, strict=True):
        assert torch.equal(piece.part.rows, part.rows)
        assert torch.equal(piece.inputs.noise, inputs(part).noise)
        assert torch.equal(piece.inputs.tokens, inputs(part).tokens)


def int8_of(samples: list[int]) -> Batch:
    """The rows of `batch_of` with int8 captions of two columns, each of its own scales."""
    batch = batch_of(samples)
    generator = torch.Generator().manual_seed(samples[0])
    count = int(batch.cu_seqlens[-1])
    stored = torch.randint(-127, 128, (count, 5 + 4), generator=generator, dtype=torch.int8)
    stored[:, 5:] = torch.rand(count, 1, generator=generator).view(torch.int8)
    channels = torch.rand(2, 5, generator=generator)
    column = (batch.rows % 2).repeat_interleave(batch.lengths)
    return replace(batch, text=Int8Tokens(stored, channels, column))


def test_int8_captions_are_those_of_bfloat16_after_the_device() -> None:
    batch = int8_of(list(range(3, 43)))
    plain = replace(batch, text=batch.tokens)
    empty = torch.tensor([[0.3] * 5, [-7.0] * 5]).bfloat16()
    for part, plain_part in zip(cut(batch, 16), cut(plain, 16), strict=True):
        assert torch.equal(part.tokens, plain_part.tokens)
        for dropout in (0.0, 0.5, 1.0):
            actual, expected = (
                training_inputs(b, Norm((0.0,), (1.0,)), empty, FlowConfig(), dropout, seed=7)
                for b in (part, plain_part)
            )
            assert isinstance(actual.text, Int8Captions)
            moved = actual.to(torch.device("cpu"))
            assert isinstance(moved.text, torch.Tensor)
            assert torch.equal(moved.text, expected.tokens)
            assert torch.equal(moved.cu_seqlens, expected.cu_seqlens)
            assert torch.equal(moved.noise, expected.noise)
