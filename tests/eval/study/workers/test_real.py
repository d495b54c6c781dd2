"""Two workers of a real study of small models: the numbers of one, whatever happens to a worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from eval.study.graph import nodes_of
from eval.study.lock import verify
from eval.study.run.workers import claimed, workers
from eval.study.study import Study
from tests.eval.study.small_study import (
    ROOT,
    environment,
    numbers,
    study_yaml,
    training_of,
    vae,
    write,
)

pytestmark = pytest.mark.timeout(900)  # a study is a dozen processes, each of which imports torch


def started(path: Path, out: Path, lease: float) -> subprocess.Popen[str]:
    words = ["run", str(path), "--out", str(out), "--lease", str(lease)]
    return subprocess.Popen(
        [sys.executable, "-m", "eval", "study", *words], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(path: Path, worker: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert worker.poll() is None, worker.communicate()[0]
        time.sleep(0.02)


def check_whole(made: Path, path: Path, out: Path) -> None:
    """All is as one worker makes it, no record is of a failure, and the lock is of what is there."""
    assert numbers(out) == numbers(made / "out")
    assert len(numbers(out)) == 2
    records = [json.loads(path.read_bytes()) for path in (out / "logs").rglob("*.json")]
    assert {record["exit_code"] for record in records} == {0}
    # a training that was taken over after its last checkpoint has none
    assert len([record for record in records if "scores" in record]) == 2
    study = Study.open(path, out)
    assert verify(study) == ([], [])
    assert workers(study) == []


def test_two_workers_of_which_one_is_killed(made: Path) -> None:
    """While each trains: both trainings pause once they have begun."""
    path, out = study_yaml(made, "pair"), made / "pair"
    fair = Study.open(path, out)
    nodes = nodes_of(fair)
    first = started(path, out, 60)
    wait_for(out / "logs/train/plain/seed0.log", first)
    trainings = [training_of(out / "configs/plain.yaml", first)]
    os.kill(trainings[0], signal.SIGSTOP)
    try:
        second = started(path, out, 60)
        wait_for(out / "logs/train/other/seed0.log", second)
        trainings.append(training_of(out / "configs/other.yaml", second))
        os.kill(trainings[1], signal.SIGSTOP)
        holders = dict(claimed(fair, nodes))  # at once: `status` takes longer than such a training
        assert holders["train/plain/seed0"]["pid"] == first.pid
        assert holders["train/other/seed0"]["pid"] == second.pid
        assert {record["pid"] for record in workers(fair)} == {first.pid, second.pid}
    finally:
        for training in trainings:
            os.kill(training, signal.SIGCONT)
    first.kill()
    first.wait()
    output = second.communicate(timeout=600)[0]
    assert second.returncode == 0, output
    assert "done: train/other/seed0" in output
    assert output.count("done: generate/") == 2
    check_whole(made, path, out)


def with_own_cache(made: Path, folder: Path) -> Path:
    """A study like that of `made`, whose column is yet to be encoded."""
    shutil.copytree(made / "cache/pets", folder / "cache/pets", ignore=lambda *_: ["other"])
    for name in ("train", "encode"):
        config = yaml.safe_load((made / f"{name}.yaml").read_text())
        (config["data"] if name == "train" else config)["root"] = str(folder / "cache")
        write(folder / f"{name}.yaml", config)
    shutil.copy(made / "few.json", folder)
    other = {"latents": "other", "encoder": vae(made, "other"), "resolution": 32}
    return study_yaml(folder, entries={"plain": "plain", "other": other})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encode", "train", "generate", "score"])
def test_a_worker_is_suspended(made: Path, tmp_path: Path, kind: str) -> None:
    """For twice its lease, and its command is not: it loses the node, and goes on with others."""
    path, out = with_own_cache(made, tmp_path), tmp_path / "out"
    first = started(path, out, 3)
    while not list(out.glob(f"logs/{kind}/**/*.log")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)
    second = started(path, out, 3)
    time.sleep(6)
    first.send_signal(signal.SIGCONT)
    outputs = [worker.communicate(timeout=600)[0] for worker in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    done = [line for output in outputs for line in output.splitlines() if "done: " in line]
    nodes = [line.partition("done: ")[2].partition(",")[0] for line in done]
    assert sorted(nodes) == sorted(set(nodes))
    assert len(nodes) >= 6  # of 7, one may have been taken over when all of it was there
    check_whole(made, path, out)
