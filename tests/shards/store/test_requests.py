"""How many requests reading a column takes, counted by a proxy before a real S3 protocol server."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shards.read.objects
from shards import Column, ColumnSpec
from shards.errors import CorruptColumn, StoreError
from shards.read.batch_layout import Planner
from shards.read.opening import open_join
from shards.read.stream import Stream
from shards.store.pages import Coming
from tests.proxy.server import Gate, Proxy, Request
from tests.shards.objects import Server
from tests.shards.toy import SHARD_ROWS, moments_spec, tokens_spec, write_column


def count(proxy: Proxy, method: str, word: str = "") -> int:
    """Returns how many requests of a method came whose path has a word."""
    return sum(n for (name, path, _), n in proxy.seen.items() if name == method and word in path)


FEW_FILES = """
import resource, sys
import numpy as np
import numpy.random
from shards import Column
resource.setrlimit(resource.RLIMIT_NOFILE, (72, 72))
column = Column.open(sys.argv[1])
ids = 2048 * np.arange(len(column.snapshot.rows))
first = column.read(ids)
print("read", flush=True)
sys.stdin.readline()
for _ in range(3):
    rows = np.random.default_rng(0).permutation(ids)
    again = column.read(rows)
    assert again[np.argsort(rows)].tobytes() == first.tobytes()
    column.hint(rows)
print("read", flush=True)
"""


def test_objects_that_were_read_are_open_whatever_the_limit_of_files(
    server: Server, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    """48 objects, where half of 72 files are a column's share; connections take up to 32."""
    server.take(write_column(tmp_path / "local", moments_spec(48), (1,) * 48), url)
    with subprocess.Popen(
        [sys.executable, "-c", FEW_FILES, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as reader:  # fmt: skip
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "read\n"
        before = dict(proxy.seen)
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "read\n"
        assert proxy.seen == before
    assert reader.returncode == 0


OPENING = 4  # column.json, the list of COMPLETE records, the newest of them and its valid rows
KINDS: dict[str, tuple[ColumnSpec, int, int]] = {  # small objects a shard, and indexes
    "moments": (moments_spec(20), 2, 0),  # its commit and checksums
    "tokens": (tokens_spec(20), 3, 0),  # lengths too
    "moments-blosc": (moments_spec(20, codec="blosc"), 2, 1),
    "tokens-webdataset": (tokens_spec(20, backend="webdataset"), 4, 0),  # and statuses
}


@pytest.fixture
def column_at(server: Server, proxy: Proxy, url: str, tmp_path: Path) -> Any:
    """Puts a column of so many rows a shard into the store, and returns the one in a folder."""

    def put(spec: ColumnSpec, rows: tuple[int, ...]) -> Path:
        path = write_column(tmp_path / f"{spec.layout.kind}", spec, rows)
        server.take(path, f"{url}/{spec.layout.kind}")
        return path

    return put


@pytest.mark.parametrize("kind", KINDS)
def test_opening_asks_for_nothing_that_the_commits_say(
    proxy: Proxy, url: str, column_at: Any, kind: str
) -> None:
    spec, small, indexes = KINDS[kind]
    rows = (3,) * 20
    near = Column.open(column_at(spec, rows))
    ids = np.random.default_rng(0).permutation(
        np.concatenate([s * SHARD_ROWS + np.arange(3) for s in range(20)])
    )
    ids = ids[near.lengths(ids) > 0] if spec.layout.ragged else ids
    gate = Gate(proxy, 16)  # commits are asked for side by side; then tables, then indexes
    proxy.fault = lambda request, count: gate.wait() if "/commits/" in request[1] else None
    far = Column.open(f"{url}/{spec.layout.kind}")
    assert far.read(ids).tobytes() == near.read(ids).tobytes()
    assert count(proxy, "HEAD") == 0
    assert count(proxy, "GET") == OPENING + 20 * (small + indexes + 1)
    assert set(proxy.seen.values()) == {1}
    assert gate.passed.is_set()
    if indexes:
        size = 16 * spec.arrays()["moments"].chunks + 4
        parts = [part for _, _, part in proxy.seen if re.fullmatch(r"bytes=\d+-\d+", part)]
        spans = [int(end) - int(start) + 1 for start, end in (p[6:].split("-") for p in parts)]
        assert spans.count(size) == 20
    # all of a second process is kept but for what is small
    proxy.fault = lambda request, count: None
    again = Column.open(f"{url}/{spec.layout.kind}")
    before = proxy.gets()
    assert again.read(ids).tobytes() == near.read(ids).tobytes()
    assert proxy.gets() == before
    for column in (near, far, again):
        column.close()


def test_a_batch_does_not_wait_for_the_shards_of_others(
    proxy: Proxy, url: str, column_at: Any
) -> None:
    """No answer comes about shards that the first batch has no row of, until it is here."""
    near = open_join(*(column_at(spec, (8,) * 40) for spec in (moments_spec(40), tokens_spec(40))))
    order = near.order(lanes=1)
    shards = next(Planner(near, order, 8).plans(0, 8)).header[1] // SHARD_ROWS
    go = threading.Event()

    def fault(request: Request, count: int) -> None:
        if (commit := re.search(r"/commits/(\d+)", request[1])) and int(commit[1]) not in shards:
            assert go.wait(60)

    far = open_join(f"{url}/moments", f"{url}/tokens")
    proxy.fault = fault
    with Stream(far, order, position=0, global_batch=8) as stream:
        batch = next(stream)
        until(lambda: count(proxy, "GET", "/commits/") > 2 * len(set(shards.tolist())))
        go.set()
        batches = [batch, *(next(stream) for _ in range(20))]
    with Stream(near, order, position=0, global_batch=8) as stream:
        for batch in batches:
            expected = next(stream)
            assert batch.moments.equal(expected.moments)
            assert batch.tokens.equal(expected.tokens)
    far.close()
    near.close()


def test_what_precedes_the_first_row_is_asked_for_at_once(
    proxy: Proxy, url: str, column_at: Any
) -> None:
    """Of both columns of a shard: commits, checksums, and lengths; none is answered before all came."""
    near = open_join(*(column_at(spec, (8,)) for spec in (moments_spec(1), tokens_spec(1))))
    far, order, gate = (
        open_join(f"{url}/moments", f"{url}/tokens"),
        near.order(lanes=1),
        Gate(proxy, 5),
    )
    known = re.compile(r"/(commits|crc|lengths)/")
    proxy.fault = lambda request, count: gate.wait() if known.search(request[1]) else None
    with (
        Stream(far, order, position=0, global_batch=8) as stream,
        Stream(near, order, position=0, global_batch=8) as expected,
    ):
        assert next(stream).moments.equal(next(expected).moments)
    assert gate.passed.is_set()
    assert sum(n for (_, path, _), n in proxy.seen.items() if known.search(path)) == 5
    far.close()
    near.close()


def test_batches_are_fetched_while_another_waits(proxy: Proxy, url: str, column_at: Any) -> None:
    """The first row does not come until the objects of many later batches were asked for."""
    near = open_join(*(column_at(spec, (8,) * 40) for spec in (moments_spec(40), tokens_spec(40))))
    order = near.order(lanes=1)
    row = int(order.at(np.zeros(1, np.int64))[1][0])
    far, go = open_join(f"{url}/moments", f"{url}/tokens"), threading.Event()
    first = far.latents._objects.path(int(far.latents.places(np.array([row])).object[0]))

    def fault(request: Request, count: int) -> None:
        if request[1].endswith(f"moments/{first}"):
            assert go.wait(60)

    def objects() -> int:
        return len({path for method, path, _ in proxy.seen if method == "GET" and "/c/" in path})

    proxy.fault = fault
    with (
        Stream(far, order, position=0, global_batch=8) as stream,
        Stream(near, order, position=0, global_batch=8) as expected,
    ):
        until(lambda: objects() > 60)  # two batches have 32 at most
        go.set()
        assert next(stream).moments.equal(next(expected).moments)
    far.close()
    near.close()


def object_of(column: Column) -> str:
    """Returns the name of the one object that holds values."""
    (name,) = [name for name, _ in column.store.list(column.layout.kind) if "/c/" in name]
    return name


def test_an_object_that_changes_once_it_was_read_is_an_error(
    url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    column_at(moments_spec(1), (40,))
    column = Column.open(f"{url}/moments")
    column.read(np.arange(4))
    name = object_of(column)
    data = column.store.read(name)
    column.store.replace(name, data[:-1] + b"?")
    with pytest.raises(StoreError, match=r"moments/c/0.*replaced while it was open"):
        column.read(np.arange(4, 8))
    column.close()


@pytest.mark.parametrize(
    ("size", "message"),
    [(None, "is missing though its shard is committed"), (40, "found 40 bytes, .* are committed"),
     (99_999, "found 99999 bytes, .* are committed")],
)  # fmt: skip
def test_an_object_that_is_not_what_was_committed_is_an_error(
    url: str, column_at: Any, size: int | None, message: str
) -> None:
    for spec in (moments_spec(1), tokens_spec(1)):
        column_at(spec, (40,))
        column = Column.open(f"{url}/{spec.layout.kind}")
        name = object_of(column)
        column.store.delete(name)
        if size is not None:
            column.store.replace(name, bytes(size))
        with pytest.raises(CorruptColumn, match=rf"{name}.*{message}"):
            column.read(np.arange(20, 30))
        column.close()


class Calls:
    """A function that counts how often it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.count, self.function = 0, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any, **how: Any) -> Any:
        self.count += 1
        return self.function(*args, **how)


@pytest.mark.parametrize("kind", ["moments", "tokens"])
def test_what_is_kept_is_read_as_a_local_file_is(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Once each page was opened and each row compared: nothing is opened, looked up or compared."""
    near = Column.open(column_at(KINDS[kind][0], (3,) * 20))
    far = Column.open(f"{url}/{kind}")
    ids = np.concatenate([s * SHARD_ROWS + np.arange(3) for s in range(20)])
    expected = near.read(ids[::-1])
    calls = [Calls(monkeypatch, os, name) for name in ("open", "fstat", "close", "stat")]
    calls.append(Calls(monkeypatch, shards.read.objects, "crc32c"))
    requests, before = -1, [-1]

    def kept() -> bool:  # once the threads that fetch have written what they handed on
        nonlocal requests, before
        requests, before = proxy.requests(), [call.count for call in calls]
        assert far.read(ids[::-1]).tobytes() == expected.tobytes()
        return [call.count for call in calls] == before

    until(kept)
    assert proxy.requests() == requests
    for column in (near, far):
        column.close()


def kept_page() -> Path:
    """Returns the file of the one page that is kept, once the thread that fetched it has written it."""
    cache = Path(os.environ["LATENTBANK_CACHE"])
    until(lambda: any(cache.glob("*/0")))
    return next(cache.glob("*/0"))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def read_once_more(column: Column, ids: NDArray[np.int64]) -> None:
    """Reads rows whose page was deleted; a thread may have written it once more, or still have it, so
    until it is an error.
    """
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for page in Path(os.environ["LATENTBANK_CACHE"]).glob("*/0"):
            page.unlink(missing_ok=True)
        column.read(ids)


def test_what_comes_once_more_is_compared_once_more(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.page_cache.TOUCH", 0)  # an evicted page is missed at once
    near = Column.open(column_at(moments_spec(1), (40,)))
    far = Column.open(f"{url}/moments")
    ids = np.arange(40)
    compared = Calls(monkeypatch, shards.read.objects, "crc32c")
    for _ in range(3):
        assert far.read(ids).tobytes() == near.read(ids).tobytes()
        assert compared.count >= 40
        proxy.fault = lambda request, count: "flip" if request[2] else None
        with pytest.raises(CorruptColumn, match="row 0 of shard 0"):
            read_once_more(far, ids)
        proxy.fault = lambda request, count: None
        compared.count = 0
    for column in (near, far):
        column.close()


def test_a_page_that_another_process_fetched_is_compared(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.page_cache.TOUCH", 0)
    column_at(moments_spec(1), (40,))
    far = Column.open(f"{url}/moments")
    whole = far.read(np.arange(40))
    page = kept_page()
    rotten = bytearray(page.read_bytes())
    rotten[0] ^= 1
    page.with_name("other").write_bytes(rotten)
    page.with_name("other").rename(page)
    assert far.read(np.arange(40)).tobytes() == whole.tobytes()
    far.close()


def test_a_page_that_another_reader_fetched_anew_is_compared(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two columns of one url: one waits for the page that the other fetches once more, damaged."""
    monkeypatch.setattr("shards.store.page_cache.TOUCH", 0)
    near, ids = Column.open(column_at(moments_spec(1), (40,))), np.arange(40)
    columns = [Column.open(f"{url}/moments") for _ in range(2)]
    whole = near.read(ids).tobytes()
    for _ in range(2):  # of what the first has fetched, too, the other reads the file
        for column in columns:
            assert column.read(ids).tobytes() == whole
    until(lambda: not columns[0].store._pages._coming)
    kept_page().unlink()
    asked, waited, go = (threading.Event() for _ in range(3))

    def fault(request: Request, count: int) -> str | None:
        if not request[2] or asked.is_set():
            return None
        asked.set()
        assert go.wait(60)
        return "flip"

    def result(coming: Coming) -> Any:  # of a page that another thread fetches
        waited.set()
        return Future.result(coming)

    proxy.fault = fault
    monkeypatch.setattr(Coming, "result", result)
    columns[0].hint(ids)
    assert asked.wait(60)
    with ThreadPoolExecutor(1) as pool:
        row = pool.submit(columns[1].read, ids[:1])
        assert waited.wait(60)
        go.set()
        assert row.result().tobytes() == near.read(ids[:1]).tobytes()
    for column in (near, *columns):
        column.close()


@pytest.mark.parametrize("closed", [True, False])
def test_what_is_read_in_another_way_is_compared_once_more(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    """Once another column is closed, or nobody has it any more, its rows are read in pages, for which
    there was no room.
    """
    near = Column.open(column_at(moments_spec(1), (40,)))
    monkeypatch.setenv("LATENTBANK_CACHE_GB", f"{1.5 * near.value_bytes / 1e9:.9f}")
    far, other = (Column.open(f"{url}/moments") for _ in range(2))
    notes, ids = [column.storage_note for column in (far, other)], np.arange(40)
    assert "row by row" in notes[1]
    assert far.read(ids).tobytes() == near.read(ids).tobytes()
    if closed:
        other.close()
    del other
    gc.collect()
    assert far.store.keeps
    assert "in pages" in far.storage_note
    proxy.fault = lambda request, count: "flip" if request[2] else None
    with pytest.raises(CorruptColumn, match="row 0 of shard 0"):
        far.read(ids)
    proxy.fault = lambda request, count: None
    assert far.read(ids).tobytes() == near.read(ids).tobytes()
    for column in (near, far):
        column.close()


def test_rows_beside_one_without_a_member_are_asked_for_at_once(
    proxy: Proxy, url: str, column_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    near = Column.open(column_at(moments_spec(1, backend="webdataset"), (40,)))
    far, ids = Column.open(f"{url}/moments"), np.arange(40)
    assert (near.places(ids).start < 0).any()
    assert far.read(ids).tobytes() == near.read(ids).tobytes()
    assert proxy.gets() == 1
    for column in (near, far):
        column.close()
