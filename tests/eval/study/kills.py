"""Studies that are killed at any moment: their numbers are those of one that is not.

studies   a number: a study of two entries and two seeds. Its worker is killed (SIGKILL) at moments drawn by
          chance, so often, before it comes to its end
pair      a number: a study of two entries that two workers make. One of the two, as chance has it, is killed at
          moments drawn by chance and started again, and once suspended for twice its lease
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
from tests.soak.sweep import Sweep

SCRATCH = os.environ.get("LATENTBANK_SCRATCH")  # of all processes of a soak run, which removes it
CASES, KILLS = 4, 5
PAIRS, PAIR_KILLS = 2, 10
LEASE = 3.0  # seconds
SEEDS = [0, 1]
SECONDS = 2 * 3600


def alone(number: int) -> None:
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


def pair(number: int) -> None:
    """AssertionError where another number comes out than of one worker, a command fails, or a node is made twice."""
    folder = undisturbed(SEEDS[:1])
    chance, out = random.Random(number), folder / f"pair-{number}"
    path = study_yaml(folder, f"pair-{number}", seeds=SEEDS[:1], checkpoints=2)
    whole = float((folder / "seconds").read_text())
    faults = ["kill"] * PAIR_KILLS + ["suspend"]
    chance.shuffle(faults)
    while faults:  # where a study came to its end before the last of them, with another one
        disturbed(path, out, faults, chance, whole)
        assert numbers(out) == numbers(folder / "out"), differences(out, folder / "out")
        assert verify(Study.open(path, out)) == ([], [])
        log = path.with_suffix(".log")
        lines = log.read_text().splitlines()
        nodes = [
            line.partition("done: ")[2].partition(",")[0] for line in lines if "done: " in line
        ]
        assert len(nodes) == len(set(nodes)), (
            f"made more than once: {Counter(nodes).most_common(1)}"
        )
        log.unlink()
        shutil.rmtree(out)


def disturbed(
    path: Path, out: Path, faults: list[str], chance: random.Random, whole: float
) -> None:
    """Runs a study with two workers to its end, and takes from `faults` those that came to pass meanwhile.
    `whole`: the seconds that one worker takes, of which a fault follows the last one within a quarter.
    """
    workers = [started(path, out) for _ in range(2)]
    try:
        while faults and any(worker.poll() is None for worker in workers):
            time.sleep(chance.uniform(0, whole / 4))
            i = chance.randrange(2)
            if workers[i].poll() is not None:
                continue
            if faults[-1] == "kill":
                workers[i].kill()
                code = workers[i].wait()
                assert code in (0, -signal.SIGKILL), "a command failed: see its log"
                workers[i] = started(path, out)
                killed = code != 0
            else:
                workers[i].send_signal(signal.SIGSTOP)
                time.sleep(2 * LEASE)
                workers[i].send_signal(signal.SIGCONT)
                killed = True
            if killed:
                faults.pop()
        codes = [worker.wait(SECONDS) for worker in workers]
        assert codes == [0, 0], f"codes {codes}: {path.with_suffix('.log').read_text()[-1500:]}"
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


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


def undisturbed(seeds: list[int] = SEEDS) -> Path:
    """The folder with what studies need, and in `out` one that nothing disturbed; made by one process."""
    folder = scratch(len(seeds))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "seconds").exists():
            write_inputs(folder)
            path, start = study_yaml(folder, seeds=seeds, checkpoints=2), time.monotonic()
            ended = study("run", path, "--out", folder / "out")
            assert ended.returncode == 0, (ended.stdout + ended.stderr)[-2000:]
            (folder / "seconds").write_text(str(time.monotonic() - start))
    return folder


@cache
def scratch(seeds: int) -> Path:
    folder = (Path(SCRATCH) if SCRATCH else kept()) / f"studies-{seeds}"
    folder.mkdir(exist_ok=True)
    return folder


SWEEPS = [
    Sweep(
        "studies", f"a study of two entries and two seeds, killed {KILLS} times at moments drawn by chance",
        lambda: [(number,) for number in range(CASES)], alone, lambda _: "killed", seconds=SECONDS,
    ),
    Sweep(
        "pair", f"a study of two workers, of which one is killed {PAIR_KILLS} times at moments drawn by chance and "
        "one suspended for twice its lease",
        lambda: [(number,) for number in range(PAIRS)], pair, lambda _: "two workers", seconds=SECONDS,
    ),
]  # fmt: skip
