"""The benchmark of generating at toy size: both sides sample the same pictures. Nothing is timed."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from encode.models.pixels import to_images
from eval.images.generate import Generator, generate, noise_number
from shards.read.latents import undraw
from shards.read.randomness import normal
from tests.bench.evaluation.generate import TOY, Bare, bench, write_models
from tests.forks import ended


def test_it_measures_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options = {"json": path, "folder": tmp_path, "rounds": 2, "threads": 1, "light": True}
    ended(lambda: bench(argparse.Namespace(**options)), tmp_path / "log")
    found = json.loads(path.read_text())["generate"]
    assert len(found["cpu"]["ratios"]) == 2
    assert min(found["cpu_s"].values()) > 0
    assert found["promises"][0]["promised"] == "<= 1.05"


def test_the_bare_loop_samples_what_generate_samples(tmp_path: Path) -> None:
    """But for its noise: with that of the set it makes the same pixels."""
    request = write_models(tmp_path, TOY)
    generator = Generator.load(request)
    assert request.prompts is not None
    prompts = json.loads(request.prompts.read_text())
    bare = Bare(generator, request, prompts)
    generate(request, generator)
    keys = [noise_number("prompts", f"{i:05d}", 0) for i in range(TOY.batch)]
    noise = normal(request.seed, "generate", keys, generator.latent_shape)
    text, _ = bare.batches[0]
    pixels = generator.vae.decode(undraw(bare.latents(text, noise), generator.norm))
    stored = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "set/images").iterdir())]
    assert np.array_equal(to_images(pixels), np.stack(stored[: TOY.batch]))
