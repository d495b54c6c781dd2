"""The benchmark of distances at toy size: each one is measured. Nothing is timed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.bench.evaluation.distances import KINDS, bench
from tests.forks import ended


def test_it_measures_each_distance(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options = {"json": path, "folder": tmp_path, "rounds": 2, "threads": 1, "light": True}
    ended(lambda: bench(argparse.Namespace(**options)), tmp_path / "log")
    result = json.loads(path.read_text())["distances"]
    assert set(result["cpu_s"]) == {f"{kind} 100" for kind in KINDS}
    assert result["promises"][0]["promised"] == "<= 2"
