"""The sampling loop against the reference's own run, and against the loop written out by hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.sampler import sample
from train.model import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model() -> DiT:
    """The tiny model of the reference's training golden."""
    config = json.loads((GOLDEN / "train_loss_flux.json").read_text())
    fields = config["dit_config"] | {"base_config": config["base_config"]}
    model = DiT(DiTConfig.from_reference(fields))
    state = load_file(GOLDEN / "train_loss_flux.safetensors")
    model.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("dit.")})
    return model.eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sample_cfg6_4steps.safetensors")


def prompts(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """text, mask and the empty caption's tokens; the golden has [empty x 2, prompts x 2]."""
    text, mask = golden["text_hidden_states"], golden["attention_mask"]
    return text[2:], mask[2:], text[0, : int(mask[0].sum())]


def test_golden_sampling(model: DiT, golden: dict[str, Tensor]) -> None:
    text, mask, empty = prompts(golden)
    found = sample(model, text, mask, empty, noise=golden["in.latents"], steps=4, guidance=6.0)
    torch.testing.assert_close(found, golden["out_latents"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_one_guided_batch_is_two_separate_passes(model: DiT, golden: dict[str, Tensor]) -> None:
    text, mask, empty = prompts(golden)
    latents = golden["in.latents"]
    nothing, alone = empty.expand(2, -1, -1), torch.ones(2, len(empty), dtype=torch.int64)
    sigmas = golden["sigmas"]
    for i in range(4):
        t = golden["timesteps"][i].expand(2)
        with_prompt, without = model(latents, t, text, mask), model(latents, t, nothing, alone)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * (6 * with_prompt - 5 * without)
    found = sample(model, text, mask, empty, noise=golden["in.latents"], steps=4, guidance=6.0)
    torch.testing.assert_close(found, latents, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_without_guidance_the_empty_caption_is_not_run(
    model: DiT, golden: dict[str, Tensor]
) -> None:
    text, mask, empty = prompts(golden)
    latents = golden["in.latents"]
    for i in range(4):
        velocity = model(latents, golden["timesteps"][i].expand(2), text, mask)
        latents = latents + (golden["sigmas"][i + 1] - golden["sigmas"][i]) * velocity
    found = sample(
        model,
        text,
        mask,
        torch.full_like(empty, torch.nan),
        noise=golden["in.latents"],
        steps=4,
        guidance=1.0,
    )
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=0)


def test_an_empty_caption_longer_than_the_prompts(model: DiT, golden: dict[str, Tensor]) -> None:
    text, mask, _ = prompts(golden)
    long = golden["text_hidden_states"][3, :7]
    short = sample(model, text[:1, :3], mask[:1, :3], long, noise=golden["in.latents"][:1], steps=4)
    padded = sample(model, text[:1], mask[:1], long, noise=golden["in.latents"][:1], steps=4)
    torch.testing.assert_close(short, padded, atol=1e-5, rtol=0)


def test_latents_stay_fp32_between_steps_under_autocast(
    model: DiT, golden: dict[str, Tensor]
) -> None:
    text, mask, empty = prompts(golden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample(model, text, mask, empty, noise=golden["in.latents"], steps=4)
    assert found.dtype == torch.float32
    error = (found - golden["out_latents"]).norm() / golden["out_latents"].norm()
    assert 1e-5 < error < 0.05
