"""Signals to jobs of real processes: while their storage hangs, and by way of torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shards.signals import SIGNALS
from tests.forks import start_torchrun, wait
from tests.proxy.server import Proxy
from tests.shards.objects import BUCKET, Server, point_to, server  # noqa: F401  # a fixture
from tests.train import faults
from tests.train.conftest import ROOT, write_config
from tests.train.faults import saved, scratch, values_of
from tests.train.processes import Job, called, load_all, settle, start

FLAG = ["--signals-to-handle", ",".join(number.name for number in SIGNALS)]


@pytest.fixture
def proxies(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Proxy]]:  # noqa: F811
    """A way of each of two ranks to an S3 server that holds the columns; nothing is cached."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    for path in (faults.columns() / "toy").rglob("*"):
        if path.is_file():
            key = f"cache/{path.relative_to(faults.columns())}"
            server.backend.put_object(BUCKET, key, path.read_bytes())
    proxies = [Proxy(server.port) for _ in range(2)]
    point_to(monkeypatch, server.port)
    yield proxies
    for proxy in proxies:
        proxy.close()


def train_from(proxies: list[Proxy], folder: Path, ranks: int, **changes: Any) -> Job:
    """Starts a run that reads `s3://` columns, each rank through its own proxy."""
    url = f"s3://{BUCKET}/cache/toy"
    data = {"latents": f"{url}/vae", "text": f"{url}/text", "lanes": 8}
    path = folder / "tiny.yaml"
    values = values_of(folder, ranks, data=data, validation={}, save_every=100_000, **changes)
    path.write_text(yaml.safe_dump(values))

    def work(rank: int) -> None:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxies[rank].port}"
        called([str(path)])

    return start(work, ranks, folder)


def steps_of(job: Job) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)/", job.text(0), re.MULTILINE)]


@pytest.mark.parametrize(("ranks", "hung", "signalled"), [(1, 0, 0), (2, 0, 1), (2, 1, 1)])
def test_a_rank_whose_storage_hangs_saves_and_leaves(
    proxies: list[Proxy], ranks: int, hung: int, signalled: int
) -> None:
    """Whichever rank gets the signal: the one that waits for its data, or one that waits for that one."""
    with scratch() as folder:
        job = train_from(proxies, folder, ranks, steps=100_000)
        job.logged("step 2/")
        proxies[hung].fault = lambda request, count: "stall"
        before = 0
        while steps_of(job)[-1] > before:  # until what had been read ahead is used up
            before = steps_of(job)[-1]
            time.sleep(2)
        job.send(signal.SIGUSR1, signalled)
        assert job.wait(20) == [128 + signal.SIGUSR1] * ranks, job.text()
        last = steps_of(job)[
            -1
        ]  # that of before, unless all ranks were kept from their CPU for 2 s
        assert f"stopped by SIGUSR1 after step {last}, saved" in job.text(0)
        assert saved(folder / "tiny-vae") == [last]
        proxies[hung].fault = lambda request, count: None
        job = train_from(proxies, folder, ranks, steps=last + 1)
        assert job.wait() == [0] * ranks, job.text()
        assert f"step-{last:08d}: step {last}, " in job.text(0)


def by_agent(words: list[str], log: Path) -> int:
    """The pid of torchrun's agent, whose ranks are forks."""
    load_all()

    def work() -> None:
        settle()
        called(words)

    return start_torchrun(work, 2, log, signals_to_handle=FLAG[1])


def by_command(words: list[str], log: Path) -> int:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *FLAG]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *launch, "-m", "train", *words], cwd=ROOT, stdout=file, stderr=file
        ).pid


@pytest.mark.parametrize(
    ("launch", "number"),
    [(by_agent, signal.SIGUSR1), pytest.param(by_command, signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_a_signal_to_torchrun_ends_all_ranks_with_a_checkpoint(
    tmp_path: Path, launch: Callable[[list[str], Path], int], number: signal.Signals
) -> None:
    log, run = tmp_path / "log", tmp_path / "tiny-vae"
    log.touch()
    agent = launch([str(write_config(tmp_path, faults.columns())), "steps=100000"], log)
    end = time.monotonic() + 100
    while "step 2/" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    os.kill(agent, number)
    assert wait(agent) != 0  # a code of torchrun's own
    text = log.read_text()
    (last,) = map(int, re.findall(rf"stopped by {number.name} after step (\d+), saved", text))
    assert saved(run)[-1] == last
    assert not list(run.glob("lease*"))
    assert "SIGKILL" not in text


def test_every_documented_launch_hands_on_all_signals() -> None:
    """torchrun hands on four of them by itself, and dies of the others without a word to its ranks."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "train/__main__.py"]
    texts = [page.read_text().replace("\\\\\n", "").replace("\\\n", "") for page in pages]
    launches = [
        line.strip()
        for text in texts
        for line in text.splitlines()
        if re.match(r" +(\$ )?torchrun --.*-m (train|eval train) ", line)
    ]
    assert len(launches) >= 5
    for line in launches:
        assert " ".join(FLAG) in line, line
