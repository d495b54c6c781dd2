"""Processes that are forked: they need not wait for imports."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(work: Callable[[], Any], output: Path) -> int:
    """Start `work` in a forked process (no imports to wait for), stdout and stderr in a file; its pid."""
    pid = os.fork()
    if pid:
        return pid
    # What the parent has left to its collector is not the child's to end: a finaliser that imports something while the
    # child imports breaks Python's import locks (KeyError in importlib, before 3.12).
    gc.freeze()
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has replaced them
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        work()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    return pid


def ended(work: Callable[[], int], output: Path) -> str:
    """What a command says in a fork, where it leaves its settings of malloc and its process group; exit code 0."""
    code = wait(fork(lambda: sys.exit(work()), output))
    text = output.read_text()
    assert code == 0, text
    return text


def wait(pid: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
