"""FLOPs in closed form, beside torch's own counter and the figures of the reference."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.model.dit import DiT, DiTConfig
from train.model.flops import GPUS, forward, gpu_of, parameters, total, training

TOKENS, HEIGHT, WIDTH = 5, 8, 12
SMALL = {
    "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 24, "mlp_size": 112,
    "in_channels": 6, "out_channels": 4, "text_width": 48,
}  # fmt: skip
THREE_B = DiTConfig(
    hidden_size=2048, layers=30, heads=16, kv_heads=4, head_dim=128, mlp_size=8192,
    in_channels=16, out_channels=16, text_width=2048,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "cross", "pos_embed": "2d-rope"},
        {"timestep_conditioning": "adaln-single", "kv_heads": 4},
        {"timestep_conditioning": "addition", "sandwich_norm": True, "attention_bias": True},
        {"timestep_conditioning": "none", "qk_norm": False, "patch_size": 4, "sample_size": 64},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_as_torch_counts(changes: dict[str, Any]) -> None:
    config = DiTConfig(**SMALL | changes)
    model = DiT(config)
    inputs = (
        torch.randn(3, 6, HEIGHT, WIDTH), torch.full((3,), 500.0), torch.randn(3, TOKENS, 48),
        torch.ones(3, TOKENS, dtype=torch.int64),
    )  # fmt: skip
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        seen_forward = counter.get_total_flops()
        out.sum().backward()
    assert total(forward(config, HEIGHT, WIDTH)).of(3, 3 * TOKENS) == seen_forward
    assert training(config, HEIGHT, WIDTH).of(3, 3 * TOKENS) == counter.get_total_flops()


def test_the_reference_model() -> None:
    """GFLOP of forward and backward, counted on the original's formulas; and of a forward pass, on the original."""
    for side, gflop in ((32, 3007), (64, 12285)):
        cost = total(forward(THREE_B, side, side))
        assert 3 * cost.of(1, 256) / 1e9 == pytest.approx(gflop, abs=1)
        assert training(THREE_B, side, side).of(1, 256) == pytest.approx(
            3 * cost.of(1, 256), rel=1e-3
        )
    assert total(forward(THREE_B, 32, 32)).of(1, 256) / 1e12 == pytest.approx(1.00, abs=0.005)


def test_only_real_tokens_cost() -> None:
    cost = total(forward(THREE_B, 32, 32))
    assert cost.of(2, 100) == cost.of(1, 30) + cost.of(1, 70)
    assert cost.of(1, 256) - cost.of(1, 0) == 256 * cost.token > 0


def test_parameters_by_part() -> None:
    with torch.device("meta"):
        model = DiT(THREE_B)
    result = parameters(model)
    assert sum(result.values()) == 2_660_490_816
    assert result["MLP"] == 30 * 3 * 2048 * 8192
    assert result["modulation"] == 30 * (12288 * 2048 + 12288) + 4096 * 2048 + 4096
    assert result["attention"] == 30 * (2 * 2048 * 2048 + 4 * 512 * 2048 + 2 * 128)
    assert result["norms"] == 30 * 2 * 2048 + 2048


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A10G", None),
    ],
)
def test_a_peak_is_known_or_left_out(name: str, peak: float | None) -> None:
    gpu = gpu_of(name)
    assert (gpu.peak if gpu else None) == peak


def test_no_device_is_two_gpus() -> None:
    names = [gpu.device for gpu in GPUS.values()]
    assert len(set(names)) == len(names)
    assert GPUS["h200"] == gpu_of("NVIDIA H200") != gpu_of("NVIDIA H200 NVL") == GPUS["h200-nvl"]
