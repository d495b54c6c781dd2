"""The workers of a run: slots filled, given up and taken on as nodes come and go, shards handed
out, deaths and errors judged.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from shards import FormatVersion, ShardsError
from shards.column.lease import Lease
from shards.errors import IncompleteColumn, LeaseHeld, StoreError
from shards.printing import redacted

from ..config import EngineConfig
from ..errors import Aborted, BadTar, EncodeError, NoWorkers, TarChanged
from ..tasks import ShardTask
from .local_worker import Died, Done, Event, Executor, Failed
from .progress import Progress
from .scheduler import Scheduler

FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
ABORT_SECONDS = 60.0  # for what is in flight to come back once it has been told to stop
NOTE_SECONDS = 60.0  # between two words on workers that do not come


@dataclass
class Supervisor:
    """Hands out tasks and takes back events until nothing is left.

    A slot is a number. Its worker may die and be replaced; after four deaths in a row it is given
    up, and counts as taken for as long as the node that it died on is there.
    """

    scheduler: Scheduler[int]
    executor: Executor
    engine: EngineConfig
    tasks: Sequence[ShardTask]
    progress: Progress
    leases: Sequence[Lease] = ()
    slots: list[int] = field(default_factory=list)
    # slots given up on a node that is gone
    lost: set[int] = field(default_factory=set)
    next_slot: int = 0
    taken_away: LeaseHeld | None = None
    fatal: Exception | None = None  # an error that would hit every shard

    def work(self) -> None:
        """To the end, or until the scheduler drains. Raises NoWorkers, or the error that would hit
        every shard; what is in flight is stopped then, so that nothing is left half-written.
        """
        try:
            self._look()
            looked = noted = time.monotonic()
            while not self.scheduler.finished:
                now = time.monotonic()
                if now - looked >= self.engine.look:
                    looked = now
                    self._look()
                    self._check()
                if any(map(self.executor.ready, self.slots)):
                    noted = now
                elif now - noted >= NOTE_SECONDS:
                    noted = now
                    self.progress.note("no worker has started yet: is there room in the cluster?")
                self._refuse_if_stranded()
                self._hand_out()
                for event in self.executor.events(timeout=1.0):
                    self._take(event)
                if self.fatal is not None:  # not before all events are taken
                    refuse(self.fatal)
                self.progress.update(self.scheduler, self.executor.stats())
        except Exception:
            self.wind_down()
            raise
        finally:
            self.progress.update(self.scheduler, self.executor.stats(), at_once=True)

    def _check(self) -> None:
        """Drains if another command has taken a column over."""
        try:
            for lease in () if self.scheduler.draining else self.leases:
                lease.check()
        except LeaseHeld as error:
            self.progress.note(f"{error}; finishing what is in flight")
            self.taken_away = error
            self.scheduler.draining = True

    def wind_down(self) -> None:
        """Tell what is in flight to stop between two batches, and wait for it."""
        self.scheduler.draining = True
        self.executor.abort()
        until = time.monotonic() + ABORT_SECONDS
        while self.scheduler.in_flight and time.monotonic() < until:
            for event in self.executor.events(timeout=0.2):
                if isinstance(event, Done):
                    self._take(event)
                elif isinstance(event, Died):
                    self.scheduler.died(event.worker, event.reason)
                else:
                    self.scheduler.dropped(event.worker, event.key)

    @property
    def wanted(self) -> int | None:
        """Workers that the config asks for; those for which there is no room may call for nodes."""
        return self.engine.workers if self.engine.executor == "ray" else None

    def _look(self) -> None:
        """Fill slots that have come, retire workers that never came for slots that have gone."""
        wanted = self.wanted or max(1, self.executor.slots())
        alive, given_up = self.executor.nodes(), self.scheduler.abandoned
        for slot in given_up - self.lost:
            node = self.executor.node_of(slot)
            if node is not None and node not in alive:
                self.lost.add(slot)
        taken = [p for p in self.slots if p not in self.lost]
        work = self.scheduler.left + self.scheduler.in_flight
        for _ in range(min(wanted - len(taken), work - len(taken))):
            self.slots.append(self.next_slot)
            self.executor.start(self.next_slot)
            self.next_slot += 1
        for slot in reversed(taken[wanted:]):
            if slot not in given_up and not self.executor.ready(slot):
                self._retire(slot)

    def _retire(self, slot: int) -> None:
        self.executor.retire(slot)
        self.scheduler.retired(slot)
        self.slots.remove(slot)

    def _refuse_if_stranded(self) -> None:
        if self.scheduler.stranded(self.slots):
            raise NoWorkers(
                "every worker died again and again; the last reason is in the log above"
            )

    def _hand_out(self) -> None:
        for slot in self.slots:
            while self.executor.ready(slot):
                key = self.scheduler.next_for(slot)
                if key is None:
                    break
                self.executor.submit(slot, key, self._task(key))

    def _task(self, key: int) -> ShardTask:
        """A share of the shards is decoded elsewhere, unless that may be what failed."""
        task, share = self.tasks[key], self.engine.remote_decode
        elsewhere = int((key + 1) * share) > int(key * share)
        return replace(task, remote=True) if elsewhere and not self.scheduler.tried(key) else task

    def _take(self, event: Event) -> None:
        if isinstance(event, Done):
            self.scheduler.done(event.worker, event.key)
            self.progress.shard_done(event.key, event.result)
        elif isinstance(event, Failed):
            self._failed(event)
        else:
            self.scheduler.died(event.worker, event.reason)
            self.progress.gone(event.worker)
            self.progress.note(f"worker {event.worker} died: {event.reason}")
            if event.worker not in self.scheduler.abandoned and not self.scheduler.draining:
                self.executor.start(event.worker)

    def _failed(self, event: Failed) -> None:
        if isinstance(event.error, Aborted | FormatVersion):
            self.scheduler.dropped(event.worker, event.key)
            if isinstance(event.error, FormatVersion):  # no fault of the shard: nothing is recorded
                self.fatal = event.error
            return
        text = str(event.error) or "the process could not get more memory"
        reason = redacted(f"{type(event.error).__name__}: {text}")
        self.scheduler.failed(event.worker, event.key, reason, is_final(event.error))
        self.progress.note(f"{self.tasks[event.key].name}: {reason}")
        if isinstance(event.error, OSError) and event.error.errno in FATAL:
            self.fatal = event.error


def is_final(error: Exception) -> bool:
    """Whether a shard's error would only come again. A network may come back, and what `gc` took is
    made anew.
    """
    passing = isinstance(error, (StoreError, IncompleteColumn, TarChanged))
    return isinstance(error, (BadTar, ShardsError)) and not passing


def refuse(error: Exception) -> NoReturn:
    """Raise what would hit every shard: a full disk, missing rights, records of a newer release."""
    if isinstance(error, FormatVersion):
        raise error
    raise EncodeError(
        f"cannot go on: {error}. Make room or give the rights, then run again"
    ) from error
