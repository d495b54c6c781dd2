"""The place of an image token and the time in the flow: sine tables (as in ViT and DiT), rotary
embeddings (RoPE, arXiv 2104.09864), features of the timestep (DDPM's sines).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .config import TIME_CHANNELS

Rope = tuple[Tensor, Tensor]  # cosines and sines, (S, hd)


def sincos_table(width: int, side: int, base: int) -> Tensor:
    """Returns the 2-D sine-cosine table (1, side * side, width): column in the first half of the
    channels, row in the second. Grid index k has coordinate k / (side / base), so that a larger
    table refines the same picture."""
    at = torch.arange(side, dtype=torch.float64) / (side / base)
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = at[:, None] * omega  # (side, width / 4)
    half = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    column = half[None, :, :].expand(side, side, -1)
    row = half[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], 2).reshape(1, side * side, width).float()


def _frequencies(dim: int, theta: float, like: Tensor) -> Tensor:
    """Returns RoPE's frequencies theta^(-2 i / dim) (dim / 2,)."""
    return 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim)


def _angles_1d(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    index = torch.arange(row.numel(), dtype=torch.float32, device=row.device)
    return (index[:, None] * _frequencies(head_dim, theta, row)).repeat(1, 2)


def _angles_2d(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    f = _frequencies(head_dim // 2, theta, row)
    return torch.cat([row[:, None] * f, column[:, None] * f], 1).repeat(1, 2)


def _angles_m(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    # rows turn with the high frequencies, columns with the low
    high, low = _frequencies(head_dim, theta, row).chunk(2)
    return torch.cat([row[:, None] * high, column[:, None] * low], 1).repeat(1, 2)


ROPES = {"1d-rope": _angles_1d, "2d-rope": _angles_2d, "m-rope": _angles_m}


def rope_table(
    kind: str, h: int, w: int, head_dim: int, theta: float, device: torch.device | None = None
) -> Rope:
    """Returns cosines and sines (h * w, head_dim) of `kind` over a token grid, row-major."""
    row = torch.arange(h, dtype=torch.float32, device=device).repeat_interleave(w)
    column = torch.arange(w, dtype=torch.float32, device=device).repeat(h)
    angles = ROPES[kind](row, column, head_dim, theta)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Applies a rotary embedding to (B, S, heads, hd), dimension j paired with j + hd / 2."""
    if rope is None:
        return x
    cos, sin = rope[0][:, None], rope[1][:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def time_features(timestep: Tensor) -> Tensor:
    """Maps timesteps (B,) in (0, 1000] to features (B, 256), cosines first."""
    frequencies = _time_frequencies().to(timestep.device, non_blocking=True)
    angle = timestep.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], 1)


@cache
def _time_frequencies() -> Tensor:
    """Returns 10000^(-k / 128) (128,), to the bit as in the goldens: t = 1000 makes 6e-5 of an ulp,
    and an fp32 exp rounds differently on each processor. Hence exp in fp64 of the fp32 exponent,
    rounded, but for three near ties that went up there."""
    half = TIME_CHANNELS // 2
    exponent = -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device="cpu") / half
    frequencies = exponent.double().exp().float()
    ties = [13, 44, 119]
    frequencies[ties] = frequencies[ties].nextafter(torch.tensor(torch.inf))
    return frequencies
