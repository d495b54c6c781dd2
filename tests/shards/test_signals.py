"""Signals that stop a command, sent to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shards.signals import SIGNALS, Stopped, stopping

ROOT = Path(__file__).parents[2]
WAITS = """
    import sys, time
    from shards.signals import stoppable
    def work():
        print("ready", flush=True)
        time.sleep(60)
    sys.exit(stoppable(work))
"""


def start(code: str, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_ends_a_command_in_order(number: signal.Signals) -> None:
    with start(WAITS) as process:
        process.send_signal(number)
        _, message = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; run it again" in message


def test_what_was_ignored_at_the_start_stays_ignored() -> None:
    """As under nohup, whose process outlives its terminal."""
    with start(WAITS, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_first_raises_and_later_ones_do_not() -> None:
    received: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)

    def stopped_twice() -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while it cleans up

    with pytest.raises(Stopped) as stop, stopping(received):
        stopped_twice()
    assert stop.value.exit_code == 128 + signal.SIGUSR1
    assert received == [signal.SIGUSR1, signal.SIGTERM]
    assert signal.getsignal(signal.SIGUSR1) is before
