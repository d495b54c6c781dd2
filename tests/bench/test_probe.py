"""The benchmark of the probe at toy size: that it measures. Nothing is timed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.bench.evaluation.probe import LIGHT, bench


def test_it_measures_each_shape(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    bench(argparse.Namespace(json=path, folder=tmp_path, light=True))
    results = json.loads(path.read_text())["probe"]
    assert [result["shape"] for result in results] == [list(shape[:3]) for shape in LIGHT]
    assert all(result["cpu_s"] > 0 and result["peak_bytes"] > 1e7 for result in results)
    assert all(0.5 < result["linear_reference"]["value"] < 4 for result in results)
