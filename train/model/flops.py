"""FLOPs of the DiT in closed form, and what GPUs can do at most.

A multiply-add of a matrix product counts two, as torch's FlopCounterMode counts; norms, activations
and sums are left out. A picture costs the same whatever its caption, and each real text token costs
the same more, so a batch of any captions costs `cost.of(samples, tokens)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import TIME_CHANNELS, DiTConfig

if TYPE_CHECKING:  # a plan's options need no torch
    from .dit import DiT


@dataclass(frozen=True)
class Cost:
    """FLOPs of each sample, and of each of its text tokens."""

    sample: int = 0
    token: int = 0

    def of(self, samples: float, tokens: float) -> float:
        return self.sample * samples + self.token * tokens

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.sample + other.sample, self.token + other.token)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.sample * times, self.token * times)


def forward(config: DiTConfig, height: int, width: int) -> dict[str, Cost]:
    """Returns the FLOPs of a forward pass by part, for latents of that height and width."""
    c, p = config, config.patch_size
    d, positions = c.hidden_size, (height // p) * (width // p)
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    to_image = Cost(2 * positions * (2 * d * q + 2 * d * kv))  # q, k, v, o
    over_image, over_text = Cost(4 * positions * positions * q), Cost(0, 4 * positions * q)
    to_text = Cost(0, 2 * 2 * d * kv)
    if c.attention == "cross":  # queries and outputs of its own
        to_text += Cost(2 * positions * 2 * d * q)
    modulation = {"adaln-zero": c.layers * 6 + 2, "adaln-single": 6}
    time = Cost(2 * (TIME_CHANNELS * d + d * d)) if c.timestep_conditioning != "none" else Cost()
    return {
        "attention, projections": (to_image + to_text) * c.layers,
        "attention, scores and sums": (over_image + over_text) * c.layers,
        "MLP": Cost(2 * 3 * positions * d * c.mlp_size) * c.layers,
        "modulation": Cost(2 * modulation.get(c.timestep_conditioning, 0) * d * d),
        "time, text and patches": time
        + Cost(0, 2 * c.text_width * d)
        + Cost(2 * positions * p * p * d * (c.in_channels + c.out_channels)),
    }


def total(parts: Mapping[str, Cost]) -> Cost:
    return sum(parts.values(), Cost())


def training(config: DiTConfig, height: int, width: int) -> Cost:
    """Returns the FLOPs of forward and backward. The backward pass costs two forward ones, but for
    gradients of the inputs, which are not computed. Blocks that are computed again to save memory
    do not count: they are no progress."""
    d = config.hidden_size
    unused = 2 * height * width * d * config.in_channels  # positions * p * p = height * width
    if config.timestep_conditioning != "none":
        unused += 2 * TIME_CHANNELS * d
    return total(forward(config, height, width)) * 3 + Cost(-unused)


PARTS = (
    ("attention", r"layers\.\d+\.(self_attn|cross_attn)\."),
    ("MLP", r"layers\.\d+\.mlp\."),
    ("modulation", r".*(norm\w*\.linear\.|scale_shift_table|t_block\.)"),
    ("time, text and patches", r"(timestep_embedder|context_embedder|patch_embed|proj_out)\."),
    ("norms", r".*"),
)


def parameters(model: DiT) -> dict[str, int]:
    """Returns the trainable parameters by part; the model may be on the meta device."""
    counts = dict.fromkeys((part for part, _ in PARTS), 0)
    for name, parameter in model.named_parameters():
        part = next(part for part, pattern in PARTS if re.match(pattern, name))
        counts[part] += parameter.numel()
    return counts


def in_tera(flops: float) -> str:
    """Returns FLOPs for people: 3.01 T, 12.5 G."""
    return f"{flops / 1e12:,.3g} T" if flops >= 1e11 else f"{flops / 1e9:,.3g} G"


# Peaks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    name: str
    peak: float  # dense bf16 FLOP/s with fp32 sums, without sparsity
    device: str  # a pattern for the whole of what torch.cuda.get_device_name says


# From the makers' data sheets and architecture white papers, where tensor-core figures "with sparsity" are halved.
# Cards of one family differ by a factor of two, so a device that no pattern covers (slices of a GPU by MIG, laptop
# and export versions) has no peak here: better no MFU than a wrong one.
GPUS = {
    "h100": Gpu("H100 SXM", 989e12, r"NVIDIA H100 80GB HBM3"),
    "h100-pcie": Gpu("H100 PCIe", 756e12, r"NVIDIA H100 PCIe"),
    "h100-nvl": Gpu("H100 NVL", 835e12, r"NVIDIA H100 NVL"),
    "h200": Gpu("H200 SXM", 989e12, r"NVIDIA H200"),
    "h200-nvl": Gpu("H200 NVL", 835e12, r"NVIDIA H200 NVL"),
    "gh200": Gpu("GH200", 989e12, r"NVIDIA GH200 (480|120|144)GB.*"),
    "b200": Gpu("B200", 2250e12, r"NVIDIA B200"),
    "b300": Gpu("B300", 2250e12, r"NVIDIA B300( SXM\d? AC)?"),
    "gb200": Gpu("GB200", 2500e12, r"NVIDIA GB200"),
    "a100": Gpu("A100", 312e12, r"(NVIDIA )?A100-SXM4-\d0GB|(NVIDIA )?A100(-PCIE-40GB| 80GB PCIe)"),
    "a40": Gpu("A40", 149.7e12, r"NVIDIA A40"),
    "a6000": Gpu("RTX A6000", 154.8e12, r"NVIDIA RTX A6000"),
    "a10": Gpu("A10", 125e12, r"NVIDIA A10"),
    "l4": Gpu("L4", 121e12, r"NVIDIA L4"),
    "l40": Gpu("L40", 181e12, r"NVIDIA L40"),
    "l40s": Gpu("L40S", 362e12, r"NVIDIA L40S"),
    "rtx6000-ada": Gpu("RTX 6000 Ada", 364.2e12, r"NVIDIA RTX 6000 Ada Generation"),
    "3090": Gpu("RTX 3090", 71e12, r"NVIDIA GeForce RTX 3090"),
    "4090": Gpu("RTX 4090", 165.2e12, r"NVIDIA GeForce RTX 4090"),
    "5090": Gpu("RTX 5090", 209.5e12, r"NVIDIA GeForce RTX 5090"),
    "mi300x": Gpu("MI300X", 1307.4e12, r"AMD Instinct MI300X( .*)?"),
    "mi325x": Gpu("MI325X", 1307.4e12, r"AMD Instinct MI325X( .*)?"),
}  # fmt: skip


def gpu_of(device_name: str) -> Gpu | None:
    """Returns the GPU of that device name, None if it is not in GPUS."""
    matches = (gpu for gpu in GPUS.values() if re.fullmatch(gpu.device, device_name))
    return next(matches, None)
