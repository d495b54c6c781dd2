"""The same job on real Ray: a worker is killed, then the driver; the columns are those of one quiet run.

Ray takes 10 s to start, so there are two starts and one test.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import configs
from encode.config import EncodeConfig
from encode.job import run
from shards.verify import logical_digest, verify

from .toy import write_config, write_source

ROOT = Path(__file__).parents[2]
SHARDS = 14


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def actors(driver: int) -> list[int]:
    """Processes of Ray workers two steps below our driver (driver, raylet, worker)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes()
        except OSError:
            continue
        pid = int(path.parent.name)
        if name.startswith(b"ray::RayWorker") and parent(parent(pid)) == driver:
            found.append(pid)
    return found


def until(
    condition: Callable[[], object], driver: "subprocess.Popen[str]", seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, "the run has ended already"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def test_ray_survives_deaths_and_equals_inline(tmp_path: Path, models: Path) -> None:
    tars = write_source(tmp_path / "tars", SHARDS, 90)
    config = write_config(tmp_path / "c.yaml", tmp_path / "cache", tars, models)
    assert run(configs.load(EncodeConfig, config, [f"root={tmp_path / 'inline'}"])) == 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    commits = tmp_path / "cache/toy/text/commits"

    def committed() -> int:
        return sum(p.suffix == ".json" for p in commits.iterdir()) if commits.is_dir() else 0

    def start(workers: int) -> "subprocess.Popen[str]":
        words = [
            "-m",
            "encode",
            "run",
            str(config),
            "engine.executor=ray",
            f"engine.workers={workers}",
        ]
        with (tmp_path / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                text=True,
            )

    driver = start(2)
    try:
        until(lambda: committed() >= 1, driver)
        victims = actors(driver.pid)
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        standing = committed()
        until(lambda: " died: " in log_of(tmp_path), driver)
        until(lambda: committed() > standing, driver)
    finally:
        driver.kill()
        driver.wait()
    assert 1 < committed() < SHARDS

    driver = start(1)
    assert driver.wait(240) == 0, log_of(tmp_path)
    assert (
        f"{tmp_path}/cache/toy/vae: complete, {SHARDS * 90:,} rows: {SHARDS * 90:,} ok"
        in log_of(tmp_path)
    )
    for column in ("vae", "text"):
        path = tmp_path / "cache/toy" / column
        assert verify(path) == []
        assert logical_digest(path) == logical_digest(tmp_path / "inline/toy" / column)
