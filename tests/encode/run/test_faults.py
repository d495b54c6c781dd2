"""Runs on a real Ray cluster, and each kind of fault there, some of them in one run; `make soak` has each alone, many
times.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import configs
from encode.config import EncodeConfig
from encode.run.job import run
from shards.tools.verify import logical_digest, verify
from tests.encode import faults
from tests.encode.rays import RAY, ROOT, Cluster, cluster, until
from tests.encode.toy import write_config, write_source
from tests.memory import MEMORY

INLINE = "engine.executor=inline"
pytestmark = pytest.mark.timeout(900)  # a cluster is a dozen processes


@pytest.fixture(scope="module", autouse=True)
def at() -> Iterator[None]:
    with faults.stage() as stage:
        faults._stage.append(stage)
        try:
            yield
        finally:
            faults._stage.clear()


def test_workers_lost_and_a_poisoned_shard() -> None:
    """After a payload, in the middle of a batch, before a commit; and thrice at one picture."""
    faults.poisoned(6, 9, ("died", "payload", 0), ("stop", 2, 5), ("die", "commit", 4))


def test_two_drivers_one_killed_and_one_told_to_end() -> None:
    faults.both_drivers_ended()


@pytest.mark.slow
def test_suspended() -> None:
    faults.suspended(seed=0)


def test_node_lost_and_another_one_comes() -> None:
    faults.node_lost(seed=0, comes=True)


@pytest.mark.skipif(not faults.can_mount(), reason="needs the right to mount")
def test_disk_full() -> None:
    faults.disk_full(kilobytes=200)


def test_decoded_elsewhere() -> None:
    faults.decoded_elsewhere(0.5)


DRIVER = """
import sys
from encode.__main__ import main
from shards import exits
try:
    exits.run(main)
finally:
    assert 'torch' not in sys.modules, 'the driver has loaded torch'
"""


def test_the_driver_loads_no_model(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker answers for the columns, and its errors come out of the command as if they were its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tars = write_source(tmp_path / "tars", 2, 5)
    cache = tmp_path / "cache"
    config = write_config(tmp_path / "c.yaml", cache, tars, models, executor="ray", workers=1)

    def driver(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", DRIVER, "run", str(config), *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    def refused(word: str, message: str) -> None:
        ended = driver(word)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr

    refused("columns.vae.encoder.path=/no/such/vae", "/no/such/vae: no such folder")
    refused("engine.device=cuda", "engine.device=cuda: no node of the Ray cluster")
    refused("columns.vae.kind=latents", "AutoencoderKL has a posterior. Say kind: moments")
    assert not cache.exists()
    ended = driver()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "vae: complete, 10 rows: 10 ok" in ended.stdout
    assert run(configs.load(EncodeConfig, config, [f"root={tmp_path}/inline", INLINE])) == 0
    for name in ("vae", "text"):
        same = {logical_digest(root / "toy" / name) for root in (cache, tmp_path / "inline")}
        assert len(same) == 1
    refused("columns.text.max_tokens=20", "identity.preprocess.max_tokens: found 24, expected 20")


def test_told_to_end_while_a_worker_loads() -> None:
    """A signal during a call of Ray's: nothing is written, and no worker stays. The worker takes as long
    as it needs to for that.
    """
    at = faults.standing()
    with at.root() as root:
        until(lambda: not at.rays.workers())
        loading = at.fault("hang-load")
        driver = faults.start(at.config(root, workers=1))
        until(lambda: not loading.exists() or not faults.alive(driver.pid))
        driver.kill(signal.SIGUSR1)
        code = driver.wait()
        assert code == 128 + signal.SIGUSR1, driver.text()
        assert "stopped by SIGUSR1" in driver.text()
        assert "Traceback" not in driver.text()
        assert list(root.iterdir()) == []
        until(lambda: not at.rays.workers())


def test_a_worker_that_hangs_while_it_loads_is_named() -> None:
    at = faults.standing()
    with at.root() as root:
        at.fault("hang-load")
        driver = faults.start(at.config(root, patience=3))
        until(lambda: not faults.alive(driver.pid), 100, "the end of the driver")
        assert driver.wait() == 4, driver.text()
        named = re.search(
            r"NoWorkers: .* 3 s: process (\d+) on .*, whose log is (\S+)\.", driver.text()
        )
        assert named, driver.text()
        assert Path(named[2]).is_file()
        assert named[1] in Path(named[2]).name
        until(lambda: not faults.alive(int(named[1])))
        assert list(root.iterdir()) == []


@pytest.fixture
def rays() -> Iterator[Cluster]:
    """A cluster that takes jobs."""
    with (
        tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as name,
        cluster(Path(name) / "ray", 2, dashboard=True) as rays,
    ):
        yield rays


@pytest.mark.slow
def test_submitted_stopped_and_submitted_again(rays: Cluster, tmp_path: Path, models: Path) -> None:
    """The real command with real models, by `ray job submit`. Half-way its workers are stopped, so
    that `ray job stop` finds shards in flight, however long it takes; then they go on.
    """
    tars = write_source(tmp_path / "tars", 10, 40)
    config = write_config(
        tmp_path / "c.yaml", tmp_path / "cache", tars, models, executor="ray", workers=1
    )
    assert run(configs.load(EncodeConfig, config, [f"root={tmp_path}/inline", INLINE])) == 0
    server = ["--address", f"http://127.0.0.1:{rays.dashboard}"]
    env = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})

    def submit(name: str) -> "subprocess.Popen[bytes]":
        options = [*server, "--submission-id", name, "--runtime-env-json", env]
        command = [sys.executable, "-m", "encode", "run", str(config)]
        with (tmp_path / name).open("w") as log:
            return subprocess.Popen(
                [RAY, "job", "submit", *options, "--working-dir", ".", "--", *command],
                cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip

    def log_of(name: str) -> str:
        return (tmp_path / name).read_text()

    job = submit("first")
    until(lambda: faults.commits(tmp_path / "cache") or job.poll() is not None)
    workers = rays.workers(b"ray::RayWorker")
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    assert job.poll() is None, log_of("first")
    stop = subprocess.Popen([RAY, "job", "stop", *server, "first"], stdout=subprocess.PIPE)
    until(lambda: "SIGTERM: finishing what is in flight" in log_of("first"))
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert b"was stopped" in stop.communicate(timeout=120)[0]
    job.wait(120)
    assert "what was finished is committed" in log_of("first")
    assert 0 < faults.commits(tmp_path / "cache") < 10
    assert not faults.litter(tmp_path / "cache")

    assert submit("second").wait(240) == 0, log_of("second")
    assert "cache/toy/vae: complete, 400 rows: 400 ok" in log_of("second")
    for name in ("vae", "text"):
        assert verify(tmp_path / "cache/toy" / name) == []
        same = [logical_digest(tmp_path / root / "toy" / name) for root in ("cache", "inline")]
        assert len(set(same)) == 1
