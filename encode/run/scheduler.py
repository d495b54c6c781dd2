"""Who encodes what next: a pure state machine, without Ray, clocks or files.

A worker has two shards in flight, so that it never waits for the next. What was in flight when a
worker died becomes a suspect; suspects run alone, so that the death of a neighbour is never held
against a shard, and not where they died if another worker lives, so that a broken machine is not
either. A shard is given up after three failures, or three deaths while alone; a worker's slot after
four deaths without a shard finished between them, where the second and third death of one suspect
tell of the suspect and are not counted.

No step looks at all shards: each costs the same for a thousand as for a million.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ATTEMPTS = 3
DEATHS = 4
IN_FLIGHT = 2

T = TypeVar("T", bound=Hashable)


@dataclass
class Scheduler(Generic[T]):
    """Tasks are handed out by `next_for` and come back by `done`, `failed` or `died`."""

    tasks: Iterable[T]
    pending: deque[T] = field(init=False)
    suspects: deque[T] = field(default_factory=deque)
    running: dict[int, list[T]] = field(default_factory=dict)
    abandoned: set[int] = field(default_factory=set)
    given_up: dict[T, str] = field(default_factory=dict)
    draining: bool = False

    def __post_init__(self) -> None:
        self.pending = deque(self.tasks)
        self._failures: dict[T, int] = {}
        self._deaths: dict[int, int] = {}
        self._alone: set[T] = set()
        self._died_at: dict[T, set[int]] = {}

    def next_for(self, worker: int) -> T | None:
        """Returns the next task for a worker, or None if it should wait."""
        tasks = self.running.setdefault(worker, [])
        if self.draining or worker in self.abandoned or any(t in self._alone for t in tasks):
            return None
        suspect = self._suspect_for(worker) if self.suspects else None
        if suspect is not None:
            if tasks:
                return None  # first it has to be without work
            task = suspect
            self.suspects.remove(task)
            self._alone.add(task)
        elif self.pending and len(tasks) < IN_FLIGHT:
            task = self.pending.popleft()
        else:
            return None
        tasks.append(task)
        return task

    def _suspect_for(self, worker: int) -> T | None:
        """Returns a suspect that has not died with this worker, or else with every living one."""
        living = self.running.keys() - self.abandoned
        for task in self.suspects:
            if worker not in self._died_at[task] or not living - self._died_at[task]:
                return task
        return None

    def done(self, worker: int, task: T) -> None:
        self._return(worker, task)
        self._deaths[worker] = 0

    def failed(self, worker: int, task: T, reason: str, final: bool = False) -> None:
        """Takes back a task that raised an error; a `final` error would only come again."""
        self._return(worker, task)
        if final:
            self.given_up[task] = reason
        else:
            self._count(task, reason, self.pending)

    def died(self, worker: int, reason: str) -> None:
        """Takes back all that a dead worker had in flight; its slot may be filled again."""
        tasks = self.running.pop(worker, [])
        suspected = any(task in self._alone and task in self._failures for task in tasks)
        self._deaths[worker] = self._deaths.get(worker, 0) + (not suspected)
        if self._deaths[worker] >= DEATHS:
            self.abandoned.add(worker)
        for task in tasks:
            self._died_at.setdefault(task, set()).add(worker)
            if task in self._alone:
                self._alone.discard(task)
                self._count(task, reason, self.suspects)
            else:
                self.suspects.append(task)

    def dropped(self, worker: int, task: T) -> None:
        """Takes back a task that an abort ended; it does not count as a failure."""
        self._return(worker, task)
        self.pending.append(task)

    def retired(self, worker: int) -> None:
        """Forgets a worker without work that will not come back."""
        assert not self.running.get(worker)
        self.running.pop(worker, None)

    def _return(self, worker: int, task: T) -> None:
        self.running[worker].remove(task)
        self._alone.discard(task)

    def _count(self, task: T, reason: str, again: deque[T]) -> None:
        self._failures[task] = self._failures.get(task, 0) + 1
        if self._failures[task] >= ATTEMPTS:
            self.given_up[task] = reason
        else:
            again.append(task)

    def drain(self) -> None:
        """Hands out no more; safe in a signal handler."""
        self.draining = True

    @property
    def left(self) -> int:
        """Tasks that nobody has at the moment."""
        return len(self.pending) + len(self.suspects)

    @property
    def in_flight(self) -> int:
        return sum(map(len, self.running.values()))

    def tried(self, task: T) -> bool:
        """Returns whether a task was handed out before and did not come back done."""
        return task in self._failures or task in self._died_at

    @property
    def finished(self) -> bool:
        """Nothing is left to hand out or to wait for."""
        busy = any(self.running.values())
        return not busy and (self.draining or not (self.pending or self.suspects))

    def stranded(self, workers: Iterable[int]) -> bool:
        """Work is left, but every worker's slot is given up."""
        return not self.finished and all(worker in self.abandoned for worker in workers)
