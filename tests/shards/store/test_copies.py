"""Copies inside a store are proven before anything is deleted: Azure answers some before they are
done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import Column
from shards.errors import IncompleteColumn, StoreError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.tools.copy import copy
from shards.tools.verify import verify
from tests.proxy.azure import CONTAINER, Azure, point_to_azure
from tests.proxy.server import Proxy
from tests.shards.toy import moments_spec, row_ids, write_column

URL = f"az://{CONTAINER}/column"
QUICK = Limits(30, stall=60, request=60, copy=60, give_up=60, backoff=0.01, max_backoff=0.05)
SHORT = Limits(30, stall=60, request=60, copy=60, give_up=0.5, backoff=0.01, max_backoff=0.05)
PART = 1 << 16
LARGE = 5 * PART + 17


@pytest.fixture
def azure() -> Azure:
    return Azure()


@pytest.fixture
def proxy(azure: Azure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """Azure's protocol, with copies that are pending; objects of more than PART are copied."""
    proxy = Proxy(azure)
    # but not what puts the store to the test before the first copy
    proxy.fault = lambda request, count: None if "/.tmp-" in request[1] else "pending"
    point_to_azure(monkeypatch, proxy.port)
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shards.store.upload.PART", PART)
    yield proxy
    proxy.close()


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def stage(data: bytes, limits: Limits = QUICK) -> bool:
    with RemoteStore(URL, limits).staged("values") as file:
        file.write(data)
        return file.publish()


def blobs(azure: Azure) -> dict[str, bytes]:
    """The objects below the column; temporary ones are called so."""
    return {
        "temporary" if ".tmp-" in name else name.removeprefix("column/"): blob.data
        for name, blob in azure.containers[CONTAINER].items()
    }


@pytest.mark.parametrize("meanwhile", ["absent", "empty", "whole"])
def test_a_pending_copy_is_waited_for(proxy: Proxy, azure: Azure, meanwhile: str) -> None:
    proxy.meanwhile = meanwhile
    data = noise(LARGE)
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(stage, data)
        until(lambda: bool(proxy.pending) or writer.done())
        time.sleep(0.2)
        assert (blobs(azure), writer.done()) == ({"temporary": data}, False)
        proxy.finish("/values")
        until(lambda: writer.done() or bool(proxy.pending))
        assert writer.result(60)
    assert blobs(azure) == {"values": data}


@pytest.mark.parametrize("meanwhile", ["absent", "empty", "whole"])
def test_a_copy_that_does_not_end_is_an_error_and_may_still_end(
    proxy: Proxy, azure: Azure, meanwhile: str
) -> None:
    proxy.meanwhile = meanwhile
    data = noise(LARGE)
    message = f"{URL}/values: the store said that it copied {URL}/.tmp"
    with proxy.given_up(SHORT.give_up), pytest.raises(StoreError, match=message):
        stage(data, SHORT)
    assert blobs(azure) == {"temporary": data}
    if meanwhile != "absent":  # the next writer finds the name taken
        message = "cannot be read|failed after .* PendingCopyOperation|without bytes exists here"
        with pytest.raises(StoreError, match=message):
            stage(data, SHORT)
    proxy.finish("/values")
    assert not stage(data, SHORT)
    assert blobs(azure) == {"values": data, "temporary": data}  # of which `gc` removes the latter


def test_a_copy_that_failed_is_an_error(proxy: Proxy, azure: Azure) -> None:
    """Its source was deleted by somebody else, so the new name stays empty."""
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(stage, noise(LARGE), SHORT)
        until(lambda: bool(proxy.pending))
        azure.containers[CONTAINER].clear()
        proxy.finish("/values")
        with pytest.raises(StoreError, match=r"its \d+ bytes cannot be read \(0 bytes there\)"):
            writer.result(60)


@pytest.mark.parametrize("meanwhile", ["empty", "whole"])
def test_a_second_writer_waits_for_the_copy_of_the_first(
    proxy: Proxy, azure: Azure, meanwhile: str
) -> None:
    proxy.meanwhile = meanwhile
    data = noise(LARGE)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stage, data)
        until(lambda: bool(proxy.pending))
        second = pool.submit(stage, data)
        time.sleep(0.3)
        assert not second.done()
        proxy.finish("/values")
        assert (first.result(60), second.result(60)) == (True, False)
    assert blobs(azure) == {"values": data}


def test_an_object_that_is_still_copied_to_is_waited_for(proxy: Proxy, azure: Azure) -> None:
    """To read it is answered 409, as to create what exists."""
    proxy.meanwhile = "whole"
    data = noise(LARGE)
    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(stage, data)
        until(lambda: bool(proxy.pending))
        reader = pool.submit(RemoteStore(URL, QUICK).read, "values")
        time.sleep(0.2)
        assert not reader.done()
        with pytest.raises(StoreError, match="The store still copies to this object"):
            RemoteStore(URL, SHORT).read("values")
        proxy.finish("/values")
        assert reader.result(60) == data
        assert writer.result(60)


def test_an_object_is_moved_once_its_copy_is_there(proxy: Proxy, azure: Azure) -> None:
    store = RemoteStore(URL, QUICK)
    for data in (noise(3000), b"x", b""):
        proxy.meanwhile = "empty" if data else "absent"
        store.replace("values", data)
        proxy.lasts = 0.2
        store.move("values", "quarantine/values")
        assert blobs(azure) == {"quarantine/values": data}
        store.delete("quarantine/values")
    store.replace("values", b"data")
    proxy.meanwhile, proxy.lasts = "empty", None
    with pytest.raises(StoreError, match="cannot be read"):
        RemoteStore(URL, SHORT).move("values", "quarantine/values")
    assert blobs(azure) == {"values": b"data"}
    with pytest.raises(FileNotFoundError):
        store.move("nothing", "quarantine/nothing")


def test_a_column_is_complete_once_all_its_copies_are(
    proxy: Proxy, azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spec = (1100, 40), moments_spec(2)
    write_column(tmp_path / "near", spec, rows)
    monkeypatch.setattr("shards.store.upload.PART", 1 << 12)
    with pytest.raises(StoreError, match="cannot be read"):
        copy(tmp_path / "near", RemoteStore(URL, SHORT))
    assert proxy.pending
    assert not [name for name in blobs(azure) if name.startswith(("complete/", "commits/"))]
    with pytest.raises(IncompleteColumn):
        Column.open(URL)
    proxy.finish()
    proxy.lasts = 0.1
    copy(tmp_path / "near", URL)
    assert verify(URL, processes=1) == []
    ids = np.concatenate([row_ids(0, rows), row_ids(1, rows)])
    far, near = Column.open(URL), Column.open(tmp_path / "near")
    np.testing.assert_array_equal(far.read(ids), near.read(ids))
    far.close()
    near.close()


def test_a_column_is_written_while_copies_last(
    proxy: Proxy, azure: Azure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.upload.PART", 1 << 12)
    proxy.lasts = 0.1
    write_column(RemoteStore(URL, QUICK), moments_spec(1), (1100,))
    write_column(tmp_path / "near", moments_spec(1), (1100,))
    assert "temporary" not in blobs(azure)
    far, near = Column.open(URL), Column.open(tmp_path / "near")
    assert far.snapshot.digest == near.snapshot.digest
    far.close()
    near.close()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
