"""Columns that are encoded straight into an object store, and read from there."""

from pathlib import Path

import pytest
import torch

import configs
from encode.config import EncodeConfig
from encode.run.job import Options, run
from shards import open_join
from shards.errors import StoreError
from shards.read.stream import Stream
from shards.store.open import open_store
from shards.tools.verify import logical_digest, verify
from tests.encode.toy import write_config, write_source
from tests.proxy.server import Proxy
from tests.shards.objects import Server, point_to


def test_encoded_to_a_store_and_streamed_from_it(url: str, tmp_path: Path, models: Path) -> None:
    """The same columns and the same batches as from a folder; a second run finds all committed."""
    tars = write_source(tmp_path / "tars", 2, 9)
    roots = [str(tmp_path / "cache"), url]
    for root in (*roots, url):
        path = write_config(tmp_path / "toy.yaml", Path("unused"), tars, models)
        assert run(configs.load(EncodeConfig, path, [f"root={root}"])) == 0
    for column in ("vae", "text"):
        here, space = (logical_digest(f"{root}/toy/{column}") for root in roots)
        assert here == space
        assert verify(f"{url}/toy/{column}") == []
    joins = [open_join(f"{root}/toy/vae", f"{root}/toy/text") for root in roots]
    streams = [Stream(join, join.order(0, 4), position=0, global_batch=8) for join in joins]
    for _ in range(6):  # more than two epochs of 16
        ours, theirs = map(next, streams)
        for part in ("samples", "rows", "moments", "tokens", "cu_seqlens"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("after", [60, 110])  # before and after the first commits
def test_credentials_that_run_out_stop_a_run_that_goes_on_with_new_ones(
    url: str,
    server: Server,
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    proxy = Proxy(server.port)
    point_to(monkeypatch, proxy.port)
    tars = write_source(tmp_path / "tars", 3, 9)
    path = write_config(tmp_path / "toy.yaml", Path("unused"), tars, models)
    config = configs.load(EncodeConfig, path, [f"root={url}"])
    proxy.fault = lambda request, count: "expired" if proxy.requests() > after else None
    with pytest.raises(StoreError, match="expired"):
        run(config)
    assert proxy.requests() < after + 60  # what cannot pass is not repeated
    proxy.fault = lambda request, count: None
    assert open_store(f"{url}/toy/vae").list("complete") == []
    assert run(config, Options(break_lease=True)) == 0  # this process lives, so the lease holds
    for column in ("vae", "text"):
        assert verify(f"{url}/toy/{column}", processes=1) == []
    proxy.close()
