"""A stream in processes of every kind: the same batches wherever it is used."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import CorruptColumn, JoinedColumns, open_join
from shards.read.stream import Stream
from tests.shards import reading
from tests.shards.toy import moments_of, small_moments, small_tokens

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def join(toy: Path) -> JoinedColumns:
    return open_join(toy / "vae", toy / "text")


@pytest.fixture(scope="module")
def expected(toy: Path) -> list[list[Any]]:
    return reading.read(toy, 12)


def test_any_position_is_where_a_stream_would_have_come_to(
    toy: Path, expected: list[list[Any]]
) -> None:
    with reading.stream_of(toy, position=5 * reading.BATCH) as stream:
        assert reading.said(next(stream)) == expected[5]
        assert stream.position == 6 * reading.BATCH


@pytest.mark.parametrize(
    "method", ["fork", "spawn", pytest.param("forkserver", marks=pytest.mark.slow)]
)
def test_in_processes_that_were_started_any_way(
    toy: Path, tmp_path: Path, expected: list[list[Any]], method: str
) -> None:
    out = tmp_path / "out"
    with reading.stream_of(toy) as stream:  # with a stream, so a thread, in the parent
        next(stream)
        context = multiprocessing.get_context(method)
        process = context.Process(target=reading.write, args=(toy, 3, out), daemon=True)
        process.start()
        process.join(120)
    assert process.exitcode == 0
    assert json.loads(out.read_text()) == expected[:3]


def test_a_stream_opens_as_many_files_as_it_may(toy: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard > 256
    # in a program of its own: a fork has the files that these tests keep open, perhaps more than 256
    script = f"""if True:
        import resource, sys
        from pathlib import Path
        from tests.shards import reading
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
        with reading.stream_of(Path(sys.argv[1])):
            print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"""
    command = [sys.executable, "-c", script, str(toy)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{min(hard, 1 << 17)}\n"


def test_in_a_worker_of_a_data_loader(toy: Path, expected: list[list[Any]]) -> None:
    data = reading.Said(toy, 4)
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


@pytest.mark.slow  # the trainer's own tests run two ranks
@pytest.mark.parametrize("world", [2, 4])
def test_under_torchrun(toy: Path, tmp_path: Path, expected: list[list[Any]], world: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m"]
    words = ["tests.shards.reading", str(toy), "3", str(tmp_path / "out")]
    subprocess.run([sys.executable, *command, *words], cwd=ROOT, check=True, capture_output=True)
    ranks = [json.loads((tmp_path / f"out-{rank}").read_text()) for rank in range(world)]
    for *parts, (position, rows, _) in zip(*ranks, expected[:3], strict=True):
        assert {part[0] for part in parts} == {position}
        assert sum((part[1] for part in parts), []) == rows


def test_an_error_of_reading_is_raised_again_and_again(tmp_path: Path) -> None:
    small_moments(tmp_path / "vae")
    small_tokens(tmp_path / "text")
    (tmp_path / "text/tokens/c/0/0").unlink()
    join = open_join(tmp_path / "vae", tmp_path / "text")
    with Stream(join, join.order(0, 8), position=0, global_batch=8) as stream:
        for _ in range(2):
            with pytest.raises(CorruptColumn, match="the object is missing") as caught:
                next(stream)
    assert "gather" in [entry.name for entry in caught.traceback]  # where it was raised


def test_a_forgotten_stream_ends_its_thread_and_leaves_its_batches(join: JoinedColumns) -> None:
    stream = Stream(join, join.order(0, 8), position=0, global_batch=8)
    batch = next(stream)
    del stream
    assert not [thread for thread in threading.enumerate() if thread.name == "stream"]
    np.testing.assert_array_equal(batch.moments.numpy(), moments_of(batch.rows.numpy()))


def test_a_process_with_an_open_stream_ends_at_once(toy: Path) -> None:
    """Neither the reading thread nor a full queue keeps it, and nothing is left in /dev/shm."""
    code = (
        "import sys; from pathlib import Path; from tests.shards import reading;"
        "stream = reading.stream_of(Path(sys.argv[1])); next(stream); print(stream.position)"
    )
    before = set(os.listdir("/dev/shm"))
    child = subprocess.run(
        [sys.executable, "-c", code, str(toy)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (child.returncode, child.stdout.strip()) == (0, str(reading.BATCH)), child.stderr
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "latentbank" in name]


def test_torch_is_loaded_with_the_stream_alone() -> None:
    code = (
        "import sys, shards; assert 'torch' not in sys.modules;"
        "from shards import *; assert 'torch' in sys.modules;"
        "from shards.read import stream; assert (Batch, Stream) == (stream.Batch, stream.Stream)"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    with pytest.raises(ImportError, match="cannot import name 'Streams'"):
        from shards import Streams  # noqa: F401
