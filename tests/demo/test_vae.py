"""The shipped VAEs: recipe, pictures and weights belong together, and held-out pictures come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from eval.demo.data import digest, read
from eval.demo.vae import RECIPES, RESOLUTION, Budget, encode_means, pictures, psnr, train
from shards import sha256_file

SHIPPED = Path(__file__).parents[2] / "configs/demo"


def recipe_of(name: str) -> dict[str, object]:
    recipe: dict[str, object] = json.loads((SHIPPED / f"vae-{name}/recipe.json").read_text())
    return recipe


@pytest.fixture(scope="module")
def images(data: Path) -> torch.Tensor:
    return pictures(data)


@pytest.mark.parametrize("name", ["equi", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_script_repeats_the_first_steps_of_the_shipped_weights(
    images: torch.Tensor, name: str
) -> None:
    recipe = recipe_of(name)
    assert recipe["data"] == digest()
    first = recipe["first_losses"]
    assert isinstance(first, list)
    shared = Budget()
    assert (recipe["steps"], recipe["batch"]) == (shared.steps, shared.batch)
    assert (recipe["rate"], recipe["seed"]) == (shared.rate, shared.seed)
    losses: list[float] = []
    train(images, name, Budget(steps=len(first)), lambda step, loss: losses.append(loss))
    assert losses == pytest.approx(first, rel=0.02)  # another CPU rounds differently


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_training_lowers_the_loss(images: torch.Tensor, name: str) -> None:
    losses: list[float] = []
    budget = Budget(steps=24, batch=4, warmup=4)
    train(images[:4], name, budget, lambda step, loss: losses.append(loss))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_weights_are_small_and_reconstruct_held_out_pictures(data: Path, name: str) -> None:
    folder = SHIPPED / f"vae-{name}"
    weights = folder / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 2_000_000
    assert recipe_of(name)["weights"] == sha256_file(weights)
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    held_out = read([data / "openmoji-val/00000.tar"], RESOLUTION)[1]
    found = psnr(vae, held_out)
    assert found > 18.5
    assert found == pytest.approx(recipe_of(name)["held_out_psnr_db"], abs=0.05)
    latents = encode_means(vae, held_out[:96])
    assert latents.shape == (96, 16, 8, 8)
    normalised = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(normalised.mean())) < 0.1
    assert abs(float(normalised.std()) - 1) < 0.1


def test_the_recipes_differ_in_the_loss_only() -> None:
    configs = [json.loads((SHIPPED / f"vae-{name}/config.json").read_text()) for name in RECIPES]
    for config in configs:
        del config["shift_factor"], config["scaling_factor"]
    assert configs[0] == configs[1]
    plain, equi = (recipe_of(name) for name in RECIPES)
    own = {"recipe", "weights", "minutes", "first_losses", "held_out_psnr_db"}
    assert {k: v for k, v in plain.items() if k not in own} == {
        k: v for k, v in equi.items() if k not in own
    }
