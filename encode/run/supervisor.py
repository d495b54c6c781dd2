"""Supervises the workers of a run: slots are filled and given up as nodes come and go, shards
handed out, deaths and errors judged.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from shards import FormatVersion, IncompleteColumn, LeaseHeld, ShardsError, StoreError
from shards.column import Lease
from shards.exits import remedy
from shards.printing import redacted

from ..config import EngineConfig
from ..errors import Aborted, BadTar, EncodeError, NoWorkers, TarChanged
from ..tasks import ShardTask
from .local_worker import Died, Done, Event, Executor, Failed
from .progress import Progress
from .scheduler import Scheduler

FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
ABORT_SECONDS = 60.0  # for what is in flight to come back after an abort
NOTE_SECONDS = 60.0  # between two lines on workers that do not come


@dataclass
class Supervisor:
    """Hands out tasks and takes back events until nothing is left.

    A slot is a number. Its worker may die and be replaced; after four deaths in a row the slot is
    given up, and counts as taken for as long as the node that its worker died on exists.
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
    # an error that would hit every shard
    fatal: Exception | None = None

    def work(self) -> None:
        """Works to the end, or until the scheduler drains. Raises NoWorkers, or the error that
        would hit every shard; what is in flight is stopped then, so that nothing is left
        half-written.
        """
        try:
            self._fill_slots()
            look_at, note_at = time.monotonic() + self.engine.look, time.monotonic() + NOTE_SECONDS
            while not self.scheduler.finished:
                now = time.monotonic()
                if now >= look_at:
                    look_at = now + self.engine.look
                    self._fill_slots()
                    self._check_leases()
                if any(map(self.executor.ready, self.slots)):
                    note_at = now + NOTE_SECONDS
                elif now >= note_at:
                    note_at = now + NOTE_SECONDS
                    self.progress.note("no worker has started yet: is there room in the cluster?")
                if self.scheduler.stranded(self.slots):
                    raise NoWorkers(
                        "every worker died again and again; the last reason is in the log above"
                    )
                self._hand_out()
                for event in self.executor.events(timeout=1.0):
                    self._take(event)
                if self.fatal is not None:  # not before all events are taken
                    refuse(self.fatal)
                self.progress.update(self.scheduler, self.executor.stats())
        except Exception:
            self._wind_down()
            raise
        finally:
            self.progress.update(self.scheduler, self.executor.stats(), at_once=True)

    def _check_leases(self) -> None:
        """Drains if another command has taken a column over."""
        try:
            for lease in () if self.scheduler.draining else self.leases:
                lease.check()
        except LeaseHeld as error:
            self.progress.note(f"{error}; finishing what is in flight")
            self.taken_away = error
            self.scheduler.draining = True

    def _wind_down(self) -> None:
        """Stops what is in flight between two batches, and waits for it."""
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

    def _fill_slots(self) -> None:
        """Starts workers in new slots, retires those that never came for slots that are gone.

        With engine.workers there may be more of them than the cluster has room for, which calls for
        nodes where it scales by itself.
        """
        workers = None if self.engine.executor == "inline" else self.engine.workers
        count = workers or max(1, self.executor.slots())
        alive, given_up = self.executor.nodes(), self.scheduler.abandoned
        for slot in given_up - self.lost:
            node = self.executor.node_of(slot)
            if node is not None and node not in alive:
                self.lost.add(slot)
        used = [slot for slot in self.slots if slot not in self.lost]
        work = self.scheduler.left + self.scheduler.in_flight
        for _ in range(min(count, work) - len(used)):
            self.slots.append(self.next_slot)
            self.executor.start(self.next_slot)
            self.next_slot += 1
        for slot in reversed(used[count:]):
            if slot not in given_up and not self.executor.ready(slot):
                self.executor.retire(slot)
                self.scheduler.retired(slot)
                self.slots.remove(slot)

    def _hand_out(self) -> None:
        for slot in self.slots:
            while self.executor.ready(slot):
                key = self.scheduler.next_for(slot)
                if key is None:
                    break
                self.executor.submit(slot, key, self._task(key))

    def _task(self, key: int) -> ShardTask:
        """Returns a task: a share of them is decoded elsewhere, unless that may be what failed."""
        task, share = self.tasks[key], self.engine.remote_decode
        remote = int((key + 1) * share) > int(key * share) and not self.scheduler.tried(key)
        return replace(task, remote=True) if remote else task

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
        error = event.error
        if isinstance(error, Aborted | FormatVersion):
            self.scheduler.dropped(event.worker, event.key)
            if isinstance(error, FormatVersion):  # no fault of the shard: nothing is recorded
                self.fatal = error
            return
        text = str(error) or "the process could not get more memory"
        reason = redacted(f"{type(error).__name__}: {text}")
        self.scheduler.failed(event.worker, event.key, reason, is_final(error))
        self.progress.note(f"{self.tasks[event.key].name}: {reason}")
        if isinstance(error, OSError) and error.errno in FATAL:
            self.fatal = error


def is_final(error: Exception) -> bool:
    """Returns whether a shard's error would only come again. A network may come back, and what `gc`
    took is made anew.
    """
    passing = isinstance(error, (StoreError, IncompleteColumn, TarChanged))
    return isinstance(error, (BadTar, ShardsError)) and not passing


def refuse(error: Exception) -> NoReturn:
    """Raises what would hit every shard: a full disk, missing rights, records of a newer release."""
    if not isinstance(error, OSError) or isinstance(error, FormatVersion):
        raise error
    raise EncodeError(f"cannot go on: {error}. {remedy(error)}") from error
