"""`study run --print-sbatch`, run by bash with stand-ins for scontrol and python: the tasks of an array."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.commands import main
from eval.errors import BadRequest
from eval.study.run.runner import FAILED
from eval.study.run.sbatch import FAILED as FAILED_THERE
from eval.study.run.sbatch import Array
from tests.eval.study.small_study import ROOT, environment
from tests.eval.study.workers.small_worker import (
    lines,
    small_yaml,
    write_nodes,
)

# saves when it is told to, and leaves with what the file `code` says
PYTHON = """trap 'echo saved >> saved; exit 143' TERM
echo "$@" >> words
for _ in $(seq "${SECONDS_LONG:-0}"); do sleep 0.1; done
exit "$(cat code)"
"""


def printed(capsys: pytest.CaptureFixture[str], path: Path, *flags: str) -> str:
    assert main(["study", "run", str(path), "--out", "an out", "--print-sbatch", *flags]) in (
        0,
        None,
    )
    return capsys.readouterr().out


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, in which the script is made, with stand-ins."""
    monkeypatch.chdir(tmp_path)
    for name, body in (("scontrol", 'echo "$@" >> called'), ("python", PYTHON)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "code").write_text("0")
    return tmp_path


def started(job: Path, script: str, end: float, **more: str) -> subprocess.Popen[str]:
    """A task of the array, whose time is over at the end."""
    (job / "a.sbatch").write_text(script)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_END_TIME": str(int(end))}
    variables = environment() | {"PATH": f"{job / 'bin'}:{os.environ['PATH']}", **slurm, **more}
    return subprocess.Popen(
        ["bash", str(job / "a.sbatch")], env=variables, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_script(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--workers",
        "5",
        "--gpus",
        "4",
        "--time",
        "1-00",
        "--partition",
        "a",
        "--account",
        "b",
    )
    text = printed(capsys, small_yaml(job, "my study"), *flags, "--jobs", "2", "--lease", "30")
    directives = re.findall(r"^#SBATCH --(.*)", text, re.MULTILINE)
    assert directives == [
        "job-name=study-my-study", "array=0-4", "nodes=1", "ntasks=1", "gpus-per-node=4", "time=1-00",
        "partition=a", "account=b", "signal=B:TERM@900", "open-mode=append",
        "output=study-my-study-%A-%a.log", "requeue",
    ]  # fmt: skip
    words = f"-m eval study run '{job}/my study.yaml' --out 'an out' --jobs 2 --lease 30 &"
    assert words in text
    assert f"cd {job} || exit 2" in text
    short = printed(capsys, small_yaml(job), "--gpus", "0", "--time", "20:00")
    assert "gpus-per-node" not in short
    assert "signal=B:TERM@300" in short  # a quarter of the time
    assert FAILED_THERE == FAILED
    for script in (text, short):
        (job / "a.sbatch").write_text(script)
        subprocess.run(["bash", "-n", job / "a.sbatch"], check=True)
        if checker := shutil.which("shellcheck"):
            subprocess.run([checker, job / "a.sbatch"], check=True)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("01:02:03", 3723), ("2-03", 183_600), ("2-03:04", 183_840),
        ("2-03:04:05", 183_845),
    ],
)  # fmt: skip
def test_times_are_those_of_sbatch(time: str, seconds: int) -> None:
    assert Array(time=time).seconds() == seconds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "soon"], "--time: found 'soon', expected minutes"),
        (["--time", "1-"], "--time: found '1-'"),
        (["--partition", "a\n#SBATCH --uid=0"], "--partition: found"),
        (["--account", "$(id)"], "--account: found"),
    ],
)
def test_what_is_no_flag_of_sbatch(job: Path, flags: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        main(["study", "run", str(small_yaml(job)), "--print-sbatch", *flags])


def test_more_processes_than_gpus_and_flags_without_the_script(job: Path) -> None:
    path = small_yaml(job, ranks=4)
    with pytest.raises(BadRequest, match="--gpus: found 4, expected at least 8"):
        main(["study", "run", str(path), "--print-sbatch", "--gpus", "4", "--jobs", "2"])
    with pytest.raises(BadRequest, match="--workers: found it without --print-sbatch"):
        main(["study", "run", str(path), "--workers", "4"])
    assert not (job / "studies").exists()


@pytest.mark.parametrize("code", [0, 1, 2, 3, 137])
def test_a_task_that_ends_by_itself_is_not_called_back(
    job: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    (job / "code").write_text(str(code))
    script = printed(capsys, small_yaml(job))
    python = str(job / "bin/python")
    task = started(job, script, time.time() + 3600, PYTHON=python)
    assert task.wait(60) == code
    assert not (job / "called").exists()
    assert (job / "words").read_text().startswith("-m eval study run ")


@pytest.mark.parametrize(("left", "called"), [(600, True), (3600, False)])
def test_the_end_of_the_time_and_a_cancelled_task(
    job: Path, capsys: pytest.CaptureFixture[str], left: int, called: bool
) -> None:
    script = printed(capsys, small_yaml(job))
    python = str(job / "bin/python")
    task = started(job, script, time.time() + left, PYTHON=python, SECONDS_LONG="600")
    while not (job / "words").exists():
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    assert task.wait(60) == 143
    assert (job / "saved").exists()
    assert (job / "called").exists() == called
    if called:
        assert (job / "called").read_text() == "requeue 12345\n"


def test_two_tasks_work_on_one_study(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With workers whose commands are small in place of the study's."""
    path = small_yaml(job)
    write_nodes(job, *((f"n{i}", [], f"n{(i + 1) % 2}", 0) for i in range(6)))
    (job / "bin/python").write_text(
        f"""#!/bin/bash
cd {ROOT} && exec {sys.executable} -m tests.eval.study.workers.small_worker {path} {job}/out 60
"""
    )
    script = printed(capsys, path)
    tasks = [
        started(job, script, time.time() + 3600, PYTHON=str(job / "bin/python"), SLURM_ARRAY_TASK_ID=str(i))
        for i in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert all(lines(job, f"n{i}.begun") == 1 for i in range(6))
    assert all("begins: train/n" in output for output in outputs)
