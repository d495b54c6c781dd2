"""A checkpoint and prompts in, pictures out.

Each picture's noise is a function of (seed, benchmark, prompt id, number), and batches are cut from the whole list of
prompts, so an interrupted run ends with the same files, byte for byte, as an undisturbed one. Another batch size gives
the same pictures but for rounding. Latents are de-normalised before the VAE decodes them.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from encode.images import to_images
from encode.text import TextEncoder, load_text
from encode.vae import Vae, load_vae
from shards import Norm
from shards.latents import undraw
from shards.randomness import normal
from shards.stream import pad_text
from train.checkpoint import CheckpointError, load_for_sampling
from train.model import DiT

from .benchmarks import BENCHMARKS
from .imageset import ImageSet
from .layouts import File
from .sampler import sample

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; names and defaults are the command line's."""

    checkpoint: Path
    prompts: Path
    save_dir: Path
    benchmark: str = "prompts"
    tag: int | None = None
    num_inference_steps: int = 25
    guidance_scale: float = 6.0
    batch_size: int = 32
    seed: int = 42
    ema_weights: bool = True
    vae: str | None = None
    text_encoder: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Generator:
    """Everything that turns prompts into pictures, on one device."""

    model: DiT
    text: TextEncoder
    vae: Vae
    norm: Norm
    latent_shape: tuple[int, int, int]  # (C, H, W)
    identity: Json  # of weights, VAE and text encoder

    @classmethod
    def load(cls, request: Request) -> "Generator":
        """Load the checkpoint and the encoders that its columns name, checking their weights."""
        step = request.checkpoint
        if request.tag is not None:
            step = step / "checkpoints" / f"step-{request.tag:08d}"
        model, manifest = load_for_sampling(step, request.ema_weights)
        if "data" not in manifest:
            raise CheckpointError(
                f"{step}: found imported weights and no word of their VAE and text encoder. Import them again and name "
                "the latent column and the text column that these made"
            )
        latents, text = manifest["data"]["latents"], manifest["data"]["text"]
        vae = load_vae(moved(latents["identity"]["encoder"], request.vae), request.device)
        _, height, width = vae.moments_shape(latents["identity"]["preprocess"]["resolution"])
        # where the column is of ids, the encoder that ran in the step
        read_by = manifest["data"].get("text_encoder", text["identity"])
        encoder = moved(read_by["encoder"], request.text_encoder)
        weights = manifest["files"][
            "ema.safetensors" if request.ema_weights else "weights.safetensors"
        ]
        return cls(
            model.to(request.device),
            load_text({**read_by, "encoder": encoder}, request.device),
            vae,
            Norm(tuple(latents["norm"]["shift"]), tuple(latents["norm"]["scale"])),
            (model.config.in_channels, height, width),
            {
                "weights": weights["sha256"],
                "step": manifest["step"],
                "ema": request.ema_weights,
                "vae": vae.weights,
                "text_encoder": encoder["weights"],
            },
        )

    def pictures(
        self, text: Sequence[Tensor], empty: Tensor, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Prompts' tokens [(n_i, D)] and noise (B, C, H, W) -> pixels (B, 3, H', W') in [-1, 1]."""
        device = noise.device
        ends = torch.tensor([0, *map(len, text)]).cumsum(0, dtype=torch.int32)
        padded, mask = pad_text(torch.cat(list(text)), ends)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents = sample(
                self.model, padded.to(device), mask.to(device), empty.to(device).float(),
                noise=noise, steps=steps, guidance=guidance,
            )  # fmt: skip
        return self.vae.decode(undraw(latents, self.norm))


def moved(encoder: Json, path: str | None) -> Json:
    """An encoder's identity with its files in another place; the weights still have to be the same."""
    return (
        encoder if path is None else encoder | {"path": path, "subfolder": None, "revision": None}
    )


def noise_number(benchmark: str, prompt: str, number: int) -> int:
    """The number of a prompt's picture for `shards.randomness`."""
    key = f"{benchmark}\0{prompt}\0{number}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little")


def generate(request: Request, generator: Generator | None = None) -> Json:
    """Make the pictures that are missing and return the manifest.

    Raises BadPrompts, OtherImages, CheckpointError or ModelNotUsable before anything is written.
    """
    benchmark = BENCHMARKS[request.benchmark]
    prompts = benchmark.read(request.prompts)
    generator = generator or Generator.load(request)
    settings = generator.identity | {
        "sampler": "euler",
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "batch_size": request.batch_size,
        "seed": request.seed,
        "precision": "bf16-autocast" if request.device.startswith("cuda") else "fp32",
    }
    images = ImageSet(
        request.save_dir, prompts, settings, benchmark.layout, benchmark.images_per_prompt
    )
    batches = list(cut(images.files, request.batch_size))
    standing = {file.path for file in images.files if images.has(file)}
    todo = [batch for batch in batches if any(file.path not in standing for file in batch)]
    if todo:
        empty = generator.text.encode([""])[0]
    with progress(request.save_dir.name) as bar:
        total, left = (sum(map(len, some)) for some in (batches, todo))
        task = bar.add_task("", total=total, completed=total - left)
        for batch in todo:
            asked = [(file.prompt, number) for file in batch for number in file.numbers]
            numbers = [noise_number(prompts.benchmark, p.id, number) for p, number in asked]
            noise = normal(request.seed, "generate", numbers, generator.latent_shape)
            pixels = generator.pictures(
                generator.text.encode([prompt.text for prompt, _ in asked]), empty, noise.to(request.device),
                request.num_inference_steps, request.guidance_scale,
            )  # fmt: skip
            pictures = iter(to_images(pixels))
            for file in batch:
                tiles = [next(pictures) for _ in file.numbers]
                if file.path not in standing:
                    images.save(file, tiles)
            bar.advance(task, len(batch))
    packages = ("torch", "diffusers", "transformers", "pillow")
    return images.finish({name: version(name) for name in packages} | {"device": request.device})


def cut(files: Sequence[File], batch_size: int) -> Iterator[Sequence[File]]:
    """Batches of about so many pictures, the same whatever is left to do; a file's pictures stay together."""
    each = max(1, batch_size // len(files[0].numbers))
    for start in range(0, len(files), each):
        yield files[start : start + each]


class Rate(ProgressColumn):
    """Pictures a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.2f} pictures/s")


def progress(name: str) -> Progress:
    """A bar on stderr with rate and time left."""
    return Progress(
        TextColumn(f"generate {name}"), BarColumn(), MofNCompleteColumn(), Rate(), TextColumn("ETA"),
        TimeRemainingColumn(), console=Console(file=sys.stderr),
    )  # fmt: skip
