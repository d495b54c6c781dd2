"""Becomes a command that ends with the process that started it, and with its fence.

    python -S bound.py SIGNAL PID FENCE COMMAND...

SIGNAL comes when the process PID, which started this one, is gone in any way: Linux sends it. FENCE is a
file, or nothing: while the command runs, another process looks whether it exists. Once it does not, the command gets
SIGNAL, and what is left of it after GRACE seconds SIGKILL: who removed the file waits for that.

Run as a script, without the package: nothing but the standard library is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import time

GRACE = 60.0  # seconds to save in
LOOK = 1.0  # seconds between two looks at the fence
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of prctl(2)


def exists(fence: str) -> bool:
    """Returns whether a file exists, False alone where that is sure. It is opened, which asks a network's
    file system anew.
    """
    try:
        os.close(os.open(fence, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    return True


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process started, and theirs; none where /proc does not say."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                # the name of a program, in brackets, may hold anything
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    pids = list(children.get(pid, ()))
    for child in pids:
        pids += children.get(child, ())
    return pids


def kill(pid: int) -> None:
    """Sends SIGKILL to a process, to its group, and to all that it started: torchrun's ranks have groups of
    their own.
    """
    for each in [*descendants(pid), pid]:
        if each != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def watch(pid: int, number: int, fence: str) -> None:
    """Ends a command, this process's parent, once its fence is gone; returns when it has ended."""
    os.setsid()
    end: float | None = None
    while os.getppid() == pid:
        if end is None and not exists(fence):
            end = time.monotonic() + GRACE
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        elif end is not None and time.monotonic() >= end:
            kill(pid)
        time.sleep(LOOK)


def main() -> None:
    number, parent, fence, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, int(number))
    if os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")
    if fence and not exists(fence):
        sys.exit(f"{fence}: no such file, so another has taken this over")
    pid = os.getpid()
    if fence and os.fork() == 0:
        try:
            watch(pid, int(number), fence)
        finally:
            os._exit(0)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
