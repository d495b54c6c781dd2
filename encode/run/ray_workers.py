"""Workers as Ray actors, one a GPU (or a CPU where there is none), supervised from the driver.

Ray restarts and repeats nothing by itself: the job does, and knows which shard it was. So whatever
Ray loses costs time, never data. Only kilobytes pass through it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from ..config import ColumnConfig, EngineConfig
from ..errors import NoWorkers
from ..meter import Stats
from ..models import load_encoders
from ..models.encoder import Encoder
from ..tasks import ShardResult, ShardTask
from .local_worker import Died, Done, Event, Failed, Question, T, Worker
from .scheduler import DEATHS

log = logging.getLogger(__name__)
POLL_SECONDS = 5.0  # between two questions to a worker
STORE_BYTES = 128 << 20  # of the object store of a cluster of our own; pictures need more
NOTE_SECONDS = 60.0  # between two lines on a worker that does not come
CALLS_AT_ONCE = 4  # of a worker: two shards, one question, one word to stop


class RayWorker:
    """The class that Ray makes an actor of. The one that is asked before any digest of weights is
    known loads the encoders at its first question, so that what loading raises is the answer.
    """

    load = staticmethod(load_encoders)

    def __init__(
        self, columns: dict[str, ColumnConfig], weights: dict[str, str] | None, engine: EngineConfig
    ) -> None:
        self._columns, self._engine = columns, engine
        self._encoders: Mapping[str, Encoder] = {}
        if weights is not None:
            self._start(weights)
        ray: Any = importlib.import_module("ray")
        self._node = str(ray.get_runtime_context().get_node_id())

    def _start(self, weights: dict[str, str] | None) -> None:
        self._encoders = self.load(self._columns, self._engine, weights)
        self._worker = Worker(self._encoders, self._engine)

    def ask(self, question: Question[T]) -> tuple[T, dict[str, str]]:
        """Returns the answer, and the digest of each encoder's weights."""
        if not self._encoders:
            self._start(None)
        return question(self._encoders), {n: e.weights for n, e in self._encoders.items()}

    def encode(self, task: ShardTask) -> tuple[ShardResult, Stats]:
        return self._worker.encode(task), self._worker.stats()

    def stats(self) -> tuple[str, Stats]:
        """The id of the node, and what has been counted."""
        return self._node, self._worker.stats()

    def abort(self) -> None:
        self._worker.abort()


@dataclass(slots=True)
class Actor:
    """What the driver knows of one."""

    handle: Any
    node: str | None = None  # None until it has answered, so until it is ready
    stats: Stats | None = None
    heard: float = 0.0  # when its beat last grew, or it was given something to do
    asked: float = 0.0
    asking: bool = True
    shards: set[int] = field(default_factory=set)  # in flight


class RayExecutor:
    """Starts actors, hands them shards, and tells of their deaths; kills those that are stuck."""

    worker_class: type = RayWorker

    def __init__(
        self, columns: dict[str, ColumnConfig], weights: dict[str, str] | None, engine: EngineConfig
    ) -> None:
        ray: Any = importlib.import_module("ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # colours of its lines would be escaped
        self._own = not ray.is_initialized()
        if self._own:
            # `ray job submit` sets RAY_ADDRESS; the cluster's resources are then its own business
            local = {
                "address": "local", "include_dashboard": False,
                "object_store_memory": STORE_BYTES * (4 if engine.remote_decode else 1),
            }  # fmt: skip
            options = {} if "RAY_ADDRESS" in os.environ else local
            at_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts its own in the place
            try:
                ray.init(logging_level="WARNING", **options)
                signal.signal(signal.SIGTERM, at_sigterm)
            except (ConnectionError, RuntimeError) as error:
                raise NoWorkers(
                    f"Ray cannot be reached or started ({error}). RAY_ADDRESS is "
                    f"{os.environ.get('RAY_ADDRESS', 'not set')}: check that the cluster runs and "
                    "that RAY_AUTH_TOKEN is its token"
                ) from error
        self._ray, self._args, self._engine = ray, (columns, weights, engine), engine
        self._poll = min(POLL_SECONDS, engine.patience / 4)
        self._looked = time.monotonic()  # for workers that are stuck
        self._spare: Any = None  # an actor with the encoders loaded that is no worker yet
        self._actors: dict[int, Actor] = {}
        self._last_node: dict[int, str] = {}
        self._calls: dict[Any, tuple[int, int | None]] = {}  # None: a question
        self._aborting = False

    # The cluster ----------------------------------------------------------------------------------

    def slots(self) -> int:
        """Workers that the cluster has room for: one a GPU, or one a CPU where there is none."""
        resources = self._ray.cluster_resources()
        cpus = int(resources.get("CPU", 0))
        if self._on_gpus(resources):
            return int(resources["GPU"])
        lent = round(cpus * self._engine.remote_decode)  # to tasks that decode
        return max(cpus - max(lent, 1), 1) if self._engine.remote_decode else cpus

    def nodes(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in self._ray.nodes() if node["Alive"])

    def _on_gpus(self, resources: Mapping[str, float]) -> bool:
        return bool(resources.get("GPU", 0)) and self._engine.device != "cpu"

    def _needs(self) -> dict[str, float]:
        gpus = self._on_gpus(self._ray.cluster_resources())
        return {"num_gpus": 1, "num_cpus": self._engine.threads} if gpus else {"num_cpus": 1}

    # Actors ---------------------------------------------------------------------------------------

    def _actor(self) -> Any:
        return self._ray.remote(self.worker_class).options(
            max_restarts=0, max_task_retries=0, max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy="SPREAD", **self._needs(),
        ).remote(*self._args)  # fmt: skip

    def ask(self, question: Question[T]) -> T:
        """Returns the answer of an actor, which then becomes the first worker; raises what loading or
        the question raise there, NoWorkers if actors die of it again and again.
        """
        reason = ""
        for _ in range(DEATHS):
            self._spare = self._spare or self._actor()
            call = self._spare.ask.remote(question)
            try:
                while not self._ray.wait([call], timeout=NOTE_SECONDS, fetch_local=False)[0]:
                    log.warning("no worker has answered yet: is there room in the cluster?")
                columns, _, engine = self._args
                answer, weights = self._ray.get(call)
                self._args = columns, weights, engine
                return cast("T", answer)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except self._ray.exceptions.RayError as error:  # of the actor, its node, its memory
                reason = reason_of(error)
                self._ray.kill(self._spare, no_restart=True)
                self._spare = None
        raise NoWorkers(f"{DEATHS} workers died while they loaded the encoders; the last: {reason}")

    def start(self, worker: int) -> None:
        self._actors[worker] = actor = Actor(self._spare or self._actor())
        self._spare = None
        self._poll_actor(worker, actor)  # fails if the actor cannot start

    def _poll_actor(self, worker: int, actor: Actor) -> None:
        actor.asked, actor.asking = time.monotonic(), True
        self._calls[actor.handle.stats.remote()] = worker, None

    def ready(self, worker: int) -> bool:
        actor = self._actors.get(worker)
        return actor is not None and actor.node is not None

    def node_of(self, worker: int) -> str | None:
        return self._last_node.get(worker)

    def retire(self, worker: int) -> None:
        self._forget(worker)

    def _forget(self, worker: int) -> None:
        """Whatever is left of an actor, and all its calls. Killed also where it seems dead, so that
        one that is only out of reach does not hold its GPU.
        """
        self._calls = {call: who for call, who in self._calls.items() if who[0] != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor.handle, no_restart=True)

    def submit(self, worker: int, key: int, task: ShardTask) -> None:
        actor = self._actors[worker]
        if not actor.shards:
            actor.heard = time.monotonic()
        actor.shards.add(key)
        self._calls[actor.handle.encode.remote(task)] = worker, key

    # Events ---------------------------------------------------------------------------------------

    def events(self, timeout: float) -> list[Event]:
        if self._aborting:
            self._aborting = False
            for actor in self._actors.values():
                actor.handle.abort.remote()
        found: list[Event] = []
        for call in self._finished(timeout):
            if call not in self._calls:  # its worker has been declared dead meanwhile
                continue
            worker, key = self._calls.pop(call)
            event = self._event(call, worker, key)
            if isinstance(event, Died):
                self._forget(worker)
            if event is not None:
                found.append(event)
        found += self._stuck()
        now = time.monotonic()
        for worker, actor in self._actors.items():
            if not actor.asking and now - actor.asked >= self._poll:
                self._poll_actor(worker, actor)
        return found

    def _finished(self, timeout: float) -> list[Any]:
        """All calls that have ended; waits for the first one."""
        if not self._calls:
            time.sleep(timeout)
            return []
        calls = list(self._calls)
        first, _ = self._ray.wait(calls, timeout=timeout, fetch_local=False)
        if not first:
            return []
        ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return list(ready)

    def _event(self, call: Any, worker: int, key: int | None) -> Event | None:
        """What a call that has ended tells; None for an answer to a question."""
        actor = self._actors[worker]
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if key is None:  # not a shard's error
                raise
            actor.shards.discard(key)
            cause = error.cause
            return Failed(worker, key, cause if isinstance(cause, Exception) else error)
        except self._ray.exceptions.RayError as error:  # of the actor, its node, its memory
            return Died(worker, reason_of(error))
        if key is not None:
            actor.shards.discard(key)
            actor.heard = time.monotonic()
            result, actor.stats = answer
            return Done(worker, key, result)
        actor.asking = False
        actor.node, stats = answer
        self._last_node[worker] = actor.node
        if actor.stats is None or stats.beat != actor.stats.beat:
            actor.heard = time.monotonic()
        actor.stats = stats
        return None

    def _stuck(self) -> list[Event]:
        """Workers with shards in flight of which nothing has been heard for too long are killed.

        The time that this process did not look (a scheduler had suspended it, maybe all of the job) does not count.
        """
        now, patience = time.monotonic(), self._engine.patience
        if now - self._looked > patience / 2:
            for actor in self._actors.values():
                actor.heard = now
        self._looked = now
        late = [
            (worker, now - actor.heard)
            for worker, actor in self._actors.items()
            if actor.shards and now - actor.heard > patience
        ]
        for worker, _ in late:
            self._forget(worker)
        return [Died(w, f"killed: nothing done for {seconds:.0f} s") for w, seconds in late]

    def stats(self) -> Mapping[int, Stats]:
        return {w: a.stats for w, a in self._actors.items() if a.stats is not None}

    def abort(self) -> None:
        self._aborting = True

    def stop(self) -> None:
        for worker in list(self._actors):
            self._forget(worker)
        if self._spare is not None:
            self._ray.kill(self._spare, no_restart=True)
        if self._own:
            self._ray.shutdown()


def reason_of(error: Exception) -> str:
    """First and last line of what Ray says of a dead actor: the last is the error of its own, if
    any.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__
