"""Attention where every sample has as many queries, but a number of keys of its own.

Keys and values of a batch are packed back to back, those of sample i at [cu_seqlens[i],
cu_seqlens[i + 1]). A sample that has none gets zeros. No mask with a row for each query is ever
made.

    plain    buffers padded to the batch's longest, and one row of mask a sample; on any device
    varlen   flash attention (arXiv 2307.08691) over the packed sequences; CUDA, half precision
    flex     FlexAttention over padded buffers, where it leaves out the padding; CUDA, and without gradient a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs import ConfigError

from .config import Backend

TILE = 128  # of FlexAttention, in queries and in keys


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Maps q (B, S, nh, hd), k and v (sum of lengths, nkv, hd) and cu_seqlens (B + 1,) to (B, S,
    nh, hd).

    Each key head serves nh / nkv adjacent query heads."""
    chosen = choose(backend, q, q.shape[3])
    keys = locate(cu_seqlens, len(k), q, 0, q.shape[2] // k.shape[1], chosen)
    return keys.attend(q, keys.join(k, None), keys.join(v, None))


@dataclass(frozen=True)
class Padded:
    """Buffers (B, K): of each sample the keys of its image, those of its text, and zeros."""

    at: Tensor  # (T,) rows of the text, what is behind the image taken as rows of all samples
    batch: int
    length: int  # K
    masked: tuple[Any, ...]  # what `kernel` takes after q, k and v
    kernel: Callable[..., Tensor]

    def join(self, text: Tensor, image: Tensor | None) -> Tensor:
        """Returns a buffer of keys or values of the text (T, nkv, hd) and of the image (B, S, nkv,
        hd), if any."""
        text_length = self.length - (0 if image is None else image.shape[1])
        rows = text.new_zeros(self.batch * text_length, *text.shape[1:])
        rows[self.at] = text
        padded = rows.view(self.batch, text_length, *text.shape[1:])
        return padded if image is None else torch.cat([image, padded], 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (_fold(q, k.shape[2]), k, v))
        out = self.kernel(*heads_first, *self.masked)
        return _unfold(out.transpose(1, 2), q.shape)


@dataclass(frozen=True)
class Packed:
    """Buffers without padding: of each sample the keys of its text, then those of its image."""

    text_at: Tensor  # (T,) rows of the buffer
    image_at: Tensor  # (B * S,)
    rows: int
    query_ends: Tensor  # (B + 1,) int32, of folded queries
    ends: Tensor  # (B + 1,) int32, of keys
    longest: int
    kernel: Callable[..., Any]

    def join(self, text: Tensor, image: Tensor | None) -> Tensor:
        rows = text.new_zeros(self.rows, *text.shape[1:])
        rows[self.text_at] = text
        if image is not None:
            rows[self.image_at] = image.flatten(0, 1)
        return rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded = _fold(q, k.shape[1])
        ends = self.query_ends, self.ends
        out = self.kernel(folded.flatten(0, 1), k, v, *ends, folded.shape[1], self.longest)
        return _unfold(out.view(folded.shape), q.shape)


Keys = Padded | Packed


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns the attention (B, S, nh, hd) where all samples have equally many keys: k and v (B, K,
    nkv, hd)."""
    folded = _fold(q, k.shape[2]).transpose(1, 2)
    out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2))
    return _unfold(out.transpose(1, 2), q.shape)


def _fold(q: Tensor, kv_heads: int) -> Tensor:
    """Maps (B, S, nh, hd) to (B, groups * S, nkv, hd): the queries that share a key head one after
    another, which spares copies of the keys, and is the same since nothing here depends on a
    query's place."""
    b, s, heads, width = q.shape
    groups = heads // kv_heads
    if groups == 1:
        return q
    split = q.view(b, s, kv_heads, groups, width).permute(0, 3, 1, 2, 4)
    return split.reshape(b, groups * s, kv_heads, width)


def _unfold(out: Tensor, shape: torch.Size) -> Tensor:
    """Maps (B, groups * S, nkv, hd) to `shape` (B, S, nh, hd): the inverse of `_fold`."""
    b, s, heads, width = shape
    kv_heads = out.shape[2]
    if kv_heads == heads:
        return out
    split = out.reshape(b, -1, s, kv_heads, width).permute(0, 2, 3, 1, 4)
    return split.reshape(shape)


# Where the keys are --------------------------------------------------------------------------------------------------


def choose(requested: Backend, like: Tensor, head_dim: int) -> Backend:
    """Returns the backend for tensors such as `like`; ConfigError if the requested one cannot."""
    half = like.dtype in (torch.float16, torch.bfloat16)
    varlen = like.is_cuda and half and head_dim % 8 == 0 and head_dim <= 256
    if requested == "varlen" and not varlen:
        raise ConfigError(
            f"compute.attention=varlen: found {like.dtype} on {like.device.type} and heads of {head_dim}, expected "
            "half precision on a GPU and a multiple of 8 up to 256. Set compute.attention=auto"
        )
    if requested == "flex" and not like.is_cuda and torch.is_grad_enabled():
        raise ConfigError(
            "compute.attention=flex: found a CPU, where FlexAttention has no gradient, expected a GPU. Set "
            "compute.attention=auto"
        )
    if requested != "auto":
        return requested
    if not like.is_cuda or head_dim < 16:  # the least that FlexAttention takes
        return "plain"
    return "varlen" if varlen and varlen_kernel() and _flash(like.device) else "flex"


def _flash(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def locate(
    cu_seqlens: Tensor, tokens: int, like: Tensor, image: int, groups: int, backend: Backend
) -> Keys:
    """Returns where the keys of the text (`tokens` of them, cut by cu_seqlens) and of `image`
    tokens a sample are.

    Computed once a forward pass, and used by all its blocks. `like`: a tensor of as many queries
    and of the type and device that the blocks compute in. A GPU does not wait for it if cu_seqlens
    is on the CPU."""
    host = cu_seqlens.to("cpu", torch.int64)
    if int(host[-1]) != tokens or int(host[0]):
        raise ValueError(
            f"cu_seqlens goes from {int(host[0])} to {int(host[-1])}, expected from 0 to the {tokens} tokens given"
        )
    if len(host) != len(like) + 1:
        raise ValueError(
            f"cu_seqlens has {len(host)} numbers, expected {len(like) + 1} for {len(like)} samples"
        )
    lengths = host.diff() + image
    longest = max(int(lengths.max()), 1)
    if backend == "varlen":
        return _packed(cu_seqlens, lengths, longest, like, image, groups)
    return _padded(cu_seqlens, lengths, longest, like, image, groups, backend == "flex")


def _beside(like: Tensor, numbers: Tensor) -> Tensor:
    return numbers.to(like.device, torch.int64, non_blocking=True)


def _samples(cu: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the sample of each text token (T,), and its place there (T,)."""
    numbers = torch.arange(len(cu) - 1, device=cu.device)
    sample = numbers.repeat_interleave(cu.diff(), output_size=tokens)
    return sample, torch.arange(tokens, device=cu.device) - cu[sample]


def _padded(
    cu_seqlens: Tensor, lengths: Tensor, longest: int, like: Tensor, image: int, groups: int, flex: bool
) -> Padded:  # fmt: skip
    tokens, batch = int(lengths.sum()) - image * len(lengths), len(lengths)
    length = -(-longest // TILE) * TILE if flex else longest
    sample, place = _samples(_beside(like, cu_seqlens), tokens)
    at = sample * (length - image) + place
    filled = _beside(like, lengths.clamp(min=1))  # a sample without keys sees one zero
    if flex:
        blocks = _blocks(filled, groups * like.shape[1], length)
        return Padded(at, batch, length, (blocks,), flex_kernel(like.is_cuda))
    allowed = None
    if int(lengths.min()) < longest:
        allowed = (torch.arange(length, device=like.device) < filled[:, None])[:, None, None]
    return Padded(at, batch, length, (allowed,), F.scaled_dot_product_attention)


def _packed(
    cu_seqlens: Tensor, lengths: Tensor, longest: int, like: Tensor, image: int, groups: int
) -> Packed:
    cu = _beside(like, cu_seqlens)
    filled = lengths.clamp(min=1)  # a sample without keys gets one, a zero
    tokens, rows, batch = int(lengths.sum()) - image * len(lengths), int(filled.sum()), len(lengths)
    ends = _beside(like, F.pad(filled.cumsum(0), (1, 0)))
    sample, place = _samples(cu, tokens)
    image_at = (ends[:-1] + cu.diff())[:, None] + torch.arange(image, device=like.device)
    queries = torch.arange(batch + 1, device=like.device) * (groups * like.shape[1])
    kernel = varlen_kernel()
    assert kernel is not None
    return Packed(
        ends[sample] + place, image_at.flatten(), rows, queries.int(), ends.int(), longest, kernel
    )


# Kernels -------------------------------------------------------------------------------------------------------------


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """Returns torch's attention over sequences of any length; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def flex_kernel(compiled: bool) -> Callable[..., Tensor]:
    """Returns FlexAttention (arXiv 2412.05496), fused by the compiler on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    run: Any = torch.compile(flex_attention) if compiled else flex_attention
    return lambda q, k, v, blocks: run(q, k, v, block_mask=blocks)


def _blocks(lengths: Tensor, queries: int, length: int) -> Any:
    """Returns which tiles of keys each sample reads: full ones, and the one where they end."""
    from torch.nn.attention.flex_attention import BlockMask

    across, down = length // TILE, -(-queries // TILE)
    full = lengths // TILE
    ends = (lengths % TILE > 0).int()  # tiles that are filled in part: one or none
    numbers = torch.arange(across, dtype=torch.int32, device=lengths.device)
    last = full.clamp(max=across - 1).int()[:, None].expand(-1, across)

    def spread(values: Tensor) -> Tensor:  # the same for all heads and all tiles of queries
        return values[:, None, None].expand(-1, 1, down, *values.shape[1:]).contiguous()

    return BlockMask.from_kv_blocks(
        spread(ends), spread(last), spread(full.int()), spread(numbers.expand(len(lengths), -1)),
        BLOCK_SIZE=TILE, seq_lengths=(queries, length),
        mask_mod=lambda b, h, q, kv: kv < lengths[b],
    )  # fmt: skip
