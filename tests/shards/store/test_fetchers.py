"""Threads that fetch ahead of readers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import pytest

from shards.store.fetchers import LINGER, Fetchers


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


def test_a_thread_that_cannot_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of four the second cannot; then none; then all can."""
    start, refused, left = threading.Thread.start, [], [1]

    def start_few(thread: threading.Thread) -> None:
        if not left[0]:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_few)
    gate, work = threading.Barrier(5), deque[Callable[[], None]]()
    threads, busy, go = fetchers(4, work), threading.Event(), threading.Event()

    def first() -> None:
        busy.set()
        assert go.wait(60)

    work += [first, *[lambda: gate.wait(60) and None] * 4]
    threads.wake(len(work))
    assert busy.wait(60)
    threads.wake(1)
    assert (threads._threads, threads._starting, len(refused)) == (1, 0, 2)
    assert capfd.readouterr().err.count("more slowly: can't start new thread. Raise") == 1
    left[0] = 3
    threads.wake(1)
    go.set()
    gate.wait(60)  # four at once


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
