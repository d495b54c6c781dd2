"""Tiny random autoencoders of every family against diffusers itself, and models that cannot serve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encode.errors import ModelNotUsable
from encode.models.own import load_vae
from encode.models.vae import POSTERIOR, REFUSED, VAE_ADAPTERS, Vae
from encode.registry import VAES, ModelSpec, location, lookup
from shards import Norm
from shards.read.latents import draw
from tests.encode.models.encoders_page import PAGE, TINY, WITHOUT_POSTERIOR, page, plain
from tests.encode.tiny_models import VAES as VAES_MADE
from tests.encode.tiny_models import Models
from tests.encode.toy import MINILM, spec

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def kl(models: Path) -> Vae:
    return Vae(spec("AutoencoderKL", models / "kl"))


@pytest.fixture(scope="module")
def qwen(models: Path) -> Vae:
    return Vae(spec("AutoencoderKLQwenImage", models / "qwen"))


@torch.no_grad()
def test_kl_equals_diffusers(models: Path, kl: Vae) -> None:
    from diffusers import AutoencoderKL

    reference = AutoencoderKL.from_pretrained(models / "kl").eval()
    moments = kl.encode(PIXELS)
    assert (moments.shape, moments.dtype) == ((3, 32, 4, 4), torch.float32)
    assert torch.equal(moments, reference.encode(PIXELS).latent_dist.parameters)
    latents = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = reference.decode(latents).sample
    assert torch.equal(kl.decode(latents), expected.clamp(-1, 1))
    assert kl.moments_shape(64) == (32, 8, 8)
    assert kl.norm == Norm((0.1,), (0.5,))


@torch.no_grad()
def test_qwen_equals_diffusers(models: Path, qwen: Vae) -> None:
    from diffusers import AutoencoderKLQwenImage

    reference = AutoencoderKLQwenImage.from_pretrained(models / "qwen").eval()
    moments = qwen.encode(PIXELS)
    assert moments.shape == (3, 32, 4, 4)
    expected = reference.encode(PIXELS.unsqueeze(2)).latent_dist.parameters.squeeze(2)
    assert torch.equal(moments, torch.cat([expected[:, :16], expected[:, 16:].clamp(-30, 20)], 1))
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    pixels = qwen.decode(latents)
    assert pixels.shape == (2, 3, 32, 32)
    assert torch.equal(
        pixels, reference.decode(latents.unsqueeze(2)).sample.squeeze(2).clamp(-1, 1)
    )
    mean, std = reference.config.latents_mean, reference.config.latents_std
    assert qwen.norm.shift == tuple(mean)
    assert qwen.norm.scale == pytest.approx([1 / s for s in std])


def made(tiny: Models, name: str) -> Vae:
    return Vae(ModelSpec.model_validate(tiny(name)))


@torch.no_grad()
@pytest.mark.parametrize("name", list(VAES_MADE))
def test_every_family_equals_diffusers(tiny: Models, name: str) -> None:
    vae = made(tiny, name)
    assert vae.kind == ("latents" if name in WITHOUT_POSTERIOR else "moments")
    rows = vae.encode(PIXELS)
    depth = rows.shape[1] // (1 if vae.kind == "latents" else 2)
    latents = torch.randn(2, depth, *rows.shape[2:], generator=torch.Generator().manual_seed(1))
    expected, pixels = plain(name, vae.model, PIXELS, latents)
    torch.testing.assert_close(rows, expected, rtol=0, atol=2e-5)
    assert vae.moments_shape(32) == tuple(expected.shape[1:])
    torch.testing.assert_close(vae.decode(latents), pixels, rtol=0, atol=2e-5)


def test_the_page_of_every_class() -> None:
    """docs/encoders.md: every class of the installed diffusers is tried, or refused for a reason."""
    assert {*VAE_ADAPTERS, *POSTERIOR} == {*TINY}
    assert not {*TINY} & {*REFUSED}
    text = page()
    assert "DIFFERS" not in text
    assert "UNKNOWN" not in text
    assert PAGE.read_text(encoding="utf-8") == text, (
        "run `python -m tests.encode.models.encoders_page`"
    )


def test_flux2_normalises_by_its_batch_norm(tiny: Models) -> None:
    vae = made(tiny, "flux2")
    bn = vae._module.bn.eval()
    latents = torch.randn(2, 16, 3, 3, generator=torch.Generator().manual_seed(1))
    moments = torch.cat([latents, torch.full_like(latents, -30)], 1)
    drawn = draw(moments, vae.norm, torch.zeros_like(latents))
    torch.testing.assert_close(drawn, bn(latents))


def test_latents_that_are_normalised_already(tiny: Models) -> None:
    assert made(tiny, "rae").norm == Norm((0.0,), (1.0,))
    assert made(tiny, "taesd").norm == Norm((0.0,), (1.0,))  # as its config says


def test_pictures_that_a_class_cannot_take(tiny: Models) -> None:
    with pytest.raises(
        ModelNotUsable, match=r"cannot encode pictures of 20 x 20 .*Try another size"
    ):
        made(tiny, "wan").moments_shape(20)


def test_channels_last_changes_no_value(tiny: Models) -> None:
    for name in ("flux", "qwen"):
        plain = made(tiny, name)
        fast = Vae(plain.model, channels_last=True)
        assert fast.weights == plain.weights
        assert any(p.ndim > 3 and not p.is_contiguous() for p in fast._module.parameters())
        torch.testing.assert_close(fast.encode(PIXELS), plain.encode(PIXELS), rtol=0, atol=1e-5)


def test_batches_do_not_matter_in_fp32(kl: Vae, qwen: Vae) -> None:
    for vae in (kl, qwen):
        single = torch.cat([vae.encode(p[None]) for p in PIXELS])
        torch.testing.assert_close(vae.encode(PIXELS), single, rtol=0, atol=1e-5)


def test_bf16_autocast_is_near(models: Path, kl: Vae) -> None:
    half = Vae(spec("AutoencoderKL", models / "kl", precision="bf16-autocast"))
    moments = half.encode(PIXELS)
    assert moments.dtype == torch.float32
    assert not torch.equal(moments, kl.encode(PIXELS))
    torch.testing.assert_close(moments, kl.encode(PIXELS), rtol=0.05, atol=0.1)
    assert half.weights == kl.weights  # fp32 weights in both


def test_by_the_identity_of_a_column(models: Path, kl: Vae) -> None:
    identity = kl.model.identity(kl.weights).record()
    assert torch.equal(load_vae(identity).encode(PIXELS), kl.encode(PIXELS))
    vae = Vae(spec("AutoencoderKL", models / "other-kl"))
    assert vae.weights != kl.weights
    with pytest.raises(
        ModelNotUsable, match=f"weights {kl.weights[:16]}.* were found, .* {vae.weights[:16]}"
    ):
        load_vae({**identity, "weights": vae.weights})


def test_digest_is_of_names_and_values(tmp_path: Path, models: Path, kl: Vae) -> None:
    shutil.copytree(models / "kl", tmp_path / "kl")
    assert Vae(spec("AutoencoderKL", tmp_path / "kl")).weights == kl.weights  # not of the path
    file = tmp_path / "kl/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"][0] += 2**-20
    save_file(tensors, file)
    assert Vae(spec("AutoencoderKL", tmp_path / "kl")).weights != kl.weights


def test_classes_and_paths_that_cannot_serve(models: Path) -> None:
    for model, message in (
        (spec("AutoencoderXL", models / "kl"), "diffusers has no class 'AutoencoderXL'"),
        (
            spec("AutoencoderKLQwenImage", models / "kl"),
            "cannot be loaded as AutoencoderKLQwenImage",
        ),
        (spec("AutoencoderKL", models / "nothing"), "nothing: no such folder"),
        (spec("AutoencoderKL", "./nothing"), "no such folder"),
        (
            spec("AutoencoderKL", "package:no_such_package/model"),
            "'no_such_package' is not installed",
        ),
        (
            spec("AutoencoderKL", "nobody/nothing"),
            "cache here .* lacks files of it, and (HF_HUB_OFFLINE is set|the hub cannot)",
        ),
        (spec("AutoencoderKL", MINILM), "cannot be loaded as AutoencoderKL"),
    ):
        with pytest.raises(ModelNotUsable, match=message):
            Vae(model)


def test_weights_that_are_not_all_there(tmp_path: Path, models: Path) -> None:
    """diffusers would draw the missing ones at random, or read a pickle instead."""
    shutil.copytree(models / "kl", tmp_path / "kl")
    file = tmp_path / "kl/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("encoder.conv_in.bias")
    save_file(tensors, file)
    with pytest.raises(
        ModelNotUsable,
        match=r"1 weights of AutoencoderKL are not in it, \['encoder.conv_in.bias'\]",
    ):
        Vae(spec("AutoencoderKL", tmp_path / "kl"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelNotUsable, match="cannot be loaded"):
        Vae(spec("AutoencoderKL", tmp_path / "kl"))
    file.unlink()
    torch.save(tensors, tmp_path / "kl/diffusion_pytorch_model.bin")
    with pytest.raises(ModelNotUsable, match="cannot be loaded"):
        Vae(spec("AutoencoderKL", tmp_path / "kl"))


def test_names_of_the_registry(models: Path) -> None:
    assert lookup("flux", VAES).path == "black-forest-labs/FLUX.1-dev"
    model = spec("AutoencoderKL", models / "kl")
    assert lookup(model, VAES) is model
    with pytest.raises(
        ModelNotUsable,
        match="'fluxs': no such name; did you mean flux. Known are .*'flux', 'flux-e2e'",
    ):
        lookup("fluxs", VAES)
    assert Path(location(MINILM), "config.json").is_file()
    assert location("owner/name") == "owner/name"
