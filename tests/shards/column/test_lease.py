"""One command at a time changes a column, whoever dies or comes late."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from shards.column.lease import LEASE, Lease, lease_chain
from shards.errors import LeaseHeld
from shards.store.open import open_store


def leases(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("lease*"))


def test_a_second_command_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    with Lease(tmp_path, "shards repair"):
        with pytest.raises(LeaseHeld, match=rf"held by `shards repair` \(pid {os.getpid()} on"):
            Lease(tmp_path, "shards gc").acquire()
        assert leases(tmp_path) == [LEASE]
    assert leases(tmp_path) == []
    with pytest.raises(RuntimeError, match="on the way"), Lease(tmp_path, "shards gc"):
        raise RuntimeError("on the way")
    assert leases(tmp_path) == []
    assert LeaseHeld("").exit_code == 5


def test_of_a_dead_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from shards.column.lease import Lease; Lease(sys.argv[1], 'shards gc').acquire();"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert leases(tmp_path) == [LEASE]
    with Lease(tmp_path, "shards repair") as lease:
        assert len(leases(tmp_path)) == 2  # the chain: none is replaced
        lease.check()
        with pytest.raises(LeaseHeld, match="shards repair"):
            Lease(tmp_path, "shards gc").acquire()
    assert leases(tmp_path) == []


def test_expired_or_broken_it_is_lost(tmp_path: Path) -> None:
    slow = Lease(tmp_path, "shards repair", seconds=0.05)
    slow.acquire()  # never renewed, as of a process that was stopped
    time.sleep(0.06)
    with Lease(tmp_path, "shards gc") as fresh:
        with pytest.raises(LeaseHeld, match="taken away or expired"):
            slow.check()
        slow.release()
        fresh.check()
        with Lease(tmp_path, "shards repair", force=True) as forced:
            with pytest.raises(LeaseHeld, match="taken away"):
                fresh.check()
            forced.check()
    assert leases(tmp_path) == []


def test_it_is_renewed_while_held(tmp_path: Path) -> None:
    def expires() -> float:
        return float(json.loads((tmp_path / LEASE).read_bytes())["expires"])

    with Lease(tmp_path, "shards repair", seconds=8) as lease:
        first, end = expires(), time.monotonic() + 60
        while expires() == first:
            assert time.monotonic() < end
            time.sleep(0.05)
        lease.check()
        with pytest.raises(LeaseHeld):
            Lease(tmp_path, "shards gc").acquire()


@pytest.mark.parametrize(
    "record",
    [b"", b"\x80\x04pickle", b"[]", b'{"owner": "../../x", "expires": 9e9}', b'{"owner": 1}',
     b"[" * 10**5, *(b'{"owner": "%s", "expires": %s}' % (b"a" * 32, until)
                    for until in (b"1e400", b"NaN", b"9" * 400, b"1e18"))],
)  # fmt: skip
def test_a_lease_that_is_none_holds_nobody_off(tmp_path: Path, record: bytes) -> None:
    (tmp_path / "column").mkdir()
    (tmp_path / "column" / LEASE).write_bytes(record)
    with Lease(tmp_path / "column", "shards gc") as lease:
        lease.check()
        (chain,) = set(leases(tmp_path / "column")) - {LEASE}
    assert leases(tmp_path / "column") == []
    assert leases(tmp_path) == []
    for name in (LEASE, chain):  # and of who took over from it
        (tmp_path / "column" / name).write_bytes(record)
    with Lease(tmp_path / "column", "shards gc") as lease:
        lease.check()
    assert leases(tmp_path / "column") == []


def claim(folder: Path, barrier: Barrier, holder: Path) -> None:
    barrier.wait()
    try:
        with Lease(folder, "shards repair"):
            (holder / str(os.getpid())).touch()
            barrier.wait(60)
            barrier.wait(60)
    except LeaseHeld:
        barrier.wait(60)
        barrier.wait(60)


def test_of_many_at_once_one_takes_over(tmp_path: Path) -> None:
    """From a lease that has expired."""
    fork = multiprocessing.get_context("fork")
    for attempt in range(6):
        folder, holder = tmp_path / str(attempt), tmp_path / f"held {attempt}"
        holder.mkdir()
        Lease(folder, "shards gc", seconds=0.0).acquire()
        barrier = fork.Barrier(7)
        runners = [fork.Process(target=claim, args=(folder, barrier, holder)) for _ in range(6)]
        for runner in runners:
            runner.start()
        for _ in range(3):
            barrier.wait(60)
        for runner in runners:
            runner.join(60)
        assert len(list(holder.iterdir())) == 1
        assert leases(folder) == []


@pytest.mark.parametrize("release", [False, True])
def test_a_slow_one_never_holds_it_beside_another(tmp_path: Path, release: bool) -> None:
    """Another command comes between any two steps of one that takes over, and stays or is done."""
    outcomes = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        Lease(folder, "shards gc", seconds=0.0).acquire()
        store, calls = open_store(folder), itertools.count()
        other, came, stays = Lease(folder, "shards repair"), False, False
        put, read = store.put_if_absent, store.read

        def between(call: Any, *words: Any) -> Any:
            nonlocal came, stays
            if next(calls) == step:  # noqa: B023 - called in this turn alone
                came = True
                with suppress(LeaseHeld):
                    other.acquire()  # noqa: B023
                    stays = not release
                    if release:
                        other.release()  # noqa: B023
            return call(*words)

        store.put_if_absent = partial(between, put)  # type: ignore[method-assign]
        store.read = partial(between, read)  # type: ignore[method-assign]
        slow = Lease(store, "shards repair")
        try:
            slow.acquire()
            mine = True
        except LeaseHeld:
            mine = False
        if not came:
            break
        _, last = lease_chain(open_store(folder))
        assert (mine, stays) != (True, True)
        assert last is not None or not (mine or stays)
        if mine or stays:
            assert last["owner"] == (slow if mine else other).owner
        outcomes.add((mine, stays))
    assert outcomes == ({(True, False)} if release else {(True, False), (False, True)})


def test_the_record_says_who(tmp_path: Path) -> None:
    with Lease(tmp_path, "shards gc"):
        record = json.loads((tmp_path / LEASE).read_bytes())
    assert record["pid"] == os.getpid()
    assert record["command"] == "shards gc"
    assert record["expires"] > time.time()
    assert {"owner", "host", "machine"} < record.keys()
    assert not [t for t in threading.enumerate() if t.name.startswith("Thread") and not t.daemon]
