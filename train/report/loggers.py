"""Where metrics go beside metrics.jsonl: TensorBoard, W&B, trackio. None of them can stop or delay
a run.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from configs import ConfigError
from shards import put_if_absent

from ..config import MetricsConfig

log = logging.getLogger(__name__)
Values = Mapping[str, float]
Config = Mapping[str, Any]
MOST_WAITING = 1000  # records of a logger that does not keep up
PATIENCE = 10.0  # seconds that the end of a run waits for a logger


class Logger(Protocol):
    """What the runs of W&B and trackio are already."""

    def log(self, values: dict[str, float], *, step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Files in the run's folder; a run that goes on takes back what was written beyond its step."""

    def __init__(self, run: Path, project: str, config: Config, step: int) -> None:
        # A second to import, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _wandb(run: Path, project: str, config: Config, step: int) -> Logger:
    """Returns a run of W&B, named as the run's folder; its id makes it go on when the run does."""
    import wandb

    return wandb.init(  # type: ignore[no-any-return]  # W&B is untyped
        project=project, name=run.name, id=run_id(run), dir=str(run), config=dict(config), resume="allow",
    )  # fmt: skip


def _trackio(run: Path, project: str, config: Config, step: int) -> Logger:
    """Returns a run of trackio, which knows runs by name alone: that of the folder and the id."""
    import trackio

    identity = run_id(run)
    name = run.name if identity == run.name else f"{run.name}-{identity}"
    return trackio.init(project=project, name=name, config=dict(config), resume="allow")  # type: ignore[no-any-return]  # untyped, too


LOGGERS: dict[str, Callable[[Path, str, Config, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def run_id(run: Path) -> str:
    """Returns the id by which W&B and trackio know a run, from its file `id`, which the first call
    makes before the run's config.yaml is written anew.

    Two runs of one name in two folders have two. A run of an earlier version, which W&B or trackio
    knows by the name of its folder, keeps that one."""
    path = run / "id"
    if not path.exists():
        config = run / "config.yaml"
        earlier = (yaml.safe_load(config.read_text()) if config.exists() else None) or {}
        by_name = {"wandb", "trackio"} & set(earlier.get("metrics", {}).get("to", ()))
        put_if_absent(path, f"{run.name if by_name else secrets.token_hex(8)}\n".encode())
    return path.read_text().strip()


def check(config: MetricsConfig) -> None:
    """Raises ConfigError if a logger is named that is not installed; nothing is imported."""
    for name in config.to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.to: {name} is asked for and not installed here: pip install {name}, or leave it out with "
                f"metrics.to=[{', '.join(rest for rest in config.to if rest != name)}]"
            )


def open_loggers(
    metrics: MetricsConfig, run: Path, config: Config, step: int
) -> list[BackgroundLogger]:
    """Returns the loggers that a config names, of a run that goes on from `step`."""
    check(metrics)
    return [
        BackgroundLogger(name, partial(LOGGERS[name], run, metrics.project, config, step))
        for name in metrics.to
    ]


class BackgroundLogger:
    """A logger in a thread: if it fails it is given up, if it hangs it is left behind."""

    def __init__(
        self, name: str, open_logger: Callable[[], Logger], patience: float = PATIENCE
    ) -> None:
        self.name, self._open, self._patience = name, open_logger, patience
        self._queue = queue.Queue[tuple[int, Values] | None](MOST_WAITING)
        self.failed = False
        self.thread = threading.Thread(target=self._work, name=f"logger-{name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: Values) -> None:
        """Hands on the values and never waits: what a logger cannot take is missing there."""
        self._put((step, values))

    def close(self) -> None:
        self._put(None)
        if not self.failed:
            self.thread.join(self._patience)
            if self.thread.is_alive():
                self._give_up(f"it has not come to an end within {self._patience:.0f} s")

    def _put(self, record: tuple[int, Values] | None) -> None:
        if not self.failed:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self._give_up(f"it has not taken the last {MOST_WAITING} records")

    def _work(self) -> None:
        try:
            logger = self._open()
            while (record := self._queue.get()) is not None:
                logger.log(dict(record[1]), step=record[0])
            logger.finish()
        except Exception as error:  # of any library: a run is worth more than its graph
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            log.warning(
                "%s gets no more metrics: %s. They are all in metrics.jsonl", self.name, reason
            )
