"""What a run does when it is told to stop, by any signal of `shards.signals`.

    first signal   shards in flight are finished and committed
    second         they are given up between two batches
    third          the process ends at once

All are safe: what is committed stays, and the same command goes on. `ray job stop` sends SIGTERM
and kills soon after, so there the second step follows by itself in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.signals import Stopped, on_stop

# Ray sets JOB for what `ray job submit` starts, and kills STOP_WAIT seconds after SIGTERM
JOB, STOP_WAIT = "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"
STOP_SECONDS = 3.0  # Ray's own default for it
SPARE_SECONDS = 1.8  # of these, to give up what is in flight and leave in order


def grace() -> float | None:
    """Returns the seconds that shards in flight have to finish; None: as long as they take."""
    if JOB not in os.environ:
        return None
    return max(0.0, float(os.environ.get(STOP_WAIT, STOP_SECONDS)) - SPARE_SECONDS)


@contextmanager
def draining(finish: Callable[[], None], abort: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `finish` at the first stop signal and `abort` at the second, from a signal handler, so
    they may do no more than set something. Yields the signals received, which grows.
    """
    received: list[int] = []
    timer = threading.Timer(grace() or 0.0, abort)
    timer.daemon = True

    def handle(number: int) -> None:
        received.append(number)
        name = signal.Signals(number).name
        if len(received) == 1:
            finish()
            say(f"{name}: finishing what is in flight; once more to give it up")
            if grace() is not None:
                timer.start()
        elif len(received) == 2:
            abort()
            say(f"{name}: giving up what is in flight")
        else:
            os._exit(128 + received[0])

    with on_stop(handle):
        try:
            yield received
        finally:
            timer.cancel()


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Yields the stop signals received meanwhile, and raises Stopped at the end if there are any:
    what a handler raises within Ray's C++ code would come out as a SystemError.
    """
    received: list[int] = []
    try:
        with on_stop(received.append):
            yield received
    finally:
        if received:
            raise Stopped(received[0])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Lets a stop signal pass that comes meanwhile: what ends in order now, ends. A second one ends
    the process at once, without the interpreter's end.
    """
    received: list[int] = []

    def handle(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + received[0])

    with on_stop(handle):
        yield


def say(text: str) -> None:
    """Writes a line; print would fail if the signal came in the middle of another print."""
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
