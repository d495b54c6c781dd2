"""The model against the original's outputs, and what it must do whatever its weights are."""

import math

import pytest
import torch
from pydantic import ValidationError

from tests.train.goldens import golden, model_of
from train.model.dit import DiT, DiTConfig
from train.model.positions import rope_table, sincos_table, time_features

VARIANTS = (
    "dit_e2e_self_ape_adalnzero",
    "dit_cross_ape_adalnzero",
    "dit_self_2drope",
    "dit_self_adalnsingle",
    "dit_self_sandwich",
)
INPUTS = ("in.hidden_states", "in.timestep", "in.text_hidden_states", "in.attention_mask")
SMALL = DiTConfig(
    hidden_size=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_size=48, in_channels=4, out_channels=4, text_width=12
)  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_the_originals(name: str) -> None:
    tensors, settings = golden(name)
    model = model_of(tensors, settings, "state.")
    out = model(*(tensors[k] for k in INPUTS))
    torch.testing.assert_close(out, tensors["out"], atol=1e-5, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == settings["n_params"]


@pytest.mark.parametrize("name", ["dit_e2e_self_ape_adalnzero", "dit_self_adalnsingle"])
def test_types_under_autocast_are_the_originals(name: str) -> None:
    tensors, settings = golden(name)
    model = model_of(tensors, settings, "state.")
    types = {}
    for part in settings["autocast_dtype_trace"]:
        module = model.get_submodule(part)
        module.register_forward_hook(
            lambda _, __, out, part=part: types.update({part: str(out.dtype)})
        )
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*(tensors[k] for k in INPUTS))
    if (
        "norm_out" in types
    ):  # the original modulates inside norm_out, and so traced the type after it
        types["norm_out"] = settings["autocast_dtype_trace"]["norm_out"]
    assert types == settings["autocast_dtype_trace"]
    error = (out.float() - tensors["out"]).norm() / tensors["out"].norm()
    assert error < 1.1 * settings["autocast_rel_err"]
    assert str(out.dtype) == settings["autocast_out_dtype"]
    reference = tensors["out_autocast_bf16_cpu"].float()
    assert (out.float() - reference).norm() / reference.norm() < settings["autocast_rel_err"]


def test_positions_and_times_are_the_originals() -> None:
    tensors, _ = golden("components")
    table = sincos_table(64, 64, 16).view(64, 64, 64)
    torch.testing.assert_close(
        table[24:40, 24:40].reshape(1, 256, 64), tensors["ape.crop_16x16_of_64_D64"]
    )
    torch.testing.assert_close(
        table[30:34, 29:35].reshape(1, 24, 64), tensors["ape.crop_4x6_of_64_D64"]
    )
    for kind in ("1d-rope", "2d-rope", "m-rope"):
        cos, sin = rope_table(kind, 4, 6, 24, 10_000.0)
        torch.testing.assert_close(cos, tensors[f"rope.{kind}.cos"][0], atol=2e-6, rtol=0)
        torch.testing.assert_close(sin, tensors[f"rope.{kind}.sin"][0], atol=2e-6, rtol=0)
    # cosines may differ by an ulp between processors, the frequencies may not: t = 1000 makes 6e-5 of their ulp
    torch.testing.assert_close(
        time_features(tensors["time.t"]), tensors["time.proj256"], atol=2e-7, rtol=0
    )
    assert math.isclose(time_features(torch.tensor([2.0]))[0, 0], math.cos(2.0), abs_tol=1e-6)


def test_the_3b_configuration_has_the_originals_size() -> None:
    with torch.device("meta"):
        model = DiT(
            DiTConfig(
                hidden_size=2048,
                layers=30,
                heads=16,
                kv_heads=4,
                head_dim=128,
                mlp_size=8192,
                in_channels=16,
                out_channels=16,
                text_width=2048,
            )  # fmt: skip
        )
    assert sum(p.numel() for p in model.parameters()) == 2_660_490_816
    assert len(list(model.parameters())) == 464
    assert len(model.state_dict()) == 465


def test_a_new_model_says_nothing_and_is_the_same_everywhere() -> None:
    model = DiT(SMALL, seed=3)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 1000.0])
    assert not model(x, t, torch.randn(2, 3, 12), torch.ones(2, 3)).any()
    second, third = DiT(SMALL, seed=3).state_dict(), DiT(SMALL, seed=4).state_dict()
    assert all(torch.equal(v, second[k]) for k, v in model.state_dict().items())
    assert not torch.equal(
        third["layers.0.mlp.up_proj.weight"], second["layers.0.mlp.up_proj.weight"]
    )
    bound = math.sqrt(6 / (32 + 48))  # xavier uniform of a 48 x 32 matrix
    weight = model.state_dict()["layers.0.mlp.up_proj.weight"]
    assert 0.9 * bound < weight.abs().max() <= bound
    assert not model.state_dict()["layers.1.input_layernorm.linear.weight"].any()


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("pos_embed", ["ape", "1d-rope", "2d-rope", "m-rope"])
@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln-single", "addition", "none"])
def test_every_variant_learns_and_ignores_padding(
    attention: str, pos_embed: str, conditioning: str
) -> None:
    fields = {"attention": attention, "pos_embed": pos_embed, "timestep_conditioning": conditioning}
    model = DiT(DiTConfig.model_validate({**SMALL.model_dump(), **fields, "attention_bias": True}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, text = torch.randn(2, 4, 8, 6), torch.tensor([30.0, 800.0]), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    out = model(x, t, text, mask)
    out.square().mean().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(conditioning == "none" or "time" not in n for n in unused)
    # A cross-attention key bias moves all scores of a query alike; everything else must have a gradient.
    assert all("timestep_embedder" in n or "k_proj.bias" in n for n in unused), unused
    padded = torch.where(mask[..., None].bool(), text, 1e3)
    torch.testing.assert_close(model(x, t, padded, mask), out, atol=1e-5, rtol=0)
    changed = model(x, t, text.roll(1, 0), mask)
    assert (changed - out).abs().max() > 1e-4


def test_a_value_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="3d-rope"):
        DiTConfig.model_validate({**SMALL.model_dump(), "pos_embed": "3d-rope"})
    with pytest.raises(ValueError, match="8 x 65 tokens"):
        DiT(SMALL)(
            torch.zeros(1, 4, 16, 130), torch.ones(1), torch.zeros(1, 1, 12), torch.ones(1, 1)
        )
