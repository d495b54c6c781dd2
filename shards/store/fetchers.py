"""Threads that fetch ahead of readers."""

from __future__ import annotations

import threading
from collections.abc import Callable

LINGER = 0.25  # seconds that an idle thread waits for work: to start one costs as much as a request


class Fetchers:
    """Up to `most` threads that do what `take` returns until it returns None; it is called with `lock`
    held.

    They end soon after nothing is left to fetch or the program ends; they are not daemons, since
    those may be stopped inside the client's code at exit.
    """

    def __init__(
        self, most: int, take: Callable[[], Callable[[], None] | None], lock: threading.Lock
    ) -> None:
        self.most, self._take = most, take
        self._threads = self._idle = 0
        self._due = threading.Condition(lock)

    def wake(self, count: int) -> None:
        """Has idle threads, or new ones, take so many pieces of work. Called without the lock."""
        with self._due:
            self._due.notify(count)
            started = max(0, min(count - self._idle, self.most - self._threads))
            self._threads += started
        for _ in range(started):
            threading.Thread(target=self._work, name="latentbank-fetch").start()

    def _work(self) -> None:
        while True:
            with self._due:
                work = self._next()
                if work is None or not threading.main_thread().is_alive():
                    self._threads -= 1
                    return
            work()

    def _next(self) -> Callable[[], None] | None:
        """Returns a piece of work, waited for; None if none came."""
        woken = True
        while not (work := self._take()) and woken and threading.main_thread().is_alive():
            self._idle += 1
            woken = self._due.wait(LINGER)
            self._idle -= 1
        return work
