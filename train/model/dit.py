"""The diffusion transformer (DiT, arXiv 2212.09748): noisy latents, a timestep and caption tokens
in, a velocity out.

Image tokens run through the blocks; caption tokens never change and enter every block as keys and
values only. Parameter names and shapes are those of the reference implementation (fuse-dit), so its
checkpoints load as they are. Shapes: B batch, C channels, (H, W) latent size, S image tokens, T
caption tokens of the whole batch, D width, nh / nkv heads, hd head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import Keys, choose, dense, locate
from .config import TIME_CHANNELS, ComputeConfig
from .config import DiTConfig as DiTConfig
from .config import ModelConfig as ModelConfig
from .positions import ROPES, Rope, rope_table, rotate, sincos_table, time_features

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) as in Gemma: x / rms(x) * (1 + weight), computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, self.eps).to(x.dtype)


class ModulatedNorm(nn.Module):
    """A norm and the linear map that makes its modulation from the time embedding: adaLN-Zero of
    DiT, section 3.2.

    The map's weights start as zeros (see `initialise`), so every block starts as the identity."""

    def __init__(self, width: int, parts: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.norm = RMSNorm(width, eps)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Maps the time embedding (B, D) to `parts` tensors (B, 1, D)."""
        out: Tensor = self.linear(F.silu(temb))[:, None]
        return out.chunk(self.parts, -1)


class PatchEmbed(nn.Module):
    """Maps latents (B, C, H, W) to tokens (B, S, D) plus the centre of the sincos table, if any."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)
        self.side = config.pos_embed_max_size if config.pos_embed == "ape" else 0
        if self.side:
            table = sincos_table(config.hidden_size, self.side, config.sample_size // p)
            # persistent: the reference's state dict holds it
            self.register_buffer("pos_embed", table)

    def forward(self, latents: Tensor) -> Tensor:
        x: Tensor = self.proj(latents)
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        return (x + self._centre(h, w)).to(x.dtype) if self.side else x

    def _centre(self, h: int, w: int) -> Tensor:
        if max(h, w) > self.side:
            raise ValueError(
                f"{h} x {w} tokens do not fit the position table of {self.side} x {self.side}"
            )
        top, left = (self.side - h) // 2, (self.side - w) // 2
        grid = self.pos_embed.view(self.side, self.side, -1)
        return grid[top : top + h, left : left + w].reshape(1, h * w, -1)


class MLP(nn.Module):
    """A gated linear unit (GLU variants, arXiv 2002.05202), as in Gemma: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) of the image over [text, image], the image alone,
    or the text alone.

    With `qk_norm`, queries and keys of each head are normed, so that their products do not grow
    (arXiv 2302.05442)."""

    def __init__(self, config: DiTConfig, image: bool, text: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        linear = partial(nn.Linear, bias=config.attention_bias)
        width, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.image, self.text = image, text
        self.q_proj = linear(width, config.heads * config.head_dim)
        if image:
            self.k_proj, self.v_proj = linear(width, kv), linear(width, kv)
        if text:
            self.text_k_proj, self.text_v_proj = linear(width, kv), linear(width, kv)
        self.o_proj = linear(config.heads * config.head_dim, width)
        norm = partial(RMSNorm, config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, context: Tensor, keys: Keys, rope: Rope | None) -> Tensor:
        """Maps x (B, S, D) and context (T, D) to (B, S, D)."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        k = v = None
        if self.image:
            k = rotate(self.k_norm(self._heads(self.k_proj(x))), rope)
            v = self._heads(self.v_proj(x))
        if self.text:  # the same k_norm as the image, no position
            text_k = self.k_norm(self._heads(self.text_k_proj(context)))
            text_v = self._heads(self.text_v_proj(context))
            attended = keys.attend(q, keys.join(text_k, k), keys.join(text_v, v))
        else:
            assert k is not None
            assert v is not None
            attended = dense(q, k, v)
        out: Tensor = self.o_proj(attended.flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)


def _modulate_zero(block: Block, temb: Tensor) -> tuple[Any, ...]:
    assert isinstance(block.input_layernorm, ModulatedNorm)
    return block.input_layernorm.modulation(temb)


def _modulate_single(block: Block, temb: Tensor) -> tuple[Any, ...]:
    return (block.scale_shift_table + temb)[:, None].chunk(6, -1)


def _modulate_not(block: Block, temb: Tensor) -> tuple[Any, ...]:
    return 0.0, 0.0, 1.0, 0.0, 0.0, 1.0


MODULATIONS = {
    "adaln-zero": _modulate_zero,
    "adaln-single": _modulate_single,
    "addition": _modulate_not,
    "none": _modulate_not,
}


class Block(nn.Module):
    """One layer. Shift, scale and gate of attention and of MLP come from the time embedding in one
    of three ways: a map of each block (adaLN-Zero), a map of all and a table of each (adaLN-single,
    PixArt-alpha, arXiv 2310.00426), or not at all."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        cross, width = config.attention == "cross", config.hidden_size
        norm = partial(RMSNorm, width, config.norm_eps)
        zero = config.timestep_conditioning == "adaln-zero"
        self.input_layernorm = ModulatedNorm(width, 6, config.norm_eps) if zero else norm()
        if config.timestep_conditioning == "adaln-single":
            self.scale_shift_table = nn.Parameter(torch.zeros(6 * width))
        self.self_attn = Attention(config, image=True, text=not cross)
        self.cross_attn = Attention(config, image=False, text=True) if cross else None
        self.mlp = MLP(config)
        self.post_attention_layernorm = norm()
        if config.sandwich_norm:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
            if cross:
                self.post_cross_attention_layernorm = norm()
        self.sandwich = config.sandwich_norm
        self.modulate = MODULATIONS[config.timestep_conditioning]

    def forward(
        self, x: Tensor, temb: Tensor, context: Tensor, keys: Keys, rope: Rope | None
    ) -> Tensor:
        # of the attention, and of the MLP: (B, 1, D) each
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulate(self, temb)
        n = self.input_layernorm(x) * (1 + scale_a) + shift_a
        a = self.self_attn(n, context, keys, rope)
        x = x + gate_a * (self.post_attention_layernorm(a) if self.sandwich else a)
        if self.cross_attn:  # its query is neither normed nor modulated and its output has no gate
            c = self.cross_attn(x, context, keys, None)
            x = x + (self.post_cross_attention_layernorm(c) if self.sandwich else c)
        # With sandwich norms (as in Gemma 2), post_attention_layernorm is used above and another one here.
        n = self.pre_feedforward_layernorm(x) if self.sandwich else self.post_attention_layernorm(x)
        m = self.mlp(n * (1 + scale_m) + shift_m)
        out: Tensor = x + gate_m * (self.post_feedforward_layernorm(m) if self.sandwich else m)
        return out


class DiT(nn.Module):
    """Maps latents (B, C, H, W), timesteps (B,) in (0, 1000] and captions to the velocity (B, C, H,
    W).

    Captions are text (T, Dt), back to back, and where each starts and the last ends, (B + 1,)
    int32, which a GPU need not be waited for if it is on the CPU; or padded text (B, L, Dt) and
    mask (B, L) of 0/1."""

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.compute = config, ComputeConfig()
        width, eps, conditioning = config.hidden_size, config.norm_eps, config.timestep_conditioning
        self.patch_embed = PatchEmbed(config)
        if conditioning != "none":
            self.timestep_embedder = nn.Sequential(
                nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
            )
        if conditioning == "adaln-single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            self.scale_shift_table = nn.Parameter(torch.zeros(2 * width))
        self.context_embedder = nn.Sequential(
            RMSNorm(config.text_width, eps), nn.Linear(config.text_width, width)
        )
        if unused := config.text_modulation_width:  # the reference makes it and has no input for it
            self.condition_embedder = nn.Sequential(
                RMSNorm(unused, eps), nn.Linear(unused, width), nn.SiLU(), nn.Linear(width, width)
            )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = (
            ModulatedNorm(width, 2, eps) if conditioning == "adaln-zero" else RMSNorm(width, eps)
        )
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        if not self.proj_out.weight.is_meta:
            initialise(self, seed)

    def prepare(self, compute: ComputeConfig) -> None:
        """Sets how to compute, before the engine takes the model. The state dict stays as it is."""
        self.compute = compute
        if compute.compile:
            for block in self.layers:
                block.compile()

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text, cu_seqlens = _pack(text, mask) if text.ndim == 3 else (text, mask)
        x = self.patch_embed(latents)
        h, w = (side // self.config.patch_size for side in latents.shape[2:])
        embedded, temb = self._embed_time(timestep, x)
        if self.config.timestep_conditioning == "addition":
            x = x + embedded[:, None]
        context = self.context_embedder(text.to(self.proj_out.weight.dtype))
        keys, rope = self._keys(cu_seqlens, text, x), self._rope(h, w, x)
        for block in self.layers:
            if self.compute.recompute and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, temb, context, keys, rope, use_reentrant=False, preserve_rng_state=False
                )  # fmt: skip
            else:
                x = block(x, temb, context, keys, rope)
        return self._unpatchify(self.proj_out(self._head(x, embedded)), h, w)

    def _keys(self, cu_seqlens: Tensor, text: Tensor, x: Tensor) -> Keys:
        c = self.config
        backend = choose(self.compute.attention, x, c.head_dim)
        image = x.shape[1] if c.attention == "self" else 0
        return locate(cu_seqlens, len(text), x, image, c.heads // c.kv_heads, backend)

    def _embed_time(self, timestep: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the embedding (B, D), and what blocks modulate by, (B, D) or (B, 6 D)."""
        if self.config.timestep_conditioning == "none":
            zeros = x.new_zeros(x.shape[0], x.shape[2])
            return zeros, zeros
        embedded = self.timestep_embedder(time_features(timestep).to(x.dtype))
        single = self.config.timestep_conditioning == "adaln-single"
        return embedded, self.t_block(embedded) if single else embedded

    def _rope(self, h: int, w: int, x: Tensor) -> Rope | None:
        c = self.config
        if c.pos_embed not in ROPES:
            return None
        cos, sin = rope_table(c.pos_embed, h, w, c.head_dim, c.rope_theta, x.device)
        return cos.to(x), sin.to(x)

    def _head(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Returns the normed and modulated tokens (B, S, D) that are projected to patches."""
        normed: Tensor = self.norm_out(x)
        match self.config.timestep_conditioning:
            case "adaln-zero":  # (scale, shift): the other way round than in the blocks
                scale, shift = self.norm_out.modulation(embedded)  # type: ignore[operator]  # a ModulatedNorm here
            case "adaln-single":
                shift, scale = (self.scale_shift_table + embedded.repeat(1, 2))[:, None].chunk(
                    2, -1
                )
            case _:
                return normed
        return normed * (1 + scale) + shift

    def _unpatchify(self, x: Tensor, h: int, w: int) -> Tensor:
        """Maps patches (B, S, p * p * C) to latents (B, C, h * p, w * p)."""
        p, c = self.config.patch_size, self.config.out_channels
        return x.view(-1, h, w, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h * p, w * p)


def _pack(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Maps padded captions (B, L, Dt) and a mask of any pattern to (T, Dt) and cu_seqlens."""
    real = mask.bool()
    return text[real], F.pad(real.sum(1).cumsum(0), (1, 0))


def initialise(model: DiT, seed: int) -> None:
    """Fills the weights as the reference does, from the same seed the same on every rank."""
    g, std = torch.Generator().manual_seed(seed), model.config.initializer_range
    embedders = "timestep_embedder.0 timestep_embedder.2 context_embedder.1 condition_embedder.1 condition_embedder.3"
    normal = {**dict.fromkeys(embedders.split(), std), "t_block.1": 0.02}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "proj_out" or name.endswith(("input_layernorm.linear", "norm_out.linear")):
                nn.init.zeros_(
                    module.weight
                )  # adaLN-Zero: blocks start as the identity, the output as 0
            elif name in normal:
                nn.init.normal_(module.weight, std=normal[name], generator=g)
            else:
                nn.init.xavier_uniform_(module.weight, generator=g)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1), generator=g)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=model.config.hidden_size**-0.5, generator=g)
