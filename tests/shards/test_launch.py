"""Ranks from the environment: what each launcher sets, and what makes no sense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import BadRanks
from shards.launch import launched

ROOT = Path(__file__).parents[2]
HOST = {"MASTER_ADDR": "first", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
SALLOC = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}  # a shell beside the allocation
BATCH = {**SALLOC, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # the script that sbatch runs


def ranks(*pairs: str) -> dict[str, str]:
    return {"RANK": pairs[0], "WORLD_SIZE": pairs[1]} | (
        {"LOCAL_RANK": pairs[2]} if len(pairs) > 2 else {}
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"LOCAL_RANK": "3"}, (0, 1, 0)),
        (ranks("5", "8", "1"), (5, 8, 1)),
        (ranks("5", "8"), (5, 8, 0)),  # PyTorchJob, one process a pod
        (ranks("3", "8") | SRUN, (3, 8, 3)),
        (ranks("9", "16", "1") | SRUN | {"SLURM_LOCALID": "0"}, (9, 16, 1)),  # torchrun under srun
        (ranks("3", "8") | {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, (3, 8, 2)),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),  # srun -n 1 within an allocation of 8
        (SALLOC, (0, 1, 0)),
        (BATCH, (0, 1, 0)),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, (0, 1, 0)),
        (BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "8"}, (0, 1, 0)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, (0, 1, 0)),
    ],
)  # fmt: skip
def test_who_this_process_is(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert launched(environment) == expected
    assert launched(environment | HOST, meet=True) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2"}, "found RANK=2 and no WORLD_SIZE .*`unset RANK` for one"),
        ({"WORLD_SIZE": "2"}, "found WORLD_SIZE=2 and no RANK .*`unset WORLD_SIZE`"),
        (ranks("2", "2"), "found RANK=2, WORLD_SIZE=2, LOCAL_RANK=0 .*from 0 to WORLD_SIZE - 1"),
        (ranks("-1", "2"), "RANK=-1, .*whole numbers"),
        (ranks("one", "2"), "RANK=one, "),
        (ranks("0", ""), "WORLD_SIZE=, "),
        (ranks("0", "0"), "WORLD_SIZE=0, "),
        (ranks("\N{SUPERSCRIPT TWO}", "4"), "RANK="),
        (ranks("0", "2", "x"), "LOCAL_RANK=x in"),
        (SRUN, r"one of 8 tasks of srun \(SLURM_NTASKS=8\) and no RANK .*RANK=\$SLURM_PROCID WORLD_SIZE=\$SLURM_NTASKS "
               r"LOCAL_RANK=\$SLURM_LOCALID MASTER_ADDR=HOST MASTER_PORT=29500"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, "one of 2 tasks of srun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"tasks of mpirun .*RANK=\$OMPI_COMM_WORLD_RANK "),
        ({"PMI_SIZE": "4"}, r"tasks of mpiexec .*RANK=\$PMI_RANK "),
    ],
)  # fmt: skip
def test_what_makes_no_sense(environment: dict[str, str], message: str) -> None:
    for meet in (False, True):
        with pytest.raises(BadRanks, match=message):
            launched(environment | HOST, meet=meet)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({}, "no MASTER_ADDR and no MASTER_PORT in"),
        ({"MASTER_ADDR": "first"}, "WORLD_SIZE=2 and no MASTER_PORT in"),
        ({"MASTER_ADDR": "", "MASTER_PORT": "1"}, "no MASTER_ADDR in"),
        ({"MASTER_ADDR": "first", "MASTER_PORT": "tcp"}, "MASTER_PORT=tcp in"),
        ({"MASTER_ADDR": "first", "MASTER_PORT": "65536"}, "MASTER_PORT=65536 in"),
    ],
)
def test_processes_that_cannot_meet(host: dict[str, str], message: str) -> None:
    environment = ranks("1", "2") | host
    assert launched(environment) == (1, 2, 0)  # pictures are generated without meeting
    with pytest.raises(BadRanks, match=message):
        launched(environment, meet=True)
    assert launched(ranks("0", "1"), meet=True) == (0, 1, 0)


@pytest.mark.parametrize(
    "words",
    [["train", "configs/train/cpu.yaml"],
     ["eval", "generate", "--checkpoint", "RUN", "--prompts", "p.txt", "--save_dir", "OUT"]],
    ids=["train", "generate"],
)  # fmt: skip
def test_commands_refuse_it_before_they_work(words: list[str]) -> None:
    """And take the argument that deepspeed's launcher puts before all others."""
    for environment, found in (({"RANK": "0"}, "no WORLD_SIZE"), (SRUN, "one of 8 tasks of srun")):
        result = subprocess.run(
            [sys.executable, "-m", words[0], "--local_rank=0", *words[1:]],
            cwd=ROOT, text=True, capture_output=True, timeout=120, env={**os.environ, **environment},
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert result.stderr.startswith(f"{BadRanks.__name__}: found ")
        assert found in result.stderr
        assert "Traceback" not in result.stderr
