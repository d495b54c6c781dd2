"""The tools on a column in an object store, as on one in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards import Column, LeaseHeld
from shards.column.lease import LEASE, Lease
from shards.errors import StoreError
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.store.open import open_store
from shards.tools.convert import convert
from shards.tools.copy import copy, stage
from shards.tools.diff import diff
from shards.tools.gc import collect
from shards.tools.info import information
from shards.tools.repair import repair
from shards.tools.verify import deep_digest, examine, logical_digest, verify
from tests.proxy.server import Proxy
from tests.shards.objects import Server
from tests.shards.toy import STORED, files_of, row_ids, tokens_spec, write_column


def test_up_damaged_mended_and_down(url: str, tmp_path: Path) -> None:
    local = write_column(tmp_path / "text", tokens_spec())
    remote = f"{url}/toy/text"
    copy(local, remote)
    assert verify(remote) == []
    assert not diff(local, remote)
    assert deep_digest(remote) == (logical_digest(local), [])
    assert information(remote)["rows"] == 2164
    Column.open(remote).read(row_ids(1))  # pages of it are in the cache now
    store = open_store(remote)
    sound = store.read("tokens/c/2/0")
    store.delete("tokens/c/2/0")
    changed = bytearray(sound)
    changed[40] ^= 1
    store.put_if_absent("tokens/c/2/0", bytes(changed))
    faults = verify(remote, processes=2)
    assert {(f.shard, f.object) for f in faults} == {(1, "tokens/c/2/0")}
    with Lease(remote, "shards gc"), pytest.raises(LeaseHeld, match="shards gc"):
        repair(remote, yes=True)
    repair(remote, yes=True)
    assert store.size(LEASE) is None
    examination = examine(remote)
    assert (examination.faults, examination.column.missing) == ([], [1])
    garbage, remaining = collect(remote, yes=True, seconds=0, quarantine=True)
    assert {item.name.split("/")[0] for item in garbage} == {"quarantine"}
    store.put_if_absent("tokens/c/2/0", sound)  # of a writer that died before its commit
    _, remaining = collect(remote, yes=True, seconds=3600)
    assert remaining == ["tokens/c/2/0: its shard is not committed, and it is too young"]
    garbage, remaining = collect(remote, yes=True, seconds=0)
    assert ([item.name for item in garbage], remaining) == (["tokens/c/2/0"], [])
    assert store.size("tokens/c/2/0") is None
    write_column(remote, tokens_spec())  # type: ignore[arg-type]
    assert verify(remote) == []
    (place,) = stage([remote], tmp_path / "nvme")
    assert place == tmp_path / "nvme/toy/text"
    assert logical_digest(place) == logical_digest(local)
    convert(place, f"{url}/tar", backend="webdataset")
    assert verify(f"{url}/tar") == []
    copy(f"{url}/tar", tmp_path / "tar")
    assert logical_digest(tmp_path / "tar") == logical_digest(local)
    assert {n for n in files_of(tmp_path / "tar") if n.startswith("tar/")} == {
        f"tar/0000{s}.tar" for s in range(3)
    }


@pytest.mark.parametrize("storage", ["zarr", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_pages_that_rot_deceive_no_tool(url: str, tmp_path: Path, storage: str) -> None:
    """Whole objects are read past the cache, and so fill no disk with it either."""
    spec = tokens_spec(1, **STORED[storage])
    remote, store = f"{url}/toy/text", open_store(f"{url}/toy/text")
    copy(write_column(tmp_path / "text", spec, (70,)), remote)
    for name, size in store.list():
        handle = store.open(name)
        store.preadv(handle, [memoryview(bytearray(size))], 0)
        store.close(handle)
    pages = {page: page.read_bytes() for page in (tmp_path / "cache").glob("*/*")}
    rotten = {page: bytes([*data[:5], data[5] ^ 1, *data[6:]]) for page, data in pages.items()}
    for page, data in rotten.items():
        page.write_bytes(data)
    (place,) = stage([remote], tmp_path / "nvme")
    assert repair(remote, yes=True)[1].quarantine == []
    assert files_of(place) == files_of(tmp_path / "text")
    assert {page: page.read_bytes() for page in (tmp_path / "cache").glob("*/*")} == rotten
    for name, _ in [*store.list("commits"), *store.list("complete")]:
        store.delete(name)
    write_column(remote, spec, (70,))  # type: ignore[arg-type]  # adopts what stands
    assert verify(remote) == []
    assert logical_digest(remote) == logical_digest(place)


def test_what_cannot_be_reached_is_not_damaged(
    url: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `repair` would put a whole column aside while the network is down."""
    copy(write_column(tmp_path / "text", tokens_spec()), f"{url}/text")
    proxy = Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")

    def work(**limits: float) -> None:
        repair(RemoteStore(f"{url}/text", Limits(**limits)), yes=False)

    work()
    proxy.close()
    with pytest.raises(StoreError):
        work(give_up=2, backoff=0.01, max_backoff=0.1)


@pytest.mark.parametrize("what", ["column.json", "commits/00000.json", "tokens/c/0/0", "crc/c/0"])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_network_changes_is_not_put_aside(
    url: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    damaged: bool,
) -> None:
    """A bit of one answer is another; what is damaged in the store stays until both looks agree."""
    copy(write_column(tmp_path / "text", tokens_spec(2), (70, 3)), url)
    store = open_store(url)
    if damaged:
        store.replace("status/c/1", bytes(8))
    before = [item for item in store.list() if not item[0].startswith("lease")]
    flips, proxy = iter(["flip"]), Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    far = RemoteStore(url)
    proxy.fault = lambda request, count: (
        next(flips, None) if request[0] == "GET" and request[1].endswith(what) else None
    )
    with pytest.raises(
        StoreError, match="only one of two looks found this: .*Nothing was put aside"
    ):
        repair(far, yes=True, processes=1)
    assert store.list() == before
    examination, plan = repair(store, yes=True, processes=1)
    assert bool(examination.faults) == damaged
    assert plan.shards == ([1] if damaged else [])
    proxy.close()
