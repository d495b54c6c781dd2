"""The demo's judge: repeatable, right about held-out drawings, sharp or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from eval.demo.classifier import (
    FEATURES,
    RESOLUTION,
    Budget,
    accuracy,
    distort,
    labels,
    load_classifier,
    train,
)
from eval.demo.data import digest, read, training_tars
from eval.demo.openmoji import GROUPS
from shards import sha256_file

SHIPPED = Path(__file__).parents[2] / "configs/demo/classifier"


@pytest.fixture(scope="module")
def held_out(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    keys, pixels = read([data / "openmoji-val/00000.tar"], RESOLUTION)
    return pixels, labels(keys, list(GROUPS))


@pytest.mark.slow
def test_the_script_repeats_the_first_steps_and_learns(data: Path) -> None:
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    assert recipe["data"] == digest()
    assert recipe["weights"] == sha256_file(SHIPPED / "classifier.safetensors")
    keys, pixels = read(training_tars(data), RESOLUTION)
    losses: list[float] = []
    # The learning rate falls faster in a shorter training, so only the first two steps are alike.
    train(pixels, labels(keys, list(GROUPS)), Budget(steps=30), lambda _, loss: losses.append(loss))
    assert losses[:2] == pytest.approx(recipe["first_losses"][:2], rel=0.02)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_held_out_drawings_are_told_apart(held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    classifier = load_classifier(SHIPPED)
    pixels, targets = held_out
    assert classifier.groups == list(GROUPS)
    assert accuracy(classifier, pixels, targets) > 0.8  # chance is 1/7
    features = classifier.features(pixels[:8])
    assert features.shape == (8, FEATURES)
    assert features.abs().max() <= 1


def test_blurred_drawings_are_judged_alike(held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    pixels, targets = held_out
    coarse = F.interpolate(pixels, size=24, mode="bilinear", antialias=True)
    blurred = F.interpolate(coarse, size=RESOLUTION, mode="bilinear")
    assert accuracy(load_classifier(SHIPPED), blurred, targets) > 0.7


def test_distortion_keeps_shape_and_range() -> None:
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    once, again = (distort(pixels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == pixels.shape
    assert once.abs().max() <= 1
    assert not torch.allclose(once, pixels, atol=0.1)
