"""The benchmarks at toy size: what they measure is there and means what it says. Nothing is timed."""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from shards import Column
from tests.bench.cost import cpu_of, median_interval, tree_cpu_seconds
from tests.bench.encoding import add_options, run_bench
from tests.bench.encoding.busy import Sleeper
from tests.bench.encoding.overhead import Bench, Case
from tests.forks import ended


def options(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([*map(str, words), "--no-ray"])


def results(tmp_path: Path, part: str, *words: object) -> dict[str, object]:
    """What a part writes down; the temporary folder is empty afterwards."""
    work = tmp_path / "work"
    work.mkdir()
    args = options(part, "--json", tmp_path / "r.json", "--folder", work, *words)
    print(ended(lambda: run_bench(args), tmp_path / "log"))
    assert not list(work.iterdir())
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"date", "cores", "load"} < found.keys()
    assert isinstance(found[part], dict)
    return dict(found[part])


def test_overhead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "overhead", "--rounds", 1, "--rows", 3)
    for name in ("encoder dominates", "demo"):
        case = found[name]
        assert isinstance(case, dict)
        assert len(case["ratios"]) == case["rounds"] == 1
        assert 0 < case["ratio_low"] <= case["ratio"] <= case["ratio_high"]
        assert set(case["stages_cpu_ms_a_row"]) >= {
            "scan",
            "write",
            "of which crc",
            "commit",
            "decode",
        }
        assert all(value >= 0 for value in case["stages_cpu_ms_a_row"].values())
        assert case["encoder_parameters"] > 10_000
    text = capsys.readouterr().out
    assert "claim: at most" in text
    assert "95 % interval" in text


def test_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "statistics", "--rounds", 1, "--rows", 3)
    for name in ("encoder dominates", "demo"):
        case = found[name]
        assert isinstance(case, dict)
        assert len(case["ratios"]) == case["rounds"] == 2
        assert 0 < case["ratio_low"] <= case["ratio"] <= case["ratio_high"]
        assert case["sums_alone_ms_a_row"] >= 0
    assert "sums over rows, demo: at most" in capsys.readouterr().out


def test_engine_and_bare_loop_do_the_same_work(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Case("demo", 32, 48, 40, 40))
    task = bench.task()
    bench.engine(task)
    assert bench.bare() == 40
    column = Column.open(task.targets["vae"].store, partial=True)
    assert column.snapshot.counts == {"ok": 40}
    assert column.layout.row_shape == (32, 4, 4)
    bench.close()


def test_busy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, times = Sleeper.rows, tmp_path / "times"

    def timed(self: Sleeper, images: Any) -> Any:  # in a fork
        start = time.monotonic()
        result = rows(self, images)
        with times.open("a") as file:
            print(time.monotonic() - start, file=file)
        return result

    monkeypatch.setattr(Sleeper, "rows", timed)
    found = results(tmp_path, "busy", "--shards", 2, "--rows", 20)
    inline = found["inline"]
    assert isinstance(inline, dict)
    assert inline["rows"] == 40
    assert 0 < inline["busy"] < 1
    spent = inline["busy"] / (1 - inline["busy"]) * sum(inline["waits_s"].values())
    slept = sum(map(float, times.read_text().split()))
    assert slept >= 40 * 0.012
    assert spent == pytest.approx(slept, rel=0.5)
    assert "busy at least" in capsys.readouterr().out
    assert Sleeper(0.0, 64).row_shape == (32, 8, 8)


def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path, "scale", "--shards", 3, "--rows", 8)
    inline, resume = found["inline"], found["resume"]
    assert isinstance(inline, dict)
    assert isinstance(resume, dict)
    assert math.isfinite(inline["driver_ms_a_shard"])
    assert inline["fixed_cpu_s"] > 0
    assert math.isfinite(inline["memory_growth"])
    assert all(resume[name] > 0 for name in ("resume_s", "whole_run_s", "status_s", "bytes_a_task"))
    assert "for 1,000,000 shards (4 sources" in capsys.readouterr().out


def test_the_interval_of_a_median() -> None:
    median, low, high = median_interval([1.0] * 20)
    assert (median, low, high) == (1.0, 1.0, 1.0)
    median, low, high = median_interval([float(i) for i in range(21)])
    assert median == 10
    assert 4 <= low < 10 < high <= 16


def test_cpu_of_children_is_counted() -> None:
    def spin() -> None:
        until = time.process_time() + 0.15
        while time.process_time() < until:
            pass

    def child() -> None:
        pid = os.fork()
        if not pid:
            spin()
            os._exit(0)
        assert sum(tree_cpu_seconds(os.getpid()).values()) > 0
        assert pid in tree_cpu_seconds(os.getpid())
        os.waitpid(pid, 0)

    assert cpu_of(child) >= 0.1
