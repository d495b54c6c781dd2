"""How a command is stopped: by any signal that a shell, a scheduler or a limit sends for that.

What is in progress (a step, a batch, a shard) is finished or given up in order, and the command ends
with exit code 128 + the signal's number.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType

# A hang-up is a closed terminal, SIGUSR1 and SIGUSR2 are what SLURM's --signal is set to, SIGXCPU
# comes before a limit of CPU time, SIGQUIT is Ctrl-\.
SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
    signal.SIGQUIT,
)  # fmt: skip
LATER = 0.01  # seconds after which a stop that was lost comes again
GRACE = 5.0  # seconds without progress after a stop, after which a request is taken to hang
_REQUESTS: dict[int, float] = {}  # when each thread that asks a store last got anything
_WAKEUPS: list[int] = []  # where this process, and none that it forks, writes its signals


class Stopped(BaseException):
    """A signal to stop came; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


@contextmanager
def on_stop(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls `handle` with the number of each stop signal that comes meanwhile, in the main thread
    between two instructions, so that it may do no more than set something or raise.

    A signal that is ignored at the start stays ignored, as SIGHUP is under nohup.
    """

    def received(number: int, _: FrameType | None) -> None:
        handle(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, received) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def to_main_thread(number: int) -> None:
    """Sends a signal to the main thread, which it wakes where it sleeps or waits."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


@contextmanager
def brought_back(kind: type[BaseException], again: Callable[[], object]) -> Iterator[None]:
    """Lets nothing of `kind` be lost that a signal handler raises meanwhile: within a finaliser, or
    a callback of the interpreter (of which each import has some), Python prints it with a traceback
    and goes on. Here `again` is called in its place, a moment later and by another thread.
    """
    before, ended, lock = sys.unraisablehook, False, threading.Lock()

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, kind):
            threading.Thread(target=later, daemon=True).start()
        else:
            before(unraisable)

    def later() -> None:
        # what is raised within the hook itself would be lost for good
        while True:
            time.sleep(LATER)
            with lock:
                if ended:  # handlers are those of before, which may end the process
                    return
                if not _runs(threading.main_thread().ident, lost.__code__):
                    again()
                    return

    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = before
        with lock:
            ended = True


def _runs(thread: int | None, code: CodeType) -> bool:
    """Returns whether a thread is within a function, or in what that calls."""
    frame = sys._current_frames().get(thread or 0)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


@contextmanager
def stopping(received: list[int] | None = None) -> Iterator[None]:
    """Lets the first stop signal raise Stopped; later ones are ignored, so that what follows cleans
    up undisturbed.

    The signal's number is appended to `received` too.
    """
    first, last = True, 0

    def stop(number: int) -> None:
        nonlocal first, last
        if received is not None:
            received.append(number)
        if first:
            first, last = False, number
            raise Stopped(number)

    def again() -> None:
        nonlocal first
        first = True
        to_main_thread(last)

    with on_stop(stop), brought_back(Stopped, again):
        yield


def stoppable(work: Callable[[], int | None], received: list[int] | None = None) -> int:
    """Runs what goes on when it is run again. Returns its exit code, None being 0, or 128 + n where
    stop signal n ended it; see `stopping`.
    """
    try:
        with stopping(received):
            return work() or 0
    except Stopped as stop:
        name = signal.Signals(stop.number).name
        print(f"stopped by {name}; run it again to go on from there", file=sys.stderr, flush=True)
        return stop.exit_code


@contextmanager
def asking() -> Iterator[None]:
    """Says that this thread waits for a store meanwhile; see `in_time`."""
    thread = threading.get_ident()
    outer = thread in _REQUESTS
    _REQUESTS[thread] = time.monotonic()
    try:
        yield
    finally:
        if not outer:
            del _REQUESTS[thread]


def progressed() -> None:
    """Says that something came of what this thread waits for."""
    thread = threading.get_ident()
    if thread in _REQUESTS:
        _REQUESTS[thread] = time.monotonic()


@contextmanager
def in_time() -> Iterator[None]:
    """Ends the process after a stop signal where a request to a store hangs, be it in the main thread,
    which handles no signal meanwhile, or in one that the main thread waits for. Only for commands
    that may be killed at any moment and go on when they are run again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _WAKEUPS.append(writer)
    threading.Thread(target=_end_in_time, args=(reader, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        _WAKEUPS.remove(writer)
        os.close(writer)


def _after_fork() -> None:
    """Stops a child from writing the signals that it gets to its parent."""
    _REQUESTS.clear()
    if _WAKEUPS:
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_after_fork)


def _end_in_time(reader: int, over: threading.Event) -> None:
    """Waits for a stop signal, then until a request makes no progress."""
    number = 0
    with os.fdopen(reader, "rb", buffering=0) as signals:
        while number not in SIGNALS:
            if not (data := signals.read(1)):
                return
            number = data[0]
    since = time.monotonic()
    while not over.wait(0.1):
        before = time.monotonic() - GRACE
        if any(max(last, since) < before for last in list(_REQUESTS.values())):
            text = f"stopped by {signal.Signals(number).name}, though a store did not answer for {GRACE:g} s"
            with suppress(OSError):
                os.write(2, f"{text}; run it again to go on from there\n".encode())
            leave(128 + number)


def leave(exit_code: int) -> int:
    """Ends the process at once if `exit_code` is that of a stop signal, else returns it.

    What had to be saved is saved by now, and the interpreter would wait at its end for threads that
    may hang in the storage.
    """
    if exit_code > 128:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there is none, its reader is gone
                stream.flush()
        os._exit(exit_code)
    return exit_code
