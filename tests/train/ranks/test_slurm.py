"""configs/train/slurm.sbatch, run by bash with stand-ins for srun and scontrol: when the job is called back."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.train.conftest import ROOT
from tests.train.test_golden import ARCHIVE

SCRIPT = ROOT / "configs/train/slurm.sbatch"
LOST = (1, 4, 134, 137, 139, 143, 253, 255)  # a rank, a node, or the end of the time
FOR_A_PERSON = (0, 2, 3, 5, 130)

SCONTROL = """case $1 in
  show) echo "$2 $3" >> hosts; printf 'node7\\nnode8\\n' ;;
  *) echo "$@" >> called ;;
esac"""
PYTHON = """[ "$3" = saved ] || exit 99
echo "$@" >> asked
cat checkpoint"""
# writes down what it is given, saves a checkpoint or none, and leaves with the highest code of its tasks
SRUN = """printf '%s\\n' "$@" > srun-words
env > srun-environment
[ -z "$SAVES" ] || echo step-2 > checkpoint
exit "$CODE" """


def stand_in(folder: Path, name: str, body: str) -> Path:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with the stand-ins, in which jobs start."""
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN), ("python", PYTHON)):
        stand_in(tmp_path, name, body)
    (tmp_path / "checkpoint").write_text("step-1\n")
    return tmp_path


def environment(job: Path, **more: str) -> dict[str, str]:
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "6"}
    path = f"{job / 'bin'}:{os.environ['PATH']}"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SRUN_", "PYTHON"))}
    return {**plain, "PATH": path, **slurm, **more}


def sbatch(job: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=job, env=environment(job, **more), capture_output=True, text=True
    )  # fmt: skip


def called_back(job: Path) -> bool:
    record = job / "called"
    result = record.read_text() if record.exists() else ""
    assert result in ("", "requeue 12345\n")
    record.unlink(missing_ok=True)
    return bool(result)


@pytest.mark.parametrize("code", [*LOST, *FOR_A_PERSON])
def test_a_job_is_called_back_after_a_lost_rank_if_it_got_on(job: Path, code: int) -> None:
    process = sbatch(job, "a.yaml", CODE=str(code), SAVES="yes")
    assert process.returncode == code, process.stderr
    assert called_back(job) == (code in LOST)
    (job / "checkpoint").write_text("step-2\n")  # it starts again, and saves nothing
    process = sbatch(job, "a.yaml", CODE=str(code), SAVES="")
    assert process.returncode == code
    assert not called_back(job)
    assert ("not called back after exit code" in process.stderr) == (code in LOST)


def test_what_srun_and_the_ranks_are_given(job: Path) -> None:
    assert sbatch(job, "a b.yaml", "seed=1", CODE="0", SAVES="").returncode == 0
    words = (job / "srun-words").read_text().split("\n")
    assert "--cpus-per-task=6" in words  # srun of today does not take it from the job
    assert "--kill-on-bad-exit=0" in words
    assert words[-4:] == ["train", "a b.yaml", "seed=1", ""]
    lines = (job / "srun-environment").read_text().splitlines()
    assert {"MASTER_ADDR=node7", "MASTER_PORT=32345", "OMP_NUM_THREADS=6"} <= set(lines)
    assert (job / "asked").read_text() == "-m train saved a b.yaml seed=1\n"


def test_a_config_that_cannot_be_used_ends_before_srun(job: Path) -> None:
    stand_in(job, "python", "exit 2")
    assert sbatch(job, "a.yaml", CODE="0", SAVES="").returncode == 2
    assert not (job / "srun-words").exists()
    assert not called_back(job)


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [(3600, False), (-1, True)],  # cancelled or preempted; at the end of the time
)
def test_a_signal_to_the_shell(job: Path, ends: int, wanted: bool) -> None:
    """It waits for the ranks, which save; then it tells who ended it by the clock."""
    wait = "until [ -e signalled ]; do sleep 0.05; done"
    stand_in(job, "srun", f"touch started; {wait}; echo step-2 > checkpoint; exit 143")
    variables = environment(job, SLURM_JOB_END_TIME=str(int(time.time()) + ends))
    shell = subprocess.Popen(["bash", str(SCRIPT), "a.yaml"], cwd=job, env=variables)
    end = time.monotonic() + 30
    while not (job / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    shell.send_signal(signal.SIGTERM)
    (job / "signalled").touch()
    assert shell.wait(30) == 143
    assert (job / "checkpoint").read_text() == "step-2\n"
    assert called_back(job) == wanted


# With the trainer itself ---------------------------------------------------------------------------------------------


def real(job: Path, srun: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The run of the golden archive, by the real command."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(job, filter="data")
    stand_in(job, "srun", srun)
    stand_in(job, "python", f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    return sbatch(job, "run.yaml", *words, CUDA_VISIBLE_DEVICES="")


def test_the_trainer_says_whether_it_got_on(job: Path) -> None:
    save = "cp -r run-vae/checkpoints/step-0000000{2,4}; exit 137"
    assert real(job, save).returncode == 137
    assert called_back(job)
    shutil.rmtree(job / "run-vae/checkpoints/step-00000004")
    assert real(job, "touch run-vae/checkpoints/latest; exit 137").returncode == 137
    assert not called_back(job)
    process = real(job, "exit 0", "steps=never")
    assert process.returncode == 2
    assert "steps: found 'never'" in process.stderr


# Two tasks on this machine; the second is killed once something was saved
TASKS = """while [ "$1" != bash ]; do shift; done
export SLURM_NTASKS=2
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids[task]=$!
done
( sleep 90; kill -9 "${pids[@]}" ) > /dev/null 2>&1 &
watchdog=$!
first=$(cat run-vae/checkpoints/latest)
for second in {1..60}; do
  [ "$(cat run-vae/checkpoints/latest)" = "$first" ] || break
  sleep 1
done
kill -9 "${pids[1]}"
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; ended=$?; echo "task ended with $ended"; [ $ended -le $code ] || code=$ended
done
kill $watchdog
exit $code"""


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed(job: Path) -> None:
    stand_in(job, "scontrol", SCONTROL.replace("node7", "127.0.0.1"))
    words = ["steps=10000000", "micro_batch=2", "guard={silence: 6, hang: 60}", "log_every=100"]
    process = real(job, TASKS, *words)
    assert process.returncode == 137, process.stderr
    assert "task ended with 4" in process.stdout
    assert "rank 1 (" in process.stderr
    assert called_back(job)
