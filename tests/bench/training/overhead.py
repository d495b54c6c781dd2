"""CPU seconds of a step of the trainer over those of a bare loop of the same model.

    A  `fit`, as a run calls it: a batch of the columns, its noise, a step under DeepSpeed, the average, a log line
    B  forward, backward, clipping, AdamW and the average, on tensors that are in memory

A and B start from the same weights and see the same samples, so their losses must agree, and are compared. They take
turns within one process, a step each, there and back, with the same threads, and memory that is kept rather than given
back, for both. A thread reads batches ahead: it has refilled its queue long before a step of A ends, so what reading
costs counts for A. The first pair is not counted.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from shards import JoinedColumns
from shards.format.atomic import Json
from shards.read.order import Order
from shards.read.stream import Batch, Stream, empty_caption, read_rows
from tests.bench.cost import cpu_seconds, paired, promise
from tests.bench.reading.samples import Samples
from train.config import TrainConfig
from train.model.dit import DiT, DiTConfig
from train.model.flow import target
from train.ranks.world import World
from train.run import fit, model_config, open_columns, shape_of
from train.step.inputs import training_inputs

from .runs import TOY, Size, config_of, forked, model

ROUNDS = 60
RATIO, WAIT, SAME = 1.03, 0.01, 1e-4  # what is promised of the ratio, of waiting, and of the losses
# 32 samples of 256 image tokens, as a rank of the shipped configs has
LARGE = Size(model(128, 6), Samples(256), 32)


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a bare loop has in memory before its step."""

    noisy: Tensor
    timestep: Tensor
    tokens: Tensor
    cu_seqlens: Tensor
    target: Tensor


class Bare:
    """What one would write by hand for one model and one process."""

    def __init__(self, config: TrainConfig, made: DiTConfig) -> None:
        self.model, self.config = DiT(made, config.seed), config
        optim = config.optim
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, optim.lr, optim.betas, optim.eps, optim.weight_decay, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, x: Tensors) -> float:
        predicted = self.model(x.noisy, x.timestep, x.tokens, x.cu_seqlens)
        loss = F.mse_loss(predicted, x.target)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]  # torch's
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema.decay)
        return loss.item()


class Turns:
    """The batches that `fit` asks for, and a step of the bare loop between two of them."""

    def __init__(self, config: TrainConfig, sources: JoinedColumns) -> None:
        self.config, self.sources = config, sources
        self.order = sources.order(config.seed, config.data.lanes, config.data.window)
        self.bare = Bare(config, model_config(config, shape_of(sources)))
        self.cpu: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        self.waited: list[float] = []
        self.losses: list[float] = []  # of the bare loop

    def __call__(self, position: int, world: World) -> Iterator[Batch]:
        """As `fit` takes them; the trainer's step ends where it asks for the next batch."""
        c = self.config.data
        stream = Stream(
            self.sources, self.order, position=position, global_batch=self.config.global_batch,
            prefetch=c.prefetch, ahead=c.ahead,
        )  # fmt: skip
        with stream:
            while True:
                x = self.tensors(stream.position)
                first = len(self.losses) % 2 == 0
                if first:
                    self._bare(x)
                start, cpu = time.perf_counter(), cpu_seconds()
                batch = next(stream)
                waited = time.perf_counter() - start
                yield batch
                self._count("trainer", start, cpu)
                self.waited.append(waited)
                if not first:
                    self._bare(x)

    def tensors(self, position: int) -> Tensors:
        """What the trainer will make of the batch at `position`, made here and not counted."""
        c = self.config
        batch = batch_at(self.sources, self.order, position, c.global_batch)
        x = training_inputs(
            batch,
            self.sources.norm,
            empty_caption(self.sources),
            c.flow,
            c.data.caption_dropout,
            c.seed,
        )
        return Tensors(x.noisy, x.timestep, x.tokens, x.cu_seqlens, target(x.latents, x.noise))

    def _bare(self, x: Tensors) -> None:
        start, cpu = time.perf_counter(), cpu_seconds()
        self.losses.append(self.bare.step(x))
        self._count("bare", start, cpu)

    def _count(self, who: str, start: float, cpu: float) -> None:
        self.cpu[who].append(cpu_seconds() - cpu)
        self.seconds[who].append(time.perf_counter() - start)


def batch_at(sources: JoinedColumns, order: Order, position: int, size: int) -> Batch:
    """A batch of one source, read at once and by no thread."""
    _, rows, samples = order(position, size)
    moments, tokens, cu_seqlens = read_rows(sources, rows)
    return Batch(position, torch.from_numpy(samples), torch.from_numpy(rows), moments, tokens, cu_seqlens)  # fmt: skip


def run(folder: Path, rounds: int | None, light: bool) -> tuple[Json, Table]:
    """Train for a while beside the bare loop; (results, table)."""
    found = forked(lambda: measure(folder, rounds or ROUNDS, TOY if light else LARGE))
    return found, table(found)


def measure(folder: Path, rounds: int, size: Size) -> Json:
    """The results of so many turns."""
    config = config_of(
        folder, size, steps=rounds + 2
    )  # the first pair and the last step are not counted
    turns = Turns(config, open_columns(config, None))
    run = folder / "run"
    fit(config, run, turns)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    found = results(turns, losses, rounds)
    found |= {
        "model": size.model, "parameters": sum(p.numel() for p in turns.bare.parameters), "batch": size.batch,
        "latents": list(turns.sources.latent_shape), "text_width": turns.sources.text_width,
        "cores": os.cpu_count(),
    }  # fmt: skip
    return found


def results(turns: Turns, losses: list[float], rounds: int) -> Json:
    """Ratios of the pairs that count, and what was promised of them."""
    cpu, seconds = (
        {who: spent[1 : rounds + 1] for who, spent in both.items()}
        for both in (turns.cpu, turns.seconds)
    )
    ratio = paired(cpu["trainer"], cpu["bare"])
    wait = sum(turns.waited[1 : rounds + 1]) / sum(seconds["trainer"])
    pairs = zip(losses, turns.losses, strict=False)  # the bare loop may not have had its last turn
    apart = max(abs(a / b - 1) for a, b in pairs)
    return {
        "rounds": rounds, **ratio, "data_wait": wait, "losses_apart": apart,
        "cpu_s": {who: float(np.median(spent)) for who, spent in cpu.items()},
        "seconds": {who: float(np.median(spent)) for who, spent in seconds.items()},
        "promises": [
            promise("CPU of a step over a bare loop's, upper end of 95 %", ratio["ratio_high"], "<=", RATIO),
            promise("share of the trainer's time that waits for data", wait, "<=", WAIT),
            promise("losses of both, largest relative difference", apart, "<=", SAME),
        ],
    }  # fmt: skip


def table(found: Json) -> Table:
    shown = Table("a step", "trainer", "bare loop", title=(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['batch']} samples of "
        f"{' x '.join(map(str, found['latents']))} a step, {found['rounds']} turns"
    ))  # fmt: skip
    rows: dict[str, Callable[[str], str]] = {
        "CPU seconds, median": lambda who: f"{found['cpu_s'][who]:.3f}",
        "seconds, median": lambda who: f"{found['seconds'][who]:.3f}",
    }
    for name, show in rows.items():
        shown.add_row(name, show("trainer"), show("bare"))
    low, high = found["ratio_low"], found["ratio_high"]
    shown.add_row("CPU ratio, median", f"{found['ratio']:.3f}", "1")
    shown.add_row("95 % interval", f"{low:.3f} to {high:.3f}", "")
    return shown
