"""Workers as Ray actors, one a GPU (or a CPU where there is none), supervised from the driver.

Ray restarts and repeats nothing by itself: the supervisor does, and knows which shard it was. So
whatever Ray loses costs time, never data. Only kilobytes pass through it.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from ..config import ColumnConfig, EngineConfig
from ..errors import NoGpu, NoWorkers
from ..meter import Stats
from ..models import load_encoders
from ..models.encoder import Encoder
from ..tasks import ShardResult, ShardTask
from .local_worker import Died, Done, Event, Failed, Question, T, Worker
from .ray_start import check_start, connect, shut_down
from .scheduler import DEATHS
from .signals import deferred, undisturbed

log = logging.getLogger(__name__)
POLL_SECONDS = 5.0  # between two polls of a worker
NOTE_SECONDS = 60  # between two lines on a worker that does not come
CALLS_AT_ONCE = 4  # of a worker: two shards, a poll, an abort


class RayWorker:
    """The class that Ray makes an actor of. Without `weights`, the signatures to expect, it loads the
    encoders at the first question, so that the caller gets what loading raises.
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

    def process(self) -> str:
        """Returns which process this is and where its log is, for messages."""
        text = f"process {os.getpid()} on {socket.gethostname()}"
        with suppress(OSError):  # without /proc; Ray lets stderr go to a file
            text += f", whose log is {os.readlink('/proc/self/fd/2')}"
        return text

    def ask(self, question: Question[T]) -> tuple[T, dict[str, str]]:
        """Returns the answer, and the signature of each encoder."""
        if not self._encoders:
            self._start(None)
        return question(self._encoders), {n: e.signature for n, e in self._encoders.items()}

    def encode(self, task: ShardTask) -> tuple[ShardResult, Stats]:
        return self._worker.encode(task), self._worker.stats()

    def stats(self) -> tuple[str, Stats]:
        """Returns the id of the node, and the counters."""
        return self._node, self._worker.stats()

    def abort(self) -> None:
        self._worker.abort()


@dataclass(slots=True)
class Actor:
    """What the driver knows of an actor. `node` is None until it is ready; `heard` is when its beat
    last grew or it got a shard; `poll_at` is infinite while a poll is under way.
    """

    handle: Any
    node: str | None = None
    stats: Stats | None = None
    heard: float = 0.0
    poll_at: float = math.inf
    shards: set[int] = field(default_factory=set)  # in flight


class RayExecutor:
    """Starts actors, hands them shards, and tells of their deaths; kills those that are stuck."""

    worker_class: type = RayWorker

    def __init__(
        self, columns: dict[str, ColumnConfig], weights: dict[str, str] | None, engine: EngineConfig
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # colours of its lines would be escaped
        ray: Any = sys.modules.get("ray")
        self._own = ray is None or not ray.is_initialized()
        if self._own:
            check_start()
            with deferred():  # half-loaded C++ code may end in an abort
                ray = importlib.import_module("ray")
            connect(ray, engine)
        if engine.device == "cuda" and not ray.cluster_resources().get("GPU"):
            if self._own:
                shut_down(ray)
            raise NoGpu(
                "engine.device=cuda: no node of the Ray cluster has "
                "a GPU. Start one that has, or leave device out: auto takes what there is"
            )
        self._ray, self._args, self._engine = ray, (columns, weights, engine), engine
        self._looked = time.monotonic()  # for workers that are stuck
        self._spare: Any = None  # an actor with the encoders loaded that is no worker yet
        self._actors: dict[int, Actor] = {}
        self._last_node: dict[int, str] = {}
        # worker and shard of each call; None: a poll
        self._calls: dict[Any, tuple[int, int | None]] = {}
        self._aborting = False

    # The cluster ----------------------------------------------------------------------------------

    def slots(self) -> int:
        """Returns the workers that the cluster has room for: one a GPU, without GPUs one a CPU."""
        resources = self._ray.cluster_resources()
        if self._on_gpus(resources):
            return int(resources["GPU"])
        cpus, share = int(resources.get("CPU", 0)), self._engine.remote_decode
        return max(cpus - max(round(cpus * share), 1), 1) if share else cpus

    def nodes(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in self._ray.nodes() if node["Alive"])

    def _on_gpus(self, resources: Mapping[str, float]) -> bool:
        return bool(resources.get("GPU", 0)) and self._engine.device != "cpu"

    # Actors ---------------------------------------------------------------------------------------

    def _actor(self) -> Any:
        on_gpus = self._on_gpus(self._ray.cluster_resources())
        needs = {"num_gpus": 1, "num_cpus": self._engine.threads} if on_gpus else {"num_cpus": 1}
        return self._ray.remote(self.worker_class).options(
            max_restarts=0, max_task_retries=0, max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy="SPREAD", **needs,
        ).remote(*self._args)  # fmt: skip

    def ask(self, question: Question[T]) -> T:
        """Returns the answer of an actor, which then becomes the first worker. Raises what loading
        or the question raise there, NoWorkers if actors die of it again and again, or if one has not
        answered after `engine.patience`. How long the cluster takes to start one is not limited.
        """
        reason = ""
        for _ in range(DEATHS):
            try:
                with deferred() as signals:
                    self._spare = self._spare or self._actor()
                    start = self._spare.process.remote()
                    self._wait(
                        start, signals, "no worker has started: is there room in the cluster?"
                    )
                    if not signals:
                        process = self._ray.get(start)
                        call = self._spare.ask.remote(question)
                        note = f"a worker still loads the encoders: {process}"
                        if not self._wait(call, signals, note, self._engine.patience):
                            self._drop_spare()
                            raise NoWorkers(
                                f"the first worker has not loaded and tried the encoders within "
                                f"{self._engine.patience:g} s: {process}. If it only needs longer, "
                                "raise engine.patience"
                            )
                    if not signals:
                        answer, weights = self._ray.get(call)
                self._args = self._args[0], weights, self._engine
                return cast("T", answer)
            except self._ray.exceptions.RayTaskError as error:
                raise cause_of(error) from None
            except self._ray.exceptions.RayError as error:  # of the actor, its node, its memory
                reason = reason_of(error)
                self._drop_spare()
        raise NoWorkers(f"{DEATHS} workers died while they loaded the encoders; the last: {reason}")

    def _wait(self, call: Any, signals: list[int], note: str, patience: float = math.inf) -> bool:
        """Waits for a call to end, or for a signal, and logs `note` every NOTE_SECONDS. Returns False
        after `patience` seconds; those in which this process was suspended do not count.
        """
        seconds = 0
        while not (signals or self._ray.wait([call], timeout=1, fetch_local=False)[0]):
            seconds += 1
            if seconds >= patience:
                return False
            if not seconds % NOTE_SECONDS:
                log.warning(note)
        return True

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._ray.kill(self._spare, no_restart=True)
            self._spare = None

    def start(self, worker: int) -> None:
        self._actors[worker] = Actor(self._spare or self._actor())
        self._spare = None
        self._poll(worker)  # fails if the actor cannot start

    def _poll(self, worker: int) -> None:
        actor = self._actors[worker]
        actor.poll_at = math.inf
        self._calls[actor.handle.stats.remote()] = worker, None

    def ready(self, worker: int) -> bool:
        actor = self._actors.get(worker)
        return actor is not None and actor.node is not None

    def node_of(self, worker: int) -> str | None:
        return self._last_node.get(worker)

    def retire(self, worker: int) -> None:
        """Ends an actor and all its calls. It is killed also where it seems dead, so that one that
        is only out of reach does not hold its GPU.
        """
        self._calls = {call: key for call, key in self._calls.items() if key[0] != worker}
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
        events: list[Event] = []
        for call in self._finished(timeout):
            if call not in self._calls:  # its worker has been declared dead meanwhile
                continue
            worker, key = self._calls.pop(call)
            event = self._event(call, worker, key)
            if isinstance(event, Died):
                self.retire(worker)
            if event is not None:
                events.append(event)
        events += self._stuck()
        now = time.monotonic()
        for worker in [worker for worker, actor in self._actors.items() if now >= actor.poll_at]:
            self._poll(worker)
        return events

    def _finished(self, timeout: float) -> list[Any]:
        """Returns all calls that have ended; waits for the first one."""
        calls = list(self._calls)
        if not calls:
            time.sleep(timeout)
        if not calls or not self._ray.wait(calls, timeout=timeout, fetch_local=False)[0]:
            return []
        ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0, fetch_local=False)
        return list(ready)

    def _event(self, call: Any, worker: int, key: int | None) -> Event | None:
        """Returns what a call that has ended tells; None for a poll."""
        actor, now = self._actors[worker], time.monotonic()
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if key is None:  # not a shard's error
                raise
            actor.shards.discard(key)
            return Failed(worker, key, cause_of(error))
        except self._ray.exceptions.RayError as error:  # of the actor, its node, its memory
            return Died(worker, reason_of(error))
        if key is not None:
            actor.shards.discard(key)
            actor.heard = now
            result, actor.stats = answer
            return Done(worker, key, result)
        actor.node, stats = answer
        self._last_node[worker] = actor.node
        if actor.stats is None or stats.beat != actor.stats.beat:
            actor.heard = now
        actor.stats, actor.poll_at = stats, now + min(POLL_SECONDS, self._engine.patience / 4)
        return None

    def _stuck(self) -> list[Event]:
        """Kills workers with shards in flight whose beat has not grown for too long.

        Time in which this process did not look does not count: a scheduler had suspended it, maybe
        all of the job.
        """
        now, patience = time.monotonic(), self._engine.patience
        if now - self._looked > patience / 2:
            for actor in self._actors.values():
                actor.heard = now
        self._looked = now
        events: list[Event] = []
        for worker, actor in list(self._actors.items()):
            if actor.shards and now - actor.heard > patience:
                self.retire(worker)
                seconds = now - actor.heard
                events.append(Died(worker, f"killed: nothing done for {seconds:.0f} s"))
        return events

    def stats(self) -> Mapping[int, Stats]:
        return {w: a.stats for w, a in self._actors.items() if a.stats is not None}

    def abort(self) -> None:
        self._aborting = True

    def stop(self) -> None:
        with undisturbed():
            for worker in list(self._actors):
                self.retire(worker)
            self._drop_spare()
            if self._own:
                shut_down(self._ray)


def cause_of(error: Any) -> Exception:
    """Returns what was raised on a worker, or Ray's error where that cannot be sent."""
    cause = error.cause
    return cause if isinstance(cause, Exception) else cast("Exception", error)


def reason_of(error: Exception) -> str:
    """Returns the first and last line of Ray's message on a dead actor: the last is its own error,
    if any.
    """
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__
