"""Image features against transformers itself, and what a model must say of the pictures it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from encode.config import EngineConfig, FeaturesColumn
from encode.errors import ModelNotUsable
from encode.models.features import FeatureEncoder
from encode.models.rehearsal import rehearse
from encode.registry import ModelSpec
from tests.encode.tiny_models import SIDE, Models, save_dinov2, save_preprocessor
from tests.encode.toy import spec

PIXELS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def made(tiny: Models, name: str, **options: Any) -> FeatureEncoder:
    return features(ModelSpec.model_validate(tiny(name)), **options)


def features(model: ModelSpec, **options: Any) -> FeatureEncoder:
    return FeatureEncoder(FeaturesColumn(encoder=model, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_equals_transformers(tiny: Models, name: str) -> None:
    """With the processor of the model itself, on pictures that are cropped already."""
    import transformers

    encoder = made(tiny, name)
    assert encoder.view.resolution == SIDE
    path = tiny(name)["path"]
    processor = transformers.AutoImageProcessor.from_pretrained(path, use_fast=False)
    images = ((PIXELS + 1) * 127.5).round().byte()
    x = processor(
        list(images.permute(0, 2, 3, 1).numpy()), do_resize=False, do_center_crop=False,
        return_tensors="pt",
    )  # fmt: skip
    cls = transformers.Dinov2Model if name == "dinov2" else transformers.SiglipVisionModel
    expected = cls.from_pretrained(path).eval()(**x)
    pixels = images.float() / 127.5 - 1
    tokens = encoder.encode(pixels)
    assert tokens.shape == (3, 5 if name == "dinov2" else 4, 32)  # a class token, or none
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=2e-5)
    pooled = made(tiny, name, output="pooled").encode(pixels)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=2e-5)


def test_one_tower_of_two_is_the_same_model(tiny: Models) -> None:
    """AutoModel loads both towers of SigLIP; the eyes alone are used, and digested."""
    towers = features(spec("AutoModel", tiny("siglip")["path"]))
    tower = made(tiny, "siglip")
    assert torch.equal(towers.encode(PIXELS), tower.encode(PIXELS))


def test_nothing_is_guessed(tmp_path: Path) -> None:
    folder = save_dinov2(tmp_path / "dinov2")
    model = spec("Dinov2Model", folder)
    encoder = features(model, resolution=16, mean=[0.5] * 3)
    assert (encoder.view.resolution, encoder.mean, encoder.std) == (
        16,
        [0.5] * 3,
        [0.229, 0.224, 0.225],
    )
    assert encoder.encode(PIXELS[:, :, :16, :16]).shape == (3, 2, 32)
    for config, message in (
        ({}, "says no resolution .*Say resolution in the column"),
        ({"size": {"height": 32, "width": 48}}, "says no resolution"),
        ({"size": {"shortest_edge": 32}, "image_std": [1, 1, 1]}, "says no mean"),
        ({"size": 32, "image_mean": [0] * 3, "image_std": [1] * 3, "rescale_factor": 2}, "no mean"),
    ):
        save_preprocessor(folder, **config)
        with pytest.raises(ModelNotUsable, match=message):
            features(model)
    save_preprocessor(folder, size={"height": 32, "width": 32}, do_normalize=False)
    assert features(model).std == [1.0] * 3
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelNotUsable, match="says no resolution"):
        features(model)


def test_models_that_cannot_serve(tiny: Models) -> None:
    text = ModelSpec.model_validate(tiny("gemma"))
    options: Any = {"resolution": SIDE, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ModelNotUsable, match="GemmaModel cannot encode pictures of 32 x 32"):
        rehearse(features(text, **options), EngineConfig())
    with pytest.raises(ModelNotUsable, match="cannot encode pictures of 48 x 48"):
        rehearse(made(tiny, "siglip", resolution=48), EngineConfig())
    with pytest.raises(ModelNotUsable, match="were found, the column was made with 0000"):
        FeatureEncoder(made(tiny, "dinov2").config, expected="0" * 64)
