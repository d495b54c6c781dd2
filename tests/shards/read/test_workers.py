"""A stream read by processes: the same batches, wherever it is used; deaths are named, and nothing is left behind."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import CorruptColumn, JoinedColumns, WorkerDied, open_join
from shards.read.stream import Stream
from tests.shards import reading
from tests.shards.toy import moments_of, small_moments, small_tokens

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def join(toy: Path) -> JoinedColumns:
    return open_join(toy / "vae", toy / "text")


# Processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(toy: Path) -> list[list[Any]]:
    return reading.read(toy, 0, 12)


@pytest.mark.parametrize("workers", [4])
def test_processes_give_the_same_batches(
    toy: Path, expected: list[list[Any]], workers: int
) -> None:
    assert reading.read(toy, workers, 12) == expected
    with reading.stream_of(toy, workers, position=5 * reading.BATCH) as stream:
        assert reading.said(next(stream)) == expected[5]
        assert stream.position == 6 * reading.BATCH


@pytest.mark.parametrize(
    "method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_in_processes_that_were_started_any_way(
    toy: Path, tmp_path: Path, expected: list[list[Any]], method: str
) -> None:
    out = tmp_path / "out"
    with reading.stream_of(toy, 0) as here:  # with a stream, so a thread, in the parent
        next(here)
        context = multiprocessing.get_context(method)
        process = context.Process(target=reading.write, args=(toy, 1, 3, out), daemon=True)
        process.start()
        process.join(120)
    assert process.exitcode == 0
    assert json.loads(out.read_text()) == expected[:3]


def test_in_a_worker_of_a_data_loader(toy: Path, expected: list[list[Any]]) -> None:
    data = reading.Said(toy, 2, 4)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    assert [json.loads(line) for line in loader] == expected[:4]


def test_a_fork_must_not_use_its_parents_stream(join: JoinedColumns) -> None:
    with Stream(join, join.order(0, 8), position=0, global_batch=8) as stream:
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                next(stream)
            except RuntimeError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(read) as file:
            assert "made in another process" in file.read()
        next(stream)


@pytest.mark.slow  # the trainer's own tests run two ranks, one worker each
@pytest.mark.parametrize("world", [2, 4])
def test_under_torchrun(toy: Path, tmp_path: Path, expected: list[list[Any]], world: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    words = ["tests.shards.reading", str(toy), "1", "3", str(tmp_path / "out")]
    subprocess.run([sys.executable, *command, *words], cwd=ROOT, check=True, capture_output=True)
    ranks = [json.loads((tmp_path / f"out-{rank}").read_text()) for rank in range(world)]
    for *parts, (position, rows, _) in zip(*ranks, expected[:3], strict=True):
        assert {part[0] for part in parts} == {position}
        assert sum((part[1] for part in parts), []) == rows


def test_an_error_in_a_process_is_raised_with_its_cause(tmp_path: Path) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    (tmp_path / "text/tokens/c/0/0").unlink()
    join = open_join(tmp_path / "vae", tmp_path / "text")
    order = join.order(0, 8)
    with Stream(join, order, position=0, global_batch=8, workers=2) as stream:
        for _ in range(2):
            with pytest.raises(CorruptColumn, match="the object is missing") as caught:
                next(stream)
        assert "in worker 0 of the stream" in str(caught.value.__cause__)
        assert "in gather" in str(caught.value.__cause__)  # where it was raised


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_all_processes_are_for_the_parent(
    join: JoinedColumns, expected: list[list[Any]], number: int
) -> None:
    """A terminal and torchrun send them to workers too, which read on: the parent has a step to end."""
    order = join.order(reading.SEED, reading.LANES)
    with Stream(join, order, position=0, global_batch=reading.BATCH, workers=1) as stream:
        (worker,) = stream._reading._workers._workers  # type: ignore[union-attr]
        for k in range(3):
            worker.process.send_signal(number)  # the first comes before it has imported anything
            assert reading.said(next(stream)) == expected[k]


def test_closing_does_not_wait_for_a_fork(join: JoinedColumns) -> None:
    stream = Stream(join, join.order(0, 8), position=0, global_batch=8, workers=1)
    next(stream)
    if not (fork := os.fork()):  # it holds copies of the sockets
        time.sleep(60)
        os._exit(0)
    (worker,) = stream._reading._workers._workers  # type: ignore[union-attr]
    stream.close()
    assert worker.process.returncode == 0  # it ended by itself, nobody had to kill it
    os.kill(fork, signal.SIGKILL)
    os.waitpid(fork, 0)


def test_a_killed_worker_is_named(join: JoinedColumns) -> None:
    stream = Stream(join, join.order(0, 8), position=0, global_batch=8, workers=2)
    with stream:
        next(stream)
        worker = stream._reading._workers._workers[1]  # type: ignore[union-attr]
        os.kill(worker.process.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(WorkerDied, match=r"worker 1 .* exit code -9 \(SIGKILL\)"):
            list(itertools.islice(stream, 8))
        assert time.monotonic() - start < 5
        with pytest.raises(WorkerDied):
            next(stream)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(processes: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def maps(process: int) -> str:
    return Path(f"/proc/{process}/maps").read_text()


def test_workers_end_with_their_parent(toy: Path) -> None:
    """Killed, while a fork of it still holds its sockets. What they share has no name that could be left behind."""
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.shards.reading", str(toy), "2", "hold"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    *workers, fork = map(int, parent.stdout.readline().split())
    try:
        assert len(workers) == 2
        assert all(map(alive, workers))
        for process in (parent.pid, *workers):
            while "/memfd:latentbank-slot" not in (mapped := maps(process)):
                time.sleep(0.05)  # a worker maps its slots when it comes to read
            assert "/dev/shm" not in mapped
        parent.kill()
        parent.wait()
        assert alive(fork)
        assert gone(workers, 5)
    finally:
        os.kill(fork, signal.SIGKILL)
        parent.stdout.close()


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "stream"]


def test_workers_end_when_the_stream_does(join: JoinedColumns) -> None:
    def ids(stream: Stream) -> list[int]:
        return [w.process.pid for w in stream._reading._workers._workers]  # type: ignore[union-attr]

    order = join.order(0, 8)
    stream = Stream(join, order, position=0, global_batch=8, workers=2)
    processes = ids(stream)
    stream.close()
    stream.close()
    assert not any(map(alive, processes))
    with pytest.raises(StopIteration):
        next(stream)
    stream = Stream(join, order, position=0, global_batch=8, workers=1)  # forgotten, not closed
    processes = ids(stream)
    batch = next(stream)
    del stream
    assert not any(map(alive, processes))
    np.testing.assert_array_equal(batch.moments.numpy(), moments_of(batch.rows.numpy()))
    thread = Stream(join, order, position=0, global_batch=8)
    next(thread)
    del thread
    assert not readers()
