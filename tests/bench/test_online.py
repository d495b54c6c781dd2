"""The benchmark of caching at toy size: an online step sees what a cached one sees. Nothing is timed."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import open_join
from shards.read.stream import Batch, read_rows
from tests.bench.evaluation.online import SPARED, TOY, Material, bench
from tests.forks import ended


def test_it_measures_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options = {"json": path, "folder": tmp_path, "rounds": 1, "threads": 1, "light": True}
    ended(lambda: bench(argparse.Namespace(**options)), tmp_path / "log")
    found = json.loads(path.read_text())["online"]
    assert found["cpu"]["ratios"][0] > 0
    assert found["expected"] == pytest.approx(
        sum(found["gflop"].values()) / found["gflop"]["train"]
    )
    assert pytest.approx(1.43, abs=0.01) == SPARED


def test_online_batches_are_those_of_the_columns(tmp_path: Path) -> None:
    material = Material(tmp_path, TOY)
    join = open_join(material.columns / "vae", material.columns / "text")
    rows = np.array([3, 0, 11, 7])
    moments, tokens, cu_seqlens = read_rows(join, rows)
    ids = torch.from_numpy(rows)
    online = material.encoded(rows, Batch(0, ids, ids, moments, tokens, cu_seqlens))
    assert torch.equal(online.cu_seqlens, cu_seqlens)
    assert (online.lengths == TOY.tokens).all()  # padded as the reference pads them, so to say
    torch.testing.assert_close(online.moments.float(), moments.float(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(online.tokens.float(), tokens.float(), atol=3e-2, rtol=1e-2)
