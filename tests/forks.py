"""Processes that are forked: they need not wait for imports."""

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def split() -> int:
    """`os.fork`, but what the parent has left to its collector is not the child's to end: a finaliser that imports
    something while the child imports breaks Python's import locks (KeyError in importlib, before 3.12).
    """
    pid = os.fork()
    if not pid:
        gc.freeze()
    return pid


def lighten() -> None:
    """Move this process's memory to pages of 2 MB, where the kernel does that (Linux 6.1): a fork copies the page
    table, which takes 70 ms of CPU once torch, diffusers and transformers are loaded, and half of that afterwards.
    """
    maps = Path("/proc/self/maps")
    advise, collapse, size = 14, 25, 1 << 21  # MADV_HUGEPAGE, MADV_COLLAPSE
    madvise = ctypes.CDLL(None).madvise
    for line in maps.read_text().splitlines() if maps.exists() else ():
        span, kind, _, _, _, *name = line.split()
        first, last = (int(address, 16) // size for address in span.split("-"))
        start = (first + 1) * size
        if kind == "rw-p" and name in ([], ["[heap]"]) and last * size > start:
            for advice in (advise, collapse):
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(last * size - start), advice)


def fork(work: Callable[[], Any], output: Path) -> int:
    """Start `work` in a forked process (no imports to wait for), stdout and stderr in a file; its pid."""
    pid = split()
    if pid:
        return pid
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


def leave_pytest() -> None:
    """Undo in a fork what pytest has set up, and end when the parent does."""
    logging.getLogger().handlers.clear()
    faulthandler.disable()  # writes to pytest's stderr
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def ended(work: Callable[[], int], output: Path) -> str:
    """What a command says in a fork, where it leaves its settings of malloc and its process group; exit code 0."""
    code = wait(fork(lambda: sys.exit(work()), output))
    text = output.read_text()
    assert code == 0, text
    return text


def wait(pid: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended_in_time(pid: int) -> int | None:
    """Exit code of a child; None if it did not end in time, and was killed."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def stop_after(owner: Any, name: str, condition: Callable[[], object]) -> None:
    """Has this process, a fork, stop itself (SIGSTOP) once, after the first call of a function that ends while
    a condition holds: what happens then need not be caught in time.
    """
    function = getattr(owner, name)

    def stopping(*words: Any, **more: Any) -> Any:
        result = function(*words, **more)
        if condition() and getattr(owner, name) is stopping:
            setattr(owner, name, function)
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    setattr(owner, name, stopping)


def await_stop(pid: int, output: Path) -> None:
    """Returns once a child has stopped; AssertionError if it ended."""
    status = os.waitpid(pid, os.WUNTRACED)[1]
    assert os.WIFSTOPPED(status), f"{os.waitstatus_to_exitcode(status)}: {output.read_text()}"


def torchrun(work: Callable[[], Any], ranks: int, output: Path) -> int:
    """torchrun's agent with `work` in a fork for each rank, not in a Python started anew; its exit code."""
    return wait(start_torchrun(work, ranks, output))


def start_torchrun(work: Callable[[], Any], ranks: int, output: Path, **options: Any) -> int:
    """The same, but not to its end: the agent's pid. `options` are fields of torch's LaunchConfig."""

    def agent() -> None:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id="forks", rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0", start_method="fork", monitor_interval=0.1,
            **{"max_restarts": 0, **options},
        )  # fmt: skip
        elastic_launch(config, as_rank)()

    def as_rank() -> None:
        leave_pytest()
        work()

    return fork(agent, output)
