"""The benchmark of the feature pass at toy size: both ways give the same features. Nothing is timed."""

import argparse
import json
from pathlib import Path

from tests.bench.evaluation.features import bench
from tests.forks import ended


def test_it_measures_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options = {"json": path, "folder": tmp_path, "rounds": 2, "threads": 1, "light": True}
    ended(lambda: bench(argparse.Namespace(**options)), tmp_path / "log")
    found = json.loads(path.read_text())["features"]
    assert found["largest_difference"] < 1e-4
    assert len(found["cpu"]["ratios"]) == len(found["kept"]["ratios"]) == 2
    assert found["promises"][0]["promised"] == "<= 1.05"
