"""The sampling loop against the reference's own run, and against the loop written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eval.images.sampler import SAMPLERS, integrate, sample
from train.model.dit import DiT, DiTConfig
from train.model.flow import inference_sigmas

GOLDEN = Path(__file__).parents[2] / "golden"


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


def captions(text: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[real] for row, real in zip(text, mask.bool(), strict=True)]


def test_golden_sampling(model: DiT, golden: dict[str, Tensor]) -> None:
    text, mask, empty = prompts(golden)
    actual = sample(
        model, captions(text, mask), empty, noise=golden["in.latents"], steps=4, guidance=6.0
    )
    torch.testing.assert_close(actual, golden["out_latents"], atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("longer", [False, True])
def test_one_guided_batch_is_two_separate_passes(
    model: DiT, golden: dict[str, Tensor], longer: bool
) -> None:
    """Also with an empty caption that is longer than the prompts."""
    text, mask, empty = prompts(golden)
    if longer:
        empty = golden["text_hidden_states"][3, :7]
        text, mask = text[:, :3], mask[:, :3]
    latents = golden["in.latents"]
    nothing, alone = empty.expand(2, -1, -1), torch.ones(2, len(empty), dtype=torch.int64)
    sigmas = golden["sigmas"]
    for i in range(4):
        t = golden["timesteps"][i].expand(2)
        with_prompt, without = model(latents, t, text, mask), model(latents, t, nothing, alone)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * (6 * with_prompt - 5 * without)
    actual = sample(
        model, captions(text, mask), empty, noise=golden["in.latents"], steps=4, guidance=6.0
    )
    torch.testing.assert_close(actual, latents, atol=2e-5, rtol=0)


@torch.inference_mode()
def test_without_guidance_the_empty_caption_is_not_run(
    model: DiT, golden: dict[str, Tensor]
) -> None:
    text, mask, empty = prompts(golden)
    latents = golden["in.latents"]
    for i in range(4):
        velocity = model(latents, golden["timesteps"][i].expand(2), text, mask)
        latents = latents + (golden["sigmas"][i + 1] - golden["sigmas"][i]) * velocity
    actual = sample(
        model,
        captions(text, mask),
        torch.full_like(empty, torch.nan),
        noise=golden["in.latents"],
        steps=4,
        guidance=1.0,
    )
    torch.testing.assert_close(actual, latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_stay_fp32_between_steps_under_autocast(
    model: DiT, golden: dict[str, Tensor], sampler: str
) -> None:
    text, mask, empty = prompts(golden)
    options = {"noise": golden["in.latents"], "steps": 4, "sampler": sampler}
    whole = sample(model, captions(text, mask), empty, **options)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sample(model, captions(text, mask), empty, **options)  # type: ignore[arg-type]
    assert actual.dtype == torch.float32
    assert not torch.equal(actual, actual.bfloat16().float())  # nor were they rounded on the way
    assert 1e-5 < (actual - whole).norm() / whole.norm() < 0.05


# Solvers -------------------------------------------------------------------------------------------------------------


def curved(x: Tensor, sigma: float) -> Tensor:
    """A velocity that is linear in nothing."""
    return torch.sin(2 * x) + sigma**2 * x.roll(1, -1) - 0.3 * torch.cos(5 * x * sigma)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 25])
def test_dpmpp_2m_is_that_of_diffusers(steps: int) -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    theirs.sigmas = inference_sigmas(steps)  # from 1 to 0: its own begin a little below 1
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    latents = noise
    for i, t in enumerate(theirs.timesteps):
        velocity = curved(latents, float(theirs.sigmas[i]))
        latents = theirs.step(velocity, t, latents).prev_sample
    actual = integrate(curved, noise, inference_sigmas(steps).tolist(), "dpmpp-2m")
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, latents, atol=2e-5, rtol=2e-5)


MEAN, DEVIATION = 0.7, 0.4


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """E[noise - x0 | x] where x0 is of N(MEAN, DEVIATION^2): x is of N((1 - sigma) MEAN, variance)."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    away = (x - (1 - sigma) * MEAN) / variance
    return sigma * away - (MEAN + (1 - sigma) * DEVIATION**2 * away)


def exact(noise: Tensor, sigma: float) -> Tensor:
    """Where the flow leads from noise at sigma = 1."""
    variance = ((1 - sigma) * DEVIATION) ** 2 + sigma**2
    return (1 - sigma) * MEAN + variance**0.5 * noise


def error(sampler: str, steps: int, first: float = 1.0, last: float = 0.0) -> float:
    """The largest at the last of evenly spaced sigmas."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    sigmas = torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist()
    actual = integrate(gaussian, exact(noise, first), sigmas, sampler)
    return float((actual - exact(noise, last)).abs().max())


def test_orders_of_convergence_on_a_gaussian() -> None:
    """Half the step, and Euler's error is a half, the other's a quarter; at equal steps it is smaller."""
    orders = {
        name: [
            math.log2(error(name, n, 0.9, 0.1) / error(name, 2 * n, 0.9, 0.1)) for n in (64, 256)
        ]
        for name in SAMPLERS
    }
    assert orders["euler"] == pytest.approx([1, 1], abs=0.1)
    assert orders["dpmpp-2m"] == pytest.approx([2, 2], abs=0.1)
    for steps in (8, 10, 25, 50, 200):  # all the way, where lambda is infinite at both ends
        assert error("dpmpp-2m", steps) < 0.4 * error("euler", steps), steps
    assert math.log2(error("dpmpp-2m", 256) / error("dpmpp-2m", 512)) > 1.7


def test_one_step_is_the_same_by_both() -> None:
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    item, other = (integrate(curved, noise, [1.0, 0.0], name) for name in ("euler", "dpmpp-2m"))
    torch.testing.assert_close(item, other, atol=1e-6, rtol=0)


class Counting(DiT):
    """Writes down how many samples each pass had."""

    def forward(self, latents: Tensor, *rest: Tensor) -> Tensor:
        self.passes = [*getattr(self, "passes", []), len(latents)]
        return super().forward(latents, *rest)


@torch.inference_mode()
def test_guidance_within_an_interval(model: DiT, golden: dict[str, Tensor]) -> None:
    """Outside of it the prompts alone are run: half the cost, and the sum written out by hand."""
    text, mask, empty = prompts(golden)
    sigmas = golden["sigmas"].tolist()
    latents = golden["in.latents"]
    nothing, alone = empty.expand(2, -1, -1), torch.ones(2, len(empty), dtype=torch.int64)
    for i in range(4):
        t = golden["timesteps"][i].expand(2)
        velocity = model(latents, t, text, mask)
        if i in (1, 2):
            velocity = 6 * velocity - 5 * model(latents, t, nothing, alone)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    counting = Counting(model.config)
    counting.load_state_dict(model.state_dict())
    actual = sample(
        counting, captions(text, mask), empty, noise=golden["in.latents"], steps=4, guidance=6.0,
        interval=(sigmas[2], sigmas[1]),
    )  # fmt: skip
    assert counting.passes == [2, 4, 4, 2]
    torch.testing.assert_close(actual, latents, atol=2e-5, rtol=0)
    everywhere = sample(
        model, captions(text, mask), empty, noise=golden["in.latents"], steps=4, interval=(0.0, 1.0)
    )
    torch.testing.assert_close(everywhere, golden["out_latents"], atol=1e-5, rtol=0)


class Knowing(torch.nn.Module):
    """In place of a model: the closed form of N(MEAN, DEVIATION^2), as velocity or as E[x0 | x]. Its prompt shifts the
    mean, so that guidance has an effect. Writes down the levels that it was asked for."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction, self.sigmas = prediction, list[float]()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, ends: Tensor) -> Tensor:
        sigma = float(timestep[0]) / 1000
        self.sigmas.append(sigma)
        by_prompt = text[ends[:-1], 0].view(-1, 1, 1, 1)
        velocity = gaussian(x - (1 - sigma) * by_prompt, sigma) - by_prompt
        return velocity if self.prediction == "velocity" else x - sigma * velocity


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_model_that_says_the_latent_samples_the_same(sampler: str, guidance: float) -> None:
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, empty = [torch.tensor([[0.5], [0.0]])] * 3, torch.zeros(1, 1)
    results = []
    for prediction in ("velocity", "latent"):
        model = Knowing(prediction)
        results.append(
            sample(
                model, text, empty, noise=noise, steps=25, guidance=guidance, sampler=sampler, shift=2.0,
                prediction=prediction,
            )  # type: ignore[arg-type]  # what a DiT does
        )  # fmt: skip
        s = torch.linspace(1, 0.002 / 1.001, 25, dtype=torch.float64)
        assert model.sigmas == pytest.approx((2 * s / (1 + s)).tolist(), abs=1e-6)
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    if guidance == 1:
        expected = exact(noise, 0.0) + 0.5
        assert (results[1] - expected).abs().mean() < 0.1  # of values around 1.2
