"""The diffusion transformer: noisy latents, a timestep and caption tokens in, a velocity out.

Image tokens run through the blocks; caption tokens never change and enter every block as keys and values only.
Parameter names and shapes are those of the reference implementation (fuse-dit), so its checkpoints load as they are.
Shapes: B batch, C channels, (H, W) latent size, S image tokens, L text tokens, D width, nh / nkv heads, hd head_dim.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs import Strict

TIME_CHANNELS = 256


class ModelConfig(Strict):
    """What a person chooses. Channels and text width are not here: they come from the columns."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    patch_size: int = 2
    attention: Literal["self", "cross"] = "self"
    pos_embed: Literal["ape", "1d-rope", "2d-rope", "m-rope"] = "ape"
    pos_embed_max_size: int = 64  # side of the sincos table, in tokens
    sample_size: int = (
        32  # latent side whose token grid gets the coordinates 0 .. sample_size / patch_size
    )
    timestep_conditioning: Literal["adaln-zero", "adaln-single", "addition", "none"] = "adaln-zero"
    qk_norm: bool = True
    sandwich_norm: bool = False
    attention_bias: bool = False
    activation: Literal["gelu_pytorch_tanh", "gelu", "silu"] = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02


class DiTConfig(ModelConfig):
    """A model in full: what was chosen, and what its columns say."""

    in_channels: int
    out_channels: int
    text_width: int

    @classmethod
    def from_reference(cls, fields: Mapping[str, Any]) -> Self:
        """Read the reference's `config.json`, its Gemma-like `base_config` nested in it."""
        base = fields["base_config"]
        hidden = fields.get("dit_hidden_size") or base["hidden_size"]
        heads = base["num_attention_heads"]
        return cls(
            hidden_size=hidden,
            layers=fields.get("dit_num_hidden_layers", 18),
            heads=heads,
            kv_heads=base["num_key_value_heads"],
            head_dim=base.get("head_dim") or hidden // heads,
            mlp_size=base["intermediate_size"],
            patch_size=fields.get("patch_size", 2),
            attention=fields.get("attention", "self"),
            pos_embed=fields.get("pos_embed", "1d-rope"),
            pos_embed_max_size=fields.get("pos_embed_max_size", 64),
            sample_size=fields.get("sample_size", 32),
            timestep_conditioning=fields.get("timestep_conditioning", "adaln-zero") or "none",
            qk_norm=fields.get("qk_norm", False),
            sandwich_norm=fields.get("sandwich_norm", False),
            attention_bias=base.get("attention_bias", False),
            activation=base.get("hidden_activation") or "gelu_pytorch_tanh",
            norm_eps=base.get("rms_norm_eps", 1e-6),
            rope_theta=base.get("rope_theta", 10_000.0),
            initializer_range=base.get("initializer_range", 0.02),
            in_channels=fields.get("in_channels", 16),
            out_channels=fields.get("out_channels", 16),
            text_width=fields.get("text_hidden_size") or base["hidden_size"],
        )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


# Positions -----------------------------------------------------------------------------------------------------------


def sincos_table(width: int, side: int, base: int) -> Tensor:
    """2-D sine-cosine table (1, side * side, width): column in the first half of the channels, row in the second.

    Grid index k stands at coordinate k / (side / base), so that a larger table refines the same picture."""
    at = torch.arange(side, dtype=torch.float64) / (side / base)
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = at[:, None] * omega  # (side, width / 4)
    half = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    column = half[None, :, :].expand(side, side, -1)
    row = half[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], 2).reshape(1, side * side, width).float()


def _frequencies(dim: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _angles_1d(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    index = torch.arange(row.numel(), dtype=torch.float32)
    return (index[:, None] * _frequencies(head_dim, theta)).repeat(1, 2)


def _angles_2d(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    f = _frequencies(head_dim // 2, theta)
    return torch.cat([row[:, None] * f, column[:, None] * f], 1).repeat(1, 2)


def _angles_m(row: Tensor, column: Tensor, head_dim: int, theta: float) -> Tensor:
    high, low = _frequencies(head_dim, theta).chunk(
        2
    )  # rows turn with the high frequencies, columns with the low
    return torch.cat([row[:, None] * high, column[:, None] * low], 1).repeat(1, 2)


ROPES = {"1d-rope": _angles_1d, "2d-rope": _angles_2d, "m-rope": _angles_m}


def rope_table(kind: str, h: int, w: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (h * w, head_dim) of the rotary embedding `kind` over a token grid, row-major."""
    row = torch.arange(h, dtype=torch.float32).repeat_interleave(w)
    column = torch.arange(w, dtype=torch.float32).repeat(h)
    angles = ROPES[kind](row, column, head_dim, theta)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply a rotary embedding to (B, heads, S, hd), dimension j paired with j + hd / 2."""
    if rope is None:
        return x
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-second, first], -1) * rope[1]


def time_features(timestep: Tensor) -> Tensor:
    """Timesteps (B,) in (0, 1000] -> (B, 256), cosines first."""
    half = TIME_CHANNELS // 2
    exponent = (
        -math.log(10_000.0) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    )
    # Through fp64, because an fp32 exp differs by an ulp between processors, and t = 1000 makes 6e-5 of it.
    angle = timestep.float()[:, None] * exponent.double().exp().float()
    return torch.cat([angle.cos(), angle.sin()], 1)


# Parts ---------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) in fp32, cast back to the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, self.eps).to(x.dtype)


class ModulatedNorm(nn.Module):
    """A norm and the linear map that makes its modulation from the time embedding (adaln-zero)."""

    def __init__(self, width: int, parts: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.norm = RMSNorm(width, eps)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out

    def modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        out: Tensor = self.linear(F.silu(temb))[:, None]
        return out.chunk(self.parts, -1)


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, S, D), with the centre of the sincos table added where there is one."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)
        self.side = config.pos_embed_max_size if config.pos_embed == "ape" else 0
        if self.side:
            table = sincos_table(config.hidden_size, self.side, config.sample_size // p)
            self.register_buffer(
                "pos_embed", table
            )  # persistent: the reference's state dict holds it

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
    """Queries of the image over keys of [text, image], of the image alone, or of the text alone."""

    def __init__(self, config: DiTConfig, image: bool, text: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
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

    def forward(
        self, x: Tensor, context: Tensor, allowed: Tensor | None, rope: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x (B, S, D), context (B, L, D), allowed keys (B, 1, 1, keys) bool -> (B, S, D)."""
        q = rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        keys, values = [], []
        if self.text:  # the same k_norm as the image, no position
            keys.append(self.k_norm(self._heads(self.text_k_proj(context))))
            values.append(self._heads(self.text_v_proj(context)))
        if self.image:
            keys.append(rotate(self.k_norm(self._heads(self.k_proj(x))), rope))
            values.append(self._heads(self.v_proj(x)))
        attended = self._attend(q, torch.cat(keys, 2), torch.cat(values, 2), allowed)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # (B, heads, tokens, hd)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        groups = self.heads // self.kv_heads
        if groups > 1:  # each key head serves `groups` adjacent query heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


def _modulate_zero(block: "Block", temb: Tensor) -> tuple[Any, ...]:
    assert isinstance(block.input_layernorm, ModulatedNorm)
    return block.input_layernorm.modulation(temb)


def _modulate_single(block: "Block", temb: Tensor) -> tuple[Any, ...]:
    return (block.scale_shift_table + temb)[:, None].chunk(6, -1)


def _modulate_not(block: "Block", temb: Tensor) -> tuple[Any, ...]:
    return 0.0, 0.0, 1.0, 0.0, 0.0, 1.0


MODULATIONS = {
    "adaln-zero": _modulate_zero,
    "adaln-single": _modulate_single,
    "addition": _modulate_not,
    "none": _modulate_not,
}


class Block(nn.Module):
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
        self,
        x: Tensor,
        temb: Tensor,
        context: Tensor,
        allowed: Tensor,
        rope: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulate(self, temb)
        n = self.input_layernorm(x) * (1 + scale_a) + shift_a
        a = self.self_attn(n, context, None if self.cross_attn else allowed, rope)
        x = x + gate_a * (self.post_attention_layernorm(a) if self.sandwich else a)
        if self.cross_attn:  # its query is neither normed nor modulated and its output has no gate
            c = self.cross_attn(x, context, allowed, None)
            x = x + (self.post_cross_attention_layernorm(c) if self.sandwich else c)
        # With sandwich norms, post_attention_layernorm is spent above and another one takes its place here.
        n = self.pre_feedforward_layernorm(x) if self.sandwich else self.post_attention_layernorm(x)
        m = self.mlp(n * (1 + scale_m) + shift_m)
        out: Tensor = x + gate_m * (self.post_feedforward_layernorm(m) if self.sandwich else m)
        return out


class DiT(nn.Module):
    """latents (B, C, H, W), timestep (B,) in (0, 1000], text (B, L, Dt), mask (B, L) 0/1 -> velocity (B, C, H, W)."""

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
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
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = (
            ModulatedNorm(width, 2, eps) if conditioning == "adaln-zero" else RMSNorm(width, eps)
        )
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        if not self.proj_out.weight.is_meta:
            initialise(self, seed)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        x = self.patch_embed(latents)
        h, w = (side // self.config.patch_size for side in latents.shape[2:])
        embedded, temb = self._embed_time(timestep, x)
        if self.config.timestep_conditioning == "addition":
            x = x + embedded[:, None]
        context = self.context_embedder(text)
        allowed = mask.bool()[:, None, None]  # (B, 1, 1, L)
        if self.config.attention == "self":
            allowed = F.pad(allowed, (0, x.shape[1]), value=True)  # keys are [text, image]
        rope = self._rope(h, w, x)
        for block in self.layers:
            x = block(x, temb, context, allowed, rope)
        return self._unpatchify(self.proj_out(self._head(x, embedded)), h, w)

    def _embed_time(self, timestep: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding itself, and what the blocks make their modulation from."""
        if self.config.timestep_conditioning == "none":
            nothing = x.new_zeros(x.shape[0], x.shape[2])
            return nothing, nothing
        embedded = self.timestep_embedder(time_features(timestep).to(x.dtype))
        single = self.config.timestep_conditioning == "adaln-single"
        return embedded, self.t_block(embedded) if single else embedded

    def _rope(self, h: int, w: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        c = self.config
        if c.pos_embed not in ROPES:
            return None
        cos, sin = rope_table(c.pos_embed, h, w, c.head_dim, c.rope_theta)
        return cos.to(x), sin.to(x)

    def _head(self, x: Tensor, embedded: Tensor) -> Tensor:
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
        p, c = self.config.patch_size, self.config.out_channels
        return x.view(-1, h, w, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(-1, c, h * p, w * p)


def initialise(model: DiT, seed: int) -> None:
    """Fill the weights as the reference does; the same seed gives the same weights on every rank."""
    g, std = torch.Generator().manual_seed(seed), model.config.initializer_range
    normal = {"timestep_embedder.0": std, "timestep_embedder.2": std, "context_embedder.1": std}
    normal["t_block.1"] = 0.02
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "proj_out" or name.endswith(("input_layernorm.linear", "norm_out.linear")):
                nn.init.zeros_(module.weight)  # every block, and the output, start as nothing
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
