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
        self._threads = self._starting = self._idle = 0
        self._wanted = 0  # pieces of work that no thread has taken yet, at most
        self._due = threading.Condition(lock)

    def wake(self, count: int) -> None:
        """Has idle threads, or new ones, take so many pieces of work. Called without the lock."""
        with self._due:
            self._wanted += count
            self._due.notify(count)
            lacking = (
                self._wanted - self._idle - self._starting
            )  # woken ones are idle till they run
            started = max(0, min(lacking, self.most - self._threads))
            self._threads += started
            self._starting += started
        for _ in range(started):
            threading.Thread(target=self._work, name="latentbank-fetch").start()

    def _work(self) -> None:
        with self._due:
            self._starting -= 1
        while work := self._next():
            try:
                work()
            except BaseException:  # whatever it is, another thread may take its place
                with self._due:
                    self._threads -= 1
                raise
            del work  # with what it holds, as a file, before the next is waited for

    def _next(self) -> Callable[[], None] | None:
        """Returns a piece of work, waited for; None if none came, or the program ends: what a thread
        has taken it does, for others may wait for it.
        """
        main, woken = threading.main_thread(), True
        with self._due:
            while main.is_alive():
                if work := self._take():
                    self._wanted = max(0, self._wanted - 1)
                    return work
                self._wanted = 0
                if not woken:
                    break
                self._idle += 1
                woken = self._due.wait(LINGER)
                self._idle -= 1
            self._threads -= 1
            return None
