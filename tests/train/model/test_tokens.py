"""Which patch and which positions a model has for a latent, and whether it is as wide as a token."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs import ConfigError
from train.config import DataShape, TrainConfig
from train.model.config import DiTConfig, FlowConfig
from train.model.dit import PatchEmbed
from train.model.tokens import Tokens, coordinates, patch_of
from train.run import model_config, refuse_narrow, with_sizes

WIDE = {"hidden_size": 4096, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "mlp_size": 8}
LATENTS = {  # (C, H, W) at 256 px, and patch and tokens of `auto`
    "FLUX": ((16, 32, 32), 2, 256),
    "SD": ((4, 32, 32), 2, 256),
    "HunyuanImage": ((64, 8, 8), 1, 64),
    "DC-AE f32c32": ((32, 8, 8), 1, 64),
    "RAE": ((768, 16, 16), 1, 256),
    "pixels": ((3, 256, 256), 16, 256),
}


def config(**model: Any) -> TrainConfig:
    values = {"data": {"latents": "c/vae", "text": "c/text"}, "model": {**WIDE, **model}}
    return TrainConfig.model_validate(values | {"steps": 1, "global_batch": 64, "micro_batch": 8})


def model_of(shape: tuple[int, int, int], **model: Any) -> DiTConfig:
    return model_config(config(**model), DataShape(*shape, text_width=8))


# Patches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATENTS)
def test_one_config_for_all_latents(name: str) -> None:
    (channels, height, width), patch, tokens = LATENTS[name]
    model = model_of((channels, height, width), patch_size="auto")
    result = Tokens.of(model, height, width)
    assert (model.patch_size, result.count) == (patch, tokens)
    assert result.values == channels * patch**2
    assert model.in_channels == model.out_channels == channels
    assert "image_tokens" not in model.model_dump()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4096))
def test_the_patch_is_the_largest_that_leaves_the_tokens(h: int, w: int, tokens: int) -> None:
    fits = [p for p in range(1, 65) if h % p == 0 and w % p == 0 and (h // p) * (w // p) >= tokens]
    assert patch_of(h, w, tokens) == max(fits, default=1)


def test_a_number_of_tokens_of_ones_own() -> None:
    sizes = [
        model_of((16, 64, 64), patch_size="auto", image_tokens=n).patch_size
        for n in (1, 256, 257, 1024, 4096, 9999)
    ]
    assert sizes == [64, 4, 2, 2, 1, 1]


def test_the_weights_that_a_run_goes_on_with_decide() -> None:
    """At 512 px from a run at 256 px: the same patch and table, though `auto` alone would take another."""
    shape = DataShape(16, 64, 64, text_width=8)
    recorded = {"patch_size": 2, "pos_embed_max_size": 64, "sample_size": 32}
    model = with_sizes(config(patch_size="auto"), shape, recorded).model
    assert {key: getattr(model, key) for key in recorded} == recorded
    assert with_sizes(config(patch_size=4), shape, recorded).model.patch_size == 4
    assert with_sizes(config(patch_size="auto"), shape, {"patch_size": "x"}).model.patch_size == 4


def test_what_is_chosen_is_chosen_again_the_same() -> None:
    """A config.yaml of a run holds the numbers."""
    shape = DataShape(768, 16, 16, text_width=8)
    first = with_sizes(config(patch_size="auto", sample_size=32, pos_embed_max_size=64), shape)
    assert (first.model.patch_size, first.model.sample_size) == (1, 16)
    assert with_sizes(first, shape) == first
    assert TrainConfig.model_validate(first.model_dump()) == first


def test_tokens_in_a_row_have_positions_of_one_dimension() -> None:
    model = model_of((32, 1, 128), patch_size="auto")
    assert (model.patch_size, model.pos_embed) == (1, "1d-rope")
    assert Tokens.of(model, 1, 128).count == 128
    assert model_of((32, 1, 128), patch_size=1).pos_embed == "ape"  # as before
    with pytest.raises(ConfigError, match="head_dim 7 is no multiple of 2"):
        model_of((32, 1, 128), patch_size="auto", head_dim=7)


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "large"])
def test_a_patch_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="patch_size"):
        config(patch_size=value)


# Positions ---------------------------------------------------------------------------------------------------------


def positions(model: DiTConfig, n: int) -> torch.Tensor:
    """What n x n tokens get added, (n * n, D)."""
    centre = PatchEmbed(model.model_copy(update={"hidden_size": 64}))._centre(n, n)
    return centre[0]


@pytest.mark.parametrize("sizes", [{}, {"sample_size": 32, "pos_embed_max_size": 64}], ids=str)
def test_as_many_tokens_have_the_same_coordinates_for_every_latent(sizes: dict[str, int]) -> None:
    """Those that FLUX has with patches of 2: 6.0 to 9.75 of 16 x 16 tokens, the first channel being their sine."""
    flux, pixels, rae = (
        model_of(shape, patch_size="auto", **sizes)
        for shape in ((16, 32, 32), (3, 256, 256), (768, 16, 16))
    )
    assert coordinates(flux, 16) == coordinates(rae, 16) == (6.0, 9.75)
    expected = torch.sin(6 + torch.arange(16) / 4)
    torch.testing.assert_close(positions(flux, 16)[:16, 0], expected, atol=1e-6, rtol=0)
    reference = model_of((16, 32, 32), patch_size=2, sample_size=32, pos_embed_max_size=64)
    for model in (flux, pixels, rae):
        assert torch.equal(positions(model, 16), positions(reference, 16))
    hunyuan, dcae = (model_of((c, 8, 8), patch_size="auto", **sizes) for c in (64, 32))
    assert coordinates(hunyuan, 8) == ((7.0, 8.75) if sizes else (3.0, 4.75))
    assert torch.equal(positions(hunyuan, 8), positions(dcae, 8))


def test_without_auto_positions_are_what_they_were() -> None:
    """A latent of 16 x 16 with patches of 1 in a shipped config: other places than FLUX's."""
    rae = model_of((768, 16, 16), patch_size=1, sample_size=32, pos_embed_max_size=64)
    assert (rae.sample_size, coordinates(rae, 16)) == (32, (12.0, 19.5))
    assert Tokens.of(rae, 16, 16).positions == "ape, 12 to 19.5"


def test_at_512_px_too() -> None:
    """The reference's continuation: the middle 32 x 32 of a table of 64, whose last coordinate is 15.75."""
    sizes = {
        "patch_size": "auto",
        "image_tokens": 1024,
        "sample_size": 32,
        "pos_embed_max_size": 64,
    }
    reference = model_of((16, 64, 64), patch_size=2, sample_size=32, pos_embed_max_size=64)
    for shape in ((16, 64, 64), (768, 32, 32)):
        model = model_of(shape, **sizes)
        assert coordinates(model, 32) == (4.0, 11.75)
        assert torch.equal(positions(model, 32), positions(reference, 32))


# Width -------------------------------------------------------------------------------------------------------------


def test_a_model_is_as_wide_as_a_token() -> None:
    """RAE with patches of 2 has tokens of 3,072 values, FLUX with patches of 2 of 64."""
    rae = model_of((768, 16, 16), patch_size=2, hidden_size=2048)
    message = r"768 x 2 x 2 = 3,072 values and a model of width 2,048.*model\.patch_size=1, model\.hidden_size=3072"
    with pytest.raises(ConfigError, match=message):
        refuse_narrow(rae, FlowConfig())
    note = refuse_narrow(rae, FlowConfig(prediction="latent"))
    assert note is not None
    assert "3,072 values" in note
    narrow = model_of((768, 16, 16), patch_size=1, hidden_size=512)
    with pytest.raises(
        ConfigError, match=r"Say model\.hidden_size=768 or more, or flow\.prediction=latent"
    ):
        refuse_narrow(narrow, FlowConfig())
    for width in (768, 1024):
        assert (
            refuse_narrow(model_of((768, 16, 16), patch_size=1, hidden_size=width), FlowConfig())
            is None
        )
