"""Keyed random numbers, against Philox4x64-10 written out by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from shards.read.randomness import normal, uniform

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011: ten rounds on four 64-bit words."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k[0], b & MASK, a >> 64 ^ x[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return x


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
@pytest.mark.parametrize("sample", [0, 7, 10**12])
def test_uniform_by_hand(seed: int, sample: int) -> None:
    name = int.from_bytes(hashlib.sha256(b"timestep").digest()[:8], "little")
    first = philox([1, 0, 0, sample], [seed, name])[0]  # numpy counts up before it draws
    assert uniform(seed, "timestep", [sample]).tolist() == [(first >> 11) * 2**-53]


def test_no_batch_or_rank_matters() -> None:
    samples = torch.arange(1000, 1032)
    whole = normal(3, "flow", samples, (2, 3))
    assert whole.shape == (32, 2, 3)
    assert whole.dtype == torch.float32
    parts = torch.cat(
        [normal(3, "flow", part, (2, 3)) for part in torch.split(samples, [1, 5, 26])]
    )
    assert torch.equal(whole, parts)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(3, "flow", samples[order], (2, 3)), whole[order])
    assert torch.equal(uniform(3, "flow", samples[order]), uniform(3, "flow", samples)[order])
    assert torch.equal(normal(3, "flow", samples.numpy(), (2, 3)), whole)


def test_seed_purpose_and_sample_all_matter() -> None:
    rows = [
        normal(seed, purpose, [sample], (4,))
        for seed in (0, 1) for purpose in ("posterior", "flow") for sample in (0, 1)
    ]  # fmt: skip
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 8


def test_moments_of_the_distributions() -> None:
    """Means of 40,000 numbers lie within four deviations of the truth."""
    n = 40_000
    z = normal(5, "posterior", range(400), (100,)).double()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(np.corrcoef(z[:-1].flatten(), z[1:].flatten())[0, 1]) < 4 / n**0.5
    u = uniform(5, "timestep", range(4000))
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
