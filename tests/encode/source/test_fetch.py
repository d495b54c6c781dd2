"""Tars from a web server that misbehaves, and from an S3 server: whole, once, and gone afterwards."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import configs
from encode.config import EncodeConfig
from encode.errors import BadTar, FetchFailed
from encode.run import job
from encode.source import fetch
from encode.source.fetch import fetched, sweep
from shards.store.client import Limits
from shards.store.open import open_store
from shards.tools.verify import logical_digest
from tests.encode.rays import until
from tests.encode.toy import write_config, write_source
from tests.encode.web import Web, serving
from tests.forks import fork, wait

QUICK = Limits(1, stall=0.5, request=5, give_up=20, backoff=0.01, max_backoff=0.05)
# where requests are counted: on a busy machine half a second may pass without a byte
PATIENT = Limits()
SHORT = replace(PATIENT, give_up=0.4, backoff=0.01, max_backoff=0.05)
DATA = np.random.default_rng(0).bytes(1_000_003)


@pytest.fixture
def web() -> Iterator[Web]:
    with serving(**{"some/a.tar": DATA}) as web:
        yield web


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RANGE", 1 << 16)  # 16 of them


def bring(web: Web, scratch: Path, limits: Limits = QUICK, size: int = len(DATA)) -> bytes:
    with fetched(f"{web.url}/some/a.tar", scratch, size, limits=limits) as path:
        assert path.parent == scratch
        return path.read_bytes()


def test_a_local_tar_is_given_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a b.tar").write_bytes(b"1")
    for name in (f"{tmp_path}/a b.tar", f"file://{tmp_path}/a%20b.tar"):
        with fetched(name, tmp_path / "scratch", 1) as path:
            assert path == tmp_path / "a b.tar"
    assert (tmp_path / "a b.tar").is_file()
    assert not (tmp_path / "scratch").exists()


def test_it_comes_whole_in_ranges_and_goes(web: Web, tmp_path: Path) -> None:
    heard: list[int] = []
    scratch = tmp_path / "new/scratch"
    with fetched(
        f"{web.url}/some/a.tar", scratch, len(DATA), report=heard.append, limits=PATIENT
    ) as path:
        assert path.read_bytes() == DATA
    assert list(scratch.iterdir()) == []
    assert web.gets() == 16
    assert sum(heard) == len(DATA)


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "stall", "close", "few"])
def test_a_server_that_fails_and_then_works(web: Web, tmp_path: Path, fault: str) -> None:
    starts: set[str] = set()

    def once(method: str, path: str, part: str) -> str | None:
        start = part.partition("-")[0]
        new = method == "GET" and start not in starts and int(start[6:] or 0) % (1 << 18) == 0
        starts.add(start)
        return fault if new else None  # one range of four, the first time

    web.fault = once
    assert bring(web, tmp_path) == DATA
    assert web.gets() >= 20


def test_a_server_without_ranges(web: Web, tmp_path: Path) -> None:
    cuts = iter(["cut", "cut"])

    def whole(method: str, path: str, part: str) -> str | None:
        return "whole" if part or method == "HEAD" else next(cuts, None)

    web.fault = whole
    assert bring(web, tmp_path) == DATA


@pytest.mark.parametrize("fault", ["500", "403", "404", "stall", "few"])
def test_a_server_that_never_works(web: Web, tmp_path: Path, fault: str) -> None:
    web.fault = lambda method, path, part: fault if method == "GET" else None
    start = time.monotonic()
    with pytest.raises(FetchFailed, match=r"/some/a\.tar: ") as caught:
        bring(web, tmp_path, replace(SHORT, stall=0.3) if fault == "stall" else SHORT)
    assert time.monotonic() - start < 40  # the server hangs up after 60 s
    assert caught.value.errno is None  # not of this machine's disk: the shard is tried again
    web.fault = lambda method, path, part: None
    assert bring(web, tmp_path) == DATA


def test_what_came_stays_for_the_next_attempt(web: Web, tmp_path: Path) -> None:
    web.fault = lambda method, path, part: "500" if part.startswith("bytes=983040") else None
    with pytest.raises(FetchFailed):
        bring(web, tmp_path, SHORT)
    (left,) = tmp_path.iterdir()
    web.fault = lambda method, path, part: None
    web.seen.clear()
    assert bring(web, tmp_path, PATIENT) == DATA
    assert web.gets() < 16
    assert not left.exists()


def test_another_size_or_version(web: Web, tmp_path: Path) -> None:
    with pytest.raises(BadTar, match="found 1000003 bytes, the source was made of 1000000"):
        bring(web, tmp_path, size=1_000_000)

    def swap(method: str, path: str, part: str) -> str | None:
        if web.gets() == 5:
            web.files["/some/a.tar"] = DATA[::-1]
        return None

    web.fault = swap
    with pytest.raises(FetchFailed, match="replaced while it was open"):
        bring(web, tmp_path)
    assert bring(web, tmp_path) == DATA[::-1]  # none of the bytes of the other version
    web.files.clear()
    with pytest.raises(FetchFailed, match="it no longer exists"):
        bring(web, tmp_path)


def test_many_who_want_the_same(web: Web, tmp_path: Path) -> None:
    """Threads and a process: it comes once, nobody's file is taken away, the last one clears up."""
    together = threading.Barrier(5)

    def work() -> None:
        with fetched(f"{web.url}/some/a.tar", tmp_path, len(DATA), limits=PATIENT) as path:
            together.wait(120)
            assert path.read_bytes() == DATA

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(work) for _ in range(4)]
        work()
        for job in jobs:
            job.result()
    assert web.gets() == 16
    assert list(tmp_path.iterdir()) == []


def test_again_and_again_by_processes(web: Web, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"

    def work() -> None:
        for _ in range(12):
            assert bring(web, scratch) == DATA
        sys.exit(0)

    children = [fork(work, tmp_path / f"output{i}") for i in range(3)]
    codes = [wait(child) for child in children]
    assert not any(codes), [(tmp_path / f"output{i}").read_text() for i in range(3)]
    assert list(scratch.iterdir()) == []


def test_a_killed_worker_leaves_what_the_next_goes_on_with(web: Web, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    web.fault = lambda method, path, part: "stall" if part.startswith("bytes=983040") else None
    child = fork(lambda: bring(web, scratch, PATIENT), tmp_path / "output")
    until(lambda: [path.read_bytes()[-16:] for path in scratch.glob("*")] == [b"\1" * 15 + b"\0"])
    assert sweep(scratch, 0.0) == 0  # it lives
    os.kill(child, signal.SIGKILL)
    assert wait(child) == -signal.SIGKILL
    web.fault = lambda method, path, part: None
    web.seen.clear()
    assert bring(web, scratch, PATIENT) == DATA
    assert web.gets() < 8


def test_litter_is_swept(web: Web, tmp_path: Path) -> None:
    old = tmp_path / f"{fetch.PREFIX}{'1' * 24}-{fetch.boot()}"
    young = tmp_path / f"{fetch.PREFIX}{'2' * 24}-{fetch.boot()}"
    earlier = tmp_path / f"{fetch.PREFIX}{'3' * 24}-earlier"
    foreign = [tmp_path / "not-ours.tar", tmp_path / f"{fetch.PREFIX}results.tar"]
    for path in (old, young, earlier, *foreign):
        path.write_bytes(b"1" * 5000)
    for path in (old, *foreign):
        os.utime(path, (1, 1))
    assert bring(web, tmp_path) == DATA
    assert sorted(tmp_path.iterdir()) == sorted([young, *foreign])


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with serving(**{"huge.tar": b""}) as huge:
        size = 1 << 60
        huge.headers = lambda path, data: {"Content-Length": str(size)}  # type: ignore[method-assign]
        with (
            pytest.raises(OSError, match="has no room.*make room") as caught,
            fetched(f"{huge.url}/huge.tar", tmp_path, size),
        ):
            pass
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)


def test_a_disk_that_fails_meanwhile(web: Web, tmp_path: Path) -> None:
    """A write fails for real: in the middle, the process may write no further into a file."""

    def limit(amount: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, resource.RLIM_INFINITY))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        scratch, size = tmp_path / "scratch", len(DATA)
        with fetched(f"{web.url}/some/a.tar", scratch, size, report=limit, limits=PATIENT):
            pass

    def told() -> None:
        try:
            work()
        except OSError as error:
            sys.exit(error.errno)

    start = time.monotonic()
    assert wait(fork(told, tmp_path / "output")) == errno.EFBIG, (tmp_path / "output").read_text()
    assert time.monotonic() - start < PATIENT.give_up / 2  # no request was repeated for it


def test_from_an_object_store(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    with store.staged("tars/a.tar") as file:
        file.write(DATA)
        file.publish()
    with fetched(f"{url}/tars/a.tar", tmp_path / "scratch", len(DATA), limits=QUICK) as path:
        assert path.read_bytes() == DATA
    with (
        pytest.raises(FetchFailed, match="it no longer exists"),
        fetched(f"{url}/tars/b.tar", tmp_path / "scratch", 1, limits=QUICK),
    ):
        pass


def test_a_column_of_tars_from_elsewhere_is_that_of_a_folder(
    url: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same source, the same bytes; the second and third run find every shard committed."""
    pattern = write_source(tmp_path / "tars", 2, 5)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    store = open_store(url)
    with serving(**{f"set/{name}": data for name, data in tars.items()}) as web:
        for name, data in tars.items():
            store.put_if_absent(f"set/{name}", data)
        digests = []
        for root, places in (
            ("web", f"{web.url}/set/{{0..1}}.tar"), ("s3", f"{url}/set/{{0..1}}.tar"),
            ("local", pattern), ("web", pattern), ("local", f"{web.url}/set/{{0..1}}.tar"),
        ):  # fmt: skip
            config = write_config(
                tmp_path / "c.yaml", tmp_path / root, places, models, scratch=str(tmp_path / "scratch")
            )  # fmt: skip
            assert job.run(configs.load(EncodeConfig, config)) == 0
            columns = (tmp_path / root / "toy" / name for name in ("vae", "text"))
            digests.append([logical_digest(column) for column in columns])
    assert digests == [digests[0]] * 5
    assert capsys.readouterr().out.count("every shard is committed already") == 2
    assert list((tmp_path / "scratch").iterdir()) == []
