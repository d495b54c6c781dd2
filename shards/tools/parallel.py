"""Work spread over all cores.

Processes are spawned, so nothing of the parent's threads or files is inherited; they hold no
semaphore when they are killed, so a death ends the work with a named error instead of a hang.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from ..errors import WorkerDied
from ..signals import asking

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[int], None]  # called with the bytes that were done since the last call

PROCESS_BYTES = 1 << 26  # starting a process costs about what this many bytes cost
_channel: Connection | None = None  # of a worker, to the parent


class Progress(Protocol):
    """What counts the bytes of a pass, as a `console.Bar` does."""

    def begin(self, total: int, /) -> None: ...

    def advance(self, count: int, /) -> None: ...


class Silent:
    """A progress that nobody looks at."""

    def begin(self, total: int, /) -> None:
        pass

    def advance(self, count: int, /) -> None:
        pass


SILENT = Silent()


def cores() -> int:
    return len(os.sched_getaffinity(0))


def processes_for(processes: int | None, tasks: int, size: int) -> int:
    """Returns how many processes work on `size` bytes in some tasks: as many as an option says, or
    all cores where that pays.
    """
    return max(1, min(processes or min(cores(), 1 + size // PROCESS_BYTES), tasks))


def spread(
    work: Callable[[Task, Report], Result], tasks: Sequence[Task], processes: int, report: Report
) -> Iterator[tuple[Task, Result]]:
    """Yields (task, result) of each task as it is done, in any order; one process is this one.

    `work` must be importable. Its exceptions come out here; raises WorkerDied if a process was
    killed.
    """
    if processes == 1:
        for task in tasks:
            yield task, work(task, report)
        return
    context = get_context("spawn")
    inlet, outlet = context.Pipe(duplex=False)
    drain = threading.Thread(target=_drain, args=(inlet, report), daemon=True)
    drain.start()
    pool = ProcessPoolExecutor(processes, context, _begin, (outlet,))
    try:
        futures = {pool.submit(_call, work, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise WorkerDied(
            "a process of this command was killed, most likely for want of memory. Run it again "
            "with fewer --processes"
        ) from None
    finally:
        outlet.send_bytes(b"")
        drain.join()
        inlet.close()  # after an error, a worker that still has a task ends with its next report
        with asking():  # a worker may hang in a store
            pool.shutdown(cancel_futures=True)
        outlet.close()


def _drain(inlet: Connection, report: Report) -> None:
    """Passes on what workers report until the parent's own empty message comes."""
    while data := inlet.recv_bytes():
        report(int.from_bytes(data, "little"))


def _begin(channel: Connection) -> None:
    """Starts a worker: its reports go to the parent; a dead parent, or Ctrl-C, ends it."""
    global _channel
    _channel = channel
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _call(work: Callable[[Any, Report], Any], task: Any) -> Any:
    channel = _channel
    assert channel is not None
    # So few bytes go through a pipe whole, also from many writers, so no lock is needed.
    return work(task, lambda count: channel.send_bytes(count.to_bytes(8, "little")))
