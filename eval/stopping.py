"""SIGTERM and SIGINT end a command in order, with a word and 128 and the signal's number as the exit code."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal came."""


@contextmanager
def stopping(came: list[int]) -> Iterator[None]:
    """Let SIGTERM and SIGINT raise Stopped, once: what follows cleans up undisturbed.

    What is raised within a finaliser is lost, so the signal's number is in `came` too.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        came.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stoppable(work: Callable[[], int]) -> int:
    """Run what raises Stopped when it is told to end, and goes on when it is run again. Returns the exit code."""
    try:
        return work()
    except Stopped as stop:
        number = int(stop.args[0])
        told = f"stopped by {signal.Signals(number).name}; run it again to go on from there"
        print(told, file=sys.stderr, flush=True)
        return 128 + number
