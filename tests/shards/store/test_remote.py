"""Object stores, against a real S3 protocol server on loopback and a proxy that misbehaves."""

import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import Column
from shards.column.commits import committed, read_failures
from shards.errors import CorruptColumn, IncompleteColumn, NotAColumn, StoreError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.store.open import open_store
from shards.tools import copy as transfer
from shards.tools.verify import examine
from tests.proxy.server import FAULTS, EachKindOnce, Proxy
from tests.shards.objects import BUCKET, Server, point_to
from tests.shards.toy import files_of, moments_spec, row_ids, tokens_spec, write_column

# repeated soon; where nothing stalls, no time-out of a busy machine repeats it as well
QUICK = Limits(30, stall=60, request=60, copy=60, give_up=120, backoff=0.01, max_backoff=0.1)
PAGE = 1 << 16
LARGE = 9 << 20  # more than one part


def store_at(url: str, limits: Limits = QUICK, **how: Any) -> RemoteStore:
    return RemoteStore(url, limits, page_bytes=PAGE, **how)


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def stage(store: RemoteStore, name: str, data: bytes, piece: int = 3 << 20) -> bool:
    with store.staged(name) as file:
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        return file.publish()


def in_place(store: RemoteStore, name: str, offset: int, length: int) -> bytes:
    handle = store.open(name)
    buffer = bytearray(length)
    count = store.preadv(handle, [memoryview(buffer)], offset)
    store.close(handle)
    return bytes(buffer[:count])


# Objects ------------------------------------------------------------------------------------------


def test_objects_come_and_go(url: str) -> None:
    store = store_at(url)
    assert (store.name, store.at("x")) == (url.rpartition("/")[2], f"{url}/x")
    assert store.put_if_absent("c/one.json", b"1")
    assert not store.put_if_absent("c/one.json", b"2")
    assert store.read("c/one.json") == b"1"
    store.replace("c/report", b"old")
    store.replace("c/report", b"newer")
    assert stage(store, "c/empty", b"")
    assert store.list("c") == [("c/empty", 0), ("c/one.json", 1), ("c/report", 5)]
    assert store.list("c/") == store.list() == store.list("c")
    assert store.list("nothing") == []
    child = store.child("c")
    assert child.list() == [("empty", 0), ("one.json", 1), ("report", 5)]
    assert child.parent.url == store.url
    assert child.parent.read("c/report") == b"newer"
    assert (store.size("c/one.json"), store.size("c/two.json")) == (1, None)
    store.move("c/one.json", "quarantine/one.json")
    store.delete("c/report")
    store.delete("c/report")
    assert [name for name, _ in store.list()] == ["c/empty", "quarantine/one.json"]


def test_what_is_absent_is_not_found(url: str) -> None:
    store = store_at(url)
    for act in (store.read, store.open, lambda name: store.move(name, "elsewhere")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{url}/nothing")):
            act("nothing")


def test_large_objects_go_in_parts(server: Server, url: str) -> None:
    store, data = store_at(url), noise(LARGE + 12345)
    assert stage(store, "values/c/0", data)
    assert not stage(store, "values/c/0", data[::-1])
    assert store.read("values/c/0") == data
    assert store.list() == [("values/c/0", len(data))]
    assert store.stale_temporaries(0) == []
    assert server.unfinished() == 0


def test_a_buffer_may_change_once_it_is_written(url: str) -> None:
    store, rows, digest = store_at(url), np.zeros(4 << 20, np.uint8), hashlib.sha256()
    with store.staged("values") as file:
        for i in range(5):
            rows[:] = i + 1
            digest.update(rows)
            file.write(rows.reshape(2, -1))
            rows[:] = 99
        assert file.publish()
    assert hashlib.sha256(store.read("values")).digest() == digest.digest()


@pytest.mark.parametrize("size", [1000, LARGE, 3 * LARGE])
def test_what_is_not_published_vanishes(server: Server, url: str, size: int) -> None:
    store = store_at(url)
    with store.staged("values") as file:
        file.write(bytes(size))
    with suppress(KeyError), store.staged("values") as file:
        file.write(bytes(size))
        raise KeyError
    assert store.list() == []
    assert store.stale_temporaries(0) == []
    assert server.unfinished() == 0


def test_markers_of_folders_are_no_objects(server: Server, url: str) -> None:
    """Which consoles and sync tools put there."""
    path = url.removeprefix(f"s3://{BUCKET}/")
    write_column(url, moments_spec(1), (70,))  # type: ignore[arg-type]
    for marker in ("", "failures/", "commits/", "complete/"):
        server.backend.put_object(BUCKET, f"{path}/{marker}", b"")
    store = open_store(url)
    assert [len(store.list(name)) for name in ("failures", "commits", "complete")] == [0, 1, 2]
    assert path not in {name for name, _ in store.list()} | {""}
    assert (examine(url).faults, read_failures(store)) == ([], {})
    store.replace("failures/notes.txt", b"not ours")
    assert read_failures(store) == {}


def test_litter_is_what_is_temporary_and_old(url: str) -> None:
    store = store_at(url)
    store.replace("values/.tmp-0123", b"left")
    store.replace("values/0", b"kept")
    assert store.list() == [("values/0", 4)]
    assert store.stale_temporaries(3600) == []
    assert store.stale_temporaries(0) == ["values/.tmp-0123"]


@pytest.mark.parametrize("size", [10, LARGE])
def test_of_many_writers_one_wins(url: str, size: int) -> None:
    store = store_at(url)
    everyone = threading.Barrier(4)

    def write(i: int) -> bool:
        with store.staged("values/0") as file:
            file.write(bytes([i]) * size)
            everyone.wait()
            return file.publish()

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert sorted(won) == [False, False, False, True]
    assert store.read("values/0") == bytes([won.index(True)]) * size
    assert store.stale_temporaries(0) == []


def test_of_many_processes_one_wins(url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        won = pool.starmap(put_mine, [(url, i) for i in range(3)])
    assert sorted(won) == [False, False, True]
    assert store_at(url).read("commit") == b"%d" % won.index(True)


def put_mine(url: str, i: int) -> bool:
    return store_at(url).put_if_absent("commit", b"%d" % i)


def test_a_store_that_overwrites_is_refused(proxy: Proxy, url: str, server: Server) -> None:
    """A server that does not know the condition: the proxy takes it out of every request."""
    deaf = Proxy(server.port)
    deaf.drop = "if-none-match"
    with pytest.MonkeyPatch.context() as monkeypatch:
        point_to(monkeypatch, deaf.port)
        with pytest.raises(StoreError, match="create only where nothing is"):
            store_at(url).put_if_absent("commit", b"1")
        store = store_at(url)
        store._client.conditions.add("create")
        with pytest.raises(StoreError, match="copy only where nothing is"):
            stage(store, "values", bytes(LARGE))
    deaf.close()
    assert store_at(url).list() == []
    assert store_at(url).stale_temporaries(0) == []


def test_a_store_without_conditional_copies_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_COPY_IF_NOT_EXISTS", "header: x-none-such: *")
    with pytest.raises(StoreError, match="copy only where nothing is"):
        stage(store_at(url), "values", bytes(LARGE))
    assert stage(store_at(url), "small", bytes(100))


# Faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_may_fail_once(proxy: Proxy, url: str, fault: str) -> None:
    proxy.fault = EachKindOnce(fault)
    times = {"stall": 0.5, "request": 1, "copy": 1} if fault == "stall" else {}
    store, data = store_at(url, replace(QUICK, **times)), noise(LARGE)
    is_new = store.put_if_absent("commit", b"done")
    assert is_new or fault in ("lost", "cut", "stall")  # a lost answer: what stands is adopted
    assert store.read("commit") == b"done"
    is_new = stage(store, "values/0", data)
    assert is_new or fault in ("lost", "cut", "stall")
    assert in_place(store, "values/0", 5 * PAGE + 7, PAGE) == data[5 * PAGE + 7 :][:PAGE]
    assert store.read("values/0") == data
    store.replace("report", b"1")
    store.move("report", "moved")
    assert store.list() == [("commit", 4), ("moved", 1), ("values/0", LARGE)]
    store.delete("moved")
    assert store.size("moved") is None
    assert proxy.fault.kinds >= {"PUT", "PUT partNumber uploadId", "POST uploadId", "GET range"}


def test_an_upload_whose_end_is_not_confirmed_is_looked_up(proxy: Proxy, url: str) -> None:
    proxy.fault = lambda request, count: (
        "lost"
        if request[0] == "POST" and re.search("/values/.tmp-.*uploadId", request[1])
        else None
    )
    store, data = (
        store_at(url, replace(QUICK, give_up=1)),
        bytes(6 * (8 << 20)),
    )
    assert stage(store, "values/0", data)
    assert store.list() == [("values/0", len(data))]
    assert store.stale_temporaries(0) == []


@pytest.mark.parametrize("fault", ["503", "stall", "close", "cut"])
def test_a_dead_store_ends_in_an_error(proxy: Proxy, url: str, fault: str) -> None:
    store_at(url).replace("x", bytes(1000))
    proxy.fault = lambda request, count: fault
    store = store_at(url, Limits(0.2, 0.2, 0.3, 0.3, give_up=0.3, backoff=0.01, max_backoff=0.1))
    acts: list[Callable[[], object]] = [
        lambda: store.read("x"),
        lambda: store.open("x"),
        lambda: store.replace("x", b"1"),
        lambda: stage(store, "values", bytes(LARGE)),
    ]
    for act in acts:
        message = r"failed after \d+ s: .*Check AWS_ENDPOINT_URL"
        with proxy.given_up(store._client.limits.give_up), pytest.raises(StoreError, match=message):
            act()


def test_no_server_no_bucket_no_permission(
    proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = store_at("s3://nosuchbucket/x")
    for act in (lambda: elsewhere.replace("x", b"1"), elsewhere.list, lambda: elsewhere.read("x")):
        with pytest.raises(StoreError, match="There is no s3://nosuchbucket"):
            act()
    proxy.fault = lambda request, count: "403"
    with pytest.raises(StoreError, match=r"403 Forbidden.*Check AWS_ACCESS_KEY_ID"):
        store_at(url).read("x")
    assert max(proxy.seen.values()) == 1  # asked once: that does not pass
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP=true"):
        store_at(url).read("x")


def test_an_answer_without_end_is_read_again(proxy: Proxy, url: str) -> None:
    store, data = store_at(url), noise(3 * PAGE)
    store.replace("values", data)
    proxy.fault = lambda request, count: "cut" if request[2] and count < 3 else None
    assert in_place(store, "values", 0, 3 * PAGE) == data
    proxy.fault = lambda request, count: "cut" if request[0] == "GET" and count < 3 else None
    assert store.read("values") == data


def test_fewer_bytes_than_were_asked_for_are_no_answer(proxy: Proxy, url: str) -> None:
    store, data = store_at(url), noise(PAGE)
    store.replace("values", data)
    proxy.fault = lambda request, count: "short" if request[2] and count < 3 else None
    assert in_place(store, "values", 0, PAGE) == data
    assert proxy.gets() == 3


@pytest.mark.parametrize(
    "bad", ["s3://", "s3:///x", "s3://b//x", "s3://b/x?versionId=1", "s3://b/x#y"]
)
def test_urls_are_checked(bad: str) -> None:
    with pytest.raises(StoreError, match="expected s3://<bucket>/<path>"):
        RemoteStore(bad)


def test_stores_open_by_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url + "/")
    assert isinstance(store, RemoteStore)
    assert store.url == url
    with pytest.raises(NotAColumn, match="nothing is above it"):
        _ = open_store(f"s3://{BUCKET}").parent
    with pytest.raises(NotAColumn, match="column.json: no such file"):
        store.unseal("column.json", "x", 1)
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "much")
    store.replace("x", b"1")
    with pytest.raises(StoreError, match="LATENTBANK_CACHE_GB: found 'much'"):
        in_place(store, "x", 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "path"),
    [("file:///data/run#1", "/data/run#1"), ("file:///data/a?b", "/data/a?b"),
     ("file://localhost/data/a%20b", "/data/a b"), ("file:///%FF", os.fsdecode(b"/\xff")),
     ("/data/column/moments/..", "/data/column/moments/..")],
)  # fmt: skip
def test_folders_open_by_path_or_url(named: str, path: str) -> None:
    store = open_store(named)
    assert store.url == path
    assert store.parent.url == ("/" if path.count("/") == 1 else "/data")


@pytest.mark.parametrize("bad", ["file://host/x", "file://data", "file://", "ftp://host/x"])
def test_urls_of_no_folder(bad: str) -> None:
    with pytest.raises(NotAColumn, match="found the (host|scheme) .*, expected"):
        open_store(bad)


# Reading in place ---------------------------------------------------------------------------------


def test_reads_fill_buffers_as_preadv_does(url: str, tmp_path: Path) -> None:
    store, data = store_at(url), noise(5 * PAGE + 100)
    store.replace("values", data)
    (tmp_path / "values").write_bytes(data)
    handle, file = store.open("values"), os.open(tmp_path / "values", os.O_RDONLY)
    assert store.length(handle, "values") == len(data)
    rng = np.random.default_rng(1)
    for _ in range(50):
        sizes = rng.integers(0, 2 * PAGE, 3)
        offset = int(rng.integers(0, len(data) + 10))
        actual, expected = ([bytearray(int(n)) for n in sizes] for _ in range(2))
        count = store.preadv(handle, [memoryview(b) for b in actual], offset)
        assert count == os.preadv(file, expected, offset)
        assert actual == expected
    os.close(file)
    store.close(handle)


def test_a_page_is_fetched_once(proxy: Proxy, url: str) -> None:
    store, data = store_at(url), noise(8 * PAGE)
    store.replace("values", data)
    handle = store.open("values")
    store.willneed(handle, 10, 6 * PAGE)  # seven pages, all on their way when the read comes
    assert in_place(store, "values", 0, 8 * PAGE) == data
    assert proxy.gets() == 8
    assert {n for (_, _, part), n in proxy.seen.items() if part} == {1}
    store.willneed(handle, 0, 8 * PAGE)
    assert in_place(store_at(url), "values", 3, 8 * PAGE) == data[3:]
    assert proxy.gets() == 8


def test_readers_of_a_page_share_one_request(proxy: Proxy, url: str) -> None:
    store, data = store_at(url), noise(PAGE)
    store.replace("values", data)
    proxy.fault = lambda request, count: "slow" if request[2] else None
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: in_place(store, "values", i, 100), range(4)))
    assert read == [data[i : i + 100] for i in range(4)]
    assert proxy.gets() == 1


def test_a_damaged_page_is_fetched_again(proxy: Proxy, url: str, tmp_path: Path) -> None:
    store, data = store_at(url), noise(PAGE)
    store.replace("values", data)
    assert in_place(store, "values", 0, PAGE) == data
    (page,) = (tmp_path / "cache").glob("*/0")
    page.write_bytes(data[:-1])  # the wrong size is seen at once
    assert in_place(store, "values", 0, PAGE) == data
    page.write_bytes(bytes(PAGE))  # wrong bytes are not, but the reader's checksum sees them
    assert in_place(store, "values", 0, PAGE) == bytes(PAGE)
    handle = store.open("values")
    assert store.forget(handle, 5, 1)
    assert in_place(store, "values", 0, PAGE) == data
    assert proxy.gets() == 3


def test_an_object_that_was_replaced_is_another(url: str) -> None:
    store = store_at(url)
    store.replace("values", bytes(PAGE) + b"old")
    handle = store.open("values")
    assert in_place(store, "values", 0, 4) == bytes(4)
    store.replace("values", bytes(PAGE) + b"new")
    assert in_place(store, "values", PAGE, 3) == b"new"
    with pytest.raises(StoreError, match="replaced while it was open"):
        store.preadv(handle, [memoryview(bytearray(3))], PAGE)


def test_without_a_cache_bytes_come_straight(proxy: Proxy, url: str, tmp_path: Path) -> None:
    store, data = store_at(url, cache_bytes=0), noise(4 * PAGE)
    store.replace("values", data)
    handle = store.open("values")
    store.willneed(handle, 0, 4 * PAGE)
    buffer = bytearray(2 * PAGE)
    for start in (100, 0):
        assert store.preadv(handle, [memoryview(buffer)], start) == 2 * PAGE
        assert buffer == data[start:][: 2 * PAGE]
    assert proxy.gets() == 1  # for all that was said to be needed
    assert in_place(store, "values", 100, PAGE) == data[100:][:PAGE]
    assert proxy.gets() == 2
    assert not (tmp_path / "cache").exists()


# Processes ----------------------------------------------------------------------------------------


def read_all(store: RemoteStore, sizes: list[int]) -> list[str]:
    return [
        hashlib.sha256(in_place(store, f"values/{i}", 0, size)).hexdigest()
        for i, size in enumerate(sizes)
    ]


def read_and_exit(store: RemoteStore, sizes: list[int], digests: list[str]) -> None:
    assert read_all(store, sizes) == digests


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_cache(proxy: Proxy, url: str, method: str) -> None:
    """The parent has used the store, so its threads run; children read, parent reads, all end."""
    store, sizes = store_at(url), [3 * PAGE + 1, 10]
    digests = []
    for i, size in enumerate(sizes):
        store.replace(f"values/{i}", noise(size, i))
        digests.append(hashlib.sha256(noise(size, i)).hexdigest())
    context = multiprocessing.get_context(method)
    children = [
        context.Process(target=read_and_exit, args=(store, sizes, digests)) for _ in range(2)
    ]
    for child in children:
        child.start()
    read_and_exit(store, sizes, digests)
    for child in children:
        child.join(240)
        assert child.exitcode == 0
    assert proxy.gets() <= 5 * 3  # the same page may be brought by each of them, but not twice
    before = proxy.gets()
    assert read_all(pickle.loads(pickle.dumps(store)), sizes) == digests
    assert proxy.gets() == before


def test_a_fork_of_a_fork(url: str) -> None:
    store = store_at(url)
    store.replace("x", b"1")
    child = os.fork()
    if not child:
        code = 1
        try:
            store.replace("y", store.read("x") + b"2")
            grandchild = os.fork()
            if not grandchild:
                store.replace("z", store.read("y") + b"3")
                os._exit(0)
            code = os.waitpid(grandchild, 0)[1] or store.read("z") != b"123"
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("z") == b"123"


UPLOAD = r"""
import re, sys, hashlib, numpy as np
from shards.store.object_store import RemoteStore
store, total, piece = RemoteStore(sys.argv[1]), int(sys.argv[2]), 16 << 20
store.replace("small", b"1")  # the library is loaded
rows = np.zeros(piece, np.uint8)
def status(field):  # of this process; getrusage would tell of its parent's peak
    return int(re.search(field + r":\s+(\d+)", open("/proc/self/status").read())[1]) << 10
before = status("VmRSS")
with store.staged("values/0") as file:
    for i in range(total // piece):
        rows[::512] = i % 251
        file.write(rows)
    assert file.publish()
    print(file.sha256)
print(status("VmHWM") - before, status("VmHWM"))
"""


def memory(url: str, total: int) -> tuple[int, int]:
    """Bytes by which a process grows while it creates an object, and those it has at its peak."""
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, url, str(total)], capture_output=True, text=True, check=True
    )
    digest, grown, peak = done.stdout.split()
    rows, expected = np.zeros(16 << 20, np.uint8), hashlib.sha256()
    for i in range(total // len(rows)):
        rows[::512] = i % 251
        expected.update(rows)
    assert digest == expected.hexdigest()
    assert RemoteStore(url).list() == [("small", 1), ("values/0", total)]
    return int(grown), int(peak)


def test_uploads_take_little_memory(url: str) -> None:
    assert memory(url, 96 << 20)[0] < 80 << 20


@pytest.mark.slow
def test_a_gigabyte_takes_little_memory(url: str) -> None:
    start = time.monotonic()
    grown, peak = memory(url, 1 << 30)
    print(
        f"1 GiB in {time.monotonic() - start:.0f} s, {peak >> 20} MiB, {grown >> 20} of them for it"
    )
    assert peak < 200 << 20


def test_a_killed_upload_leaves_nothing_to_see(proxy: Proxy, url: str) -> None:
    proxy.fault = lambda request, count: "stall" if "uploadId" in request[1] else None
    with subprocess.Popen([sys.executable, "-c", UPLOAD, url, str(64 << 20)]) as writer:
        until(lambda: any("uploadId" in path for _, path, _ in proxy.seen))
        writer.kill()
    proxy.fault = lambda request, count: None
    store = store_at(url)
    assert store.list() == [("small", 1)]
    assert stage(store, "values/0", noise(LARGE))


def written(cache: Path) -> list[Path]:
    """The files of pages, once there is one: a page is handed to its reader before it is written."""
    until(lambda: any(cache.glob("*/[0-9]*")))
    return list(cache.glob("*/[0-9]*"))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# Columns ------------------------------------------------------------------------------------------

SPECS = {
    "moments": moments_spec(2),
    "tokens": tokens_spec(2),
    "moments-blosc": moments_spec(2, codec="blosc"),
    "tokens-webdataset": tokens_spec(2, backend="webdataset"),
}


@pytest.mark.parametrize("way", SPECS)
def test_a_column_is_written_and_read_as_in_a_folder(url: str, tmp_path: Path, way: str) -> None:
    spec, rows = SPECS[way], (1100, 40)
    write_column(url, spec, rows)
    write_column(tmp_path / "local", spec, rows)
    store = open_store(url)
    local = files_of(tmp_path / "local")
    assert {name for name, _ in store.list()} == set(local)
    for name, data in local.items():
        if not name.startswith("commits/"):  # which tell of the time
            assert store.read(name) == data
    ids = np.random.default_rng(0).permutation(np.concatenate([row_ids(0, rows), row_ids(1, rows)]))
    far, near = Column.open(url), Column.open(tmp_path / "local")
    assert far.snapshot.digest == near.snapshot.digest
    far.hint(ids)
    np.testing.assert_array_equal(far.read(ids), near.read(ids))
    np.testing.assert_array_equal(far.status(ids), near.status(ids))
    again = pickle.loads(pickle.dumps(far))
    np.testing.assert_array_equal(again.read(ids[:10]), near.read(ids[:10]))
    for column in (far, near, again):
        column.close()


def test_bytes_that_rot_in_the_cache_are_fetched_again(
    proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.page_cache.TOUCH", 0)  # what is deleted is missed at once
    write_column(url, moments_spec(1), (1024,))
    column, ids = Column.open(url), row_ids(0, (1024,))
    whole = column.read(ids)
    (page,) = written(tmp_path / "cache")
    rotten = bytearray(page.read_bytes())
    rotten[100] ^= 1
    page.write_bytes(rotten)
    before = proxy.gets()
    again = Column.open(url)  # which has compared no row yet, as another process
    np.testing.assert_array_equal(again.read(ids), whole)
    assert proxy.gets() > before
    again.close()
    written(tmp_path / "cache")
    # and what has rotted in the store itself is an error that names the row
    name = next(name for name, _ in column.store.list("moments") if name.endswith("0"))
    rotten = bytearray(column.store.read(name))
    rotten[100] ^= 1
    column.store.replace(name, bytes(rotten))
    column.close()
    np.testing.assert_array_equal(Column.open(url).read(ids), whole)  # what is kept is still right
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CorruptColumn, match=re.escape(f"{url}: row 3 of shard 0 (row id 3)")):
        Column.open(url).read(ids)


def test_a_column_stands_a_store_that_fails(proxy: Proxy, url: str, tmp_path: Path) -> None:
    failed: set[tuple[str, str, str]] = set()

    def fault(request: tuple[str, str, str], count: int) -> str | None:
        """One request of three fails once, each in another way."""
        draw = int(hashlib.sha256(repr(request[1:]).encode()).hexdigest(), 16) % 9
        if draw > 3 or request in failed or "list-type" in request[1]:
            return None
        failed.add(request)
        return ("503", "cut", "close", "lost")[draw]

    proxy.fault = fault
    limits = Limits(backoff=0.01, max_backoff=0.1)
    store = RemoteStore(url, limits)
    write_column(store, tokens_spec(1), (1100,))
    proxy.fault = lambda request, count: None
    write_column(tmp_path / "local", tokens_spec(1), (1100,))
    ids = row_ids(0, (1100,))
    assert len(failed) > 3
    far = Column.open(url)
    np.testing.assert_array_equal(far.read(ids), Column.open(tmp_path / "local").read(ids))
    far.close()


WRITER = """
import sys
from tests.shards.toy import moments_spec, write_column
write_column(sys.argv[1], moments_spec(1), (1100,))
"""


@pytest.mark.parametrize("at", ["/moments/", "/commits/", "/complete/"])
def test_a_writer_that_is_killed_leaves_no_column_and_can_be_run_again(
    proxy: Proxy, url: str, tmp_path: Path, at: str
) -> None:
    proxy.fault = lambda request, count: (
        "stall" if request[0] == "PUT" and at in request[1] and ".tmp-" not in request[1] else None
    )
    with subprocess.Popen([sys.executable, "-c", WRITER, url]) as writer:
        until(lambda: any(m == "PUT" and at in path for m, path, _ in proxy.seen))
        writer.kill()
    proxy.fault = lambda request, count: None
    with pytest.raises(IncompleteColumn):
        Column.open(url)
    assert committed(open_store(url), 1) == ([0] if at == "/complete/" else [])
    write_column(url, moments_spec(1), (1100,))
    write_column(tmp_path / "local", moments_spec(1), (1100,))
    ids = row_ids(0, (1100,))
    far, near = Column.open(url), Column.open(tmp_path / "local")
    assert far.snapshot.digest == near.snapshot.digest
    np.testing.assert_array_equal(far.read(ids), near.read(ids))
    far.close()


def test_a_column_is_copied_there_and_back(url: str, tmp_path: Path) -> None:
    write_column(tmp_path / "local", tokens_spec(1), (70,))
    transfer.copy(tmp_path / "local", url)
    transfer.copy(url, tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "local")
