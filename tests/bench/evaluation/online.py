"""What caching saves: a training step that encodes its pictures and captions, over one that reads columns.

    python -m tests.bench.evaluation.online --json FILE      # about three minutes
    python -m tests.bench.evaluation.online --light          # toy sizes: that it runs, and nothing else

Small models of the real classes (AutoencoderKL, GemmaModel), of random weights, whose FLOPs stand to those of the
diffusion transformer about as the reference's do at 256 px: 0.27 for the VAE, 1.02 for the language model on captions
padded to their full length, 3.0 for forward and backward. One trainer takes batches of either kind in turns. Pictures
are in memory and decoded, so what decoding takes is left out, and counts for neither.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from encode import EncodeConfig
from encode.models.encoder import CaptionEncoder, ImageEncoder
from encode.models.load import load_encoder
from encode.run.job import run as encode_run
from encode.source.images import decode, transform
from shards import JoinedColumns, exits
from shards.format.atomic import Json
from shards.read.stream import Batch, Stream
from tests.bench import turns
from tests.bench.cost import cpu_seconds, paired, promise
from tests.bench.encoding.synthetic import picture, save_gemma, save_vae, write_tar
from train.config import TrainConfig
from train.model.dit import DiT
from train.run import fit, model_config, open_columns, shape_of

ROUNDS = 20
REAL = {
    "vae": 0.273,
    "text": 1.024,
    "train": 3.007,
}  # TFLOP a sample at 256 px, captions of 256 tokens
SPARED = sum(REAL.values()) / REAL["train"]  # 1.43: as often a step's FLOPs are done online
PER_CAPTION = 16_384  # tokens of a text batch: all captions of a step at once
Batches = Iterator[Batch]


@dataclass(frozen=True, slots=True)
class Size:
    """Models, and how many samples a step takes."""

    vae: str  # of tests.bench.encoding.synthetic.MODELS
    resolution: int
    tokens: int
    text: dict[str, int]  # of GemmaConfig
    model: dict[str, int]  # of train.model.ModelConfig
    batch: int
    rows: int


def gemma(width: int, layers: int) -> dict[str, int]:
    heads = max(1, width // 64)
    return {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 64,
    }  # fmt: skip


def dit(width: int, layers: int) -> dict[str, int]:
    heads = max(1, width // 64)
    return {
        "hidden_size": width, "layers": layers, "heads": heads, "kv_heads": max(1, heads // 4), "head_dim": 64,
        "mlp_size": 4 * width, "sample_size": 16,
    }  # fmt: skip


LARGE = Size("wide", 128, 64, gemma(384, 8), dit(384, 8), 8, 64)
TOY = Size("small", 32, 16, gemma(64, 1), dit(64, 1), 4, 16)


class Material:
    """Pictures and captions in memory, their columns, and the encoders that made them."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.size = size
        data = [picture(row, size.resolution + 32, size.resolution) for row in range(size.rows)]
        self.captions = [f"picture {row}: ".ljust(size.tokens, "x") for row in range(size.rows)]
        write_tar(folder / "0.tar", zip(data, (c.encode() for c in self.captions), strict=True))
        save_gemma(folder / "gemma", size.text)
        config = EncodeConfig.model_validate({
            "root": str(folder / "cache"), "sources": {"bench": str(folder / "0.tar")}, "shard_rows": 1024,
            "columns": {
                "vae": {"kind": "moments", "resolution": size.resolution, "encoder": {
                    "class": "AutoencoderKL", "path": str(save_vae(folder / "vae", size.vae))}},
                "text": {"kind": "tokens", "max_tokens": size.tokens, "encoder": {
                    "class": "GemmaModel", "path": str(folder / "gemma")}},
            },
            "engine": {"executor": "inline", "device": "cpu"},
        })  # fmt: skip
        if encode_run(config):
            raise RuntimeError("the columns could not be made; what was said is above")
        self.columns = folder / "cache/bench"
        vae, text = (load_encoder(config.columns[name], "cpu") for name in ("vae", "text"))
        assert isinstance(vae, ImageEncoder)
        assert isinstance(text, CaptionEncoder)
        self.vae, self.text = vae, text
        pictures = (decode(item)[0] for item in data)
        self.images = np.stack([transform(p, size.resolution) for p in pictures if p is not None])

    def encoded(self, rows: Any, like: Batch) -> Batch:
        """The batch that columns would give for these rows, from pictures and captions."""
        moments = torch.from_numpy(self.vae.rows(self.images[rows]))
        states = self.text.rows([self.captions[row] for row in rows], PER_CAPTION)
        lengths = torch.tensor([0, *map(len, states)], dtype=torch.int32)
        tokens = torch.from_numpy(np.concatenate(states)).view(torch.bfloat16)
        return Batch(
            like.position, like.samples, like.rows, moments, tokens, lengths.cumsum(0, dtype=torch.int32)
        )  # fmt: skip


class Turns:
    """Batches of both kinds in turns, and what each step took, from asking for its batch to asking for the next."""

    def __init__(self, material: Material, config: TrainConfig, sources: JoinedColumns) -> None:
        self.material, self.config, self.sources = material, config, sources
        self.cpu: dict[str, list[float]] = {"cached": [], "online": []}
        self.seconds: dict[str, list[float]] = {"cached": [], "online": []}

    def __call__(self, position: int, world: object) -> Batches:
        order = self.sources.order(
            self.config.seed, self.config.data.lanes, self.config.data.window
        )
        batch = self.config.global_batch
        with Stream(self.sources, order, position=position, global_batch=batch) as stream:
            for kind in cycle(("cached", "online", "online", "cached")):  # there and back
                start, cpu = time.perf_counter(), cpu_seconds()
                batch_ = next(stream)  # an online step asks for it too: to know its rows
                if kind == "online":
                    batch_ = self.material.encoded(batch_.rows.numpy(), batch_)
                yield batch_
                self.cpu[kind].append(cpu_seconds() - cpu)
                self.seconds[kind].append(time.perf_counter() - start)


def run(folder: Path, rounds: int, light: bool) -> tuple[Json, Table]:
    """Train for a while on batches of both kinds; (results, table)."""
    size = TOY if light else LARGE
    material = Material(folder, size)
    config = TrainConfig.model_validate({
        "data": {"latents": str(material.columns / "vae"), "text": str(material.columns / "text"), "lanes": size.batch},
        "model": size.model, "global_batch": size.batch, "micro_batch": size.batch,
        "steps": 2 * rounds + 3,  # the first pair and the last step are not counted
        "log_every": 1, "save_every": 10**9,
    })  # fmt: skip
    turns = Turns(material, config, open_columns(config, None))
    fit(config, folder / "run", turns)
    cpu, seconds = (
        {kind: spent[1 : rounds + 1] for kind, spent in both.items()}
        for both in (turns.cpu, turns.seconds)
    )
    flops = flops_of(material, config, turns.sources)
    expected = sum(flops.values()) / flops["train"]
    saved, time_ = (paired(spent["online"], spent["cached"]) for spent in (cpu, seconds))
    found: Json = {
        "rounds": rounds, "batch": size.batch, "resolution": size.resolution, "tokens": size.tokens,
        "gflop": flops, "expected": expected, "expected_of_the_reference": SPARED, "cpu": saved, "seconds": time_,
        "cpu_s": {kind: float(np.median(spent)) for kind, spent in cpu.items()},
        "seconds_s": {kind: float(np.median(spent)) for kind, spent in seconds.items()},
        "promises": [
            promise("online over cached FLOPs, of the reference's", expected / SPARED, ">=", 0.9),
            promise("CPU of an online step over a cached one's, over that of FLOPs, lower end of 95 %",
                    saved["ratio_low"] / expected, ">=", 0.9),
        ],
    }  # fmt: skip
    return found, table(found)


def flops_of(material: Material, config: TrainConfig, sources: JoinedColumns) -> dict[str, float]:
    """GFLOP of one sample: encoding its picture, its caption, and forward and backward of the model."""
    made = model_config(config, shape_of(sources))
    model = DiT(made)
    latents = torch.zeros(1, *sources.latent_shape)
    tokens = torch.zeros(1, material.size.tokens, made.text_width)
    mask = torch.ones(1, material.size.tokens, dtype=torch.long)
    works: dict[str, Callable[[], object]] = {
        "vae": lambda: material.vae.rows(material.images[:1]),
        "text": lambda: material.text.rows(material.captions[:1], PER_CAPTION),
        "train": lambda: model(latents, torch.ones(1), tokens, mask).sum().backward(),
    }
    found = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        found[name] = counter.get_total_flops() / 1e9
    return found


def table(found: Json) -> Table:
    shown = Table("a step", "cached", "online", "online over cached", "95 % interval",
                  title=f"{found['batch']} samples, {found['rounds']} turns")  # fmt: skip
    for name, values, ratio in (
        ("CPU seconds", found["cpu_s"], found["cpu"]),
        ("seconds", found["seconds_s"], found["seconds"]),
    ):
        interval = f"{ratio['ratio_low']:.3f} to {ratio['ratio_high']:.3f}"
        each = (f"{values[kind]:.3f}" for kind in ("cached", "online"))
        shown.add_row(name, *each, f"{ratio['ratio']:.3f}", interval)
    train, *spared = (found["gflop"][name] for name in ("train", "vae", "text"))
    shown.add_row(
        "GFLOP a sample",
        f"{train:.2f}",
        f"{train + sum(spared):.2f}",
        f"{found['expected']:.3f}",
        "",
    )
    reference = sum(REAL.values())
    shown.add_row(
        "the reference's, TFLOP", f"{REAL['train']:.2f}", f"{reference:.2f}", f"{SPARED:.3f}", ""
    )
    return shown


def main() -> int:
    return bench(turns.parsed(__doc__, ROUNDS))


def bench(args: argparse.Namespace) -> int:
    """Measure, print, write down."""
    return turns.measured({"online": turns.timed(run)}, args)


if __name__ == "__main__":
    exits.run(main)
