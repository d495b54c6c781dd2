"""What a run leaves to be read: metrics.jsonl, TensorBoard files, and one line a log step on the screen."""

import json
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from .history import forget_after

log = logging.getLogger(__name__)


class Metrics:
    """Records of rank 0. Those of steps after `step` are from before a crash, and are dropped."""

    def __init__(self, run: Path, step: int) -> None:
        # A second to import, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        forget_after(self.path, step)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """One JSON line; its numbers also go to TensorBoard, nested names joined by a slash."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in _numbers(values):
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def _numbers(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found += _numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        else:
            found.append((prefix + name, float(value)))
    return found


class Pace:
    """Wall-clock seconds of a log interval: how many samples, and how long the step waited for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start, self.waited, self.samples, self.losses = (
            time.perf_counter(),
            0.0,
            0,
            list[float](),
        )

    def measure(self, steps_left: int) -> dict[str, float]:
        """The interval's means, and the seconds that `steps_left` more steps would take."""
        seconds = time.perf_counter() - self.start
        return {
            "loss": sum(self.losses) / len(self.losses),
            "samples_per_second": self.samples / seconds,
            "data_wait": self.waited / seconds,
            "seconds_left": seconds / len(self.losses) * steps_left,
        }


def line(step: int, steps: int, m: dict[str, float]) -> str:
    left = timedelta(seconds=round(m["seconds_left"]))
    return (
        f"step {step:,}/{steps:,}  loss {m['loss']:.4f}  norm {m['grad_norm']:.3f}  lr {m['lr']:.2e}  "
        f"{m['samples_per_second']:,.1f} samples/s  data wait {m['data_wait']:.1%}  ETA {left}"
    )
