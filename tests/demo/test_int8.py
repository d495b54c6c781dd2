"""What int8 latents cost in pictures: the demo's autoencoder on held-out drawings, beside float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encode.models import Vae
from encode.registry import ModelSpec
from eval.demo.data import read
from eval.demo.vae import RESOLUTION
from shards import Layout
from shards.format.int8 import calibrate_rows, dequantise_rows, quantise_rows

ROOT = Path(__file__).parents[2]


def psnr(decoded: Tensor, pictures: Tensor) -> float:
    """Mean of the pictures' PSNR in dB; values in [-1, 1]."""
    error = ((decoded.float().clamp(-1, 1) - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def test_decoded_pictures_lose_a_tenth_of_a_decibel_at_most(data: Path) -> None:
    """Latents are the means of a VAE that was trained on such drawings; scales from other ones."""
    spec = {"class": "AutoencoderKL", "path": str(ROOT / "configs/demo/vae-plain")}
    vae = Vae(ModelSpec.model_validate(spec), "cpu")
    images = read([data / "openmoji-val/00000.tar"], RESOLUTION)[1][:160]
    latents = torch.cat([vae.encode(part).chunk(2, 1)[0] for part in images.split(32)])
    stored = latents.numpy().astype(np.float16)
    layout = Layout("latents", stored.shape[1:], 1, element="int8")
    scales = calibrate_rows(stored[:96], layout)
    channel = np.array(scales["channel"], np.float32)
    held_out = stored[96:]
    words = quantise_rows(held_out, layout, channel)
    read_back = dequantise_rows(words, layout, channel)
    assert words.nbytes <= 0.51 * held_out.nbytes
    decoded, lossy = (
        vae.decode(torch.from_numpy(values).float()) for values in (held_out, read_back)
    )
    plain = psnr(decoded, images[96:])
    assert plain > 19  # as the demo's page has it of held-out drawings
    assert plain - psnr(lossy, images[96:]) < 0.1
    # errors that do not depend on those of the decoder add up; so a decoder of 30 dB would not lose more
    apart = psnr(lossy, decoded.float().clamp(-1, 1))
    assert 10 * np.log10(1 + 10 ** ((30 - apart) / 10)) < 0.1
    gap = read_back.astype(np.float64) - held_out.astype(np.float64)
    relative = np.linalg.norm(gap) / np.linalg.norm(held_out.astype(np.float64))
    assert abs(relative - scales["relative_error"]) < 0.2 * scales["relative_error"]
