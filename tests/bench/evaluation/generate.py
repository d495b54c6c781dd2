"""What making a set costs beyond sampling it: `generate`, beside a bare loop of the same model.

    python -m tests.bench.evaluation.generate --json FILE      # about seven minutes
    python -m tests.bench.evaluation.generate --light          # toy sizes: that it runs, and nothing else

Both sample the same pictures, in turns. The bare loop has its noise and its text ready and padded: it runs the sampler,
de-normalises, decodes, and throws the pixels away. `generate` does all that a set is: it opens the folder, draws noise
by prompt, reads the cached text and pads it, rounds to 8 bits, encodes PNG, stamps, writes and syncs each file, and
records the digests of all. Models are loaded and prompts encoded before either starts.
"""

import argparse
import io
import json
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from eval.images.generate import Generator, Request, generate
from eval.images.prompt_cache import TextCache
from eval.images.sampler import sample
from shards import exits
from shards.format.atomic import Json
from shards.read.latents import undraw
from shards.read.randomness import normal
from tests.bench import turns
from tests.bench.cost import cpu_of, paired, promise
from tests.bench.encoding.synthetic import save_gemma, save_vae
from train.checkpoints.reference import STATES
from train.model.dit import DiT, DiTConfig

from .online import dit, gemma

ROUNDS = 40
CHANNELS = 16  # of the VAEs


@dataclass(frozen=True, slots=True)
class Size:
    vae: str  # of tests.bench.encoding.synthetic.MODELS
    resolution: int
    text: dict[str, int]  # of GemmaConfig
    model: dict[str, int]  # of train.model.ModelConfig
    batch: int
    batches: int  # of a turn
    steps: int


LARGE = Size("wide", 128, gemma(128, 2), dit(256, 4), 4, 2, 10)
TOY = Size("small", 32, gemma(64, 1), dit(64, 1), 2, 2, 2)


def write_models(folder: Path, size: Size) -> Request:
    """A checkpoint as the reference keeps them, of random weights, its encoders and prompts."""
    shapes = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_width": size.text["hidden_size"],
    }
    config = DiTConfig.model_validate(size.model | shapes)
    model = DiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    (folder / "run/1").mkdir(parents=True)
    torch.save({"ema": model.state_dict()}, folder / "run/1" / STATES)
    (folder / "run/config.json").write_text(json.dumps(config.to_reference()))
    count = size.batch * size.batches
    prompts = [f"picture {i}: a dog on the road to the west" for i in range(count)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return Request(
        checkpoint=folder / "run", type="baseline-dit", prompts=folder / "prompts.json", save_dir=folder / "set",
        vae=str(save_vae(folder / "vae", size.vae)), text_encoder=str(save_gemma(folder / "gemma", size.text)),
        resolution=size.resolution, num_inference_steps=size.steps, batch_size=size.batch, text_cache=folder / "text",
        threads=torch.get_num_threads(),
    )  # fmt: skip


class Bare:
    """The loop that anybody would write: noise and text are ready, pixels are dropped."""

    def __init__(self, generator: Generator, request: Request, prompts: list[str]) -> None:
        assert request.text_cache is not None
        self.generator, self.steps = generator, request.num_inference_steps
        cache = TextCache(request.text_cache, generator.texts.identity, prompts, request.device)
        numbers = list(range(len(prompts)))
        cache.fill(numbers, generator.texts.load)
        self.empty = cache.empty.float()
        self.batches = []
        assert request.batch_size is not None
        for start in range(0, len(prompts), request.batch_size):
            chosen = numbers[start : start + request.batch_size]
            text = [states.float() for states in cache.read(chosen)]
            self.batches.append((text, normal(0, "bench", chosen, generator.latent_shape)))

    def __call__(self) -> None:
        for text, noise in self.batches:
            self.generator.vae.decode(undraw(self.latents(text, noise), self.generator.norm))

    def latents(self, text: list[Tensor], noise: Tensor) -> Tensor:
        return sample(self.generator.model, text, self.empty, noise=noise, steps=self.steps)


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    """Sample the same set by both in turns; (results, table)."""
    size = TOY if light else LARGE
    request = write_models(folder, size)
    generator = Generator.load(request)
    assert request.prompts is not None
    bare = Bare(generator, request, json.loads(request.prompts.read_text()))

    def whole() -> None:
        with redirect_stderr(io.StringIO()):  # the bar of each turn
            generate(request, generator)

    spent: dict[str, list[float]] = {"bare": [], "generate": []}
    seconds: dict[str, list[float]] = {"bare": [], "generate": []}
    for turn in turns.turns("generate", range(rounds + 1)):
        works: list[tuple[str, Callable[[], None]]] = [("bare", bare), ("generate", whole)]
        for name, work in works if turn % 2 else works[::-1]:
            start = time.perf_counter()
            used = cpu_of(work)
            if turn:  # the first is for warming up
                spent[name].append(used)
                seconds[name].append(time.perf_counter() - start)
        shutil.rmtree(request.save_dir)
    cpu, time_ = (paired(both["generate"], both["bare"]) for both in (spent, seconds))
    found: Json = {
        "rounds": rounds, "batch": size.batch, "batches": size.batches, "resolution": size.resolution,
        "steps": size.steps, "cpu": cpu, "seconds": time_,
        "cpu_s": {name: float(np.median(each)) / size.batches for name, each in spent.items()},
        "seconds_s": {name: float(np.median(each)) / size.batches for name, each in seconds.items()},
        "promises": [
            promise("CPU of generate over that of the bare loop, upper end of 95 %", cpu["ratio_high"], "<=", 1.05)
        ],
    }  # fmt: skip
    return found, table(found)


def table(found: Json) -> Table:
    shown = Table(
        "a batch", "bare", "generate", "generate over bare", "95 % interval",
        title=f"{found['batch']} pictures of {found['resolution']} px, {found['rounds']} turns",
    )  # fmt: skip
    rows: list[tuple[str, Any, Any]] = [
        ("CPU seconds", found["cpu_s"], found["cpu"]), ("seconds", found["seconds_s"], found["seconds"]),
    ]  # fmt: skip
    for name, values, ratio in rows:
        each = (f"{values[kind]:.3f}" for kind in ("bare", "generate"))
        interval = f"{ratio['ratio_low']:.3f} to {ratio['ratio_high']:.3f}"
        shown.add_row(name, *each, f"{ratio['ratio']:.3f}", interval)
    return shown


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measure, print, write down."""
    return turns.measured({"generate": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
