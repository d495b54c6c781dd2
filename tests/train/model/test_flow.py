"""Noise levels, loss, gradients and sampling against the original's."""

import math

import numpy as np
import pytest
import torch

import configs
from configs import ConfigError
from shards import Norm
from shards.read.latents import draw
from tests.train.goldens import golden, model_of
from train.model import flow
from train.model.config import LEAST_SHIFT, MOST_SHIFT, shift_of
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


# The shift of the noise levels --------------------------------------------------------------------

LATENTS = {  # (C, H, W) at 256 px, and the shift of its dimension
    "SD": ((4, 32, 32), 1.0),
    "FLUX": ((16, 32, 32), 2.0),
    "FLUX.2": ((128, 16, 16), 2.8284),
    "DC-AE f32c32": ((32, 8, 8), 0.70711),
    "RAE, DINOv2-B": ((768, 16, 16), 6.9282),
    "RAEv2, DINOv3-L": ((1024, 16, 16), 8.0),
}


@pytest.mark.parametrize("name", LATENTS)
def test_the_map_is_that_of_rae_and_raev2(name: str) -> None:
    """bytetriper/RAE, stage2/transport/transport.py, and nanovisionx/RAEv2, src/stage2/transport/transport.py, both in
    `Transport.sample`: t = a t / (1 + (a - 1) t), with a = sqrt(time_dist_shift_dim / time_dist_shift_base), of base
    4096 (RAE's stage2/train.py, RAEv2's src/train.py and configs). They draw t from a continuum, here it is a level."""
    shape, expected = LATENTS[name]
    shift = FlowConfig(shift="auto").resolved(math.prod(shape)).timestep_shift
    assert shift == pytest.approx(expected, rel=1e-4)
    a = (np.prod(shape) / 4096) ** 0.5
    t = np.arange(1000, 0, -1) / 1000
    theirs = a * t / (1 + (a - 1) * t)
    assert np.abs(flow.train_sigmas(shift).double().numpy() - theirs).max() < 1e-6
    assert flow.train_timesteps(shift)[0] == 1000


@pytest.mark.parametrize("shift", [0.7071, 1.0, 2.0, 6.93])
def test_the_sampler_has_a_table_of_its_own(shift: float) -> None:
    """The end level included, which is the last one of training, shifted once more."""

    def shifted(s: np.ndarray) -> np.ndarray:
        return shift * s / (1 + (shift - 1) * s)

    for steps in (1, 4, 25):
        expected = [*shifted(np.linspace(1, shifted(np.array(0.001)), steps)), 0.0]
        np.testing.assert_allclose(flow.inference_sigmas(steps, shift), expected, atol=1e-6)


@pytest.mark.parametrize("shift", [LEAST_SHIFT, 0.7071, 1.0, 3.0, 8.0, MOST_SHIFT])
def test_levels_of_any_shift_are_told_apart(shift: float) -> None:
    sigmas = flow.train_sigmas(shift)
    assert sigmas[0] == pytest.approx(1, abs=2e-6)
    assert sigmas.max() <= 1
    assert (sigmas.diff() < 0).all()
    assert (sigmas > 0).all()
    assert flow.level_of(sigmas, 1000, shift).tolist() == list(range(1000))
    sigma, timestep = flow.noise_levels(torch.tensor([0.0, 0.9999]), shift)
    assert torch.equal(sigma, sigmas[[0, 999]])
    assert torch.equal(timestep, sigma * 1000)


def test_a_shift_of_three_changes_no_bit() -> None:
    """The formula of before, in its order, without a limit."""
    s = torch.from_numpy(np.linspace(1, 1000, 1000, dtype=np.float32)[::-1].copy()) / 1000
    assert torch.equal(flow.train_sigmas(), 3.0 * s / (1 + 2.0 * s))
    assert torch.equal(flow.train_sigmas(3.0), flow.train_sigmas())


@pytest.mark.parametrize("value", ["0", "-1", "0.001", "1e9", ".nan", "true", "automatic"])
def test_a_shift_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="shift: found"):
        configs.load(FlowConfig, None, [f"shift={value}"])


def test_a_shift_is_a_number_or_follows_the_latent() -> None:
    assert configs.load(FlowConfig, None, ["shift=2"]).resolved(4096).shift == 2.0
    config = configs.load(FlowConfig, None, ["shift=auto"])
    assert config.shift == "auto"
    assert config.resolved(4096).shift == shift_of(4096) == 1.0


def test_what_the_reference_does_is_the_identity_of_before() -> None:
    before = {
        "weighting": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "precondition": False
    }  # fmt: skip
    assert FlowConfig().identity() == FlowConfig(shift=3).identity() == before
    other = FlowConfig(shift=2, prediction="latent").identity()
    assert other == {**before, "shift": 2.0, "prediction": "latent"}


# Prediction of the latent -------------------------------------------------------------------------


def test_the_loss_of_a_latent_is_that_of_its_velocity() -> None:
    """RAEv2's `Transport.training_losses`, in numpy: v = (z - x) / max(s, 0.05) of the latent and of the output."""
    g = np.random.default_rng(0)
    x, noise, output = g.standard_normal((3, 5, 2, 4, 4))
    s = np.array([0.003, 0.0499, 0.0501, 0.4, 1.0]).reshape(5, 1, 1, 1)
    z = (1 - s) * x + s * noise
    below = np.maximum(s, 0.05)
    expected = (((z - output) / below - (z - x) / below) ** 2).mean((1, 2, 3))
    tensors = (torch.from_numpy(value).float() for value in (output, x, noise, s.ravel()))
    actual = flow.losses(FlowConfig(prediction="latent"), *tensors)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    weighted = FlowConfig(prediction="latent", weighting="cosmap")
    tensors = (torch.from_numpy(value).float() for value in (output, x, noise, s.ravel()))
    cosmap = 2 / (np.pi * (1 - 2 * s + 2 * s**2)).ravel()
    np.testing.assert_allclose(flow.losses(weighted, *tensors), expected * cosmap, rtol=1e-5)


def test_above_the_least_level_both_predictions_have_the_same_loss() -> None:
    """A latent x' and the velocity (z - x') / s say the same."""
    latents, noise, guess = torch.randn(3, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.06, 1, 6)
    noisy = flow.interpolate(latents, noise, sigma)
    velocity = torch.stack(
        [
            flow.velocity_of(guess[i], noisy[i], float(sigma[i]), prediction="latent")
            for i in range(6)
        ]
    )
    of_latent = flow.losses(FlowConfig(prediction="latent"), guess, latents, noise, sigma)
    of_velocity = flow.losses(FlowConfig(), velocity, latents, noise, sigma)
    torch.testing.assert_close(of_latent, of_velocity, rtol=1e-4, atol=0)
    exact = flow.velocity_of(latents[0], noisy[0], float(sigma[0]), prediction="latent")
    torch.testing.assert_close(exact, noise[0] - latents[0], atol=1e-5, rtol=1e-5)
    assert flow.velocity_of(guess, noisy, 0.5) is guess


def test_the_gradient_stays_finite_where_there_is_hardly_any_noise() -> None:
    latents, noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1e-5, 1e-3, 0.02, 0.05])
    output = (latents + 1).requires_grad_()
    flow.losses(FlowConfig(prediction="latent"), output, latents, noise, sigma).sum().backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, torch.full_like(output, 2 * 400 / 32))


def test_two_estimates_of_the_latent_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"flow\.precondition true and flow\.prediction latent"):
        configs.load(FlowConfig, None, ["precondition=true", "prediction=latent"])


def test_the_levels_that_stand_for_a_schedule_are_its_quantiles() -> None:
    assert flow.fixed_sigmas() == pytest.approx(
        [0.9780, 0.9284, 0.8684, 0.7951, 0.7034, 0.5855, 0.4286, 0.1880], abs=0.03
    )
    for config in (FlowConfig(), FlowConfig(weighting="none", shift=1.5)):
        normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
        drawn = flow.noise_levels(flow.density(config, normal), config.timestep_shift)[0]
        levels = torch.tensor(flow.schedule_sigmas(config))
        assert len(levels) == 64
        middles = drawn.sort(descending=True).values.unflatten(0, (64, -1)).mean(1)
        torch.testing.assert_close(levels, middles, atol=0.01, rtol=0)
