"""Where a worker's time goes.

Every moment of a worker is counted once: as busy while an encoder runs, else under what the shard
that is ahead of the others waits for (`read`, `decode`, `write`), or as `idle` where it has none.
So busy and waits add up to the worker's life, and the greatest wait says what to do about it.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

READ, DECODE, WRITE, IDLE = "read", "decode", "write", "idle"
WAITS = (DECODE, READ, WRITE, IDLE)
Seconds = defaultdict[str, float]


def none_spent() -> Seconds:
    """Returns zero seconds of anything."""
    return defaultdict(float)


@dataclass(frozen=True, slots=True)
class Stats:
    """What a worker has done since it was made; a picture of one moment."""

    node: str  # host name
    pid: int
    beat: int  # grows with everything that gets done; a worker whose beat does not grow is stuck
    busy: float  # seconds in which an encoder ran
    waits: dict[str, float]  # seconds in which none did, by reason
    seconds: dict[str, float]  # by stage, added up over threads
    cpu: dict[str, float]
    rows: dict[str, int]  # so far, of each shard in flight


@dataclass(slots=True, eq=False)
class Timer:
    """One shard's part: seconds by stage for its commits, and its place among those in flight."""

    meter: Meter
    name: str
    rows: int = 0
    waits_for: str = READ
    encoding: bool = False
    seconds: Seconds = field(default_factory=none_spent)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts a stage; any thread may, several at once."""
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.meter.add(self, stage, time.perf_counter() - start, time.thread_time() - cpu)

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Counts time in which the shard goes no further."""
        before = self.waits_for
        self.meter.shift(self, reason, False)
        try:
            yield
        finally:
            self.meter.shift(self, before, False)

    @contextmanager
    def encodes(self, column: str) -> Iterator[None]:
        """Counts time in which an encoder runs for the shard."""
        self.meter.shift(self, self.waits_for, True)
        try:
            with self(column):
                yield
        finally:
            self.meter.shift(self, self.waits_for, False)

    def done(self, rows: int = 0) -> None:
        """Counts progress, and rows that need no more encoding."""
        self.rows += rows
        self.meter.beat()


class Meter:
    """The counters of one worker."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._at = clock()
        self._timers: list[Timer] = []  # of the shards in flight, the first one is ahead
        self._beat = 0
        self._busy = 0.0
        self._waits: Seconds = none_spent()
        self._seconds: Seconds = none_spent()
        self._cpu: Seconds = none_spent()

    @contextmanager
    def shard(self, name: str) -> Iterator[Timer]:
        """Yields the timer of a shard in flight."""
        timer = Timer(self, name)
        with self._lock:
            self._advance()
            self._timers.append(timer)
        try:
            yield timer
        finally:
            with self._lock:
                self._advance()
                self._timers.remove(timer)
                self._beat += 1

    def _advance(self) -> None:
        """Counts the time since the last change; under the lock."""
        now = self._clock()
        if any(timer.encoding for timer in self._timers):
            self._busy += now - self._at
        else:
            reason = self._timers[0].waits_for if self._timers else IDLE
            self._waits[reason] += now - self._at
        self._at = now

    def shift(self, timer: Timer, waits_for: str, encoding: bool) -> None:
        """Sets what a shard waits for, and whether an encoder runs for it."""
        with self._lock:
            self._advance()
            timer.waits_for, timer.encoding = waits_for, encoding

    def add(self, timer: Timer, stage: str, seconds: float, cpu: float) -> None:
        """Adds the seconds of a stage."""
        with self._lock:
            timer.seconds[stage] += seconds
            self._seconds[stage] += seconds
            self._cpu[stage] += cpu

    def beat(self) -> None:
        """Counts progress of any kind."""
        with self._lock:
            self._beat += 1

    def stats(self) -> Stats:
        """Returns the counters of this moment."""
        with self._lock:
            self._advance()
            return Stats(
                platform.node(), os.getpid(), self._beat, self._busy,
                {reason: self._waits[reason] for reason in WAITS},
                dict(self._seconds), dict(self._cpu), {t.name: t.rows for t in self._timers},
            )  # fmt: skip
