"""Threads that fetch for readers: ahead of them, or many things at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.store.fetchers import LINGER, Fetchers, fetch_all


def fetchers(most: int, work: deque[Callable[[], None]]) -> Fetchers:
    return Fetchers(most, lambda: work.popleft() if work else None, threading.Lock())


def test_no_more_threads_than_asked_for_and_all_work_is_done() -> None:
    """Three hold the first three pieces until all have begun; the rest waits for them."""
    gate, names, lock = threading.Barrier(4), set[str](), threading.Lock()
    done = threading.Semaphore(0)

    def piece(first: bool) -> None:
        if first:
            gate.wait(60)
        with lock:
            names.add(str(threading.get_ident()))
        done.release()

    work = deque([lambda i=i: piece(i < 3) for i in range(40)])
    threads = fetchers(3, work)
    threads.wake(len(work))
    gate.wait(60)
    for _ in range(40):
        assert done.acquire(timeout=60)
    assert len(names) <= 3
    assert not work


def test_an_idle_thread_takes_what_comes_next_and_ends_when_nothing_does() -> None:
    work: deque[Callable[[], None]] = deque()
    threads = fetchers(4, work)
    done = threading.Semaphore(0)
    for _ in range(50):
        work.append(done.release)
        threads.wake(1)
        assert done.acquire(timeout=60)
    end = time.monotonic() + 60
    while threads._threads and time.monotonic() < end:
        time.sleep(LINGER / 10)
    assert threads._threads == threads._idle == 0


def test_work_that_comes_bit_by_bit_is_done_side_by_side() -> None:
    """One thread is idle; five pieces wait for each other."""
    gate, work = threading.Barrier(6), deque[Callable[[], None]]()
    threads, first = fetchers(8, work), threading.Event()
    work.append(first.set)
    threads.wake(1)
    assert first.wait(60)
    for _ in range(5):
        work.append(lambda: gate.wait(60) and None)
        threads.wake(1)
    gate.wait(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_has_a_successor() -> None:
    def fail() -> None:
        raise MemoryError

    done = threading.Event()
    work: deque[Callable[[], None]] = deque([fail])
    threads = fetchers(1, work)
    threads.wake(1)
    end = time.monotonic() + 60
    while threads._threads and time.monotonic() < end:
        time.sleep(0.01)
    work.append(done.set)
    threads.wake(1)
    assert done.wait(10)
    for thread in threading.enumerate():  # the error is said of this test
        if thread.name == "latentbank-fetch":
            thread.join(60)


class Left:
    """The threads that may still be started; others are refused as the system does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.count, self.refused = count, 0
        start = threading.Thread.start

        def start_few(thread: threading.Thread) -> None:
            if not self.count:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            self.count -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_few)


def test_a_thread_that_cannot_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of four the second cannot; then none; then all can."""
    left = Left(monkeypatch, 1)
    gate, work = threading.Barrier(5), deque[Callable[[], None]]()
    threads, busy, go = fetchers(4, work), threading.Event(), threading.Event()

    def first() -> None:
        busy.set()
        assert go.wait(60)

    work += [first, *[lambda: gate.wait(60) and None] * 4]
    threads.wake(len(work))
    assert busy.wait(60)
    threads.wake(1)
    assert (threads._threads, threads._starting, left.refused) == (1, 0, 2)
    assert capfd.readouterr().err.count("more slowly: can't start new thread. Raise") == 1
    left.count = 3
    threads.wake(1)
    go.set()
    gate.wait(60)  # four at once


@pytest.mark.parametrize("count", [0, 1, 4])
def test_many_are_fetched_by_the_threads_that_there_are(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Of four; each waits for all others at its first item."""
    begun = set[int]()
    gate = threading.Barrier(count + (count < 4))

    def fetch(item: int) -> int:
        if threading.get_ident() not in begun:
            begun.add(threading.get_ident())
            gate.wait(60)
        return 10 * item

    left = Left(monkeypatch, count)
    with ThreadPoolExecutor(4) as pool:
        assert fetch_all(pool, fetch, range(40)) == list(range(0, 400, 10))
    assert len(begun) == gate.parties
    assert (left.refused > 0) == (threading.get_ident() in begun) == (count < 4)


@pytest.mark.parametrize("count", [0, 4])
def test_after_an_error_the_rest_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    begun: list[int] = []

    def fetch(item: int) -> None:
        begun.append(item)
        if not item:
            raise ValueError("the first")
        time.sleep(0.01)

    Left(monkeypatch, count)
    with ThreadPoolExecutor(4) as pool, pytest.raises(ValueError, match="the first"):
        fetch_all(pool, fetch, range(1000))
    assert len(begun) < 1000


PROGRAM = """
import threading, time
from collections import deque
from shards.store.fetchers import Fetchers
work = deque([lambda: time.sleep(0.1)] * 10_000)
threads = Fetchers(4, lambda: work.popleft() if work else None, threading.Lock())
threads.wake(4)
time.sleep(0.1)
"""


def test_a_program_ends_though_much_is_left_to_fetch() -> None:
    """It would take 250 s to do it all."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
