"""Moments to latents and back, against closed forms and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shards import Norm
from shards.read.latents import draw, undraw


def test_by_hand() -> None:
    moments = torch.tensor([3.0, -1.0, math.log(4.0), math.log(0.25)]).view(1, 4, 1, 1).half()
    noise = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    norm = Norm((1.0, -2.0), (10.0, 0.5))
    # (3 + 2 * 0.5 - 1) * 10 and (-1 + 0.5 * 2 + 2) * 0.5; log(4) is rounded to float16
    assert draw(moments, norm, noise).flatten().tolist() == pytest.approx([30, 1], rel=2e-3)
    assert draw(moments, norm, 0 * noise).flatten().tolist() == [20.0, 0.5]


def test_logvar_is_clamped() -> None:
    moments = torch.tensor([0.0, 0.0, 1000.0, -1000.0]).view(1, 4, 1, 1)
    latents = draw(moments, Norm((0.0,), (1.0,)), torch.ones(1, 2, 1, 1)).flatten().tolist()
    assert latents == pytest.approx([math.exp(10), math.exp(-15)], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_diffusers(dtype: torch.dtype) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    generator = torch.Generator().manual_seed(0)
    moments = (8 * torch.randn(3, 8, 5, 4, generator=generator)).to(dtype)
    distribution = DiagonalGaussianDistribution(moments.float())
    expected = distribution.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(3, 4, 5, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw(moments, Norm((0.0,), (1.0,)), noise), expected)
    shift, scale = 0.1159, 0.3611
    assert torch.equal(draw(moments, Norm((shift,), (scale,)), noise), (expected - shift) * scale)


def test_latents_are_normalised_and_nothing_is_drawn() -> None:
    latents = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1).half()
    drawn = draw(latents, Norm((1.0, -2.0), (10.0, 0.5)), None)
    assert drawn.dtype == torch.float32
    assert drawn.flatten().tolist() == [20.0, 0.5]


PLACES = np.random.default_rng(0).uniform(0.5, 2, (3, 4, 4)).astype(np.float32)  # (C, H, W)


@pytest.mark.parametrize(
    "norm",
    [
        Norm((0.3,), (1.7,)),
        Norm((1.0, -2.0, 3.0), (0.1, 2.0, 30.0)),
        Norm((0.5,), PLACES),
        Norm(PLACES - 1, PLACES[:1]),
    ],
)
def test_undraw_is_the_inverse(norm: Norm) -> None:
    moments = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    moments[:, 3:] = -100  # no spread: the draw is the mean
    latents = draw(moments, norm, torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(undraw(latents, norm), moments[:, :3])


def test_a_norm_of_each_channel_and_place() -> None:
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    for shift, scale in ((PLACES - 1, PLACES), (PLACES[:, :1], PLACES[0]), (PLACES[:, 0, 0], [2])):
        axes = [np.float32(v)[:, None, None] if np.ndim(v) == 1 else v for v in (shift, scale)]
        expected = (latents.float().numpy() - axes[0]) * axes[1]
        assert np.array_equal(draw(latents, Norm(shift, scale), None).numpy(), expected)
