"""What a launcher says to each process of a job: torchrun, accelerate, deepspeed, a PyTorchJob or a
script set RANK, WORLD_SIZE, LOCAL_RANK, and MASTER_ADDR and MASTER_PORT where the processes meet.

Processes that srun or mpirun start have none of these: each would do the whole work alone, and all
in one folder. That is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableSequence

from .errors import BadRanks

RANKS = ("RANK", "WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
FLAGS = ("--local_rank=", "--local-rank=")
# srun numbers its steps from 0; those of the batch script and of salloc's shell are one process,
# and have the highest numbers (SLURM_BATCH_SCRIPT 2^32 - 5, SLURM_INTERACTIVE_STEP 2^32 - 6)
SPECIAL_STEPS = 2**32 - 16
# tasks of a launcher without RANK: its name, and the variables that have what RANK, WORLD_SIZE and
# LOCAL_RANK have
MANAGERS = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


def launched(
    environment: Mapping[str, str] = os.environ, *, meet: bool = False
) -> tuple[int, int, int]:
    """Returns rank, number of processes, and rank within the machine; (0, 1, 0) of a process that
    nothing launched. Without LOCAL_RANK, as in a PyTorchJob, the last is what SLURM or MPI says, or 0.

    BadRanks where the variables make no sense, where half of them are missing, or where one of
    several tasks has none. `meet`: the processes are to meet, for which several need MASTER_ADDR and
    MASTER_PORT.
    """
    missing = [name for name in RANKS if name not in environment]
    if len(missing) == len(RANKS):
        _refuse_lone_task(environment)
        return 0, 1, 0
    if missing:
        (other,) = set(RANKS) - set(missing)
        raise BadRanks(
            f"found {other}={environment[other]} and no {missing[0]} in the environment, expected both or none. Start "
            f"with torchrun, set {missing[0]}, or `unset {other}` for one process alone"
        )
    values = {name: environment[name] for name in RANKS}
    values |= {"LOCAL_RANK": next((environment[n] for n in LOCAL if n in environment), "0")}
    numbers = [int(v) if v.isascii() and v.isdecimal() else -1 for v in values.values()]
    if min(numbers) < 0 or numbers[0] >= numbers[1]:
        settings = ", ".join(f"{name}={value}" for name, value in values.items())
        raise BadRanks(
            f"found {settings} in the environment, expected whole numbers and RANK from 0 to WORLD_SIZE - 1. Start "
            "with torchrun, or set them for each process"
        )
    rank, size, local = numbers
    if meet and (size > 1 or any(name in environment for name in MEETING)):
        _check_meeting(environment, rank, size)
    return rank, size, local


def _check_meeting(environment: Mapping[str, str], rank: int, size: int) -> None:
    absent = [name for name in MEETING if not environment.get(name)]
    port = environment.get("MASTER_PORT", "")
    if not absent and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
        return
    found = f"no {' and no '.join(absent)}" if absent else f"MASTER_PORT={port}"
    raise BadRanks(
        f"found RANK={rank}, WORLD_SIZE={size} and {found} in the environment, expected the host of rank 0 and a "
        f"port that is free there, the same for all. Start with torchrun, or `export MASTER_ADDR=HOST "
        "MASTER_PORT=29500` for each process"
    )


def _refuse_lone_task(environment: Mapping[str, str]) -> None:
    for name, (rank, size, local) in MANAGERS.items():
        tasks = environment.get(size, "")
        if (
            name == "srun"
        ):  # SLURM_NTASKS alone is also that of a batch script, which is one process
            tasks = environment.get("SLURM_STEP_NUM_TASKS", tasks)
            step = environment.get("SLURM_STEP_ID", "")
            if not step.isdecimal() or int(step) >= SPECIAL_STEPS:
                continue
        if tasks.isdecimal() and int(tasks) > 1:
            raise BadRanks(
                f"found one of {tasks} tasks of {name} ({size}={environment.get(size, tasks)}) and no RANK in the "
                f"environment: each would work alone. Start one task, or set for each `export RANK=${rank} "
                f"WORLD_SIZE=${size} LOCAL_RANK=${local} MASTER_ADDR=HOST MASTER_PORT=29500`, HOST being that of the "
                "first (configs/train/slurm.sbatch does so), or let one task a machine start torchrun"
            )


def take_local_rank(words: MutableSequence[str]) -> None:
    """Takes `--local_rank=N` out of a command line, where `deepspeed --module` and torch's former
    launcher put it; it counts where LOCAL_RANK is not set.
    """
    for word in [word for word in words if word.startswith(FLAGS)]:
        words.remove(word)
        os.environ.setdefault("LOCAL_RANK", word.partition("=")[2])
