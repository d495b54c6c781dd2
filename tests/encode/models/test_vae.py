"""Tiny random autoencoders of every family against diffusers itself, and models that cannot serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

import configs
from encode.config import ColumnConfig, EncodeConfig
from encode.errors import ModelNotUsable
from encode.models.load import load_encoder
from encode.models.norm import config_norm
from encode.models.vae import Vae, load_vae
from encode.registry import VAES, ModelSpec, location, lookup
from shards import Norm
from shards.read.latents import draw
from tests.encode.tiny_models import DOWN, Models, saved
from tests.encode.tiny_models import VAES as VAES_MADE
from tests.encode.toy import MINILM, save_kl, spec

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
    """Shapes, frame axis, fourth channel, patches and ranges written out by hand for each class."""
    import diffusers
    from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

    vae = made(tiny, name)
    reference = getattr(diffusers, vae.model.cls).from_pretrained(vae.model.path).eval()
    x, many = PIXELS, name in ("qwen", "qwen21", "wan")
    if name == "qwen21":  # an opaque picture in RGBA
        x = torch.cat([x, torch.ones(3, 1, 32, 32)], 1)
    if name == "rae":
        x = (x + 1) / 2
    output = reference.encode(x[:, :, None] if many else x)
    if name in ("dc", "rae", "taesd"):
        expected = output.latents if name == "taesd" else output.latent
    else:
        mean, logvar = output.latent_dist.mean, output.latent_dist.logvar
        if name == "flux2":
            mean, logvar = (Flux2Pipeline._patchify_latents(part) for part in (mean, logvar))
        expected = torch.cat([mean, logvar], 1)
        expected = expected[:, :, 0] if many else expected
    assert vae.kind == ("latents" if name in ("dc", "rae", "taesd") else "moments")
    torch.testing.assert_close(vae.encode(PIXELS), expected, rtol=0, atol=2e-5)
    assert vae.moments_shape(32) == tuple(expected.shape[1:])

    channels = expected.shape[1] // (1 if vae.kind == "latents" else 2)
    seeded = torch.Generator().manual_seed(1)
    latents = torch.randn(2, channels, *expected.shape[2:], generator=seeded)
    z = Flux2Pipeline._unpatchify_latents(latents) if name == "flux2" else latents
    pixels = reference.decode(z[:, :, None] if many else z, return_dict=False)[0]
    pixels = pixels[:, :3, 0] if many else pixels
    pixels = pixels * 2 - 1 if name == "rae" else pixels
    torch.testing.assert_close(vae.decode(latents), pixels.clamp(-1, 1), rtol=0, atol=2e-5)


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
    ],
)  # fmt: skip
def test_norm(config: dict[str, object], norm: Norm) -> None:
    assert config_norm(config, "x").own() == norm


def test_no_norm_is_not_guessed(tmp_path: Path) -> None:
    factors = {"shift_factor": 0.5, "scaling_factor": 2.0}
    half = [{name: [1.0, 2.0]} | factors for name in ("latents_mean", "latents_std")]
    for config in (
        {},
        {"scaling_factor": 0.18},
        {"shift_factor": 0.1},
        {"latents_mean": [1.0]},
        *half,
    ):
        with pytest.raises(ModelNotUsable, match="Training needs a normalisation"):
            config_norm(config, "x").own()
    vae = Vae(spec("AutoencoderKL", save_kl(tmp_path / "kl", shift_factor=None)))
    with pytest.raises(
        ModelNotUsable, match=r"no shift of latents .* norm: {shift: \[0.0\], scale: \[0.5\]}"
    ):
        _ = vae.norm


MEAN, STD = [-1.5, 1.75, -1.25, 2.5], [8.5, 5.75, 6.5, 5.25]


def kl_saying(folder: Path, without: tuple[str, ...] = (), **config: Any) -> dict[str, str]:
    """`encoder` of a VAE of four channels whose config.json says just this of normalisation."""
    options = {
        **DOWN, "block_out_channels": [8, 16, 16, 16], "latent_channels": 4, "norm_num_groups": 4,
        "sample_size": 32, "shift_factor": 0.1, "scaling_factor": 0.5,
    }  # fmt: skip
    saved(folder, "diffusers", "AutoencoderKL", options)
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in without}))
    return {"class": "AutoencoderKL", "path": str(folder)}


def encoder_of(encoder: dict[str, str], norm: dict[str, list[float]] | None = None) -> Any:
    column = {"kind": "moments", "encoder": encoder, "resolution": 32, "norm": norm}
    return load_encoder(TypeAdapter(ColumnConfig).validate_python(column), "cpu")  # type: ignore[arg-type]  # a union


def test_two_conventions_in_one_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mean and deviation alone, as the reference; diffusers' pipelines multiply by the factor, too."""
    encoder = kl_saying(
        tmp_path / "m", latents_mean=MEAN, latents_std=STD, scaling_factor=0.5, shift_factor=None
    )
    reference = Norm(tuple(MEAN), tuple(1 / s for s in STD))
    multiplied = {"shift": MEAN, "scale": [0.5 / s for s in STD]}
    assert encoder_of(encoder).norm == reference
    (record,) = caplog.records
    message = record.getMessage()
    assert "scaling_factor 0.5" in message
    assert "diffusers' own pipelines multiply" in message
    assert yaml.safe_load(message.partition("write norm: ")[2]) == multiplied
    caplog.clear()
    for norm, scale in (
        (multiplied, tuple(multiplied["scale"])),
        ({"shift": MEAN, "scale": list(reference.scale)}, reference.scale),
        # rounded by a person: the config's own numbers are recorded
        ({"shift": MEAN, "scale": [round(s, 7) for s in reference.scale]}, reference.scale),
    ):
        agreed = encoder_of(encoder, norm).norm
        assert (agreed.shift, agreed.scale) == (reference.shift, pytest.approx(scale, rel=1e-12))
    for norm in (
        {"shift": MEAN, "scale": [1.0]},
        {"shift": [0.0], "scale": multiplied["scale"]},
        {"shift": [0.0], "scale": [0.5]},
    ):
        with pytest.raises(ModelNotUsable, match="Leave norm out of the column"):
            encoder_of(encoder, norm)
    assert not caplog.records
    unit = kl_saying(tmp_path / "one", latents_mean=MEAN, latents_std=STD, scaling_factor=1.0)
    assert encoder_of(unit).norm == reference
    assert not caplog.records
    # the class's 0.18215 is what diffusers multiplies by where the file says nothing
    kl_saying(tmp_path / "m", ("scaling_factor",), latents_mean=MEAN, latents_std=STD)
    assert encoder_of(encoder).norm == reference
    assert "scaling_factor 0.18215" in caplog.text


CLASSES = {
    "AutoencoderKL": (("scaling_factor",), "kl", {"shift": [0.1], "scale": [0.18215]}),
    "AutoencoderTiny": (("scaling_factor", "shift_factor"), "taesd", {"shift": [0.0], "scale": [1.0]}),
    "AutoencoderKLQwenImage": (("latents_std",), "qwen", None),
    "AutoencoderKLWan": (("latents_mean", "latents_std"), "wan", None),
}  # fmt: skip


@pytest.mark.parametrize("cls", list(CLASSES))
def test_a_default_of_the_class_is_not_the_config(
    tmp_path: Path, tiny: Models, models: Path, cls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with the line to write, by path; by name the registry answers for the model."""
    fields, name, line = CLASSES[cls]
    folder = tmp_path / "m"
    shutil.copytree(models / name if name in ("kl", "qwen") else tiny(name)["path"], folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in fields}))
    model = spec(cls, folder)
    with pytest.raises(ModelNotUsable, match="its config says no ") as refused:
        _ = Vae(model).norm
    norm = yaml.safe_load(str(refused.value).partition("norm: ")[2].partition(" (")[0])
    assert line in (norm, None)
    # what it says may be said
    column_norm = Norm(tuple(norm["shift"]), tuple(norm["scale"]))
    assert Vae(model).file_norm.agreed(column_norm) == column_norm
    monkeypatch.setitem(VAES, "mine", model)
    assert Vae(model).norm == column_norm


def test_latents_that_are_said_to_be_normalised_and_are_not(tmp_path: Path, tiny: Models) -> None:
    config = json.loads(Path(tiny("rae")["path"], "config.json").read_text())
    plain = {k: v for k, v in config.items() if k[0] != "_" and k[:8] != "latents_"}
    folder = saved(tmp_path / "m", "diffusers", "AutoencoderRAE", plain)
    with pytest.raises(ModelNotUsable, match="its config says no shift and no scale"):
        _ = Vae(spec("AutoencoderRAE", folder)).norm


def test_a_norm_that_contradicts_what_the_config_says(tmp_path: Path) -> None:
    """Whatever else it leaves out."""
    for number, (config, contradiction, right) in enumerate((
        ({"shift_factor": None, "scaling_factor": 0.13025},
         {"shift": [0.0], "scale": [1.0]}, {"shift": [0.0], "scale": [0.13025]}),
        ({"shift_factor": None, "scaling_factor": 0.13025},
         {"shift": [0.5] * 4, "scale": [0.13025, 0.13025, 0.13025, 0.5]},
         {"shift": [0.5] * 4, "scale": [0.13025] * 4}),
        ({"shift_factor": 0.25, "scaling_factor": None},
         {"shift": [0.0], "scale": [1.0]}, {"shift": [0.25], "scale": [1.0]}),
    )):  # fmt: skip
        model = kl_saying(tmp_path / str(number), **config)
        with pytest.raises(ModelNotUsable, match="the column says .*Say norm: {shift: "):
            encoder_of(model, contradiction)
        norm = encoder_of(model, right).norm
        assert norm == Norm(tuple(right["shift"]), tuple(right["scale"]))


@pytest.mark.parametrize("config", [
    {"scaling_factor": 0.0}, {"scaling_factor": -1.0}, {"scaling_factor": float("nan")},
    {"scaling_factor": "much"}, {"shift_factor": float("inf")}, {"scaling_factor": 1e38},
    {"latents_mean": MEAN, "latents_std": [1.0, 0.0, 1.0, 1.0]}, {"shift_factor": {}},
    {"latents_mean": MEAN, "latents_std": [1.0, None, 1.0, 1.0]},
    {"latents_mean": MEAN, "latents_std": [1.0, float("nan"), 1.0, 1.0]},
    {"latents_mean": MEAN[:3], "latents_std": STD}, {"latents_mean": MEAN, "latents_std": [-1.0] * 4},
    {"latents_mean": [MEAN, [1.0]], "latents_std": STD}, {"latents_mean": [], "latents_std": STD},
    {"latents_mean": MEAN, "latents_std": [1e-38] * 4},
])  # fmt: skip
def test_numbers_of_a_config_that_are_none(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelNotUsable, match="its config .*Correct it"):
        encoder_of(kl_saying(tmp_path / "m", **config))


@pytest.mark.parametrize("norm", [
    {"shift": [0.0], "scale": [0.0]}, {"shift": [0.0], "scale": [float("nan")]},
    {"shift": [float("inf")], "scale": [1.0]}, {"shift": [0.0] * 3, "scale": [1.0] * 4},
    {"shift": [0.0], "scale": [1e-60]}, {"shift": [1e31], "scale": [1.0]},
    {"shift": [0.0], "scale": [1.0, 0.0, 1.0, 1.0]}, {"shift": [], "scale": [1.0]},
])  # fmt: skip
def test_a_norm_that_cannot_be_ends_where_the_config_is_loaded(
    tmp_path: Path, norm: dict[str, list[float]]
) -> None:
    column = {
        "kind": "moments", "encoder": {"class": "AutoencoderKL", "path": "x"}, "resolution": 32,
        "norm": norm,
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    values = {"root": "cache", "sources": {"s": "s.tar"}, "columns": {"c": column}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(configs.ConfigError, match=r"columns\.c.*norm"):
        configs.load(EncodeConfig, path)


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
    model = spec("AutoencoderKL", models / "kl")
    assert lookup(model, VAES) is model
    with pytest.raises(
        ModelNotUsable, match="'fluks': no such name; known are .*'flux', 'flux-e2e'"
    ):
        lookup("fluks", VAES)
    assert Path(location(MINILM), "config.json").is_file()
    assert location("owner/name") == "owner/name"
