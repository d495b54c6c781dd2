"""The processes of a run: who they are, and the few things they say to each other."""

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from ..config import GuardConfig
from .lock import RunLock
from .watchdog import Guard

# Seconds for which the others may wait while one rank gets on, as in reading a checkpoint.
LATER = 3600.0
FOREVER = 24 * 86_400.0  # poll(2), by which torch's store waits, takes 31 bits of milliseconds


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    guard: Guard | None = None
    lock: RunLock | None = None  # of rank 0

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Sums over all ranks, the same floats on each. NaN and infinity on one rank reach all."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do something on each rank and return all results everywhere; a user's error on one rank, that is one with
        an `exit_code`, is raised on all."""
        outcome, failure = None, None
        try:
            outcome = work()
        except Exception as error:
            if not hasattr(type(error), "exit_code"):
                raise
            failure = error
        outcomes = self.gather((outcome, failure))
        for _, found in outcomes:
            if found is not None:
                raise found
        return [found for found, _ in outcomes]

    def mark(self, at: str, own: bool = False) -> None:
        """Tell the guard what this rank is at; see `Guard.mark`."""
        if self.guard:
            self.guard.mark(at, own)

    def tell(self, at: str) -> None:
        """That this rank has got on, in what not all ranks do."""
        self.mark(at, own=True)

    def check_lock(self) -> None:
        """RunLocked if another job has taken over this run's folder. To be asked before each change in it."""
        if self.lock:
            self.lock.check()

    @property
    def owner(self) -> str:
        """A name that no other job's folders carry."""
        return self.lock.owner if self.lock else secrets.token_hex(16)


@contextmanager
def joined(config: GuardConfig, run: Path) -> Iterator[World]:
    """Meet the other processes of this run, hold its folder against other jobs, and watch over each other.

    An error of one rank alone ends the others too, with its text and exit code."""
    rank, size, device = _meet(config)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    guard = Guard(rank, size, config, address, port)
    world = World(rank, size, device, guard, RunLock(run) if rank == 0 else None)
    try:
        world.barrier()
        guard.start()
        world.together(world.lock.take if world.lock else lambda: None)
        yield world
        world.barrier()  # the store outlives the guards
    except BaseException as error:
        lost = guard.explain(error)
        guard.stop()
        if lost:
            raise lost from error
        if size == 1 or device.type == "cpu":  # NCCL would wait for ranks that do not come
            _part()
        raise
    else:
        guard.stop()
        world.barrier()
        _part()
    finally:
        if world.lock:
            world.lock.release()


def _part() -> None:
    """By DeepSpeed, which keeps groups of its own and would hand them to the next run of this process."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def _meet(config: GuardConfig) -> tuple[int, int, torch.device]:
    """Join the process group through DeepSpeed; without torchrun, be a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(alone)
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not gpu:  # else a C++ extension is compiled here, half a minute to two, for the same bits
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = patience_of(config)
    # of the groups that DeepSpeed makes, now and later: it hands no time-out on
    defaults: Any = distributed_c10d
    defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = patience
    deepspeed.init_distributed(
        dist_backend="nccl" if gpu else "gloo", verbose=False, timeout=patience
    )
    return rank, size, device


def patience_of(config: GuardConfig) -> timedelta:
    """How long a collective waits. The guard names the culprit; the backend's time-out, which cannot, comes after it:
    the guard counts from the last progress of any rank, the backend from when the first one began to wait."""
    return timedelta(seconds=min(config.hang + LATER, FOREVER) if config.hang else FOREVER)
