"""Every command on real servers: from encoding to training, with two writers, and with a server that
stops and comes back.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import configs
from encode.config import EncodeConfig
from encode.run.job import run
from shards import Column, open_join
from shards.errors import StoreError
from shards.read.stream import Stream
from shards.store.client import Limits
from shards.store.object_store import RemoteStore
from shards.store.open import open_store
from shards.tools.copy import copy, stage
from shards.tools.info import information
from shards.tools.verify import logical_digest, verify
from tests.encode.conftest import models  # noqa: F401  # a fixture
from tests.encode.toy import write_config, write_source
from tests.proxy.azure import point_to_azure
from tests.proxy.server import FAULTS, EachKindOnce, Proxy
from tests.servers.every_tool import use_every_tool
from tests.servers.servers import Running, serving, url_of
from tests.shards.objects import point_to
from tests.shards.toy import moments_spec, row_ids, write_column
from tests.train.conftest import launch, write_columns

pytestmark = pytest.mark.slow

LARGE = 20 << 20  # three parts
PATIENT = Limits(2, stall=5, request=20, copy=20, give_up=90, backoff=0.1, max_backoff=1)


@pytest.fixture(params=["azurite", "localbucket"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Running]]:
    """A server to which columns are written: its url, and its process."""
    with serving(request.param, tmp_path, monkeypatch) as server:
        yield url_of(request.param, server), server


def columns(folder: Path) -> Path:
    write_columns(folder / "toy", "toy", 150, 1)
    return folder


def losses(folder: Path, root: str, columns: Path) -> list[str]:
    """Trains a few steps on columns below a root; the loss of each."""
    folder.mkdir()
    data = {"latents": f"{root}/toy/vae", "text": f"{root}/toy/text", "lanes": 8}
    done = launch(folder, columns, data=data, steps=6, save_every=6)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    return [line.partition("loss")[2].split()[0] for line in lines]


def test_encoded_there_and_read_from_there(
    store: tuple[str, Running],
    tmp_path: Path,
    models: Path,  # noqa: F811
) -> None:
    tars = write_source(tmp_path / "tars", 2, 9)
    roots = [str(tmp_path / "cache"), f"{store[0]}/cache"]
    for root in (*roots, roots[1]):  # the second time all is there
        path = write_config(tmp_path / "toy.yaml", Path("unused"), tars, models)
        assert run(configs.load(EncodeConfig, path, [f"root={root}"])) == 0
    for column in ("vae", "text"):
        assert verify(f"{roots[1]}/toy/{column}", processes=1) == []
        assert logical_digest(f"{roots[0]}/toy/{column}") == logical_digest(
            f"{roots[1]}/toy/{column}"
        )
    joins = [open_join(f"{root}/toy/vae", f"{root}/toy/text") for root in roots]
    streams = [Stream(join, join.order(0, 4), position=0, global_batch=8) for join in joins]
    for _ in range(6):  # more than two epochs of 16
        near, far = map(next, streams)
        for part in ("samples", "rows", "moments", "tokens", "cu_seqlens"):
            assert torch.equal(getattr(near, part), getattr(far, part)), part
    for stream in streams:
        stream.close()


def test_every_tool(store: tuple[str, Running], tmp_path: Path) -> None:
    use_every_tool(store[0], tmp_path)


def test_trained_from_there(store: tuple[str, Running], tmp_path: Path) -> None:
    near = columns(tmp_path / "near")
    for column in ("vae", "text"):
        copy(near / "toy" / column, f"{store[0]}/toy/{column}")
    far = losses(tmp_path / "far-run", store[0], near)
    assert far == losses(tmp_path / "near-run", str(near), near)


def put_large(url: str, i: int, limits: Limits = PATIENT) -> bool:
    with RemoteStore(url, limits).staged("values/0") as file:
        for piece in range(LARGE >> 20):
            file.write(bytes([i + piece]) * (1 << 20))
        return file.publish()


def put_column(url: str, i: int) -> bool:
    write_column(RemoteStore(url, PATIENT), moments_spec())  # type: ignore[arg-type]
    return True


def test_two_writers(store: tuple[str, Running], tmp_path: Path) -> None:
    url = f"{store[0]}/raced"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        won = pool.starmap(put_large, [(f"{url}/large", i) for i in range(2)])
        assert pool.starmap(put_column, [(f"{url}/column", i) for i in range(2)]) == [True, True]
    assert sorted(won) == [False, True]
    place = RemoteStore(f"{url}/large", PATIENT)
    first = won.index(True)
    assert place.read("values/0")[:: 1 << 20] == bytes(first + i for i in range(LARGE >> 20))
    assert place.stale_temporaries(0) == []
    assert verify(f"{url}/column", processes=1) == []
    near = write_column(tmp_path / "near", moments_spec())
    assert logical_digest(f"{url}/column") == logical_digest(near)


def test_the_server_stops_and_comes_back(store: tuple[str, Running], tmp_path: Path) -> None:
    """While a column is copied there, and while it is read."""
    url, server = f"{store[0]}/column", store[1]
    near = write_column(tmp_path / "near", moments_spec())
    place = RemoteStore(url, PATIENT)
    place.replace("large", np.random.default_rng(0).bytes(LARGE))

    def pause() -> None:
        server.stop()
        time.sleep(2)
        server.start()

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(copy, near, place, False, 1)
        time.sleep(0.05)
        pause()
        work.result(120)
        assert verify(url, processes=1) == []
        work = pool.submit(digest_of, place, "large")  # type: ignore[arg-type]
        time.sleep(0.02)
        pause()
        expected = hashlib.sha256(np.random.default_rng(0).bytes(LARGE)).hexdigest()
        assert work.result(120) == expected  # type: ignore[comparison-overlap]
    far = Column.open(place)
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    stopper = threading.Thread(target=pause)
    stopper.start()
    rows = far.read(ids)
    stopper.join()
    np.testing.assert_array_equal(rows, Column.open(near).read(ids))
    far.close()


def digest_of(place: RemoteStore, name: str) -> str:
    handle = place.open(name, cached=False)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    for start in range(0, LARGE, 1 << 18):
        assert place.preadv(handle, [buffer], start) == 1 << 18
        digest.update(buffer)
    place.close(handle)
    return digest.hexdigest()


@pytest.mark.parametrize("fault", [*FAULTS, "500", "429 after 1", "whole", "short", "flip"])
def test_each_kind_of_request_may_fail_once(
    store: tuple[str, Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A proxy before the server; all that is written and read is right in the end."""
    if fault == "whole" and store[0].startswith("az"):
        fault = "short"  # Azure's signature is of the range, too
    proxy = Proxy(store[1].port)
    point_to(monkeypatch, proxy.port)
    point_to_azure(monkeypatch, proxy.port)
    limits = replace(PATIENT, stall=1, request=3, copy=5, backoff=0.01, max_backoff=0.1)
    place = RemoteStore(f"{store[0]}/column", limits)
    near = write_column(tmp_path / "near", moments_spec())
    damaging = fault in ("whole", "short", "flip")  # of answers to reads of parts
    once = EachKindOnce(fault)
    proxy.fault = lambda request, count: (
        once(request, count) if request[2] or not damaging else None
    )
    copy(near, place)
    put_large(f"{store[0]}/large", 0, limits)
    proxy.fault = EachKindOnce(fault) if not damaging else proxy.fault
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    far = Column.open(place)
    np.testing.assert_array_equal(far.read(ids), Column.open(near).read(ids))
    far.close()
    proxy.fault = lambda request, count: None
    assert verify(place, processes=1) == []
    proxy.close()


def test_copies_that_are_pending_before_a_real_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.upload.PART", 1 << 12)
    with serving("azurite", tmp_path, monkeypatch) as server:
        proxy = Proxy(server.port, lasts=0.5)
        proxy.fault = lambda request, count: None if "/.tmp-" in request[1] else "pending"
        point_to_azure(monkeypatch, proxy.port)
        near = write_column(tmp_path / "near", moments_spec())
        copy(near, "az://shelf/column")
        assert verify("az://shelf/column", processes=1) == []
        assert open_store("az://shelf/column").stale_temporaries(0) == []
        assert proxy.copies > 0
        proxy.close()


@pytest.mark.parametrize("name", ["nanio", "s3rver"])
def test_stores_without_conditions_are_refused_and_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(name, tmp_path, monkeypatch) as server:
        url = url_of(name, server)
        near = write_column(tmp_path / "near", moments_spec())
        with pytest.raises(StoreError, match="s3://shelf: this store replaces what exists"):
            copy(near, f"{url}/column")
        upload(near, f"{url}/column")
        assert verify(f"{url}/column", processes=1) == []
        (staged,) = stage([f"{url}/column"], tmp_path / "nvme")
        assert logical_digest(staged) == logical_digest(near)


def upload(folder: Path, url: str) -> None:
    """Puts a column there as a sync tool does."""
    for path in folder.rglob("*"):
        if path.is_file():
            place = open_store(url)
            place.replace(str(path.relative_to(folder)), path.read_bytes())


def test_columns_in_google_cloud_storage_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("fake-gcs-server", tmp_path, monkeypatch) as server:
        near = columns(tmp_path / "near")
        shutil.copytree(near / "toy", server.folder / "shelf/toy")
        server.stop()
        server.start()
        for column in ("vae", "text"):
            far = f"gs://shelf/toy/{column}"
            assert verify(far, processes=1) == []
            assert information(far)["rows"] == 150
            assert logical_digest(far) == logical_digest(near / "toy" / column)
            (staged,) = stage([far], tmp_path / "nvme")
            assert logical_digest(staged) == logical_digest(far)
        assert losses(tmp_path / "far-run", "gs://shelf", near) == losses(
            tmp_path / "near-run", str(near), near
        )
        with pytest.raises(StoreError, match="400 Bad Request.*invalid uploadType"):
            copy(near / "toy/vae", "gs://shelf/b/vae")  # once it can, all is to be run on it
        assert open_store("gs://shelf/b").list() == []


def test_tars_behind_nginx_are_encoded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    models: Path,  # noqa: F811
) -> None:
    """Over TLS; the server stops and comes back while the second column is made."""
    with serving("nginx", tmp_path, monkeypatch) as server:
        write_source(server.folder / "tars", 2, 9)
        url = url_of("nginx", server)
        sources = {"near": str(server.folder), "far": url}
        for name, root in sources.items():
            tars = f"{root}/tars/{{0..1}}.tar"
            path = write_config(tmp_path / f"{name}.yaml", tmp_path / name, tars, models)
            if name == "far":
                server.stop()
                threading.Timer(3, server.start).start()
            assert run(configs.load(EncodeConfig, path, [])) == 0
        for column in ("vae", "text"):
            here, there = (tmp_path / name / "toy" / column for name in sources)
            assert verify(there, processes=1) == []
            assert logical_digest(here) == logical_digest(there)
