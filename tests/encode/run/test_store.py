"""Columns that are encoded straight into an object store, and read from there."""

from pathlib import Path

import torch

import configs
from encode.config import EncodeConfig
from encode.run.job import run
from shards import open_join
from shards.read.stream import Stream
from shards.tools.verify import logical_digest, verify
from tests.encode.toy import write_config, write_source


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
