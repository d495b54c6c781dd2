"""What a run does when it is told to end.

    first SIGINT or SIGTERM   shards in flight are finished and committed
    second                    they are given up between two batches
    third                     the process ends at once

All are safe: what is committed stands, and the same command goes on. `ray job stop` sends SIGTERM
and kills soon after, so there the second step follows by itself in time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what is started by `ray job submit`
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_SECONDS = 3.0  # that `ray job stop` waits where it is not told otherwise
SPARE_SECONDS = 1.8  # of these, to give up what is in flight and leave in order
DRAINED = 130


def grace() -> float | None:
    """Seconds for shards in flight to finish in; None: as long as they take."""
    if JOB not in os.environ:
        return None
    return max(0.0, float(os.environ.get(STOP_WAIT, STOP_SECONDS)) - SPARE_SECONDS)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is as Ctrl-C while a run gets ready: what is held is given back."""

    def handle(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def draining(finish: Callable[[], None], abort: Callable[[], None]) -> Iterator[None]:
    """Call these at the first and the second signal. They run within a signal handler, so they may
    do no more than set something.
    """
    count = 0
    timer: threading.Timer | None = None

    def handle(number: int, _: object) -> None:
        nonlocal count, timer
        count += 1
        name = signal.Signals(number).name
        if count == 1:
            finish()
            say(f"{name}: finishing what is in flight; once more to give it up")
            if (seconds := grace()) is not None:
                timer = threading.Timer(seconds, abort)
                timer.daemon = True
                timer.start()
        elif count == 2:
            abort()
            say(f"{name}: giving up what is in flight")
        else:
            os._exit(DRAINED)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Not print: it fails if the signal came in the middle of another print."""
    os.write(sys.stderr.fileno(), f"\n{text}\n".encode())
