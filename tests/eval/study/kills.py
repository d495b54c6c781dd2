"""Studies that are killed at any moment: their numbers are those of one that is not.

studies   a number: a study of two entries and two seeds, of which SIGKILL ends `study run` at moments
          drawn by chance, so often, before it comes to its end
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from tests.eval.study.small_study import ROOT, environment, numbers, study, study_yaml, write_inputs
from tests.memory import kept
from tests.soak.sweep import Case, Sweep

SCRATCH = os.environ.get("LATENTBANK_SCRATCH")  # of all processes of a soak run, which removes it
CASES, KILLS = 4, 5
SEEDS = [0, 1]
SECONDS = 2 * 3600


def check(number: int) -> None:
    """AssertionError where another number comes out, or a command fails."""
    folder = undisturbed()
    chance, out = random.Random(number), folder / f"killed-{number}"
    path = study_yaml(folder, f"killed-{number}", seeds=SEEDS, checkpoints=2)
    whole = float((folder / "seconds").read_text())
    kills = 0
    while kills < KILLS:
        if killed_after(chance.uniform(0, whole / 2), path, out):
            kills += 1
        else:  # it came to its end: another one
            assert numbers(out) == numbers(folder / "out"), differences(out, folder / "out")
            shutil.rmtree(out)
    ended = study("run", path, "--out", out)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-2000:]
    assert numbers(out) == numbers(folder / "out"), differences(out, folder / "out")
    shutil.rmtree(out)


def differences(out: Path, other: Path) -> str:
    a, b = numbers(out), numbers(other)
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return "; ".join(f"{name}: found {a.get(name)}, expected {b.get(name)}" for name in names)


def killed_after(seconds: float, path: Path, out: Path) -> bool:
    """Runs a study for so long; returns whether it had to be killed."""
    command = [sys.executable, "-m", "eval", "study", "run", str(path), "--out", str(out)]
    with (path.parent / f"{path.stem}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            assert process.wait(seconds) == 0, "a command failed: see its log"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True
    return False


def undisturbed() -> Path:
    """The folder with what studies need, and in `out` one that nothing disturbed; made by one process."""
    folder = scratch()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "seconds").exists():
            write_inputs(folder)
            path, start = study_yaml(folder, seeds=SEEDS, checkpoints=2), time.monotonic()
            ended = study("run", path, "--out", folder / "out")
            assert ended.returncode == 0, (ended.stdout + ended.stderr)[-2000:]
            (folder / "seconds").write_text(str(time.monotonic() - start))
    return folder


@cache
def scratch() -> Path:
    folder = (Path(SCRATCH) if SCRATCH else kept()) / "studies"
    folder.mkdir(exist_ok=True)
    return folder


def cases() -> list[Case]:
    return [(number,) for number in range(CASES)]


SWEEP = Sweep(
    "studies", f"a study of two entries and two seeds, killed {KILLS} times at moments drawn by chance",
    cases, check, lambda case: "killed", seconds=SECONDS,
)  # fmt: skip
