"""Items that a thread makes before they are asked for."""

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shards.read.prefetch import Ahead


def until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def counted(made: list[int], end: int | None = None) -> Iterator[int]:
    number = 0
    while number != end:
        made.append(number)
        yield number
        number += 1


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_all_in_their_order_and_no_more_than_depth_ahead() -> None:
    made: list[int] = []
    ahead = Ahead(counted(made, 50), 3, "numbers")
    assert until(lambda: len(made) == 4)  # three wait, and one is in the hand
    time.sleep(0.05)
    assert len(made) == 4
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

    ahead = Ahead(broken(), 4, "broken")
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(type(error), match="row 7"):
            next(ahead)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_the_thread_ends_with_it(how: str) -> None:
    name = f"ends-{how}"
    ahead = Ahead(counted([]), 2, name)
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
