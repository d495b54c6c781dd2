"""A real Ray cluster on this machine for tests: `ray start`, with a token, ports and a folder of its
own, and nodes that can be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers.ports import free_port

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def processes(name: bytes) -> list[int]:
    """Those whose command line holds this."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if name in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], object], seconds: float = 120, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(0.01)


class Cluster:
    """A head and further nodes."""

    def __init__(self, folder: Path, cpus: int, dashboard: bool) -> None:
        self.folder, self.dashboard = folder, free_port() if dashboard else 0
        self.raylets: list[int] = []
        port, more = free_port(), []
        if dashboard:
            more = ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        self.start(
            "--head", f"--port={port}", f"--ray-client-server-port={free_port()}",
            f"--include-dashboard={str(dashboard).lower()}", f"--temp-dir={folder}",
            f"--num-cpus={cpus}", *more,
        )  # fmt: skip
        self.address = (folder / "ray_current_cluster").read_text().strip()

    def start(self, *words: str) -> int:
        """A node; the pid of its raylet."""
        done = subprocess.run(
            [
                RAY, "start", *words, "--min-worker-port=0", "--max-worker-port=0",
                f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
                "--object-store-memory=80000000",
            ],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            self.stop()  # what has started of it
            raise AssertionError(done.stdout + done.stderr)
        new = [pid for pid in self.mine(b"raylet/raylet\0") if pid not in self.raylets]
        self.raylets += new
        return new[0]

    def add_node(self, cpus: int) -> int:
        return self.start(f"--address={self.address}", f"--num-cpus={cpus}")

    def mine(self, name: bytes) -> list[int]:
        """Processes of this cluster."""
        here = str(self.folder).encode()
        return [pid for pid in processes(name) if here in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def workers(self, name: bytes = b"ray::LightWorker") -> list[int]:
        """Processes of actors of ours."""
        return [pid for pid in processes(name) if parent(pid) in self.raylets]

    def stop(self) -> None:
        """Kill every process that belongs to it."""
        here = str(self.folder).encode()
        own = {pid for pid in processes(here) if pid != os.getpid()} | set(self.raylets)
        below = {pid for pid in processes(b"ray::") if parent(pid) in own}
        for pid in own | below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def cluster(folder: Path, cpus: int = 2, dashboard: bool = False) -> Iterator[Cluster]:
    """A cluster that drivers started from here attach to."""
    keep = {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "1000",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in (*keep, "RAY_ADDRESS")}
    os.environ.update(keep)
    os.environ.pop("RAY_ADDRESS", None)
    made = None
    try:
        made = Cluster(folder, cpus, dashboard)
        os.environ["RAY_ADDRESS"] = made.address
        yield made
    finally:
        if made is not None:
            made.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
