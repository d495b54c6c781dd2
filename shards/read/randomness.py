"""Random numbers keyed by (seed, purpose, sample number): the same for any rank, batch,
micro-batch and restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

GENERATOR = "numpy Philox4x64-10, key (seed, purpose), counter (0, 0, 0, sample)"


def generator(seed: int, purpose: str, sample: int) -> np.random.Generator:
    """Returns a stream of its own for one purpose of one sample; streams are 2^192 draws apart.

    Philox (Salmon et al. 2011) computes the n-th draw from its key and a counter, without the draws
    before it: a sample's numbers need no state and no other sample.

    seed and sample: 0 <= value < 2^64.
    """
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    key = np.array([seed, name], np.uint64)
    counter = np.array([0, 0, 0, sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(seed: int, purpose: str, samples: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Returns standard normal numbers, (B, *shape) float32, row i a function of (seed, purpose,
    samples[i]).
    """
    draws = [
        generator(seed, purpose, int(g)).standard_normal(shape, dtype=np.float32) for g in samples
    ]
    return torch.from_numpy(np.stack(draws))


def uniform(seed: int, purpose: str, samples: Iterable[int]) -> Tensor:
    """Returns uniform numbers in [0, 1), (B,) float64, the i-th a function of (seed, purpose,
    samples[i]).
    """
    return torch.tensor(
        [generator(seed, purpose, int(g)).random() for g in samples], dtype=torch.float64
    )
