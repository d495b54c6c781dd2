"""Pictures of runs whose latents are normalised by what was measured: the norm in the checkpoint is undone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from eval.errors import BadRequest
from eval.images.generate import Generator, Request, generate, noise_number
from eval.watch import watch
from shards import Norm, seal
from shards.read.randomness import normal
from tests.eval.models import NORM
from tests.eval.test_watch import CONFIG, scorers
from train.checkpoints.checkpoint import CheckpointError, write_tensors
from train.checkpoints.norm import FILE, norm_tensors

PROMPTS = ["a red cat", "the blue dog", "a flag"]
LATENT = (4, 4, 4)  # of 32 pixels


def measured_norm(per_place: bool) -> Norm:
    """A shift and a scale for each channel, or each place of one, as `shards norm` would give them."""
    rng = np.random.default_rng(0)
    shape = LATENT if per_place else LATENT[:1]
    shift, scale = rng.normal(1.0, 2.0, shape), rng.uniform(0.05, 0.6, shape)
    return Norm(tuple(shift.tolist()), tuple(scale.tolist()))


def save_norm(run: Path, norm: Norm, per_place: bool) -> None:
    """Changes a run's checkpoints to those of one that measured its norm."""
    method = "measured-per-place" if per_place else "measured"
    about = {"method": method, "digest": "1" * 64, "rows": 4_096, "complete": "2" * 64}
    for step in (run / "checkpoints").iterdir():
        record = manifest(step)
        record["data"]["latents"] |= {"norm": norm.record(), "measured": about}
        name, entry = write_tensors(step / FILE, norm_tensors(record), {})
        record["files"][name] = entry
        (step / "manifest.json").write_bytes(seal(record))


def manifest(step: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((step / "manifest.json").read_bytes())
    del record["digest"]
    return record


@pytest.fixture(params=[False, True], ids=["per channel", "per place"])
def measured(request: pytest.FixtureRequest, run: Path, tmp_path: Path) -> tuple[Request, Norm]:
    """What to generate of a run with such a norm. Its weights move nothing: the noise is what is sampled."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    norm = measured_norm(request.param)
    save_norm(folder, norm, request.param)
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS))
    return Request(
        checkpoint=folder, prompts=tmp_path / "few.json", save_dir=tmp_path / "out", num_inference_steps=2,
        ema_weights=False,
    ), norm  # fmt: skip


def expected(request: Request, norm: Norm, vae_folder: Path) -> torch.Tensor:
    """Pixels (B, 3, 32, 32) in [-1, 1] of the noise, by plain diffusers: latents / scale + shift."""
    keys = [noise_number("few", f"{i:05d}", 0) for i in range(len(PROMPTS))]
    noise = normal(request.seed, "generate", keys, LATENT).double().numpy()
    shape = (-1, 1, 1) if len(np.shape(norm.shift)) == 1 else LATENT
    latents = noise / np.reshape(norm.scale, shape) + np.reshape(norm.shift, shape)
    decoder = AutoencoderKL.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        pixels: torch.Tensor = decoder.decode(torch.from_numpy(latents).float()).sample
    return pixels.clamp(-1, 1)


def pictures(folder: Path) -> np.ndarray:
    files = sorted((folder / "images").rglob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in files]).astype(int)


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels + 1) * 127.5).permute(0, 2, 3, 1).round().numpy().astype(int)


def test_pictures_are_plain_diffusers_of_the_latents(
    measured: tuple[Request, Norm], vae_folder: Path
) -> None:
    request, norm = measured
    settings = generate(request)["settings"]
    assert settings["norm"] == norm.summary()
    made, right = pictures(request.save_dir), as_bytes(expected(request, norm, vae_folder))
    assert np.abs(made - right).max() <= 1
    other = as_bytes(expected(request, Norm(NORM["shift"], NORM["scale"]), vae_folder))
    assert np.abs(made - other).max() > 8  # the columns' own norm is not what is undone


def test_pictures_of_a_run_that_is_watched(
    measured: tuple[Request, Norm], vae_folder: Path
) -> None:
    request, norm = measured
    run = request.checkpoint
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    watched = replace(request, save_dir=run / "eval")
    assert watch(run, watched, scorers(), once=True) == 0
    right = as_bytes(expected(request, norm, vae_folder))
    for step in ("step-00000010", "step-00000020"):
        assert np.abs(pictures(run / "eval" / step) - right).max() <= 1


def test_a_norm_by_place_is_of_one_size(measured: tuple[Request, Norm]) -> None:
    """Before anything is sampled or written; one by channel takes any size."""
    request, norm = measured
    larger = replace(request, resolution=64)
    if len(np.shape(norm.shift)) == 1:
        assert Generator.load(larger).latent_shape == (4, 8, 8)
        return
    with pytest.raises(
        BadRequest, match=r"--resolution 64: norm.shift: found an array of \(4, 4, 4\)"
    ):
        generate(larger)
    assert not request.save_dir.exists()


def test_a_damaged_norm_is_another_checkpoints(measured: tuple[Request, Norm]) -> None:
    request, norm = measured
    step = request.checkpoint / "checkpoints/step-00000020"
    path = step / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert Generator.load(request).identity["step"] == 10  # falls back
    with pytest.raises(CheckpointError, match=rf"is damaged: {FILE} is not the"):
        generate(replace(request, checkpoint=step))
    # a file that its manifest names, and yet no norm or another one
    tensors = norm_tensors(manifest(step))
    for changed, message in (
        ({"shift": tensors["shift"]}, "expected shift and scale"),
        (tensors | {"scale": tensors["scale"] * 0}, "none of them 0"),
        (tensors | {"shift": tensors["shift"] + 1}, "another norm than that of"),
    ):
        path.unlink()
        name, entry = write_tensors(path, changed, {})
        record = manifest(step)
        record["files"][name] = entry
        (step / "manifest.json").write_bytes(seal(record))
        with pytest.raises(CheckpointError, match=message):
            generate(replace(request, checkpoint=step))
    assert not request.save_dir.exists()
