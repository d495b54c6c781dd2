"""What a run leaves to be read: metrics.jsonl and one line a log step on the screen; loggers get
the same numbers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import Batch
from shards.console import without_nan

from ..model.flops import Cost
from ..model.flow import SHIFT, level_of
from .loggers import BackgroundLogger
from .records import forget_after, validated

log = logging.getLogger(__name__)
LEVELS = 8  # equal parts of the run's own noise levels, from much noise to little


# Of one step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRecord:
    """A step of all ranks together."""

    loss: float  # mean over all samples
    level_loss: tuple[float, ...]  # sums, by part of the noise levels
    level_count: tuple[int, ...]
    tokens: int  # of text, real ones
    padded: int  # the same if each micro-batch were padded to its longest caption
    bytes: int  # read from the columns
    waited: float  # seconds for data, mean of the ranks
    skipped: bool = False  # it moved no weight, for its loss or its gradient was not finite

    @property
    def samples(self) -> int:
        return sum(self.level_count)


class StepSums:
    """One rank's part of a step, as numbers that are summed over the ranks by one collective; `shift`
    is that of the noise levels."""

    SIZE = 1 + 2 * LEVELS + 4

    def __init__(self, shift: float = SHIFT) -> None:
        self._shift = shift
        self._bytes = self._tokens = self._padded = 0
        self._waited = 0.0
        self._parts: list[tuple[Tensor, Tensor]] = []  # losses and noise levels of each micro-batch

    def wait(self, seconds: float) -> None:
        """Adds seconds of waiting for the data of a micro-batch."""
        self._waited += seconds

    def add(self, part: Batch, losses: Tensor, sigma: Tensor) -> None:
        """Adds a micro-batch: the loss and the noise level of each sample, (b,)."""
        self._bytes += sum(t.nbytes for t in (part.moments, part.text, *part.extra.values()))
        self._tokens += int(part.cu_seqlens[-1])
        self._padded += len(losses) * int(part.lengths.max())
        self._parts.append((losses.detach(), sigma))

    @property
    def losses(self) -> Tensor:
        return torch.cat([losses for losses, _ in self._parts])

    def sums(self) -> list[float]:
        """Returns `SIZE` numbers, summed in fp64; the first is not finite where a loss is not."""
        losses = self.losses.double()
        level = level_of(torch.cat([sigma for _, sigma in self._parts]), LEVELS, self._shift)
        by_level = losses.new_zeros(2, LEVELS)
        by_level[0].index_add_(0, level, losses)
        by_level[1].index_add_(0, level, torch.ones_like(losses))
        totals: list[float] = torch.cat([losses.sum()[None], by_level.flatten()]).tolist()
        return [*totals, self._tokens, self._padded, self._bytes, self._waited]


def step_record(sums: Sequence[float], world: int) -> StepRecord:
    """Returns the step from the sums of `world` ranks."""
    loss, rest = sums[0], sums[1 : 1 + 2 * LEVELS]
    tokens, padded, read, waited = sums[1 + 2 * LEVELS : StepSums.SIZE]
    counts = tuple(int(n) for n in rest[LEVELS:])
    return StepRecord(
        loss / sum(counts), tuple(rest[:LEVELS]), counts, int(tokens), int(padded), int(read), waited / world,
    )  # fmt: skip


# Of an interval ------------------------------------------------------------------------------------------------------


class Throughput:
    """The steps of a log interval, and its wall-clock seconds.

    `peak`: dense bf16 FLOP/s of all ranks' devices, None where it is not known.
    """

    def __init__(self, cost: Cost = Cost(), peak: float | None = None) -> None:  # noqa: B008  # frozen
        self.cost, self.peak = cost, peak
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.steps: list[StepRecord] = []

    def add(self, step: StepRecord) -> None:
        self.steps.append(step)

    def leave_out(self, seconds: float) -> None:
        """Takes seconds out of the interval that went into something else than steps."""
        self.start += seconds

    def measure(self, steps_left: int) -> dict[str, Any]:
        """Returns the interval's means, and the seconds that `steps_left` more steps would take."""
        steps, seconds = self.steps, time.perf_counter() - self.start
        samples, tokens, padded = (
            sum(getattr(s, name) for s in steps) for name in ("samples", "tokens", "padded")
        )
        flops = self.cost.of(samples, tokens) / seconds
        finite = [s for s in steps if math.isfinite(s.loss) and not s.skipped]
        return {
            "loss": sum(s.loss for s in finite) / len(finite) if finite else math.nan,
            "loss_by_level": _by_level(finite),
            "not_finite": len(steps) - len(finite),
            "samples_per_second": samples / seconds,
            "data_wait": sum(s.waited for s in steps) / seconds,
            "read_mb_per_second": sum(s.bytes for s in steps) / 1e6 / seconds,
            "text_tokens": tokens / samples,
            "padding_waste": 1 - tokens / padded if padded else 0.0,
            "flops_per_second": flops,
            "mfu": flops / self.peak if self.peak else None,
            "memory_gb": peak_memory() / 1e9,
            "seconds_a_step": seconds / len(steps),
            "seconds_left": seconds / len(steps) * steps_left,
        }


def _by_level(steps: Sequence[StepRecord]) -> list[float | None]:
    """Returns the mean loss by part of the noise levels, None where there was no sample."""
    sums = [sum(values) for values in zip(*(s.level_loss for s in steps), strict=True)]
    counts = [sum(values) for values in zip(*(s.level_count for s in steps), strict=True)]
    means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
    return means or [None] * LEVELS


def peak_memory() -> int:
    """Returns the most bytes held: by torch on this rank's GPU; on a CPU, by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def line(step: int, steps: int, m: dict[str, Any], with_rate: bool = True) -> str:
    """Returns what a log step says on the screen; without rates of a first step, which compiles."""
    figures = f"step {step:,}/{steps:,}  loss {m['loss']:.4f}  norm {m['grad_norm']:.3f}  lr {m['lr']:.2e}"
    if not with_rate:
        return figures
    rest = timedelta(seconds=round(m["seconds_left"]))
    mfu = "" if m["mfu"] is None else f"  MFU {m['mfu']:.1%}"
    return (
        f"{figures}  "
        f"{m['samples_per_second']:,.1f} samples/s  data wait {m['data_wait']:.1%}{mfu}  ETA {rest}"
    )


# Where it goes -------------------------------------------------------------------------------------------------------


class Metrics:
    """The records of a run, written by rank 0. Those of steps after `step` are from before a crash,
    and are dropped; `validated` says whether those of `step` have its validation.

    `check_lock` raises where another job has the folder by now; it is called before each change of
    the file."""

    def __init__(
        self, run: Path, step: int, loggers: Sequence[BackgroundLogger] = (),
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.path = run / "metrics.jsonl"
        self._check_lock = check_lock
        forget_after(self.path, step, check_lock)
        self.validated = validated(self.path, step)
        self._loggers = loggers
        self._failed = False  # whether a line was lost, of which one warning is enough

    def write(self, step: int, **values: Any) -> None:
        """Writes a JSON line, or warns once where the disk takes none; its numbers also go to the
        loggers, names joined by a slash."""
        record = json.dumps(without_nan({"step": step, **values}), allow_nan=False)
        try:
            self._append(f"{record}\n".encode())
        except OSError as error:  # steps cannot be had again, a line of them can be missed
            if not self._failed:
                log.warning(
                    "%s: a line could not be written (%s); training goes on", self.path, error
                )
            self._failed = True
        numbers = dict(_numbers(values))
        for logger in self._loggers:
            logger.log(step, numbers)

    def _append(self, line: bytes) -> None:
        """Writes a whole line or nothing."""
        with self.path.open("ab", buffering=0) as file:
            self._check_lock()
            end = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                if written != len(line):  # the next byte has no room
                    file.write(line[written:])
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the finite numbers of nested dicts and lists by their paths."""
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield prefix + name, float(value)
