"""Threads that fetch for readers: ahead of them, or many things at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

LINGER = 0.25  # seconds that an idle thread waits for work: to start one costs as much as a request
NO_THREAD = (RuntimeError, MemoryError)  # what starting a thread raises where the system refuses


class Fetchers:
    """Up to `most` threads that do what `take` returns until it returns None; it is called with `lock`
    held.

    They end soon after nothing is left to fetch or the program ends; they are not daemons, since
    those may be stopped inside the client's code at exit. Where the system starts no more threads,
    what no thread takes is left to its reader.
    """

    def __init__(
        self, most: int, take: Callable[[], Callable[[], None] | None], lock: threading.Lock
    ) -> None:
        self.most, self._take = most, take
        self._threads = self._starting = self._idle = 0
        self._wanted = 0  # pieces of work that no thread has taken yet, at most
        self._refused = False  # whether a thread could not be started, and that was said
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
        for remaining in range(started, 0, -1):
            try:
                threading.Thread(target=self._work, name="latentbank-fetch").start()
            except NO_THREAD as error:
                with self._due:
                    self._threads -= remaining
                    self._starting -= remaining
                self._say_refused(error)
                return

    def _say_refused(self, error: Exception) -> None:
        """Says once that no thread can be started, since reading goes on, more slowly."""
        if not self._refused:
            self._refused = True
            print(
                f"a store is read with fewer requests at once, more slowly: {error or 'no memory'}. Raise "
                "the limit of threads (`ulimit -u`, or that of the container), or start fewer processes",
                file=sys.stderr, flush=True,
            )  # fmt: skip

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


def fetch_all(
    pool: ThreadPoolExecutor, fetch: Callable[[Item], Result], items: Iterable[Item]
) -> list[Result]:
    """Returns fetch(item) of each item in order, by the threads of a pool; where it can start none, or no
    more, this thread does the rest. One item may then be fetched twice. After an error, what has not
    begun is left out.
    """
    waiting, coming = list(items), list[Future[Result]]()
    with suppress(*NO_THREAD):
        for item in waiting:
            coming.append(pool.submit(fetch, item))
    try:
        own = [fetch(item) for item in waiting[len(coming) :]]
        return [future.result() for future in coming] + own
    finally:
        for future in coming:  # those that are left after an error
            future.cancel()
