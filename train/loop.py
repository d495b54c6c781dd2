"""A run in progress: step, log, validate, save, until the last step or a signal. The step itself is
`Trainer.step`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import yaml

from shards import Batch, JoinedColumns, Order, Stream, atomic_write, canonical_json
from shards.console import counted
from shards.read import Prefetcher, empty_caption
from shards.signals import SIGNALS, on_stop

from .checkpoints import checkpoint
from .checkpoints.identity import differing, initial_share, precision, resumed
from .checkpoints.resume import refuse_other_run
from .checkpoints.snapshots import PowerAverages
from .config import TrainConfig
from .model.dit import DiT
from .model.flops import gpu_of, parameters, training
from .model.flow import losses
from .model.tokens import Tokens
from .ranks.world import World
from .report.commit import commit
from .report.loggers import open_loggers, run_id
from .report.metrics import Metrics, StepRecord, StepSums, Throughput, line, step_record
from .report.page import what_follows, write_last_page
from .report.start import latent_lines, latent_record
from .step.ema import Ema
from .step.engine import Engine, deepspeed_config
from .step.inputs import Inputs, MicroBatch, micro_batches, training_inputs
from .step.online_text import TextEncoder, encoded, identity_of
from .step.schedule import learning_rate
from .step.skips import Skips
from .step.validate import Validator

log = logging.getLogger(__name__)
AHEAD = 2  # micro-batches that are ready before their turn
CHECKPOINTS = "checkpoints"  # folder of a run
POLL = 1.0  # seconds between two looks of a rank that waits for data at whether the run is to stop
# (position, world) -> this rank's batches from there on
Batches = Callable[[int, World], Iterator[Batch]]


class Trainer:
    """A run in progress on one rank: the engine, the average, and how far they are."""

    def __init__(
        self, config: TrainConfig, run: Path, sources: JoinedColumns, order: Order, model: DiT, world: World,
        text_encoder: TextEncoder | None = None, init: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.folder = run
        self.sources = sources
        self.world = world
        self.text_encoder = text_encoder
        self.init = init
        self.empty = empty_caption(sources)
        self.totals = {name: p.numel() for name, p in model.named_parameters()}
        self.parameters = parameters(model)
        model.prepare(config.compute)
        self.engine = Engine(model, config, world)
        self.model_config = model.config
        self.precision = precision(deepspeed_config(config, world.size))
        self.ema = Ema(self.engine.weights(), config.ema.decay)
        self.powers = PowerAverages(self.engine.weights(), config.ema, config.steps, run)
        self.state = checkpoint.State(self.engine.fragments, self.totals, {})
        self._checkpoints = run / CHECKPOINTS
        self.order_identity = order.identity()
        self.epoch_samples = order.epoch_samples
        self.step_number = 0  # steps done
        self.position = 0  # samples consumed
        self.changes: list[dict[str, Any]] = []  # of the config, each with its first step
        self.updates = 0  # of the weights
        self.skips = Skips(config.guard, run, sources, world)
        self.cost = training(model.config, *sources.latent_shape[1:])
        self.gpu = gpu_of(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        peak = self.gpu.peak * world.size if self.gpu else None
        self.throughput = Throughput(self.cost, peak)
        self._received = 0  # the signal that this process got
        self._signal = 0  # the one that all agreed on
        self._all_ready = False  # whether each rank has the data of the next step

    # The step ------------------------------------------------------------------------------------------------------

    def step(self, queue: Iterator[MicroBatch]) -> StepRecord | None:
        """Updates the weights from this rank's part of a global batch; returns the figures of all
        ranks, or None where a signal came before the data: the weights are then as they were."""
        lr = learning_rate(self.config.optim, self.step_number, self.config.steps)
        sums = StepSums(self.config.flow.timestep_shift)
        if not self._data_ready(queue, sums):
            return None
        number, micro = 0, None
        while micro is None or not micro.last:
            self.world.phase(f"step {self.step_number}, data of micro-batch {number}")
            start = time.perf_counter()
            micro = next(queue)
            sums.wait(time.perf_counter() - start)
            self.world.phase(f"step {self.step_number}, micro-batch {number}")
            x = micro.inputs.to(self.world.device)
            tokens = encoded(self.text_encoder, x.tokens, x.cu_seqlens)
            predicted = self.engine(x.noisy, x.timestep, tokens, x.cu_seqlens)
            loss = losses(self.config.flow, predicted, x.latents, x.noise, x.sigma)
            self.engine.backward(loss.mean())
            sums.add(micro.part, loss, x.sigma)
            if micro.last:
                record = self._agree(micro.batch, sums, _ready(queue))
            self.engine.step(lr)  # moves the weights after the last one
            number += 1
        if self.engine.skipped:
            kind = "gradient" if math.isfinite(record.loss) else "loss"
            self._not_finite(micro.batch, sums.losses, kind)
        else:
            self.ema.update(self.engine.weights())
            self.updates += 1
            self.skips.count = 0
            self.powers.update(self.engine.weights(), self.updates)
        self.step_number += 1
        self.position += self.config.global_batch
        return replace(record, skipped=self.skips.count > 0)

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
        """Returns the micro-batches; a thread makes those of columns while the device computes."""
        queue = micro_batches(batches, self.config.micro_batch, self._inputs)
        return Prefetcher(queue, AHEAD, "inputs") if isinstance(batches, Stream) else queue

    def _inputs(self, part: Batch) -> Inputs:
        c = self.config
        x = training_inputs(
            part, self.sources.norm, self.empty, c.flow, c.data.caption_dropout, c.seed,
            self.sources.posterior,
        )  # fmt: skip
        return x.pinned() if self.world.device.type == "cuda" else x

    def _data_ready(self, queue: Iterator[MicroBatch], sums: StepSums) -> bool:
        """Waits until each rank has data for the step; False if a signal came meanwhile.
        Collective.

        The first micro-batch is what is waited for: with it, the rank's part of the global batch
        has been read. The ranks ask each other every POLL seconds, since none of them could leave a
        step that others are in."""
        if self._all_ready:
            return True
        self.world.phase(f"step {self.step_number}, waiting for data")
        start = time.perf_counter()
        ready, late = False, 1.0
        while late and not self._signal:
            if not ready and (ready := _ready(queue, POLL)):
                sums.wait(time.perf_counter() - start)
                self.world.phase(f"step {self.step_number}, waiting for the data of other ranks")
            late, *signals = self.world.sum([not ready, *self._signals()])
            self._heed(signals)
        if not ready:  # as many phases as those that were
            self.world.phase(f"step {self.step_number}, given up")
        return not self._signal

    def _agree(self, batch: Batch, sums: StepSums, ready: bool) -> StepRecord:
        """Sums the figures of all ranks before the weights move; agrees on any signal, and on
        whether all are `ready` for the next step. Where the loss is not finite on some rank, all
        stop, or leave the weights alone."""
        self.world.phase(f"step {self.step_number}, agreement")
        late, *totals = self.world.sum([not ready, *sums.sums(), *self._signals()])
        self._all_ready = not late
        self._heed(totals[StepSums.SIZE :])
        record = step_record(totals[: StepSums.SIZE], self.world.size)
        if not math.isfinite(record.loss):
            if self.config.guard.nonfinite == "stop":
                self._not_finite(batch, sums.losses, "loss")
            self.engine.discard()
        return record

    def _not_finite(self, batch: Batch, losses: torch.Tensor, kind: str) -> None:
        weights = self.engine.weights()
        self.skips.add(self.step_number, batch, losses, kind, weights, self.updates)

    # Signals -------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self._received = number  # the ranks agree on it, finish what is in progress, and save

    def _signals(self) -> list[float]:
        return [self._received == number for number in SIGNALS]

    def _heed(self, sums: Sequence[float]) -> None:
        """Sets the signal that some rank has got, from the sums over all ranks; 0: none."""
        self._signal = next((n for n, count in zip(SIGNALS, sums, strict=True) if count), 0)

    def _stopping(self) -> bool:
        """Whether some rank has got a signal; collective."""
        self._heed(self.world.sum(self._signals()))
        return bool(self._signal)

    # The run -------------------------------------------------------------------------------------------------------

    def run_to_end(self, batches: Batches, validator: Validator | None) -> int:
        """Trains until the last step or a signal; returns the exit code."""
        with on_stop(self._on_signal):
            self._resume()  # refuses another run's folder before anything is written
            self._begin(validator)
            stream = batches(self.position, self.world)
            queue = self._micro_batches(stream)
            try:
                self._train(queue, validator)
            finally:
                for source in (stream, queue):  # the first frees the second, which waits for it
                    if isinstance(source, Prefetcher | Stream):
                        source.close()
                if self.metrics:
                    self.metrics.close()
        if self.metrics:
            self.world.check_lock()
            write_last_page(self.folder)
        if name := self._signal and Signals(self._signal).name:
            end = "saved" if self.step_number else "before there was anything to save"
            log.info("stopped by %s after step %s, %s", name, self.step_number, end)
            return 128 + self._signal
        log.info("done: step %s of %s", f"{self.step_number:,}", f"{self.config.steps:,}")
        log.info("%s", what_follows(self.folder))
        return 0

    def _begin(self, validator: Validator | None) -> None:
        self.world.together(self.world.check_lock)  # a checkpoint may have taken long to read
        if self.world.rank == 0:
            run_id(self.folder)
            if self.step_number < self.config.steps or not (self.folder / "config.yaml").exists():
                text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
                atomic_write(self.folder / "config.yaml", text.encode())
        self.metrics = self._open_metrics() if self.world.rank == 0 else None
        self._announce()
        if validator:
            validator.prepare(self.folder, self.sources)
        self.throughput.reset()

    def _train(self, queue: Iterator[MicroBatch], validator: Validator | None) -> None:
        config = self.config
        saved, shown = self.step_number, False
        recorded = not self.metrics or self.metrics.validated
        if validator and validator.missing(self.step_number, recorded):
            self._validate(validator)
        while self.step_number < config.steps and not self._signal:
            record = self.step(queue)
            if record is not None:
                self.throughput.add(record)
                if self.powers.due(self.step_number):
                    self.throughput.leave_out(self._snapshot())
                if (due := self._due(config.log_every)) or not shown:
                    self._log(due)
                    shown = True
                if validator and validator.due(self.step_number) and not self._signal:
                    self._validate(validator)
            if self.step_number > saved and (self._to_save() or self._signal):
                self.save()
                saved = self.step_number
                self._stopping()  # a signal that came meanwhile ends the run at what was just saved

    def _due(self, every: int) -> bool:
        return self.step_number % every == 0 or self.step_number == self.config.steps

    def _to_save(self) -> bool:
        return self._due(self.config.save_every) or self.step_number in self.config.save_at

    def _log(self, due: bool) -> None:
        """Logs the interval; the first step of a start is shown at once, and counts for the interval."""
        values = {
            **self.throughput.measure(self.config.steps - self.step_number),
            "grad_norm": self.engine.grad_norm,
            "lr": learning_rate(self.config.optim, self.step_number - 1, self.config.steps),
            "epoch": self.position / self.epoch_samples,
            "initial_share": self.ema.initial_share,
        }
        log.info("%s", line(self.step_number, self.config.steps, values, with_rate=due))
        if not due:
            return
        if self.metrics:
            self.metrics.write(self.step_number, position=self.position, **values)
        self.throughput.reset()

    def _validate(self, validator: Validator) -> None:
        start = time.perf_counter()
        result = validator(self.engine, self.ema, self._stopping)
        seconds = time.perf_counter() - start
        if result is None:
            log.info("validation abandoned after %.1f s, for a signal", seconds)
            return
        share = self.ema.initial_share
        log.info("%s", result.line(self.step_number, share, seconds))
        if self.metrics:
            record = {**result.record(), "initial_share": share, "seconds": seconds}
            self.metrics.write(self.step_number, validation=record)
        self.throughput.leave_out(time.perf_counter() - start)

    def _open_metrics(self) -> Metrics:
        values = {**self.config.model_dump(mode="json"), "mix": self._mix()}
        loggers = open_loggers(self.config.metrics, self.folder, values, self.step_number)
        return Metrics(self.folder, self.step_number, loggers, self.world.check_lock)

    def _announce(self) -> None:
        """Says what is trained on which data, on the screen and as a line of metrics.jsonl."""
        channels, height, width = self.sources.latent_shape
        device = torch.cuda.get_device_name() if self.world.device.type == "cuda" else "cpu"
        log.info(
            "%s: %.1f M parameters, latents %d x %d x %d, text width %d, %s samples an epoch, %s on %s",
            self.folder, sum(self.totals.values()) / 1e6, channels, height, width, self.model_config.text_width,
            f"{self.epoch_samples:,}", counted(self.world.size, "rank"), device,
        )  # fmt: skip
        flow, tokens = self.config.flow, Tokens.of(self.model_config, height, width)
        for text in (*latent_lines(flow, tokens), *self.sources.notes):
            log.info("%s", text)
        mix = self._mix()
        log.info("data mix: %s", ", ".join(f"{name} {share:.3f}" for name, share in mix.items()))
        log.info("DeepSpeed: %s", ", ".join(f"{k} {v}" for k, v in self.engine.effective.items()))
        if self.world.device.type == "cuda" and self.gpu is None:
            log.info("no MFU: the peak of %s is not in train/model/flops.py", device)
        if self.metrics:
            start = {
                "mix": mix, "epoch_samples": self.epoch_samples, "world": self.world.size, "device": device,
                "parameters": self.parameters, "flops_a_sample": self.cost.sample,
                "flops_a_text_token": self.cost.token, "peak_flops_per_second": self.throughput.peak,
                **latent_record(flow, tokens), "commit": commit(),
            }  # fmt: skip
            self.metrics.write(self.step_number, start=start)

    def _mix(self) -> dict[str, float]:
        """Returns the share of each source in the samples."""
        names = self.config.data.source_names
        shares = self.sources.weights or [len(join.valid_rows) for join in self.sources.by_source]
        return {n: s / sum(shares) for n, s in zip(names, shares, strict=True)}

    # State ---------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint's manifest says of this run and its progress."""
        record = {
            "step": self.step_number,
            "position": self.position,
            "model": self.model_config.model_dump(mode="json"),
            "latent_shape": list(self.sources.latent_shape),
            "config": self.config.model_dump(mode="json"),
            "data": self._data(),
            "order": self.order_identity,
            "objective": {
                "flow": self.config.flow.identity(),
                "caption_dropout": self.config.data.caption_dropout,
            },
            "seed": self.config.seed,
            "init": self.init,
            "optimizer": {"kind": "adamw", "step": self.updates, "skipped": self.skips.count},
            "deepspeed": self.precision,
            "average": {"initial_share": self.ema.initial_share} | self.powers.record(self.updates),
            **({"changes": self.changes} if self.changes else {}),
        }
        return json.loads(canonical_json(record))  # type: ignore[no-any-return]  # as it will be read again

    def _data(self) -> dict[str, Any]:
        """Returns the columns' identity, with that of the encoder where they hold ids."""
        encoder = identity_of(self.text_encoder)
        return self.sources.identity() | ({"text_encoder": encoder} if encoder else {})

    def save(self) -> Path:
        """Writes a checkpoint; collective."""
        start = time.perf_counter()
        flats = {"weights": self.engine.weights(), **self.engine.moments(), "ema": self.ema.parts}
        state = replace(self.state, flats=flats | self.powers.parts)
        model: Any = self.engine.model
        path = checkpoint.save(
            self._checkpoints, state, model, self.record(), self.world, self.config.keep, self.config.save_at
        )  # fmt: skip
        seconds = time.perf_counter() - start
        log.info("saved %s (%.1f s)", path, seconds)
        self.throughput.leave_out(seconds)
        return path

    def _snapshot(self) -> float:
        """Writes a snapshot of the power averages; returns the seconds that it took. Collective."""
        model = self.model_config.model_dump(mode="json")
        return self.powers.save(self.step_number, self.updates, model, self.state, self.world)

    def _resume(self) -> None:
        """Goes on from the newest whole checkpoint; ResumeRefused if it is of another run."""
        newest = checkpoint.on_first(self.world, self._newest)
        if newest is None:
            return
        path, manifest = newest
        # only the shapes of these tensors matter
        kinds = (*checkpoint.KINDS, *self.powers.parts)
        blank = replace(self.state, flats={kind: self.engine.weights() for kind in kinds})
        state = checkpoint.load(path, manifest, blank, self.world.progress)
        self.engine.set_weights(state.flats["weights"])
        self.updates = manifest["optimizer"]["step"]
        self.skips.count = manifest["optimizer"].get("skipped", 0)
        moments = {kind: state.flats[kind] for kind in ("exp_avg", "exp_avg_sq")}
        self.engine.set_moments(self.updates, moments)
        self.ema.parts = list(state.flats["ema"])
        self.powers.go_on(manifest, state.flats)
        share = initial_share(manifest)
        assert share is not None  # every checkpoint that can be resumed has its config
        self.ema.initial_share = share
        self.step_number = manifest["step"]
        self.position = manifest["position"]
        self.init = manifest.get("init")
        self.changes = manifest.get("changes", [])
        record = self.record()
        if "deepspeed" not in manifest:  # an older one: what its JSON file said is unknown
            del record["deepspeed"]
        if changed := differing(resumed(manifest), resumed(record)):
            self.changes = [*self.changes, {"step": self.step_number, **changed}]
        step, position = f"{self.step_number:,}", f"{self.position:,}"
        log.info("resumed from %s: step %s, position %s", path, step, position)

    def _newest(self) -> tuple[Path, checkpoint.Manifest] | None:
        if newest := checkpoint.newest(self._checkpoints, self.world.progress):
            refuse_other_run(*newest, self.record())
        return newest


def _ready(queue: Iterator[MicroBatch], seconds: float = 0.0) -> bool:
    """Whether the next micro-batch is there within `seconds`; assumed where no thread reads."""
    return not isinstance(queue, Prefetcher) or queue.wait(seconds)
