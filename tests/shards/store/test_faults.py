"""Columns that are read through faults: the right rows, or an error with a name in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import Column, exits, signals
from shards.__main__ import main
from shards.errors import CorruptColumn, StoreError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.tools.copy import copy
from tests.forks import ended_in_time, fork
from tests.proxy.azure import CONTAINER, Azure, Blob, point_to_azure
from tests.proxy.server import EachKindOnce, Proxy
from tests.shards.toy import SPECS, STORED, moments_spec, row_ids, tokens_spec, write_column

URL = f"az://{CONTAINER}/column"
QUICK = Limits(30, stall=60, request=60, copy=60, give_up=120, backoff=0.01, max_backoff=0.05)
STALLS = {"stall": 0.3, "request": 0.6}  # seconds, where nothing comes
SHORT = Limits(30, stall=60, request=60, copy=60, give_up=0.5, backoff=0.01, max_backoff=0.05)
ROWS = (20, 7)
READS = ("503", "429 after 0", "500", "cut", "short", "whole", "flip", "close", "lost", "stall")


@pytest.fixture
def near(tmp_path: Path) -> Path:
    return write_column(tmp_path / "near", moments_spec(2), ROWS)


@pytest.fixture
def proxy(near: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """Azure in memory, which holds the column."""
    proxy = Proxy(Azure())
    point_to_azure(monkeypatch, proxy.port)
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "cache"))
    copy(near, URL)
    yield proxy
    proxy.close()


def rows_of(place: RemoteStore | Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    column = Column.open(place)  # type: ignore[arg-type]
    try:
        return column.read(np.concatenate([row_ids(0, ROWS), row_ids(1, ROWS)]))  # type: ignore[return-value]
    finally:
        column.close()


@pytest.mark.parametrize("cache", ["64", "0"])
@pytest.mark.parametrize("fault", READS)
def test_a_fault_that_passes_changes_no_row(
    proxy: Proxy, near: Path, monkeypatch: pytest.MonkeyPatch, fault: str, cache: str
) -> None:
    """It befalls the first request for bytes of every object, and of each other kind; records are
    read whole.
    """
    monkeypatch.setenv("LATENTBANK_CACHE_GB", cache)
    once = EachKindOnce(fault)
    damaging = fault in ("short", "whole", "flip")
    read: set[str] = set()

    def one(request: tuple[str, str, str], count: int) -> str | None:
        method, path, part = request
        if not part:
            return None if damaging else once(request, count)
        new = path not in read
        read.add(path)
        return fault if new else None

    proxy.fault = one
    limits = replace(QUICK, **(STALLS if fault == "stall" else {}))
    np.testing.assert_array_equal(rows_of(RemoteStore(URL, limits)), rows_of(near))
    assert len(read) >= 2


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("stored", STORED)
def test_a_page_that_rots_on_the_disk_is_fetched_again(
    proxy: Proxy, tmp_path: Path, kind: str, stored: str
) -> None:
    near = write_column(tmp_path / kind, SPECS[kind](2, **STORED[stored]), ROWS)
    copy(near, URL + kind)
    expected = rows_of(near)
    np.testing.assert_array_equal(rows_of(RemoteStore(URL + kind)), expected)
    for page in (tmp_path / "cache").glob("*/0"):
        page.write_bytes(bytes(page.stat().st_size))  # as after a power cut
    np.testing.assert_array_equal(rows_of(RemoteStore(URL + kind)), expected)


@pytest.mark.parametrize(
    ("fault", "cache"), [*((fault, "64") for fault in READS), ("503", "0"), ("stall", "0")]
)
def test_a_fault_that_stays_has_a_name_in_time(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: str, cache: str
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", cache)
    proxy.fault = lambda request, count: fault if request[2] else None
    error, message = {
        "flip": (CorruptColumn, "row 0 of shard 0|of shard 0.*checksum|damaged|another"),
        "whole": (StoreError, "gives whole objects where a part is asked for"),
        "429 after 0": (StoreError, "429 Too Many Requests"),
    }.get(fault, (StoreError, "reading failed after .* Check AZURE_STORAGE_ACCOUNT_NAME"))
    with proxy.given_up(SHORT.give_up), pytest.raises(error, match=message):
        rows_of(RemoteStore(URL, replace(SHORT, **(STALLS if fault == "stall" else {}))))


def test_an_object_that_is_replaced_meanwhile_has_a_name(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTBANK_CACHE_GB", "0")
    column, ids = Column.open(RemoteStore(URL, SHORT)), row_ids(0, ROWS)
    column.read(ids[:1])
    blobs = proxy.backend.containers[CONTAINER]  # type: ignore[attr-defined]
    (name,) = [name for name in blobs if name.startswith("column/moments/c/0")]
    blobs[name] = Blob(bytes(len(blobs[name].data)))
    with pytest.raises(StoreError, match="replaced while it was open"):
        column.read(ids)
    column.close()


@pytest.mark.parametrize("cache", ["64", "0"])
@pytest.mark.parametrize("codec", [None, "blosc"])
def test_without_threads_that_fetch_rows_are_the_same(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str, codec: str | None
) -> None:
    """None can be started once a column is open: neither those that fetch ahead, nor those that fetch
    what is known of many shards, nor the one that closes pages.
    """
    monkeypatch.setenv("LATENTBANK_CACHE_GB", cache)
    near = write_column(tmp_path / "other", tokens_spec(2, codec=codec), ROWS)
    copy(near, f"{URL}-other")
    columns = [Column.open(RemoteStore(f"{URL}-other", QUICK)) for _ in range(2)]
    start, refused = threading.Thread.start, set[str]()

    def start_others(thread: threading.Thread) -> None:
        if kind := re.match("latentbank-.*|ThreadPoolExecutor", thread.name):
            refused.add(kind[0])
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
    ids = np.concatenate([row_ids(0, ROWS), row_ids(1, ROWS)])
    for column in columns:  # the second from what is kept
        np.testing.assert_array_equal(column.read(ids), Column.open(near).read(ids))
        column.close()
    closing = {"latentbank-close"} if cache == "64" else set()
    assert refused == {"latentbank-fetch", "ThreadPoolExecutor"} | closing


# Ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["info", URL], ["copy", URL, "COPY"], ["verify", URL, "--processes", "2"]],
    ids=lambda words: words[0],
)
def test_ctrl_c_waits_for_no_server_that_hangs(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """`info` asks in the main thread, which handles no signal meanwhile, `copy` in others, and `verify` in
    processes that the signal did not reach.
    """
    monkeypatch.setattr(signals, "GRACE", 0.3)
    place = [word.replace("COPY", str(tmp_path / "copy")) for word in words]
    monkeypatch.setattr(sys, "argv", ["shards", *place])
    asked = threading.Event()

    def fault(request: tuple[str, str, str], count: int) -> str | None:
        if words[0] != "info" and "/moments/c/" not in request[1]:
            return None
        asked.set()
        return "stall"

    proxy.fault = fault
    pid = fork(lambda: exits.run(main), tmp_path / "log")
    try:
        assert asked.wait(60)
    finally:
        os.kill(pid, signal.SIGINT)
        code = ended_in_time(pid)
    text = (tmp_path / "log").read_text()
    assert code == 130, text
    assert "stopped by SIGINT, though a store did not answer for 0.3 s; run it again" in text


def test_a_program_waits_for_no_repetition_of_a_request() -> None:
    code = (
        "import threading, shards.store.client as client\n"
        "def work():\n"
        "    try: client.pause(600)\n"
        "    except client.StoreError as error: print(error)\n"
        "threading.Thread(target=work).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "the program ended while a request was to be repeated\n", done.stderr
