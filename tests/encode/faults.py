"""What may befall a run on Ray, each with real signals to real processes, and each ending in the
digests of a run that nothing befell.

Each function is one case: of the tests, and in great numbers of the soak run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from encode.config import EncodeConfig
from encode.run.job import Options
from shards import exits
from shards.tools.verify import logical_digest, verify
from tests.encode import light
from tests.encode.rays import Cluster, cluster, until
from tests.forks import fork, wait
from tests.memory import MEMORY
from tests.soak.sweep import Case, Sweep

SHARDS, ROWS = 8, 40
COLUMNS = "vae", "large", "text"
MS = 10  # a picture
RUN_SECONDS = 3.0  # that a run encodes, about
PLAIN = Options()


@dataclass
class Stage:
    """A cluster of two nodes with a CPU each, a source, and what comes of it undisturbed."""

    folder: Path
    rays: Cluster
    node: int  # the raylet of the second node
    undisturbed: list[str]

    def config(self, root: Path, **engine: Any) -> EncodeConfig:
        return config_of(self.folder, root, **{"executor": "ray", **engine})

    def fault(self, name: str, content: str = "") -> Path:
        """Something that is to happen to a worker; see `light`."""
        path = self.folder / "faults" / name
        path.write_text(content)
        return path

    @contextmanager
    def root(self) -> Iterator[Path]:
        """A folder for columns, and no faults before or after."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            try:
                yield Path(name)
            finally:
                for path in (self.folder / "faults").iterdir():
                    path.unlink()

    def ensure_node(self) -> None:
        if not alive(self.node):
            self.node = self.rays.add_node(1)


def state_of(pid: int) -> str:
    """As ps(1) shows it: T is stopped, Z a zombie; X if there is none."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def alive(pid: int) -> bool:
    return state_of(pid) not in "ZX"


def config_of(folder: Path, root: Path, **engine: Any) -> EncodeConfig:
    return EncodeConfig.model_validate({
        "root": str(root),
        "sources": {"toy": f"{folder}/tars/{{0..{SHARDS - 1}}}.tar"},
        "columns": {
            "vae": {"kind": "moments", "encoder": str(MS), "resolution": 32},
            "large": {"kind": "moments", "encoder": "0", "resolution": 64},
            "text": {"kind": "ids", "encoder": "0"},
        },
        "shard_rows": 1024,
        "engine": {"batch": 8, "device": "cpu", **engine},
    })  # fmt: skip


def digests(root: Path) -> list[str]:
    return [logical_digest(root / "toy" / name) for name in COLUMNS]


@contextmanager
def stage() -> Iterator[Stage]:
    """Set it, and clear it away."""
    with tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        light.write_source(folder / "tars", SHARDS, ROWS)
        (folder / "faults").mkdir()
        pid = fork(
            lambda: run_in(config_of(folder, folder / "quiet", executor="inline")), folder / "log"
        )
        assert wait(pid) == 0, (folder / "log").read_text()
        os.environ[light.FAULTS] = str(folder / "faults")
        try:
            with cluster(folder / "ray", 1) as rays:
                yield Stage(folder, rays, rays.add_node(1), digests(folder / "quiet"))
        finally:
            del os.environ[light.FAULTS]


_stage: list[Stage] = []


def standing() -> Stage:
    """One stage for all cases of a process of the soak run."""
    if not _stage:
        os.environ.setdefault("RAY_AUTH_TOKEN", random.Random().randbytes(32).hex())
        os.environ["RAY_AUTH_MODE"] = "token"
        opened = stage()
        _stage.append(opened.__enter__())
        Finalize(None, lambda: opened.__exit__(None, None, None), exitpriority=10)
    return _stage[0]


def run_in(config: EncodeConfig, options: Options = PLAIN) -> None:
    """In a forked process: what the command would do."""

    exits.run(lambda: light.run(config, options))


@dataclass
class Driver:
    """A run in a process of its own."""

    pid: int
    log: Path
    code: int | None = None

    def wait(self) -> int:
        if self.code is None:
            self.code = wait(self.pid)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        return self.log.read_text()


def start(config: EncodeConfig, options: Options = PLAIN) -> Driver:
    log = Path(os.environ[light.FAULTS]).parent / f"log-{random.Random().randbytes(4).hex()}"
    return Driver(fork(lambda: run_in(config, options), log), log)


def commits(root: Path, column: str = "text") -> int:
    return len(list(root.glob(f"toy/{column}/commits/*.json")))


def begun(root: Path) -> bool:
    """Whether a worker has read a tar."""
    return any(root.glob("toy/index/*.jsonl"))


def litter(root: Path) -> list[Path]:
    return list(root.rglob(".tmp-*"))


def sound(at: Stage, root: Path, driver: Driver) -> None:
    """A run that ended well, in the same as if nothing had been."""
    assert driver.wait() == 0, driver.text()
    assert digests(root) == at.undisturbed
    for name in COLUMNS:
        assert verify(root / "toy" / name) == []
        assert commits(root, name) == SHARDS
    assert not list(root.glob("toy/*/lease*"))


def some_time(chance: random.Random, root: Path) -> None:
    """A moment of a run, once it has begun."""
    until(lambda: begun(root), what="the first index")
    time.sleep(chance.uniform(0, RUN_SECONDS))


# The cases ----------------------------------------------------------------------------------------


def driver_killed(seed: int) -> None:
    """SIGKILL to the driver at any moment; the same command goes on."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root))
        some_time(chance, root)
        driver.kill()
        driver.wait()
        sound(at, root, start(at.config(root)))


def worker_killed(seed: int) -> None:
    """SIGKILL to a worker at any moment."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root))
        some_time(chance, root)
        victims = at.rays.workers()
        if victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
        sound(at, root, driver)


Moment = tuple[str, str | int, int]


def arranged(at: Stage, *moments: Moment) -> None:
    """Workers die just before or after they publish an object of a shard (die or died, what, shard); or die, hang
    or are stopped in the middle of a batch (how, shard, row).
    """
    for i, (how, where, number) in enumerate(moments):
        if isinstance(where, str):
            at.fault(f"{how}-link-{i}", PUBLISHED[where].format(number))
        else:
            at.fault(f"{how}-picture-{where}-{number}")


def killed(how: str, where: str | int, number: int) -> None:
    """A worker is lost, and nothing else."""
    at = standing()
    with at.root() as root:
        at.ensure_node()
        arranged(at, (how, where, number))
        driver = start(at.config(root, patience=4))
        sound(at, root, driver)
        assert not list((at.folder / "faults").iterdir()), "it has not happened"
        assert driver.text().count(" died: ") >= 1


PUBLISHED = {
    "index": "*/toy/index/{:05d}.jsonl", "payload": "*/toy/vae/moments/c/{}/*",
    "second payload": "*/toy/large/moments/c/{}/*", "third payload": "*/toy/text/ids/c/{}",
    "lengths": "*/toy/text/lengths/c/{}", "status": "*/toy/vae/status/c/{}",
    "crc": "*/toy/large/crc/c/{}", "commit": "*/toy/vae/commits/{:05d}.json",
    "last commit": "*/toy/text/commits/{:05d}.json",
}  # fmt: skip


def poisoned(shard: int, row: int, *moments: Moment) -> None:
    """A picture that kills whoever looks at it: its shard alone is given up, though other workers are lost too."""
    at = standing()
    with at.root() as root:
        at.ensure_node()
        poison = at.fault(f"die-picture-{shard}-{row}", "always")
        arranged(at, *moments)
        driver = start(at.config(root, patience=4))
        given_up_alone(root, driver, shard)
        assert list((at.folder / "faults").iterdir()) == [poison], "not all of it has happened"
        assert driver.text().count(" died: ") >= 3 + len(moments)
        poison.unlink()
        sound(at, root, start(at.config(root, executor="inline"), Options(retry=True)))


def given_up_alone(root: Path, driver: Driver, shard: int) -> None:
    assert driver.wait() == 3, driver.text()
    assert f"FAILED toy/{shard:05d}" in driver.text()
    for name in COLUMNS:
        done = sorted(int(p.stem) for p in root.glob(f"toy/{name}/commits/*.json"))
        assert done == [n for n in range(SHARDS) if n != shard]
        assert not list(root.glob(f"toy/{name}/complete/*"))
        failed = json.loads((root / f"toy/{name}/failures/{shard:05d}.json").read_text())
        assert "died" in failed["reason"] or "dead" in failed["reason"], failed


def suspended(seed: int) -> None:
    """The job stands still for longer than a worker may, as under a scheduler, and goes on: nobody is killed."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root, patience=4))
        some_time(chance, root)
        job = [driver.pid, *at.rays.workers()]
        for number, seconds in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
            for pid in job:
                with suppress(ProcessLookupError):  # an idle one of an earlier run may have ended
                    os.kill(pid, number)
            time.sleep(seconds)
        sound(at, root, driver)
        assert " died: " not in driver.text(), driver.text()


def drained(name: str, seed: int) -> None:
    """A signal at any moment: what is in flight is finished, and nothing lies about."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root, workers=1))
        some_time(chance, root)
        driver.kill(getattr(signal, name))
        ended_in_order(root, driver, getattr(signal, name))
        sound(at, root, start(at.config(root, executor="inline")))


def ended_in_order(root: Path, driver: Driver, number: int) -> None:
    assert driver.wait() in (0, 128 + number), driver.text()
    assert "Traceback" not in driver.text()
    assert not litter(root)
    assert not list(root.glob("toy/*/lease*"))
    assert {commits(root, name) for name in COLUMNS} == {commits(root)}


def decoded_elsewhere(share: float) -> None:
    """Pictures come from tasks on other CPUs; the columns are the same."""
    at = standing()
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root, remote_decode=share))
        sound(at, root, driver)
        assert "RemoteDecodeFailed" not in driver.text()


def two_drivers(seed: int, end: str) -> None:
    """Two runs share the work; one of them is told to end, or killed."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()  # a CPU for each
        drivers = [start(at.config(root, cooperate=True, workers=1)) for _ in range(2)]
        some_time(chance, root)
        if end != "none":
            drivers[0].kill(getattr(signal, end))
        code = drivers[0].wait()
        assert code in {"none": (0,), "SIGTERM": (0, 143), "SIGKILL": (0, -9)}[end], drivers[
            0
        ].text()
        sound(at, root, drivers[1])
        assert end == "SIGKILL" or not litter(root)


def both_drivers_ended() -> None:
    """Of two runs that share the work one is killed and then the other told to end, both in the midst of it; a third
    goes on. Their workers stop in the first shard of each, and go on once both are told.
    """
    at = standing()
    with at.root() as root:
        at.ensure_node()
        stops = [at.fault(f"stop-picture-{shard}-5") for shard in range(SHARDS)]
        first, second = (start(at.config(root, cooperate=True, workers=1)) for _ in range(2))

        def stopped() -> list[int]:
            return [pid for pid in at.rays.workers() if state_of(pid) == "T"]

        until(lambda: len(stopped()) == 2 or not (alive(first.pid) and alive(second.pid)))
        workers = stopped()
        assert len(workers) == 2, first.text() + second.text()
        for path in stops:
            path.unlink(missing_ok=True)
        first.kill()
        second.kill(signal.SIGTERM)
        for pid in workers:
            with suppress(ProcessLookupError):  # that of the first driver ends with it
                os.kill(pid, signal.SIGCONT)
        assert (first.wait(), second.wait()) == (-signal.SIGKILL, 143), second.text()
        assert "Traceback" not in second.text()
        assert commits(root) < SHARDS
        sound(at, root, start(at.config(root, executor="inline")))


def node_lost(seed: int, comes: bool) -> None:
    """The second node is lost with its worker, at any moment; and another one may come."""
    at, chance = standing(), random.Random(seed)
    with at.root() as root:
        at.ensure_node()
        driver = start(at.config(root, look=0.5))
        some_time(chance, root)
        os.kill(at.node, signal.SIGKILL)
        if comes:
            at.ensure_node()
        sound(at, root, driver)


def disk_full(kilobytes: int) -> None:
    """The disk fills up: the run ends with one message, and goes on once there is room."""
    at = standing()
    with at.root() as root:
        at.ensure_node()
        with small_disk(root, kilobytes) as grow:
            driver = start(at.config(root / "cache", workers=1), Options(ignore_space=True))
            assert driver.wait() in (0, 2), driver.text()
            if driver.code == 2:
                assert "No space left on device" in driver.text(), driver.text()
                assert "Traceback" not in driver.text()
                assert not litter(root)
                grow(16_384)
            sound(at, root / "cache", start(at.config(root / "cache", executor="inline")))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many kilobytes; for root alone. Yields what makes it larger."""

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words, str(folder)], check=True)

    mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs")
    try:
        yield lambda more: mount("-o", f"remount,size={more}k")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), 64):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


KINDS: dict[str, Callable[..., None]] = {
    "driver killed": driver_killed,
    "worker killed": worker_killed,
    "killed at": killed,
    "killed within": killed,
    "poisoned": poisoned,
    "suspended": suspended,
    "drained": drained,
    "two drivers": two_drivers,
    "node lost": node_lost,
    "disk full": disk_full,
    "decoded elsewhere": decoded_elsewhere,
}


def cases() -> list[Case]:
    found: list[Case] = [("driver killed", seed) for seed in range(20)]
    found += [("worker killed", seed) for seed in range(20)]
    found += [
        ("killed at", when, what, shard)
        for when in ("die", "died")
        for what in PUBLISHED
        for shard in (0, SHARDS - 1)
    ]
    found += [
        ("killed within", how, shard, row)
        for how in ("die", "hang", "stop")
        for shard, row in ((0, 0), (3, 17), (SHARDS - 1, ROWS - 1))
    ]
    found += [("poisoned", shard, row) for shard, row in ((0, 0), (4, 9), (SHARDS - 1, ROWS - 1))]
    found += [("suspended", seed) for seed in range(3)]
    found += [("drained", name, seed) for name in ("SIGTERM", "SIGINT") for seed in range(5)]
    found += [
        ("two drivers", seed, end) for end in ("none", "SIGTERM", "SIGKILL") for seed in range(3)
    ]
    found += [("decoded elsewhere", share) for share in (1, 0.5)]
    found += [("node lost", seed, comes) for comes in (0, 1) for seed in range(4)]
    if sys.platform == "linux" and os.geteuid() == 0:
        found += [("disk full", size) for size in (60, 120, 200, 300, 400)]
    return found


def check(kind: str, *arguments: Any) -> None:
    KINDS[kind](*arguments)


SWEEP = Sweep(
    "encode", "a fault of a run on Ray", cases, check, lambda case: str(case[0])
)  # fmt: skip
