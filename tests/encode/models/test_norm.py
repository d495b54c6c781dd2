"""The normalisation of latents: what a VAE's config states, and what a column may say beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

import configs
from encode.config import ColumnConfig, EncodeConfig
from encode.errors import ModelNotUsable
from encode.models.load import load_encoder
from encode.models.norm import config_norm
from encode.models.vae import Vae
from encode.registry import PUBLISHED, VAES, ModelSpec
from shards import Norm
from tests.encode.tiny_models import DOWN, Models, saved
from tests.encode.toy import save_kl, spec


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
    without = save_kl(tmp_path / "kl", shift_factor=None)
    file = without / "config.json"
    values = json.loads(file.read_text())
    del values["scaling_factor"]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelNotUsable, match=r"norm: {shift: \[0.0\], scale: \[0.18215\]}"):
        _ = Vae(spec("AutoencoderKL", without)).norm


def test_a_scale_alone_is_the_norm_where_no_shift_exists(tmp_path: Path, tiny: Models) -> None:
    """As diffusers' pipelines multiply by scaling_factor and take nothing; of the file's number alone,
    and never where the class fills in a shift, or the file has half of mean and deviation.
    """
    kl = save_kl(tmp_path / "kl", shift_factor=None)
    assert Vae(spec("AutoencoderKL", kl)).norm == Norm((0.0,), (0.5,))
    assert encoder_of({"class": "AutoencoderKL", "path": str(kl)}).norm == Norm((0.0,), (0.5,))
    dc = Path(tiny("dc")["path"])
    assert Vae(spec("AutoencoderDC", dc)).norm == Norm((0.0,), (0.41407,))
    for config, filled in (
        ({"scaling_factor": 0.5}, {"scaling_factor": 0.5, "shift_factor": 0.0}),
        ({"scaling_factor": 0.5}, {"scaling_factor": 0.5, "latents_mean": [1.0]}),
        ({}, {"scaling_factor": 0.5, "shift_factor": None}),
        ({"scaling_factor": 0.5, "latents_std": [1.0]},) * 2,
    ):
        with pytest.raises(ModelNotUsable, match="Training needs a normalisation"):
            config_norm(config, "x", filled).own()


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("sd-vae", 0.18215),
        ("sdxl-vae", 0.13025),
        ("dc-ae-f32c32", 0.41407),
        ("hunyuan-image", 0.75289),
    ],
)
def test_a_name_has_the_norm_that_was_published(
    tmp_path: Path, name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model's file leaves out."""
    encoder = kl_saying(tmp_path / "m", ("scaling_factor", "shift_factor"))
    monkeypatch.setitem(VAES, name, ModelSpec.model_validate(encoder))
    column = {"kind": "moments", "encoder": name, "resolution": 32}
    validated = TypeAdapter(ColumnConfig).validate_python(column)
    norm = Norm((0.0,), (scale,))
    assert load_encoder(validated, "cpu").norm == norm  # type: ignore[arg-type, union-attr]  # a union
    assert PUBLISHED[name].source


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"scaling_factor": 0.5, "shift_factor": None}, r"scaling_factor.* scale \[0.5\]"),
        ({"scaling_factor": 0.13025, "shift_factor": 0.1}, r"shift_factor.* shift \[0.1\]"),
        ({"latents_mean": [1.5] * 4, "latents_std": [2.0] * 4}, r"latents_mean.* shift \[1.5, 1.5"),
    ],
)
def test_files_that_contradict_the_registry(
    tmp_path: Path, config: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both numbers are named, before anything is encoded; the numbers of the file may be the registry's."""

    def load(values: dict[str, Any]) -> Any:
        encoder = kl_saying(tmp_path / str(len(list(tmp_path.iterdir()))), **values)
        monkeypatch.setitem(VAES, "sdxl-vae", ModelSpec.model_validate(encoder))
        column = {"kind": "moments", "encoder": "sdxl-vae", "resolution": 32}
        return load_encoder(TypeAdapter(ColumnConfig).validate_python(column), "cpu")  # type: ignore[arg-type]  # a union

    with pytest.raises(ModelNotUsable, match=found + r".* the registry by \[0") as error:
        load(config)
    assert "sd_xl_base.yaml" in str(error.value)
    same = load({"scaling_factor": 0.13025, "shift_factor": None})
    assert same.norm == Norm((0.0,), (0.13025,))


def test_a_shard_records_where_the_norm_comes_from(
    tmp_path: Path, tiny: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(encoder: dict[str, str], norm: dict[str, list[float]] | None = None) -> str:
        recorded: str = encoder_of(encoder, norm).runs_on()["norm_source"]
        return recorded

    both = kl_saying(tmp_path / "both")
    assert source(both) == "shift_factor and scaling_factor of the model's config"
    assert source(both, {"shift": [0.1], "scale": [0.5]}) == "norm of the column's encode config"
    scale = kl_saying(tmp_path / "scale", shift_factor=None)
    assert source(scale) == "scaling_factor of the model's config"
    mean = kl_saying(tmp_path / "mean", latents_mean=MEAN, latents_std=STD)
    assert source(mean) == "latents_mean and latents_std of the model's config"
    assert source(tiny("flux2")) == "the batch norm in the weights"
    bare = kl_saying(tmp_path / "bare", ("shift_factor", "scaling_factor"))
    monkeypatch.setitem(VAES, "sdxl-vae", ModelSpec.model_validate(bare))
    assert source(bare).startswith("registry: scale_factor of Stability-AI/generative-models")


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
