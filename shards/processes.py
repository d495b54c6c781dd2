"""Commands of ours as processes of their own, with the programs of this environment."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import bound

exists = bound.exists
kill = bound.kill


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
