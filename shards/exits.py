"""How a command ends: one way for all packages. Exit codes are listed in docs/faults.md.

error whose class has an `exit_code`     that code, and its message
a disk that is full or read-only, no right to a file, too many open ones, ...
                                         2, the path, and what to do
Ctrl-C where nothing handles signals     130 and a line
a reader that has seen enough (`| head`) 0, without a word: see `shards.printing.command`
any other error                          1 and its traceback: a fault of the program
"""

from __future__ import annotations

import atexit
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from .early import end
from .printing import drop_output
from .processes import allow_open_files
from .signals import brought_back, leave, to_main_thread

NO_RIGHT = "Give this user the right to it, or name another place, then run again"
MAKE_ROOM = "Make room, or name another disk, then run again"
OPEN_FILES = "Raise the limit of open files (`ulimit -n`), then run again"
IN_THE_WAY = (
    "Something else is where a file or folder is needed: move it away, or name another place"
)
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`), or name another disk",
    errno.EROFS: "It can only be read there: name another place, then run again",
    errno.EACCES: NO_RIGHT,
    errno.EPERM: NO_RIGHT,
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOENT: "Check the path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EIO: "The disk, or the storage behind it, fails: look at the system's log",
    errno.ESTALE: "The storage behind it was lost: look at the mount, then run again",
}


def explained(error: BaseException) -> tuple[int, str] | None:
    """Returns the exit code and message of an error that a user can put right; None of a fault of
    the program.
    """
    code = getattr(type(error), "exit_code", None)
    if code is not None:
        return int(code), f"{type(error).__name__}: {error}"
    if isinstance(error, BrokenPipeError) or not isinstance(error, OSError):
        return None
    if error.errno not in REMEDIES or (error.errno == errno.ENOENT and error.filename is None):
        return None
    return 2, f"{type(error).__name__}: {error}. {remedy(error)}"


def remedy(error: OSError) -> str:
    """Returns what to do about an error of the system."""
    return REMEDIES.get(error.errno or 0, "Make room, or give the rights, then run again")


def failed(error: BaseException) -> int:
    """Prints what a user can put right, and returns the exit code; raises a fault of the program."""
    explanation = explained(error)
    if explanation is None:
        raise error
    _say(explanation[1])
    return explanation[0]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command, and ends the process as the top of this file says.

    `main` returns the exit code, None being 0.
    """
    code: int | None = None
    allow_open_files()
    with _interrupts() as interrupts:
        try:
            code = main()
            _print_rest()
        except SystemExit:  # of `--help`, or of words that are wrong
            if not interrupts:
                raise
        except BaseException as error:
            # libraries may have made anything of an interrupt
            code = None if interrupts else failed(error)
        if interrupts and code is None:
            code = 128 + signal.SIGINT
            _say("stopped by SIGINT")
    sys.exit(leave(code or 0))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Lets Ctrl-C raise KeyboardInterrupt, and yields a list which then is not empty. At the end,
    when threads may still be waited for, another one ends the process at once.

    A signal that is ignored, or whose default the parent has left, stays as it is.
    """
    interrupts: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    handled = callable(signal.getsignal(signal.SIGINT))
    if handled:
        signal.signal(signal.SIGINT, interrupt)
        # the last of the exit functions: after them the interpreter gives signals their default again,
        # and Ctrl-C would end a command that is done as if it had been stopped
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with brought_back(KeyboardInterrupt, lambda: to_main_thread(signal.SIGINT)):
        yield interrupts
    if handled:
        signal.signal(signal.SIGINT, end)


def _print_rest() -> None:
    """Prints what stdout holds back: at the interpreter's end nobody could say that its disk is full."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):
            raise


def _say(text: str) -> None:
    with suppress(OSError):  # its reader is gone, or its disk is full
        print(text, file=sys.stderr, flush=True)
