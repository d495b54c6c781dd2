"""A fork while threads of its parent read: what they hold, nobody in the child would release."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from shards import Column
from shards.store.page_cache import PageCache
from tests.forks import ended_in_time, fork
from tests.proxy.server import Proxy
from tests.shards.objects import Server
from tests.shards.store.test_pages import open_files
from tests.shards.toy import moments_spec, write_column

ROWS = np.array([3, 250, 17])


@pytest.mark.parametrize("cache", ["64", "0"])
@pytest.mark.parametrize("part", ["/crc/", "/moments/c/"])
def test_a_child_reads_what_a_thread_of_its_parent_waits_for(
    server: Server,
    proxy: Proxy,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    cache: str,
) -> None:
    """As in a worker of a DataLoader that begins while the parent's stream reads ahead."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", cache)
    server.take(write_column(tmp_path / "near", moments_spec(1), (300,)), url)
    expected = Column.open(tmp_path / "near").read(ROWS).tobytes()
    column, held, go = Column.open(url), threading.Event(), threading.Event()

    def fault(request: tuple[str, str, str], count: int) -> str | None:
        if part in request[1] and not held.is_set():
            held.set()
            assert go.wait(60)
        return None

    proxy.fault = fault
    thread = threading.Thread(target=column.read, args=(ROWS,))
    thread.start()
    try:
        assert held.wait(60)

        def read() -> None:
            assert column.read(ROWS).tobytes() == expected

        assert ended_in_time(fork(read, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    finally:
        go.set()
        thread.join()
    assert column.read(ROWS).tobytes() == expected
    column.close()


def test_a_child_reads_in_the_way_of_its_parent(
    server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are its own, and know nothing of a column that does not fit until it says so again."""
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0.000001")
    server.take(write_column(tmp_path / "near", moments_spec(1), (300,)), url)
    column = Column.open(url)
    note = column.storage_note
    assert "row by row" in note

    def read() -> None:
        column.places(ROWS, whole=True)
        assert column.storage_note == note
        column.read(ROWS)
        assert not (tmp_path / "cache").exists()

    assert ended_in_time(fork(read, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    column.close()


def test_a_child_has_no_pages_of_its_parent_open(tmp_path: Path) -> None:
    """The room of those that are evicted would not be given back before it ends."""
    cache = PageCache(tmp_path / "cache", 1 << 20)
    cache.add("k", 0, b"12")
    page = cache.open("k", 0, 2)
    assert page
    del page

    def look() -> None:
        assert open_files(tmp_path / "cache") == []
        assert cache.open("k", 0, 2)

    with cache._lock:
        pid = fork(look, tmp_path / "log")
    assert ended_in_time(pid) == 0, (tmp_path / "log").read_text()
    assert len(open_files(tmp_path / "cache")) == 1
