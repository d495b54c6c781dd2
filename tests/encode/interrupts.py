"""Ctrl-C at any moment of an `encode run` that starts Ray itself: the whole command, with a real model and
signals to its process group, as a terminal sends them.

`check` is one case: of a test, and in great numbers of the soak run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

from tests.encode.rays import ROOT, processes, until
from tests.encode.toy import save_gemma, save_kl, write_config, write_source
from tests.memory import MEMORY
from tests.soak.sweep import Case, Sweep

SHARDS, ROWS = 30, 200
KINDS = {"once": 80, "twice": 80, "thrice": 40}  # signals, and how many cases
FIRST = 0.5, 20.0  # seconds from the start to the first signal; a run takes about 20
NEXT = 0.05, 3.0  # from one signal to the next
END_SECONDS = 60.0  # from the first signal to the end of the process

_folder: list[Path] = []


def folder() -> Path:
    """One source and its models for all cases of a process of the soak run."""
    if not _folder:
        scratch = tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True)
        Finalize(None, scratch.cleanup, exitpriority=10)
        made = Path(scratch.name)
        save_kl(made / "models" / "kl")
        save_gemma(made / "models" / "gemma")
        write_source(made / "tars", SHARDS, ROWS)
        _folder.append(made)
    return _folder[0]


def check(kind: str, number: int) -> None:
    """Sends 1 to 3 signals at moments drawn by chance. The command ends by itself with 128 + SIGINT, or was
    done before, never in an abort; it prints no traceback, and nothing of the cluster remains.
    """
    chance = random.Random(f"{kind} {number}")
    seconds = chance.uniform(*FIRST)
    between = [chance.uniform(*NEXT) for _ in range(list(KINDS).index(kind))]
    code, output = interrupted(seconds, between)
    assert code in (0, 128 + signal.SIGINT), f"exit code {code} after {seconds:.1f} s: {output}"
    assert "Traceback" not in output, output


def interrupted(
    first: float, between: list[float], word: str = "", **engine: object
) -> tuple[int, str]:
    """Returns the exit code of a run and what it printed; the first signal comes `first` seconds after
    the start, or after `word` was printed.
    """
    tars = f"{folder()}/tars/{{0..{SHARDS - 1}}}.tar"
    with tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as name:
        here, log = Path(name), Path(name) / "log"
        config = write_config(
            here / "c.yaml", here / "cache", tars, folder() / "models",
            **{"executor": "ray", "workers": 1, **engine},
        )  # fmt: skip
        env = {n: v for n, v in os.environ.items() if n != "RAY_ADDRESS"}
        env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": name, "PYTHONFAULTHANDLER": "1"}
        with log.open("w") as file:
            run = subprocess.Popen(
                [sys.executable, "-m", "encode", "run", str(config)], cwd=ROOT, env=env,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        try:
            if word:
                until(lambda: word in log.read_text() or run.poll() is not None)
            with suppress(subprocess.TimeoutExpired):
                run.wait(first)
            for pause in [*between, END_SECONDS]:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        run.wait(pause)
            assert run.poll() is not None, f"no end {END_SECONDS} s after it: {log.read_text()}"
            until(lambda: not processes(name.encode()), 60, "the end of the cluster")
            return run.returncode, log.read_text()
        finally:
            for pid in {run.pid, *processes(name.encode())} if run.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def cases() -> list[Case]:
    return [(kind, number) for kind, count in KINDS.items() for number in range(count)]


SWEEP = Sweep(
    "interrupts", "moments of Ctrl-C in a run that starts Ray", cases, check,
    lambda case: f"Ctrl-C {case[0]}", seconds=300,
)  # fmt: skip
