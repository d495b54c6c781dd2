"""Tiny random VAEs of both classes against diffusers itself, and models that cannot serve."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encode.errors import ModelNotUsable
from encode.registry import VAES, location, lookup
from encode.vae import Vae, load_vae, norm_of
from shards import Norm

from .toy import MINILM, save_kl, spec

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


def test_batches_do_not_matter_in_fp32(kl: Vae, qwen: Vae) -> None:
    for vae in (kl, qwen):
        alone = torch.cat([vae.encode(p[None]) for p in PIXELS])
        torch.testing.assert_close(vae.encode(PIXELS), alone, rtol=0, atol=1e-5)


def test_bf16_autocast_is_near(models: Path, kl: Vae) -> None:
    half = Vae(spec("AutoencoderKL", models / "kl", precision="bf16-autocast"))
    moments = half.encode(PIXELS)
    assert moments.dtype == torch.float32
    assert not torch.equal(moments, kl.encode(PIXELS))
    torch.testing.assert_close(moments, kl.encode(PIXELS), rtol=0.05, atol=0.1)
    assert half.weights == kl.weights  # fp32 weights in both


def test_by_the_identity_of_a_column(models: Path, kl: Vae) -> None:
    identity = kl.model.identity(kl.weights)
    assert torch.equal(load_vae(identity).encode(PIXELS), kl.encode(PIXELS))
    other = Vae(spec("AutoencoderKL", models / "other-kl"))
    assert other.weights != kl.weights
    with pytest.raises(
        ModelNotUsable, match=f"weights {kl.weights[:16]}.* were found, .* {other.weights[:16]}"
    ):
        load_vae({**identity, "weights": other.weights})


def test_digest_is_of_names_and_values(tmp_path: Path, models: Path, kl: Vae) -> None:
    shutil.copytree(models / "kl", tmp_path / "kl")
    assert Vae(spec("AutoencoderKL", tmp_path / "kl")).weights == kl.weights  # not of the path
    file = tmp_path / "kl/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"][0] += 2**-20
    save_file(tensors, file)
    assert Vae(spec("AutoencoderKL", tmp_path / "kl")).weights != kl.weights


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        ({"shift_factor": 0.25, "scaling_factor": 2}, Norm((0.25,), (2.0,))),
        ({"shift_factor": 0, "scaling_factor": 2}, Norm((0.0,), (2.0,))),
        ({"latents_mean": [1, 2], "latents_std": [4, 0.5]}, Norm((1.0, 2.0), (0.25, 2.0))),
        (
            {"latents_mean": [1, 2], "latents_std": [4, 0.5], "shift_factor": 9, "scaling_factor": 9},
            Norm((1.0, 2.0), (0.25, 2.0)),
        ),
        ({"latents_mean": [1, 2], "shift_factor": 9, "scaling_factor": 8}, Norm((9.0,), (8.0,))),
    ],
)  # fmt: skip
def test_norm(config: dict[str, object], norm: Norm) -> None:
    assert norm_of(config, "x") == norm


def test_no_norm_is_not_guessed(tmp_path: Path) -> None:
    for config in ({}, {"scaling_factor": 0.18}, {"shift_factor": 0.1}, {"latents_mean": [1.0]}):
        with pytest.raises(ModelNotUsable, match="Training needs a normalisation"):
            norm_of(config, "x")
    with pytest.raises(ModelNotUsable, match="shift_factor None and scaling_factor 0.5"):
        Vae(spec("AutoencoderKL", save_kl(tmp_path / "kl", shift_factor=None)))


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
        (spec("AutoencoderKL", "nobody/nothing"), "the hub can be reached"),
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
    own = spec("AutoencoderKL", models / "kl")
    assert lookup(own, VAES) is own
    with pytest.raises(
        ModelNotUsable, match="'fluks': no such name; known are .*'flux', 'flux-e2e'"
    ):
        lookup("fluks", VAES)
    assert Path(location(MINILM), "config.json").is_file()
    assert location("owner/name") == "owner/name"
