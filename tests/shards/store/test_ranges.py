"""Reading where nothing is kept: without a cache, or with one that is smaller than the columns."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import Column
from shards.errors import CorruptColumn, StoreError
from shards.format.norm import Norm
from shards.read.batch_layout import Planner, Reader
from shards.read.opening import open_join
from shards.read.stream import Stream
from shards.store import object_store, ranges
from shards.store.page_cache import File
from shards.store.pages import PAGE
from shards.store.ranges import Ranges
from shards.tools.convert import convert
from tests.proxy.server import Gate, Proxy
from tests.shards.objects import Server
from tests.shards.toy import SHARD_ROWS, moments_spec, tokens_spec, write_column


class Numbered:
    """An object of numbered bytes that says which ranges were fetched."""

    def __init__(self, size: int, key: str = "k") -> None:
        self.key, self.size = key, size
        self.pages: dict[int, File | None] = {}
        self.anew, self.beside = False, 0
        self.data = np.random.default_rng(size).bytes(size)
        self.fetched: list[tuple[int, int]] = []
        self.go = threading.Event()
        self.go.set()
        self.enough = 0  # requests at once, with which they go on
        self.most = self.now = 0
        self.lock = threading.Lock()

    def fetch(self, start: int, length: int) -> bytes:
        with self.lock:
            self.fetched.append((start, length))
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == self.enough:
                self.go.set()
        assert self.go.wait(60)
        with self.lock:
            self.now -= 1
        return self.data[start : start + length]


def read(reader: Ranges, source: Numbered, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    count = reader.preadv(source, [memoryview(buffer)], start)
    return bytes(buffer[:count])


def until(true: Any) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_byte_is_fetched_once_and_let_go_when_it_was_read() -> None:
    reader, source = Ranges(), Numbered(3 * PAGE)
    for start in (0, 100, PAGE - 50, 2 * PAGE):
        reader.willneed(source, start, 80, 80)
    reader.willneed(source, PAGE + 100, PAGE + 500, 600)  # two requests, of which some is wanted
    for start in (2 * PAGE, 0, PAGE - 50, 100):
        assert read(reader, source, start, 80) == source.data[start : start + 80]
    assert read(reader, source, PAGE + 100, 300) == source.data[PAGE + 100 :][:300]
    assert reader._held == PAGE + 500
    assert read(reader, source, 2 * PAGE + 300, 300) == source.data[2 * PAGE + 300 :][:300]
    assert reader._held == 0
    assert sorted(source.fetched) == [
        (0, 80), (100, 80), (PAGE - 50, 80), (PAGE + 100, PAGE), (2 * PAGE, 80), (2 * PAGE + 100, 500),
    ]  # fmt: skip
    assert read(reader, source, 3 * PAGE - 10, 50) == source.data[-10:]  # nobody said so before
    assert read(reader, source, 3 * PAGE, 50) == b""


def test_many_are_fetched_at_once_and_what_has_no_turn_yet_by_its_reader() -> None:
    reader, source = Ranges(threads=4), Numbered(1000)
    source.go.clear()
    for start in range(0, 1000, 100):
        reader.willneed(source, start, 100, 100)
    until(lambda: source.now == 4)
    source.enough = 5
    assert read(reader, source, 900, 100) == source.data[900:]
    assert source.most == 5
    assert b"".join(read(reader, source, i, 100) for i in range(0, 900, 100)) == source.data[:900]
    assert len(source.fetched) == 10


def test_what_nobody_reads_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its reader has come to what was asked for long after it."""
    monkeypatch.setattr(ranges, "LONG", 0)
    reader, source = Ranges(held=250), Numbered(1000)
    for start in (0, 100, 200, 300):
        time.sleep(0.001)
        reader.willneed(source, start, 50 if start == 200 else 100, 50)
    until(lambda: len(source.fetched) == 3)  # for the fourth there is no room
    assert read(reader, source, 200, 50) == source.data[200:250]
    reader.willneed(source, 400, 100, 100)
    assert reader._held == 200  # the fourth and this one
    for start in (0, 100, 300, 400):
        assert read(reader, source, start, 100) == source.data[start : start + 100]
    assert reader._held == 0


def test_what_finds_no_room_waits_for_it() -> None:
    reader, source = Ranges(held=250), Numbered(1000)
    for start in range(0, 600, 100):
        reader.willneed(source, start, 100, 100)
    for start in range(0, 600, 100):
        until(lambda count=start // 100 + 2: len(source.fetched) >= min(count, 6))
        assert reader._held <= 250
        assert read(reader, source, start, 100) == source.data[start : start + 100]
    assert sorted(source.fetched) == [(start, 100) for start in range(0, 600, 100)]
    assert reader._held == 0


def test_a_reader_that_ended_leaves_room_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it asked for takes all room, and is never read."""
    monkeypatch.setattr(ranges, "LONG", 0)
    reader, source = Ranges(held=200), Numbered(1000)
    for start in (0, 100):
        reader.willneed(source, start, 100, 100)
    time.sleep(0.001)
    reader.willneed(source, 200, 100, 60)
    assert read(reader, source, 230, 40) == source.data[230:270]
    time.sleep(0.001)
    reader.willneed(source, 300, 100, 100)
    until(lambda: (300, 100) in source.fetched)
    assert read(reader, source, 200, 20) == source.data[200:220]
    assert read(reader, source, 300, 100) == source.data[300:400]
    assert sorted(source.fetched) == [(start, 100) for start in range(0, 400, 100)]
    assert reader._held == 0


def test_what_is_closed_leaves_room_to_what_waits() -> None:
    reader, source, other = Ranges(held=200), Numbered(1000), Numbered(500)
    for start in (0, 100, 200):
        reader.willneed(source, start, 100, 100)
    reader.willneed(other, 0, 100, 100)
    assert other.fetched == []
    reader.forget(source)
    until(lambda: other.fetched == [(0, 100)])
    assert read(reader, other, 0, 100) == other.data[:100]
    assert (reader._held, len(reader._waiting)) == (0, 0)


def test_what_is_due_stays_over_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it was, and though others were read meanwhile that are not of the stream."""
    monkeypatch.setattr(ranges, "LONG", 0)
    reader, source, other = Ranges(held=250), Numbered(1000), Numbered(60, "held-out")
    other.beside = 1000
    for start in (0, 100):
        reader.willneed(source, start, 100, 100)
    time.sleep(0.01)  # a pause, by LONG
    reader.willneed(other, 0, 50, 50)
    assert read(reader, other, 0, 50) == other.data[:50]
    for start in range(200, 600, 100):
        reader.willneed(source, start, 100, 100)
    data = b"".join(read(reader, source, start, 100) for start in range(0, 600, 100))
    assert data == source.data[:600]
    assert sorted(source.fetched) == [(start, 100) for start in range(0, 600, 100)]
    assert other.fetched == [(0, 50)]


def test_an_error_is_met_by_the_reader() -> None:
    class Broken(Numbered):
        def fetch(self, start: int, length: int) -> bytes:
            if start == 100:
                raise StoreError("no answer")
            return super().fetch(start, length)

    reader, source = Ranges(threads=1), Broken(1000)
    for start in range(0, 500, 100):
        reader.willneed(source, start, 100, 100)
    with pytest.raises(StoreError, match="no answer"):
        read(reader, source, 100, 100)
    assert read(reader, source, 300, 100) == source.data[300:400]


def test_an_error_of_another_request_is_not_for_ever() -> None:
    class Flaky(Numbered):
        def fetch(self, start: int, length: int) -> bytes:
            data = super().fetch(start, length)
            if len(self.fetched) == 1:
                raise StoreError("no answer")
            return data

    reader, source = Ranges(), Flaky(100)
    reader.willneed(source, 0, 100, 100)
    until(lambda: source.fetched and not reader._fetchers._threads)
    assert read(reader, source, 0, 40) == source.data[:40]
    assert read(reader, source, 40, 60) == source.data[40:]
    assert source.fetched == [(0, 100)] * 2


def test_a_request_that_fails_while_its_reader_waits_is_not_made_again() -> None:
    """It was repeated for as long as a request may be, so an error would come after twice that."""

    class Broken(Numbered):
        def fetch(self, start: int, length: int) -> bytes:
            super().fetch(start, length)
            raise StoreError("no answer")

    reader, source = Ranges(), Broken(100)
    source.go.clear()
    reader.willneed(source, 0, 100, 100)
    until(lambda: source.now == 1)
    threading.Timer(0.3, source.go.set).start()
    with pytest.raises(StoreError, match="no answer"):
        read(reader, source, 0, 100)
    assert source.fetched == [(0, 100)]


# Columns ------------------------------------------------------------------------------------------

SHARDS, ROWS = 4, 300
WAYS = {"no": "0", "small": "0.00001"}


@pytest.fixture
def near(server: Server, url: str, tmp_path: Path) -> Path:
    """A folder of two columns that the store has, too."""
    for spec in (moments_spec(SHARDS), tokens_spec(SHARDS)):
        name = spec.layout.kind
        server.take(write_column(tmp_path / name, spec, (ROWS,) * SHARDS), f"{url}/{name}")
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_exact_ranges_are_fetched_ahead(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Of shuffled rows: each byte once, nothing beside it, many at once."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", WAYS[way])
    monkeypatch.setattr("shards.read.objects.REMOTE_GAP", 0)
    gate = Gate(proxy, 16)
    proxy.fault = lambda request, count: gate.wait() if request[2] else None
    here = open_join(near / "moments", near / "tokens")
    far = open_join(f"{url}/moments", f"{url}/tokens")
    words = "without a cache" if way == "no" else "the cache cannot hold all columns"
    assert [words in note and "row by row" in note for note in far.storage_notes] == [True] * 2
    assert here.storage_notes == []
    order = here.order()
    streams = [Stream(join, order, position=0, global_batch=64) for join in (here, far)]
    count, used = order.epoch_samples // 64, 0
    for expected, batch in islice(zip(*streams, strict=True), count):
        assert batch.moments.equal(expected.moments)
        assert batch.tokens.equal(expected.tokens)
        used += batch.moments.nbytes + batch.tokens.nbytes
    for stream in streams:
        stream.close()
    fetched = 0
    for (method, _, part), times in proxy.seen.items():
        if method == "GET" and part:
            start, end = map(int, part[6:].split("-"))
            fetched += times * (end - start + 1)
    ahead = 8 * 64 * (32 + 24)  # batches that were not asked for any more
    assert used <= fetched <= used + ahead
    assert gate.passed.is_set()
    assert not list((near / "cache").glob("*/*"))
    for join in (here, far):
        join.close()


def test_a_stream_that_pauses_fetches_nothing_twice(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there is no more room for what it will read than for what it has asked for."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    monkeypatch.setattr("shards.read.objects.REMOTE_GAP", 0)
    monkeypatch.setattr(ranges, "LONG", 0.5)
    monkeypatch.setitem(object_store._RANGES, os.getpid(), Ranges(held=4000))  # some 70 rows
    far = open_join(f"{url}/moments", f"{url}/tokens")
    with Stream(far, far.order(), position=0, global_batch=64, prefetch=1, ahead=2) as stream:
        for step in range(6):
            next(stream)
            if step == 2:
                time.sleep(1)
    counts = [n for (method, _, part), n in proxy.seen.items() if method == "GET" and part]
    assert len(counts) > 6 * 64
    assert set(counts) == {1}
    far.close()


def test_what_is_near_is_one_request_and_what_is_not_is_none(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    monkeypatch.setattr("shards.read.objects.REMOTE_GAP", 40)  # a row has 32 bytes
    column = Column.open(f"{url}/moments")
    rows = np.array([10, 250, 11, 13, SHARD_ROWS + 5, 16])
    expected = Column.open(near / "moments").read(rows)
    assert column.read(rows).tobytes() == expected.tobytes()
    parts = sorted(
        tuple(map(int, part[6:].split("-"))) for m, _, part in proxy.seen if m == "GET" and part
    )
    assert parts == [(5 * 32, 6 * 32 - 1), (320, 14 * 32 - 1), (512, 17 * 32 - 1), (8000, 8031)]
    column.close()


def test_a_request_of_merged_rows_has_a_bound(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    monkeypatch.setattr("shards.read.objects.MOST_MERGED", 64 * 32)  # 64 rows
    column, rows = Column.open(f"{url}/moments"), np.arange(2, 202)
    assert column.read(rows).tobytes() == Column.open(near / "moments").read(rows).tobytes()
    parts = [tuple(map(int, p[6:].split("-"))) for m, _, p in proxy.seen if m == "GET" and p]
    sizes = [(start // 32, (end + 1) // 32) for start, end in sorted(parts)]
    assert sizes[-4:] == [(2, 66), (66, 130), (130, 194), (194, 202)]
    column.close()


def test_bytes_that_came_wrong_are_fetched_again(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every time that they come, for nothing is kept."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    column, rows = Column.open(f"{url}/moments"), np.arange(0, 300, 20)
    expected = Column.open(near / "moments").read(rows)
    column.read(rows)
    flipped: list[str] = []

    def fault(request: tuple[str, str, str], count: int) -> str | None:
        if not request[2] or flipped:
            return None
        flipped.append(request[2])
        return "flip"

    proxy.fault = fault
    assert column.read(rows).tobytes() == expected.tobytes()
    assert flipped
    proxy.fault = lambda request, count: "flip" if request[2] else None
    with pytest.raises(CorruptColumn, match="row 0 of shard 0"):
        column.read(rows)
    column.close()


def test_a_column_counts_for_as_long_as_it_is_read(
    url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fit into the cache one by one, and not together."""
    size = Column.open(near / "moments").value_bytes
    monkeypatch.setenv("LATENTBANK_CACHE_GB", f"{1.5 * size / 1e9:.9f}")
    first = Column.open(f"{url}/moments")
    assert "in pages, kept in" in first.storage_note
    second = Column.open(f"{url}/moments")
    assert "cannot hold all columns" in second.storage_note
    second.close()
    assert "in pages, kept in" in first.storage_note
    first.close()


@pytest.mark.parametrize("room", [1.5, 3])
def test_rows_of_a_held_out_column_do_not_change_how_others_are_read(
    proxy: Proxy, url: str, near: Path, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    """They are kept where their column fits beside those that are read as a whole."""
    size = Column.open(near / "moments").value_bytes
    monkeypatch.setenv("LATENTBANK_CACHE_GB", f"{room * size / 1e9:.9f}")
    training, held_out = (Column.open(f"{url}/moments") for _ in range(2))
    note = training.storage_note
    assert "in pages, kept in" in note
    rows = np.array([3, SHARD_ROWS + 7])
    expected = Column.open(near / "moments").read(rows)
    for _ in range(2):
        assert held_out.read(rows).tobytes() == expected.tobytes()
    assert training.storage_note == note
    parts = [part for (method, _, part), n in proxy.seen.items() if method == "GET" and part]
    assert ("bytes=96-127" in parts) == (room < 2)
    kept = (near.parent / near.name / "cache").glob
    end = time.monotonic() + 60
    while room > 2 and not any(kept("*/*")) and time.monotonic() < end:
        time.sleep(0.01)  # a page is handed to its reader before it is written
    assert any(kept("*/*")) == (room > 2)
    training.close()
    held_out.close()


def test_int8_latents_are_fetched_once_and_let_go(
    proxy: Proxy, server: Server, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    monkeypatch.setattr("shards.read.objects.REMOTE_GAP", 0)
    spec = moments_spec(SHARDS)
    layout = replace(spec.layout, kind="latents")
    identity = spec.identity | {"kind": "latents"}
    spec = replace(spec, layout=layout, identity=identity, norm=Norm((0.0,), (1.0,)))
    write_column(near / "latents", spec, (ROWS,) * SHARDS)
    convert(near / "latents", near / "int8", element="int8")
    server.take(near / "int8", f"{url}/int8")
    here = open_join(near / "int8", near / "tokens")
    far = open_join(f"{url}/int8", f"{url}/tokens")
    order = here.order()
    readers = [Reader(Planner(join, order, 64)) for join in (here, far)]
    buffers = [np.zeros(reader.layout.capacity, np.uint8) for reader in readers]
    count = order.epoch_samples // 64 - 3  # what is asked for ahead is of this epoch, too
    plans = [islice(reader.plans(0, 64), count) for reader in readers]
    for pair in zip(*plans, strict=True):
        for reader, plan, buffer in zip(readers, pair, buffers, strict=True):
            reader.fill(plan, buffer)
        assert buffers[0][: pair[0].bytes].tobytes() == buffers[1][: pair[1].bytes].tobytes()
    values = [
        n for (method, path, part), n in proxy.seen.items() if "/int8/latents/" in path and part
    ]
    assert values
    assert set(values) == {1}
    store: Any = far.latents.store
    held = {
        source: asked for source, asked in store._ranges._ranges.items() if source.store is store
    }
    assert sum(map(len, held.values())) <= 2 * 64  # those of the batches ahead
    far.close()
    here.close()


def test_the_oldest_chunk_indexes_go_and_never_those_that_are_needed(
    server: Server, url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = moments_spec(SHARDS, codec="blosc")
    server.take(write_column(near / "packed", spec, (ROWS,) * SHARDS), f"{url}/packed")
    here, column = Column.open(near / "packed"), Column.open(f"{url}/packed")
    three = 3 * 8 * column._objects._array.chunks
    monkeypatch.setattr("shards.read.objects.INDEX_BYTES", three)
    first, second, all_shards = (np.array(s) * SHARD_ROWS for s in ([0, 1], [2, 0, 3], range(4)))
    for rows, kept in ((first, 2), (second, 3), (all_shards, 4)):
        assert column.read(rows).tobytes() == here.read(rows).tobytes()
        assert len(column._objects._edges) == kept
        assert {int(n) for n in column.places(rows).object} <= column._objects._edges.keys()
    column.close()
