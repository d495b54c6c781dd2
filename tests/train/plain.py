"""The reference's forward pass, written from its specification alone: plain torch on a state dict and a config.json.

Nothing is shared with train/; slow and literal on purpose (padded text, an additive mask, keys repeated for each head).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x * torch.sigmoid(x),
}
ACTIVATIONS[None] = ACTIVATIONS["gelu_pytorch_tanh"]


def forward(
    config: dict[str, Any], s: State, z: Tensor, t: Tensor, text: Tensor, mask: Tensor
) -> Tensor:
    """z (B, C, H, W), t (B,), text (B, L, Dt), mask (B, L) -> velocity (B, C, H, W)."""
    base, kind = config["base_config"], config["timestep_conditioning"]
    eps, p, width = base["rms_norm_eps"], config["patch_size"], config["dit_hidden_size"]
    batch, channels, h, w = z.shape[0], z.shape[1], z.shape[2] // p, z.shape[3] // p

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ s[f"{name}.weight"].T
        return out + s[f"{name}.bias"] if f"{name}.bias" in s else out

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + s[f"{name}.weight"])

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    # patches in row-major order, each (C, p, p) flattened; then the position table's centre
    patches = z.reshape(batch, channels, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
    x = patches.reshape(batch, h * w, -1) @ s["patch_embed.proj.weight"].reshape(width, -1).T
    x = x + s["patch_embed.proj.bias"]
    if config["pos_embed"] == "ape":
        x = x + table(width, config["pos_embed_max_size"], config["sample_size"] // p, h, w)

    e = torch.zeros(batch, width)
    if kind is not None:
        # "computed fp32": the exponent too, which at t = 1000 shows in the fifth digit
        exponent = (-math.log(10_000) * torch.arange(128).float() / 128).tolist()
        f = torch.tensor([math.exp(x) for x in exponent])
        angles = t[:, None] * f
        features = torch.cat([angles.cos(), angles.sin()], -1)
        e = linear(silu(linear(features, "timestep_embedder.0")), "timestep_embedder.2")
    if kind == "addition":
        x = x + e[:, None]
    c = linear(norm(text, "context_embedder.0"), "context_embedder.1")

    heads, kv_heads, hd = (base[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))  # fmt: skip
    angle = rope_angles(config["pos_embed"], h, w, hd, base["rope_theta"])

    def split(x: Tensor, number: int) -> Tensor:
        return x.reshape(batch, -1, number, hd).transpose(1, 2)

    def rope(x: Tensor) -> Tensor:
        if angle is None:
            return x
        half = torch.cat([-x[..., hd // 2 :], x[..., : hd // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    def attention(n: Tensor, name: str, image: bool, use_text: bool) -> Tensor:
        def qk(x: Tensor, which: str) -> Tensor:
            return norm(x, f"{name}.{which}_norm") if config["qk_norm"] else x

        q = qk(split(linear(n, f"{name}.q_proj"), heads), "q")
        keys, values, bias = [], [], []
        if use_text:
            keys.append(qk(split(linear(c, f"{name}.text_k_proj"), kv_heads), "k"))
            values.append(split(linear(c, f"{name}.text_v_proj"), kv_heads))
            bias.append(torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min))
        if image:
            q = rope(q)
            keys.append(rope(qk(split(linear(n, f"{name}.k_proj"), kv_heads), "k")))
            values.append(split(linear(n, f"{name}.v_proj"), kv_heads))
            bias.append(torch.zeros(batch, h * w))
        repeat = torch.arange(heads) // (heads // kv_heads)
        k, v = torch.cat(keys, 2)[:, repeat], torch.cat(values, 2)[:, repeat]
        scores = q @ k.transpose(2, 3) / math.sqrt(hd) + torch.cat(bias, 1)[:, None, None]
        return linear(
            (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, h * w, heads * hd),
            f"{name}.o_proj",
        )

    sandwich, cross = config["sandwich_norm"], config["attention"] == "cross"
    for i in range(config["dit_num_hidden_layers"]):
        at = f"layers.{i}"
        shift_a = scale_a = shift_m = scale_m = torch.zeros(1)
        gate_a = gate_m = torch.ones(1)
        if kind in ("adaln-zero", "adaln-single"):
            if kind == "adaln-zero":
                six = linear(silu(e), f"{at}.input_layernorm.linear")
            else:
                six = s[f"{at}.scale_shift_table"] + linear(silu(e), "t_block.1")
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
                six[:, None, j * width : (j + 1) * width] for j in range(6)
            )
        inner = f"{at}.input_layernorm" + (".norm" if kind == "adaln-zero" else "")
        n = norm(x, inner) * (1 + scale_a) + shift_a
        a = attention(n, f"{at}.self_attn", image=True, use_text=not cross)
        if sandwich:
            a = norm(a, f"{at}.post_attention_layernorm")
        x = x + gate_a * a
        if cross:
            a = attention(x, f"{at}.cross_attn", image=False, use_text=True)
            x = x + (norm(a, f"{at}.post_cross_attention_layernorm") if sandwich else a)
        n = norm(x, f"{at}.{'pre_feedforward' if sandwich else 'post_attention'}_layernorm")
        n = n * (1 + scale_m) + shift_m
        activation = ACTIVATIONS[base["hidden_activation"]]
        gate = activation(linear(n, f"{at}.mlp.gate_proj"))
        m = linear(gate * linear(n, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        if sandwich:
            m = norm(m, f"{at}.post_feedforward_layernorm")
        x = x + gate_m * m

    if kind == "adaln-zero":
        two = linear(silu(e), "norm_out.linear")[:, None]
        x = norm(x, "norm_out.norm") * (1 + two[..., :width]) + two[..., width:]
    else:
        x = norm(x, "norm_out")
        if kind == "adaln-single":
            two = (s["scale_shift_table"] + torch.cat([e, e], -1))[:, None]
            x = x * (1 + two[..., width:]) + two[..., :width]
    x = linear(x, "proj_out").reshape(batch, h, w, p, p, config["out_channels"])
    return torch.einsum("bhwpqc->bchpwq", x).reshape(batch, -1, h * p, w * p)


def table(width: int, side: int, base: int, h: int, w: int) -> Tensor:
    """The centre h x w of the sincos table, (1, h * w, width), each entry by its formula."""
    quarter = width // 4
    rows = []
    for r in range((side - h) // 2, (side - h) // 2 + h):
        for q in range((side - w) // 2, (side - w) // 2 + w):
            entry = []
            for place in (q, r):  # the column first
                angles = [place * base / side * 10_000 ** (-k / quarter) for k in range(quarter)]
                entry += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(entry)
    return torch.tensor(rows)[None]


def rope_angles(kind: str, h: int, w: int, hd: int, theta: float) -> Tensor | None:
    """(h * w, hd)"""
    if kind == "ape":
        return None
    full = [theta ** (-2 * j / hd) for j in range(hd // 2)] * 2
    half = [theta ** (-2 * j / (hd // 2)) for j in range(hd // 4)]
    angles = []
    for index in range(h * w):
        row, column = divmod(index, w)
        if kind == "1d-rope":
            angles.append([index * f for f in full])
        elif kind == "2d-rope":
            angles.append(([row * f for f in half] + [column * f for f in half]) * 2)
        else:
            chunk = hd // 4
            angles.append([(row, column)[j // chunk % 2] * f for j, f in enumerate(full)])
    return torch.tensor(angles)
