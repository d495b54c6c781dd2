"""The processes of a run: who they are, and the few things they say to each other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]  # public, but not in its __all__

from shards.exits import explained
from shards.launch import launched

from ..config import GuardConfig
from .lock import RunLock
from .watchdog import Watchdog

# Seconds for which the others may wait while one rank gets on, as in reading a checkpoint.
LATER = 3600.0
FOREVER = 24 * 86_400.0  # poll(2), by which torch's store waits, takes 31 bits of milliseconds


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    watchdog: Watchdog | None = None
    lock: RunLock | None = None  # of rank 0

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Returns the sums over all ranks, the same floats on each, NaN and infinity too."""
        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Returns the value of each rank, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.gather(None)

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Does work on each rank and returns all results everywhere; a user's error on one rank,
        that is one which `explained` knows, is raised on all."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if explained(error) is None:
                raise
            failure = error
        results, failures = zip(*self.gather((result, failure)), strict=True)
        for failure in failures:
            if failure is not None:
                raise failure
        return list(results)

    def phase(self, at: str, within: bool = False) -> None:
        """Records for the watchdog what this rank does; see `Watchdog.phase`."""
        if self.watchdog:
            self.watchdog.phase(at, within)

    def progress(self, at: str) -> None:
        """Records that this rank has got on, in work that not all ranks do."""
        self.phase(at, within=True)

    def check_lock(self) -> None:
        """Raises RunLocked if another job has taken over this run's folder; to be called before
        each change in it."""
        if self.lock:
            self.lock.check()

    @property
    def owner(self) -> str:
        """A name that no other job's folders have."""
        return self.lock.owner if self.lock else secrets.token_hex(16)


@contextmanager
def joined(config: GuardConfig, run: Path) -> Iterator[World]:
    """Joins the other processes of this run, locks its folder against other jobs, and starts the
    watchdogs.

    An error of one rank alone ends the others too, with its text and exit code."""
    rank, size, device = _meet(config)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    watchdog = Watchdog(rank, size, config, address, port)
    world = World(rank, size, device, watchdog, RunLock(run) if rank == 0 else None)
    try:
        world.barrier()
        watchdog.start()
        world.together(world.lock.take if world.lock else lambda: None)
        yield world
        world.barrier()  # the store outlives the watchdogs
    except BaseException as error:
        lost = watchdog.explain(error)
        watchdog.stop()
        if lost:
            raise lost from error
        if size == 1 or device.type == "cpu":  # NCCL would wait for ranks that do not come
            _leave_group()
        raise
    else:
        watchdog.stop()
        world.barrier()
        _leave_group()
    finally:
        if world.lock:
            world.lock.release()


def _leave_group() -> None:
    """Ends the process group by DeepSpeed, whose own groups would stay for the next run."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def _meet(config: GuardConfig) -> tuple[int, int, torch.device]:
    """Joins the process group, without torchrun one of its own. Returns rank, size, device."""
    store = None
    if launched(meet=True)[1] == 1 and "MASTER_ADDR" not in os.environ:
        # on a free port, which it keeps: the group's store, of the same process, will be this one
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    rank, size, local = launched(meet=True)
    os.environ["LOCAL_RANK"] = str(local)  # DeepSpeed asks for it
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
    """Returns how long a collective waits. The watchdog names the culprit; the backend's time-out,
    which cannot, comes after it: the watchdog counts from the last progress of any rank, the
    backend from when the first began to wait."""
    return timedelta(seconds=min(config.hang + LATER, FOREVER) if config.hang else FOREVER)
