"""Ctrl-C while the script `latentbank` loads this package: it ends at once, with exit code 130 and
without a traceback, as `shards.early` has it of the stages. Nothing else is touched by it.
"""

from __future__ import annotations

import os
import signal
import sys

if (
    [os.path.basename(word) for word in sys.argv[:1]] == ["latentbank"]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored
):
    signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
