"""Every variant of the model against the plain forward pass written from the specification."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.goldens import golden
from tests.train.plain import forward
from train.model.dit import DiT, DiTConfig

SIZES = ((6, 10), (8, 4))  # latents, non-square both ways
KINDS = ("adaln-zero", "adaln-single", "addition", None)
POSITIONS = ("ape", "1d-rope", "2d-rope", "m-rope")
# rows: full, right padding, left padding, holes
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])


def reference(attention: str, position: str, kind: str | None, **changes: Any) -> dict[str, Any]:
    base = {
        "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 12, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5, "rope_theta": 100.0,
        "attention_bias": False, "initializer_range": 0.02,
    }  # fmt: skip
    config: dict[str, Any] = {
        "attention": attention, "dit_hidden_size": 32, "dit_num_hidden_layers": 2, "in_channels": 3, "out_channels": 5,
        "patch_size": 2, "pos_embed": position, "pos_embed_max_size": 7, "qk_norm": True, "sample_size": 8,
        "sandwich_norm": False, "text_hidden_size": 32, "timestep_conditioning": kind, "base_config": base,
    }  # fmt: skip
    for name, value in changes.items():
        (base if name in base else config)[name] = value
    return config


def filled(config: dict[str, Any]) -> DiT:
    model = DiT(DiTConfig.from_reference(config))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name and "linear" not in name else 0.15, generator=g)  # fmt: skip
    return model


def inputs(config: dict[str, Any], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(len(MASK), config["in_channels"], *size, generator=g)
    text = torch.randn(*MASK.shape, config["text_hidden_size"], generator=g)
    return z, torch.tensor([1.5, 50.25, 160.0, 300.0]), text, MASK


def check(config: dict[str, Any]) -> None:
    for size in SIZES:
        model, (z, t, text, mask) = filled(config), inputs(config, size)
        with torch.no_grad():
            expected = forward(config, model.state_dict(), z, t, text, mask)
            result = model(z, t, text, mask)
            assert expected.std() > 0.1
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
            # the same captions back to back
            tokens = torch.cat([row[keep] for row, keep in zip(text, mask.bool(), strict=True)])
            ends = torch.tensor([0, *mask.sum(1)]).cumsum(0).int()
            torch.testing.assert_close(model(z, t, tokens, ends), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_and_positions(attention: str, position: str, kind: str | None) -> None:
    for qk_norm, sandwich in itertools.product((True, False), repeat=2):
        check(reference(attention, position, kind, qk_norm=qk_norm, sandwich_norm=sandwich))


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_heads_biases_activations(attention: str, kv_heads: int) -> None:
    for bias, activation in itertools.product(
        (True, False), ("gelu_pytorch_tanh", "gelu", "silu", None)
    ):
        check(
            reference(
                attention,
                "2d-rope",
                "adaln-zero",
                num_key_value_heads=kv_heads,
                attention_bias=bias,
                hidden_activation=activation,
            )  # fmt: skip
        )


def test_text_of_another_width() -> None:
    for position in POSITIONS:
        check(reference("self", position, "adaln-zero", text_hidden_size=20))


@pytest.mark.parametrize("patch", [1, 3])
def test_another_patch(patch: int) -> None:
    config = reference("self", "ape", "adaln-zero", patch_size=patch, pos_embed_max_size=12)
    model = filled(config)
    z, t, text, mask = inputs(config, (6, 9))
    with torch.no_grad():
        expected = forward(config, model.state_dict(), z, t, text, mask)
        torch.testing.assert_close(model(z, t, text, mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["dit_e2e_self_ape_adalnzero", "dit_cross_ape_adalnzero", "dit_self_2drope", "dit_self_adalnsingle",
     "dit_self_sandwich"],
)  # fmt: skip
def test_the_plain_forward_itself_is_the_originals(name: str) -> None:
    tensors, settings = golden(name)
    config = {**settings["dit_config"], "base_config": settings["base_config"]}
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    names = ("hidden_states", "timestep", "text_hidden_states", "attention_mask")
    out = forward(config, state, *(tensors[f"in.{k}"] for k in names))
    torch.testing.assert_close(out, tensors["out"], atol=1e-5, rtol=0)
