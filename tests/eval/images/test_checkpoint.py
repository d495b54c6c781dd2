"""Where models come from: a run of ours or the reference's folder, with the columns' encoders or with others."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encode.errors import ModelNotUsable
from encode.models.vae import Vae
from encode.registry import TEXTS, VAES, ModelSpec
from eval.errors import BadRequest, EncoderMismatch
from eval.images.encoders import relocate_encoder, text_named, vae_named
from eval.images.generate import Generator, Request, generate
from shards.format.identity import EncoderIdentity
from tests.encode.toy import text_encoder
from tests.eval.models import save_reference, save_run, save_text, save_vae
from train.checkpoints.checkpoint import CheckpointError
from train.checkpoints.reference import BadReference, import_reference


@pytest.fixture
def theirs(tmp_path: Path, vae_folder: Path, text_folder: Path) -> Request:
    prompts = tmp_path / "list.txt"
    prompts.write_text("a red cat\nthe blue dog on a flag\ndog\n")
    return Request(
        checkpoint=save_reference(tmp_path / "theirs", (10, 20)), type="baseline-dit", prompts=prompts,
        save_dir=tmp_path / "out", num_inference_steps=3, vae=str(vae_folder), text_encoder=str(text_folder),
        resolution=32,
    )  # fmt: skip


def changed(request: Request, **fields: object) -> Request:
    return Request(**(vars(request) | fields))  # type: ignore[arg-type]  # fields of Request


def pictures(request: Request) -> np.ndarray:
    files = sorted((request.save_dir / "images").iterdir())
    return np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)


def test_the_reference_s_weights_make_the_pictures_of_ours(
    theirs: Request, tmp_path: Path, vae_folder: Path, text_folder: Path
) -> None:
    """Text of 256 tokens at most, the VAE's norm from its config, encoders under bf16 autocast as the registry's."""
    settings = generate(theirs)["settings"]
    assert (settings["type"], settings["step"], settings["ema"]) == ("baseline-dit", 20, True)
    assert settings["norm"] == {"shift": [3.0], "scale": [0.05]}
    vae, text = vae_named(str(vae_folder)), text_named(str(text_folder))
    assert (vae.cls, text.cls, text.precision) == ("AutoencoderKL", "BertModel", "bf16-autocast")
    ours = save_run(tmp_path / "ours", Vae(vae), text_encoder(text, max_tokens=256))
    same = changed(
        theirs, checkpoint=ours, type="latentbank", vae=None, text_encoder=None, resolution=None,
        save_dir=tmp_path / "same",
    )  # fmt: skip
    other = generate(same)["settings"]
    for name in ("vae", "norm", "text_encoder", "text", "resolution", "prompts"):
        assert settings[name] == other[name], name
    assert np.array_equal(pictures(theirs), pictures(same))
    raw = changed(theirs, ema_weights=False, save_dir=tmp_path / "raw")
    assert generate(raw)["settings"]["weights"] != settings["weights"]
    assert np.abs(pictures(raw) - pictures(theirs)).max() > 2


def test_its_defaults(theirs: Request) -> None:
    assert Generator.load(changed(theirs, resolution=None)).latent_shape == (4, 32, 32)  # 256 px
    assert Generator.load(changed(theirs, tag=10)).identity["step"] == 10


def test_its_encoders_must_be_named(theirs: Request) -> None:
    for flag, field in (("--vae", "vae"), ("--text-encoder", "text_encoder")):
        with pytest.raises(BadRequest, match=f"--type baseline-dit: found no {flag}, expected"):
            generate(changed(theirs, **{field: None}))
    with pytest.raises(ModelNotUsable, match="no such folder"):
        generate(changed(theirs, vae="/nowhere"))
    with pytest.raises(BadReference, match="found steps 10, 20, expected step 7"):
        generate(changed(theirs, tag=7))
    assert not theirs.save_dir.exists()


def test_a_state_that_is_not_the_last(theirs: Request, tmp_path: Path) -> None:
    """`text_hidden_states_index` of its config is heeded."""
    folder = save_reference(tmp_path / "second", text_hidden_states_index=-2)
    step = import_reference(folder, None, tmp_path / "imported")
    for fields in ({}, {"checkpoint": step, "type": "latentbank"}):
        texts = Generator.load(changed(theirs, **{"checkpoint": folder} | fields)).texts
        assert texts.identity["hidden_state"] == -2


def test_an_encoder_of_another_shape_is_named(theirs: Request, run: Path, tmp_path: Path) -> None:
    wide = changed(theirs, vae=str(save_vae(tmp_path / "wide", channels=8)))
    ours = changed(wide, type="latentbank", checkpoint=run, allow_other_encoder=True)
    for request in (wide, ours):
        with pytest.raises(EncoderMismatch, match="found a VAE of 8 latent channels, expected 4"):
            generate(request)
    long = changed(theirs, text_encoder=str(save_text(tmp_path / "long", width=32)))
    with pytest.raises(EncoderMismatch, match="found a text encoder of width 32, expected 24"):
        generate(long)
    assert not theirs.save_dir.exists()


def test_what_was_asked_of_ours_but_is_not_there(run: Path, theirs: Request) -> None:
    ours = changed(theirs, checkpoint=run, type="latentbank", vae=None, text_encoder=None)
    with pytest.raises(CheckpointError, match="found steps 10, 20, expected step 11"):
        generate(changed(ours, tag=11))
    step = run / "checkpoints/step-00000020"
    with pytest.raises(CheckpointError, match="found step 20, expected step 10"):
        generate(changed(ours, checkpoint=step, tag=10))
    assert Generator.load(changed(ours, checkpoint=step, tag=20)).identity["step"] == 20
    with pytest.raises(CheckpointError, match="It is the reference's"):
        generate(changed(ours, checkpoint=theirs.checkpoint))
    assert not ours.save_dir.exists()


def test_other_encoders_only_where_allowed(
    run: Path, theirs: Request, text_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertModel

    model = BertModel.from_pretrained(text_folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(torch.rand(24))
    other = tmp_path / "other"
    for path in text_folder.iterdir():
        (other / path.name).parent.mkdir(exist_ok=True)
        (other / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(other)
    ours = changed(
        theirs,
        checkpoint=run,
        type="latentbank",
        vae=None,
        text_encoder=str(other),
        resolution=None,
    )
    with pytest.raises(EncoderMismatch, match=r"not the text encoder .*weights: found .*--allow"):
        generate(ours)
    assert not ours.save_dir.exists()
    settings = generate(changed(ours, allow_other_encoder=True))["settings"]
    column = json.loads((run / "checkpoints/step-00000020/manifest.json").read_bytes())["data"]
    was = column["text"]["identity"]["encoder"]["weights"]
    used = text_encoder(
        ModelSpec.model_validate({"class": "BertModel", "path": str(other)}), max_tokens=16
    )
    assert settings["text_encoder"] == used.weights != was
    assert f"text_encoder: using weights {used.weights[:16]}" in caplog.text
    original = changed(ours, text_encoder=None, save_dir=tmp_path / "original")
    generate(original)
    assert np.abs(pictures(original) - pictures(ours)).max() > 2


def test_encoders_of_a_repository_move_with_it_or_alone(tmp_path: Path, text_folder: Path) -> None:
    """Its text encoder and the tokenizer are in folders of their own."""
    for path in text_folder.iterdir():
        below = "tokenizer_3" if "token" in path.name else "text_encoder_3"
        (tmp_path / "now" / below).mkdir(parents=True, exist_ok=True)
        (tmp_path / "now" / below / path.name).write_bytes(path.read_bytes())
    spec = ModelSpec.model_validate(
        {
            "class": "BertModel",
            "path": "was",
            "subfolder": "text_encoder_3",
            "tokenizer": "tokenizer_3",
        }
    )
    expected = text_encoder(
        ModelSpec.model_validate({"class": "BertModel", "path": str(text_folder)}), max_tokens=16
    )
    column = spec.identity(expected.weights)
    for place in (tmp_path / "now", tmp_path / "now/text_encoder_3", text_folder):
        actual = text_encoder(
            ModelSpec.of_identity(relocate_encoder(column, str(place), TEXTS)), max_tokens=16
        )
        assert (actual.weights, actual.tokenizer.weights) == (
            expected.weights,
            expected.tokenizer.weights,
        ), place
    (tmp_path / "now/vae").mkdir()
    vae = VAES["flux"].identity("0")
    assert relocate_encoder(vae, str(tmp_path / "now"), VAES).subfolder == "vae"
    assert relocate_encoder(vae, str(tmp_path / "now/vae"), VAES).subfolder is None


def test_a_registered_model_by_its_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vae_named("REPA-E/e2e-flux-vae") == VAES["flux-e2e"]
    t5 = TEXTS["t5-xxl"]
    assert text_named(t5.path) == t5
    elsewhere = EncoderIdentity(cls=t5.cls, path="/gone", subfolder=None, weights="0")
    for name in ("t5-xxl", t5.path):
        assert relocate_encoder(elsewhere, name, TEXTS).tokenizer == "tokenizer_3"
    here = tmp_path / "google/gemma-2b"
    here.mkdir(parents=True)
    (here / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    monkeypatch.chdir(tmp_path)
    assert text_named("google/gemma-2b").cls == "Qwen3Model"  # a folder goes first


def test_a_folder_says_which_class_it_is(tmp_path: Path) -> None:
    nested = tmp_path / "vae"
    nested.mkdir()
    (nested / "config.json").write_text('{"_class_name": "AutoencoderKLQwenImage"}')
    actual = vae_named(str(tmp_path))
    assert (actual.cls, actual.subfolder) == ("AutoencoderKLQwenImage", "vae")
    for output, cls in (
        ("GemmaForCausalLM", "GemmaModel"), ("Qwen3Model", "Qwen3Model"), ("CLIPModel", "CLIPTextModel"),
        ("T5ForConditionalGeneration", "T5EncoderModel"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [output]}))
        assert text_named(str(tmp_path)).cls == cls
    assert text_named("gemma-2b").path == "google/gemma-2b"
    assert vae_named("flux").subfolder == "vae"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotUsable, match="names no class"):
        text_named(str(tmp_path))
    with pytest.raises(ModelNotUsable, match="gemma-3b: no such folder, and none of gemma-2b"):
        text_named("gemma-3b")


def test_a_vae_that_is_not_there_is_refused_before_a_checkpoint_is_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpoint": tmp_path / "none", "save_dir": tmp_path / "out"}
    (tmp_path / "models").mkdir()
    for place in (tmp_path / "vaes/flux", "a/b/c", "fluxx"):
        with pytest.raises(
            ModelNotUsable, match=f"^--vae: {place}: no such folder.* one of flux, "
        ):
            Request(**fields, vae=str(place))
    with contextlib.chdir(tmp_path):
        with pytest.raises(
            ModelNotUsable, match="^--vae: models/flx: found no such folder in models, "
        ):
            Request(**fields, vae="models/flx")
        for place in ("models", "owner/of-the-hub", "flux", "REPA-E/e2e-flux-vae"):
            Request(**fields, vae=place)
        Request(**fields, vae="models/flx", allow_class=["mine:Vae"])  # it knows what that is
