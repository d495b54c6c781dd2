"""Jobs of the trainer in forked processes, one for each rank: what torchrun starts, without waiting for imports.

A rank by itself costs some tenths of a second; through torchrun it costs six seconds, most of them imports.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shards import exits
from shards.read.stream import Batch, Stream
from shards.signals import SIGNALS
from tests.forks import fork, leave_pytest, start_torchrun, wait
from tests.memory import MEMORY
from train.config import GuardConfig, TrainConfig, run_folder
from train.ranks.world import World, joined
from train.run import fit, open_columns

# What a run imports on its way, and takes four seconds: once, here, and not in each rank.
IMPORTED = (
    "deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo.debug_utils", "torch._dynamo.testing",
    "torch._inductor.compile_fx", "setuptools", "torch.utils.tensorboard", "train.__main__",
)  # fmt: skip
Wrap = Callable[[Iterator[Batch], World], Iterator[Batch]]
SECONDS = 200.0  # a job that takes longer hangs
JOBS: list["Job"] = []  # that were started, and may still go on


@dataclass
class Job:
    """The processes of a job, by rank."""

    pids: list[int]
    logs: list[Path]
    # Bound to the port where the ranks meet, so that no other process gets it. Nobody listens by it:
    # the store of rank 0, which allows it as this does, binds to the same port.
    place: socket.socket
    codes: dict[int, int] = field(default_factory=dict)  # of those that have ended

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (result := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(result[1])
        if len(self.codes) < len(self.pids):
            return False
        self.place.close()
        return True

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes by rank, or minus the signal. What has not ended then is killed, and TimeoutError."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                remaining = [rank for rank in range(len(self.pids)) if rank not in self.codes]
                self.kill()
                raise TimeoutError(f"ranks {remaining} did not end:\n{self.text()}")
            time.sleep(0.01)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            if rank not in self.codes:
                os.kill(self.pids[rank], number)

    def kill(self) -> list[int]:
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        return self.wait()

    def text(self, *ranks: int) -> str:
        return "".join(self.logs[rank].read_text() for rank in ranks or range(len(self.pids)))

    def until(self, condition: Callable[[], Any], event: str) -> Any:
        """Wait for something to come of a job that goes on."""
        end = time.monotonic() + SECONDS
        while not (result := condition()):
            if self.poll() or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no {event}, but {self.codes}:\n{self.text()}")
            time.sleep(0.001)
        return result

    def logged(self, words: str) -> None:
        """Wait until rank 0 has said this."""
        self.until(lambda: words in self.text(0), words)


def load_all() -> None:
    """Import what ranks would import each."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the trainer sets it
    for name in IMPORTED:
        import_module(name)
    assert import_module("deepspeed.ops").__compatible_ops__  # found out by compiling something


def settle() -> None:
    """One thread, no GPU, and nothing of pytest in a rank that was forked from a test. A shell that starts the tests in
    the background has them ignore SIGINT, which a trainer would keep to."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    leave_pytest()


def start(work: Callable[[int], Any], ranks: int, folder: Path) -> Job:
    """Run `work(rank)` in a process for each rank, with what torchrun puts into the environment."""
    load_all()
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    port = str(place.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"log-{rank}" for rank in range(ranks)]
    for log in logs:
        log.write_text("")

    def as_rank(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip
        settle()
        work(rank)

    job = Job(
        [fork(lambda rank=rank: as_rank(rank), logs[rank]) for rank in range(ranks)], logs, place
    )  # type: ignore[misc]
    JOBS.append(job)
    return job


def command(path: Path, words: tuple[str, ...], ranks: int) -> Job:
    """`torchrun --nproc-per-node RANKS -m train PATH WORDS`."""
    return start(lambda rank: called([str(path), *words]), ranks, path.parent)


def by_agent(
    words: list[str], ranks: int, output: Path, before: Callable[[], None] = lambda: None,
    **options: Any,
) -> int:  # fmt: skip
    """The same, but with torchrun's own agent over the ranks; its exit code. Each rank does `before`
    first; `options` are the agent's."""
    load_all()

    def work() -> None:
        settle()
        before()
        called(words)

    return wait(start_torchrun(work, ranks, output, **options))


def called(words: list[str]) -> None:
    """`python -m train WORDS`, in this process."""
    from train.__main__ import main

    sys.argv = ["train", *words]
    exits.run(main)


def fitting(
    folder: Path, values: dict[str, Any], ranks: int, wrap: Wrap, name: str = "tiny.yaml"
) -> Job:
    """`fit` on batches of the columns that `wrap` may spoil."""
    config = TrainConfig.model_validate(values)
    run = run_folder(config, folder / name)

    def batches(position: int, world: World) -> Iterator[Batch]:
        sources = open_columns(config, None)
        order = sources.order(config.seed, config.data.lanes, config.data.window)
        stream = Stream(
            sources, order, position=position, global_batch=config.global_batch, world=world.size, rank=world.rank
        )  # fmt: skip
        return wrap(stream, world)

    def work(rank: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        exits.run(lambda: fit(config, run, batches))

    return start(work, ranks, folder)


def in_world(
    ranks: int,
    work: Callable[[World], Any],
    guard: GuardConfig = GuardConfig(),  # noqa: B008  # frozen
) -> list[Any]:
    """What `work` returns on each rank of a process group of its own; its error is raised here."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)

        def meet(rank: int) -> None:
            with joined(guard, folder / "run") as world:
                result = work(world)
            (folder / f"found-{rank}").write_bytes(pickle.dumps(result))

        job = start(meet, ranks, folder)
        if any(job.wait()):
            raise AssertionError(f"{job.codes}:\n{job.text()}")
        return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(ranks)]
