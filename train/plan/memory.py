"""Bytes of a GPU that a run takes, by what they hold: exact for state, an estimate for
activations."""

from __future__ import annotations

from ..model.dit import DiTConfig

GEMMA = 2.506e9  # parameters of Gemma-2B without its output layer, which the reference holds in fp32 on each GPU


def by_stage(
    stage: int,
    world: int,
    parameters: int,
    linear: int,
    bucket: int,
    autocast: bool = True,
    powers: int = 0,
) -> dict[str, float]:
    """Returns the bytes of state of one of `world` GPUs, by what they hold. Stage 0 is the
    reference: everything on each GPU. `linear`: parameters of layers that autocast runs in bf16;
    `bucket`: elements of ZeRO's buffer for gradients (arXiv 1910.02054: stage 1 splits the
    optimizer's state, stage 2 the gradients, too); `powers`: power-function averages beside the plain one."""
    full, part = 4.0 * parameters, 4.0 * parameters / world
    bucket = min(bucket, parameters)
    return {
        "weights": full,
        "their bf16 copies, from forward to backward": 2.0 * linear if autocast else 0.0,
        # stage 1 keeps all of them until the step; both make a flat copy of the own part for it
        "gradients": {0: full, 1: full + part, 2: 2 * part + 4.0 * bucket}[stage],
        "AdamW's moments": 2 * full if stage == 0 else 2 * part,
        "own part of the weights, for AdamW": 0.0 if stage == 0 else part,
        "average of the weights": full if stage == 0 else part,
        **({"power averages of them": 0.0 if stage == 0 else powers * part} if powers else {}),
        "Gemma-2B in fp32": 4 * GEMMA if stage == 0 else 0.0,
    }


def activations(
    config: DiTConfig, height: int, width: int, tokens: float, half: int = 2, recompute: bool = False
) -> float:  # fmt: skip
    """Returns the bytes that the blocks keep of a sample for the backward pass without
    torch.compile, which keeps less.

    Inputs of norms are kept in fp32, the rest in `half` bytes a value: inputs of the linear layers,
    the MLP's four tensors, what is multiplied by modulation and gates, queries, keys and values.
    The attention keeps its output, not its scores."""
    c = config
    places = height * width / c.patch_size**2
    d, q, kv = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim
    norms = 2 * d + (q + kv if c.qk_norm else 0)
    values = 6 * d + 2 * q + 2 * kv + 4 * c.mlp_size
    text = half * 2 * kv + (4 * kv if c.qk_norm else 0)
    if c.attention == "cross":
        norms += q if c.qk_norm else 0
        values += d + 2 * q
    if c.sandwich_norm:
        norms += 2 * d
    block = places * (4 * norms + half * values) + tokens * text
    if recompute:  # the input of each block, and one block in full
        return c.layers * places * d * half + block
    return c.layers * block
