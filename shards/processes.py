"""Commands of ours as processes of their own, with the programs of this environment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Asks Linux for a signal when the process that started it is gone, then becomes the command: PR_SET_PDEATHSIG is 1.
BOUND = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() != int(sys.argv[2]):
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[3], sys.argv[3:])
"""


def with_this_python(command: Sequence[str]) -> list[str]:
    """Returns the same command by this environment's programs, whatever PATH says."""
    program, *rest = command
    folder = Path(sys.executable).parent
    return [sys.executable if program == "python" else str(folder / program), *rest]


def bound_to(pid: int, command: Sequence[str]) -> list[str]:
    """Returns a command that gets SIGTERM when the process that starts it, of this pid, ends in any
    way, SIGKILL among them; elsewhere than on Linux, the command as it is.
    """
    number = str(int(signal.SIGTERM))
    return [sys.executable, "-S", "-c", BOUND, number, str(pid), *command]
