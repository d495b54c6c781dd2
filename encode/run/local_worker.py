"""A worker holds every encoder once and encodes shards, two at a time. Here is the worker of this
process; `ray_workers` has those that are Ray actors. Both report to the supervisor by the same
events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..config import EngineConfig
from ..meter import Stats
from ..models.encoder import Encoder
from ..tasks import ShardResult, ShardTask
from .encode_shard import encode_shard
from .resources import WorkerResources
from .scheduler import IN_FLIGHT


@dataclass(frozen=True, slots=True)
class Done:
    worker: int
    key: int  # of the task, as `submit` got it
    result: ShardResult


@dataclass(frozen=True, slots=True)
class Failed:
    worker: int
    key: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Died:
    worker: int
    reason: str


Event = Done | Failed | Died
T = TypeVar("T")
Question = Callable[[Mapping[str, Encoder]], T]  # what only loaded encoders can answer


class Executor(Protocol):
    """Workers are small integers, and so are tasks."""

    def ask(self, question: Question[T]) -> T: ...  # on a worker; raises what it raises there
    def slots(self) -> int: ...  # workers there is room for now; it may change
    def nodes(self) -> frozenset[str]: ...  # ids of the living nodes
    def start(self, worker: int) -> None: ...
    def ready(self, worker: int) -> bool: ...  # a cluster may have no room for it yet
    def retire(self, worker: int) -> None: ...  # ends it, or calls it off
    def submit(self, worker: int, key: int, task: ShardTask) -> None: ...
    def events(self, timeout: float) -> list[Event]: ...
    def node_of(self, worker: int) -> str | None: ...  # where it is, or was
    def stats(self) -> Mapping[int, Stats]: ...  # the newest of each living worker
    def abort(self) -> None: ...  # shards in flight fail as Aborted; called by a signal handler
    def stop(self) -> None: ...


class Worker:
    """`encode` may be called from two threads: one shard fills the gaps of the other."""

    def __init__(self, encoders: Mapping[str, Encoder], engine: EngineConfig) -> None:
        self._encoders, self._engine = encoders, engine
        self._resources = WorkerResources(engine.threads)

    def encode(self, task: ShardTask) -> ShardResult:
        return encode_shard(task, self._encoders, self._engine, self._resources)

    def stats(self) -> Stats:
        return self._resources.meter.stats()

    def abort(self) -> None:
        """Lets what is in flight fail between two batches."""
        self._resources.stop.set()


class InlineExecutor:
    """One worker in this process."""

    def __init__(self, encoders: Mapping[str, Encoder], engine: EngineConfig) -> None:
        self._encoders, self._worker = encoders, Worker(encoders, engine)
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="shard")
        self._calls: dict[Future[ShardResult], tuple[int, int]] = {}

    def ask(self, question: Question[T]) -> T:
        return question(self._encoders)

    def slots(self) -> int:
        return 1

    def nodes(self) -> frozenset[str]:
        return frozenset()

    def start(self, worker: int) -> None: ...
    def retire(self, worker: int) -> None: ...
    def ready(self, worker: int) -> bool:
        return True

    def node_of(self, worker: int) -> str | None:
        return None

    def submit(self, worker: int, key: int, task: ShardTask) -> None:
        self._calls[self._pool.submit(self._worker.encode, task)] = worker, key

    def events(self, timeout: float) -> list[Event]:
        ready, _ = wait(self._calls, timeout, FIRST_COMPLETED)
        events: list[Event] = []
        for call in ready:
            worker, key = self._calls.pop(call)
            try:
                events.append(Done(worker, key, call.result()))
            except Exception as error:  # the supervisor decides what it means
                events.append(Failed(worker, key, error))
        return events

    def stats(self) -> Mapping[int, Stats]:
        return {0: self._worker.stats()}

    def abort(self) -> None:
        self._worker.abort()

    def stop(self) -> None:
        self._worker.abort()
        self._pool.shutdown(cancel_futures=True)
