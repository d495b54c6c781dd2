"""Studies that are killed at any moment: their numbers are those of one that is not.

studies   a number and how many workers: a study of two entries and two seeds. One worker is killed (SIGKILL) at
          moments drawn by chance, so often, before it comes to its end. Of two, one is killed and started
          again, or suspended for twice its lease, as chance has it
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

from eval.study.lock import verify
from eval.study.study import Study
from tests.eval.study.small_study import ROOT, environment, numbers, study, study_yaml, write_inputs
from tests.memory import kept
from tests.soak.sweep import Case, Sweep

SCRATCH = os.environ.get("LATENTBANK_SCRATCH")  # of all processes of a soak run, which removes it
CASES, KILLS = 4, 5
LEASE = 3.0  # seconds
SEEDS = [0, 1]
SECONDS = 2 * 3600


def check(number: int, workers: int) -> None:
    """AssertionError where another number comes out, or a command fails."""
    (alone if workers == 1 else pair)(number)


def alone(number: int) -> None:
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


def pair(number: int) -> None:
    folder = undisturbed()
    chance, out = random.Random(number), folder / f"pair-{number}"
    path = study_yaml(folder, f"pair-{number}", seeds=SEEDS, checkpoints=2)
    whole = float((folder / "seconds").read_text())
    at_work = [started(path, out) for _ in range(2)]
    faults = 0
    while faults < KILLS and any(worker.poll() is None for worker in at_work):
        time.sleep(chance.uniform(0, whole / KILLS))
        i = chance.randrange(2)
        if at_work[i].poll() is None:
            faults += 1
            if chance.random() < 0.5:
                at_work[i].kill()
                assert at_work[i].wait() in (0, -signal.SIGKILL), "a command failed: see its log"
                at_work[i] = started(path, out)
            else:
                at_work[i].send_signal(signal.SIGSTOP)
                time.sleep(2 * LEASE)
                at_work[i].send_signal(signal.SIGCONT)
    assert [worker.wait(SECONDS) for worker in at_work] == [0, 0], "a command failed: see its log"
    assert numbers(out) == numbers(folder / "out"), differences(out, folder / "out")
    assert verify(Study.open(path, out)) == ([], [])
    lines = (folder / f"{path.stem}.log").read_text().splitlines()
    nodes = [line.partition("done: ")[2].partition(",")[0] for line in lines if "done: " in line]
    assert len(nodes) == len(set(nodes)), f"made more than once: {Counter(nodes).most_common(1)}"
    shutil.rmtree(out)


def differences(out: Path, other: Path) -> str:
    a, b = numbers(out), numbers(other)
    names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
    return "; ".join(f"{name}: found {a.get(name)}, expected {b.get(name)}" for name in names)


def killed_after(seconds: float, path: Path, out: Path) -> bool:
    """Runs a study for so long; returns whether it had to be killed."""
    process = started(path, out)
    try:
        assert process.wait(seconds) == 0, "a command failed: see its log"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def started(path: Path, out: Path) -> subprocess.Popen[bytes]:
    """A worker, whose output is added to a log beside the YAML."""
    words = ["run", str(path), "--out", str(out), "--lease", str(LEASE)]
    command = [sys.executable, "-m", "eval", "study", *words]
    with (path.parent / f"{path.stem}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)


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
    return [(number, workers) for workers in (1, 2) for number in range(CASES)]


SWEEP = Sweep(
    "studies", f"a study of two entries and two seeds, killed or suspended {KILLS} times at moments drawn by chance",
    cases, check, lambda case: "one worker" if case[1] == 1 else "two workers", seconds=SECONDS,
)  # fmt: skip
