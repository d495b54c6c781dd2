"""Noise levels, loss, gradients and sampling against the original's."""

import pytest
import torch

from shards import Norm
from shards.read.latents import draw
from tests.train.goldens import golden, model_of
from train.model import flow
from train.model.flow import FlowConfig


def test_noise_levels_are_the_originals() -> None:
    tables, _ = golden("scheduler_tables")
    torch.testing.assert_close(flow.train_sigmas(), tables["train_sigmas"], atol=1e-7, rtol=0)
    torch.testing.assert_close(flow.train_timesteps(), tables["train_timesteps"], atol=1e-4, rtol=0)
    for steps in (4, 25, 28, 50):
        sigmas = flow.inference_sigmas(steps)
        torch.testing.assert_close(sigmas, tables[f"infer{steps}_sigmas"], atol=1e-6, rtol=0)
        torch.testing.assert_close(
            sigmas[:-1] * 1000, tables[f"infer{steps}_timesteps"], atol=1e-3, rtol=0
        )


def test_densities_and_weights_are_the_originals() -> None:
    tables, _ = golden("scheduler_tables")
    normal = torch.randn(64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        flow.density(FlowConfig(), normal), tables["density_logit_normal_seed5_n64"]
    )
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(uniform, tables["density_none_seed5_n64"])
    torch.testing.assert_close(flow.mode_density(uniform, 1.29), tables["density_mode_seed5_n64"])
    for scheme in ("sigma_sqrt", "cosmap"):
        expected = tables[f"weighting_{scheme}_of_train_sigmas"]
        torch.testing.assert_close(flow.LOSS_WEIGHTS[scheme](tables["train_sigmas"]), expected)


def test_other_densities_are_what_they_say() -> None:
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    uniform = flow.density(FlowConfig(weighting="none"), normal)
    assert abs(uniform.mean() - 1 / 2) < 0.01
    assert abs(uniform.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("name", ["train_loss_flux", "train_loss_qwen"])
def test_a_training_step_is_the_originals(name: str) -> None:
    tensors, settings = golden(name)
    weights, weights_settings = golden("train_loss_flux")
    model = model_of(weights, weights_settings, "dit.")
    shift, scale = tensors.get("shift"), tensors.get("scale")
    norm = (
        Norm((settings["shift"],), (settings["scale"],))
        if shift is None or scale is None
        else Norm(tuple(shift.flatten().tolist()), tuple(scale.flatten().tolist()))
    )
    raw, noise = tensors["in.latents_raw"], tensors["in.noise"]
    latents = draw(torch.cat([raw, torch.full_like(raw, -30.0)], 1), norm, torch.zeros_like(raw))
    sigma, timestep = flow.noise_levels(tensors["in.u"])
    torch.testing.assert_close(timestep, tensors["timesteps"], atol=1e-4, rtol=0)
    noisy = flow.interpolate(latents, noise, sigma)
    torch.testing.assert_close(noisy, tensors["noisy"], atol=1e-5, rtol=0)
    predicted = model(noisy, timestep, tensors["text_hidden_states"], tensors["in.attention_mask"])
    torch.testing.assert_close(predicted, tensors["pred"], atol=1e-5, rtol=0)
    loss = flow.losses(FlowConfig(), predicted, latents, noise, sigma).mean()
    torch.testing.assert_close(loss, tensors["loss"].reshape(()), atol=1e-5, rtol=0)
    loss.backward()
    parameters = dict(model.named_parameters())
    expected = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(expected) == 3
    for parameter, gradient in expected.items():
        torch.testing.assert_close(parameters[parameter].grad, gradient, atol=1e-5, rtol=0)
    total = torch.nn.utils.get_total_norm(p.grad for p in parameters.values() if p.grad is not None)
    torch.testing.assert_close(total, tensors["grad_norm"].reshape(()), atol=1e-5, rtol=0)


def test_guided_sampling_is_the_originals() -> None:
    tensors, settings = golden("sample_cfg6_4steps")
    model = model_of(*golden("train_loss_flux"), "dit.")
    x, sigmas = tensors["in.latents"], flow.inference_sigmas(4)
    with torch.no_grad():
        for before, after, expected in zip(
            sigmas[:-1], sigmas[1:], tensors["latents_per_step"], strict=True
        ):
            t = (before * 1000).expand(4)
            v = model(
                torch.cat([x, x]), t, tensors["text_hidden_states"], tensors["attention_mask"]
            )
            without, conditional = v.chunk(2)
            x = x + (after - before) * (
                without + settings["guidance_scale"] * (conditional - without)
            )
            torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)


def test_precondition_compares_an_estimate_of_the_latent() -> None:
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigma = torch.tensor([0.2, 0.5, 1.0])
    exact = flow.target(latents, noise)  # noisy - sigma * velocity is the latent
    for config in (FlowConfig(), FlowConfig(precondition=True)):
        assert flow.losses(config, exact, latents, noise, sigma).max() < 1e-10
    off = flow.losses(FlowConfig(precondition=True), exact + 1, latents, noise, sigma)
    torch.testing.assert_close(off, sigma**2)
