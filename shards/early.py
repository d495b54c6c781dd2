"""Ctrl-C while a command still loads its modules, so before there is anything to clean up: it ends
at once, with exit code 130 and without a traceback. `shards.exits.run` takes over from there.

Each command (`python -m train`, also under torchrun) loads this before all else, by way of the
package `shards`. A program that only imports the package is left alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

COMMANDS = ("encode", "eval", "shards", "train")


def end(number: int, _: FrameType | None) -> None:
    """Ends the process; a signal handler."""
    os._exit(128 + number)


def starts_command(words: Sequence[str], original: Sequence[str]) -> bool:
    """Returns whether the interpreter, with `original` on its command line, is about to run one of
    COMMANDS: `words` (sys.argv) begins with -m until the module is loaded.
    """
    if list(words[:1]) != ["-m"] or "-m" not in original[:-1]:
        return False
    return original[original.index("-m") + 1].partition(".")[0] in COMMANDS


if (
    starts_command(sys.argv, sys.orig_argv)
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored
):
    signal.signal(signal.SIGINT, end)
