"""Commands of ours as processes of their own, with the programs of this environment; what a fork
makes anew; how many files a process may open.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from . import bound

exists = bound.exists
kill = bound.kill
OPEN_FILES = 1 << 17  # that a process needs at most: objects of columns, and pages of a store


def allow_open_files() -> None:
    """Raises this process's soft limit of open files to the hard one, 131,072 at most. It is often
    1,024 for the sake of programs that use `select`, and what is not kept open is opened for each row.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # the system may allow less than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Forked(Protocol):
    """An object with locks, or files, that only one process can use."""

    def after_fork(self) -> None: ...


_WATCHED: WeakSet[Forked] = WeakSet()


def watch_forks(item: Forked) -> None:
    """Calls `item.after_fork()` in each child of a fork, for as long as the object lives: a lock that a
    thread of the parent held is never released in the child, which has no such thread.
    """
    _WATCHED.add(item)


def _after_fork() -> None:
    for item in list(_WATCHED):
        item.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def with_this_python(command: Sequence[str]) -> list[str]:
    """Returns the same command by this environment's programs, whatever PATH says."""
    program, *rest = command
    folder = Path(sys.executable).parent
    return [sys.executable if program == "python" else str(folder / program), *rest]


def bound_to(pid: int, command: Sequence[str], fence: Path | None = None) -> list[str]:
    """Returns a command that gets SIGTERM when the process that starts it, of this pid, ends in any
    way, SIGKILL among them, or when a file, its fence, is removed; see `bound`. Elsewhere than on Linux the
    process may end.
    """
    script, number = str(Path(bound.__file__)), str(int(signal.SIGTERM))
    return [sys.executable, "-S", script, number, str(pid), str(fence or ""), *command]
