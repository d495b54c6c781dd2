"""Items that threads make before they are asked for."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shards.read.prefetch import Prefetcher, map_ahead


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def counted(log: list[int], end: int | None = None) -> Iterator[int]:
    number = 0
    while number != end:
        log.append(number)
        yield number
        number += 1


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_all_in_their_order_and_no_more_than_depth_ahead() -> None:
    log: list[int] = []
    ahead = Prefetcher(counted(log, 50), 3, "numbers")
    assert until(lambda: len(log) == 4)  # three wait, and one is in the hand
    time.sleep(0.05)
    assert len(log) == 4
    assert list(ahead) == list(range(50))
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize(
    "error", [KeyError("row 7"), SystemExit("row 7")]
)  # what is no Exception, too
def test_an_error_comes_in_its_turn_and_again(error: BaseException) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise error

    ahead = Prefetcher(broken(), 4, "broken")
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(type(error), match="row 7"):
            next(ahead)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_the_thread_ends_with_it(how: str) -> None:
    name = f"ends-{how}"
    ahead = Prefetcher(counted([]), 2, name)
    assert next(ahead) == 0
    assert len(named(name)) == 1
    if how == "close":
        ahead.close()
        assert not named(name)
        ahead.close()
        with pytest.raises(StopIteration):
            next(ahead)
    else:
        del ahead
        gc.collect()
        assert until(lambda: not named(name))


# In a pool ----------------------------------------------------------------------------------------


def test_results_in_order_and_no_more_than_depth_ahead() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.002 * (number % 3))  # later ones end first
        return number * number

    with ThreadPoolExecutor(4) as pool:
        results = map_ahead(pool, work, range(40), 6)
        assert next(results) == 0
        assert until(lambda: len(started) == 7)
        time.sleep(0.05)
        assert len(started) == 7
        assert list(results) == [number * number for number in range(1, 40)]


def test_an_error_comes_in_its_turn_and_the_rest_is_waited_for() -> None:
    running, release = threading.Event(), threading.Event()
    ended: list[int] = []

    def work(number: int) -> int:
        if number == 1:
            running.wait(10)
            raise KeyError("row 1")
        if number == 2:
            running.set()
            release.wait(10)
        ended.append(number)
        return number

    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, work, range(9), 4)
        assert next(results) == 0
        threading.Timer(0.1, release.set).start()
        with pytest.raises(KeyError, match="row 1"):
            next(results)
        assert 2 in ended
        assert list(results) == []


def test_close_cancels_what_has_not_begun() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(
            pool, lambda number: (started.append(number), time.sleep(0.2)), range(99), 50
        )
        next(results)
        results.close()
        count = len(started)
        assert count < 50
        time.sleep(0.5)
        assert len(started) == count
