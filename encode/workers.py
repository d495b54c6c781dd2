"""Where shards are encoded: in this process, or in Ray actors. Both speak to the job by the same
few events.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .config import ColumnConfig, EngineConfig, MomentsColumn
from .engine import Encoder, ShardResult, ShardTask, encode_shard
from .registry import TEXTS, VAES, lookup
from .text import TextEncoder
from .vae import Vae


@dataclass(frozen=True, slots=True)
class Done:
    worker: int
    task: ShardTask
    result: ShardResult


@dataclass(frozen=True, slots=True)
class Failed:
    worker: int
    task: ShardTask
    error: Exception


@dataclass(frozen=True, slots=True)
class Died:
    worker: int
    reason: str


Event = Done | Failed | Died


class Executor(Protocol):
    """Workers are small integers. `rows` is how many rows have been written so far, for the
    progress bar.
    """

    def start(self, worker: int) -> None: ...
    def ready(self, worker: int) -> bool: ...  # a cluster may have no room for it yet
    def submit(self, worker: int, task: ShardTask) -> None: ...
    def events(self, timeout: float) -> list[Event]: ...
    def rows(self) -> int: ...
    def stop(self) -> None: ...


def pick_device(device: str) -> str:
    """`auto` is the GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(config: ColumnConfig, device: str, expected: str | None = None) -> Encoder:
    """The model of a column; ModelNotUsable if it cannot be loaded or its weights are not the
    expected ones.
    """
    if isinstance(config, MomentsColumn):
        return Encoder(config, Vae(lookup(config.encoder, VAES), device, expected))
    text = TextEncoder(
        lookup(config.encoder, TEXTS),
        max_tokens=config.max_tokens,
        hidden_state=config.hidden_state,
        template=config.template,
        device=device,
        expected=expected,
    )
    return Encoder(config, text)


class Worker:
    """Holds every model once and encodes shards; two calls may run at a time, models take turns."""

    def __init__(self, encoders: dict[str, Encoder], engine: EngineConfig) -> None:
        self._encoders, self._engine = encoders, engine
        self._lock = threading.Lock()
        self._rows = 0
        torch.set_num_threads(engine.torch_threads)

    @classmethod
    def load(
        cls, columns: dict[str, ColumnConfig], weights: dict[str, str], engine: EngineConfig
    ) -> Worker:
        device = pick_device(engine.device)
        return cls({n: load_encoder(c, device, weights[n]) for n, c in columns.items()}, engine)

    def encode(self, task: ShardTask) -> ShardResult:
        return encode_shard(task, self._encoders, self._engine, self._lock, self._count)

    def _count(self, rows: int) -> None:
        self._rows += rows

    def rows(self) -> int:
        return self._rows


class InlineExecutor:
    """One worker in this process; a task runs when its event is asked for."""

    def __init__(self, encoders: dict[str, Encoder], engine: EngineConfig) -> None:
        self._worker = Worker(encoders, engine)
        self._queue: deque[tuple[int, ShardTask]] = deque()

    def start(self, worker: int) -> None:
        pass

    def ready(self, worker: int) -> bool:
        return True

    def submit(self, worker: int, task: ShardTask) -> None:
        self._queue.append((worker, task))

    def events(self, timeout: float) -> list[Event]:
        if not self._queue:  # drained before the first task was handed out
            return []
        worker, task = self._queue.popleft()
        try:
            return [Done(worker, task, self._worker.encode(task))]
        except Exception as error:  # the job decides what it means
            return [Failed(worker, task, error)]

    def rows(self) -> int:
        return self._worker.rows()

    def stop(self) -> None:
        pass


class RayExecutor:
    """Supervised Ray actors, one a worker. Ray restarts nothing by itself: the job does, and knows
    which shard it was.
    """

    def __init__(
        self, columns: dict[str, ColumnConfig], weights: dict[str, str], engine: EngineConfig
    ) -> None:
        ray: Any = importlib.import_module("ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if not ray.is_initialized():
            # `ray job submit` sets RAY_ADDRESS; the cluster's resources are then its own business
            local = {
                "address": "local", "include_dashboard": False, "object_store_memory": 128 << 20
            }  # fmt: skip
            options = {} if "RAY_ADDRESS" in os.environ else local
            ray.init(logging_level="WARNING", **options)
        self._ray, self._args, self._engine = ray, (columns, weights, engine), engine
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, ShardTask | None]] = {}
        self._ready: set[int] = set()
        self._finished_rows = 0

    def slots(self) -> int:
        """Workers that the cluster has room for: one a GPU, or one a CPU where there is none."""
        resources = self._ray.cluster_resources()
        return int(resources.get("GPU", 0) or resources.get("CPU", 1))

    def _needs(self) -> dict[str, float]:
        gpus = self._ray.cluster_resources().get("GPU", 0) and self._engine.device != "cpu"
        return {"num_gpus": 1, "num_cpus": self._engine.threads} if gpus else {"num_cpus": 1}

    def start(self, worker: int) -> None:
        actor = self._ray.remote(RayWorker).options(
            max_restarts=0, max_task_retries=0, max_concurrency=4,
            scheduling_strategy="SPREAD", **self._needs(),
        ).remote(*self._args)  # fmt: skip
        self._actors[worker] = actor
        self._calls[actor.rows.remote()] = worker, None  # fails if the actor cannot start

    def ready(self, worker: int) -> bool:
        return worker in self._ready

    def submit(self, worker: int, task: ShardTask) -> None:
        self._calls[self._actors[worker].encode.remote(task)] = worker, task

    def events(self, timeout: float) -> list[Event]:
        ready, _ = self._ray.wait(list(self._calls), timeout=timeout)
        found: list[Event] = []
        for call in ready:
            if call not in self._calls:  # its worker has been declared dead meanwhile
                continue
            worker, task = self._calls.pop(call)
            try:
                result = self._ray.get(call)
            except self._ray.exceptions.RayActorError as error:
                self._calls = {c: who for c, who in self._calls.items() if who[0] != worker}
                self._ready.discard(worker)
                found.append(Died(worker, reason_of(error)))
            except self._ray.exceptions.RayTaskError as error:
                if task is None:  # not a shard's error
                    raise
                found.append(Failed(worker, task, error.cause))
            else:
                if task is None:
                    self._ready.add(worker)
                else:
                    self._finished_rows += result.rows
                    found.append(Done(worker, task, result))
        return found

    def rows(self) -> int:
        return self._finished_rows

    def stop(self) -> None:
        self._ray.shutdown()


def reason_of(error: Exception) -> str:
    """First and last line of what Ray says of a dead actor: the last is the error of its own, if
    any.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))


class RayWorker:
    """The class that Ray makes an actor of."""

    def __init__(
        self, columns: dict[str, ColumnConfig], weights: dict[str, str], engine: EngineConfig
    ) -> None:
        self._worker = Worker.load(columns, weights, engine)

    def encode(self, task: ShardTask) -> ShardResult:
        return self._worker.encode(task)

    def rows(self) -> int:
        return self._worker.rows()
