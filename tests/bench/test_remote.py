"""The bench of object stores: what is served, counted and made of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.reading.remote import report, run
from tests.bench.reading.remote.passes import WARM
from tests.bench.reading.remote.server import Delayed, Store
from tests.bench.reading.samples import BATCH, Samples

SAMPLES = Samples(2 * BATCH, (4, 4, 4), 16)
NO_PEERS = Path("no-peers/python")
PAYLOAD = SAMPLES.row_bytes(2)


@pytest.mark.parametrize("nginx", [True, False])
def test_every_byte_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nginx: bool
) -> None:
    """The first epoch fetches all, the second nothing; also where there is no nginx. All rows are
    those that were written.
    """
    if not nginx:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    bench = run.Bench(tmp_path, SAMPLES, NO_PEERS)
    with Store(tmp_path) as store, Delayed(store.port, 0.001) as late:
        found = dict(bench.passes("cache", late.port, store, check=True))
    assert list(found) == ["cold", "warm"]
    assert [each["bytes"] for each in found.values()] == [PAYLOAD, WARM * PAYLOAD]
    assert PAYLOAD < found["cold"]["fetched"] < 1.2 * PAYLOAD
    assert (found["warm"]["fetched"], found["warm"]["requests"]) == (0, 0)
    assert 0 < found["cold"]["opening"] < found["cold"]["first"] < found["cold"]["seconds"]


def test_a_way_that_delivers_other_rows_has_no_numbers(tmp_path: Path) -> None:
    bench = run.Bench(tmp_path, SAMPLES, NO_PEERS)
    bench.digest = "of others"
    with (
        Store(tmp_path) as store,
        pytest.raises(run.Failed, match="cache: delivers other rows than were written"),
    ):
        list(bench.passes("cache", store.port, store, check=True))


def test_every_way_is_measured_and_what_is_not_has_a_line(tmp_path: Path) -> None:
    """Without an environment of peers, which the tests do not have."""
    out, missing = tmp_path / "remote.json", tmp_path / "python"
    command = [
        sys.executable, "-m", "tests.bench.reading.remote", "--light", "--rounds", "1", "--networks", "near",
        "--json", str(out), "--peers", str(missing),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())["remote"]
    own = [name for way in run.WAYS if way not in run.PEERS for name, *_ in run.WAYS[way]]
    ways = found["networks"]["0 ms"]
    assert sorted(ways) == sorted(own)
    for name, each in ways.items():
        assert len(each["passes"]) == 1
        if "steady" not in name:  # so little may all have come before
            assert (each["bytes_a_byte"] > 0) == (name not in ("warm", "staged"))
    for peer in run.PEERS:
        assert f"there is no {missing}" in found["not_run"][peer]
        assert f"not run: {peer}: there is no" in result.stdout.replace("\n", " ")
    for promise in found["promises"]:
        assert f"{promise['what']}: " in result.stdout


def test_a_library_that_is_not_installed_or_fails_has_a_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/sh
case "$1" in -c) echo '{"litdata": "1"}' ;; *) echo broken >&2; exit 3 ;; esac
"""
    )
    python.chmod(0o755)
    bench = run.Bench(tmp_path, SAMPLES, python)
    assert bench.ways == [way for way in run.WAYS if way not in run.PEERS]
    assert f"mosaicml-streaming is not installed for {python}" in bench.not_run["mosaicml"]
    assert bench.not_run["litdata"] == "litdata could not be written:\nbroken\n"


def passes(seconds: float, opening: float = 0) -> dict[str, Any]:
    return {
        "bytes": 100, "first_bytes": 10, "seconds": seconds, "opening": opening, "first": 0.5, "cpu": 1.0, "epochs": 1,
        "requests": 256, "fetched": PAYLOAD,
    }  # fmt: skip


def test_ratios_are_of_one_round() -> None:
    ways = {name: [passes(2), passes(20)] for names in run.WAYS.values() for name, *_ in names}
    ways["cold"] = [passes(6, opening=2), passes(60, opening=20)]
    made = report.summary(ways, SAMPLES)
    cold = made["cold"]
    assert cold["over_plain"]["ratios"] == [0.5, 0.5]
    assert cold["over_plain_with_opening"]["ratios"] == pytest.approx([1 / 3, 1 / 3])
    assert cold["over_litdata_cold"]["ratios"] == [0.5, 0.5]
    ways["warm"] = [{**each, "epochs": 3, "bytes": 310} for each in ways["warm"]]
    assert report.summary(ways, SAMPLES)["warm"]["over_plain"]["ratios"] == pytest.approx(
        [300 / 1.5 / 50, 300 / 19.5 / 5]
    )
    assert cold["requests_a_sample"] == 2
    assert cold["bytes_a_byte"] == 1
    held = report.promises({"0 ms": made, "1.2 GB/s": made, "20 ms": made})
    assert len(held) == len(report.BARS)
    failed = [each["what"] for each in held if not each["holds"]]
    assert failed == [
        "0 ms, cold, over_plain", "0 ms, cold, over_plain_with_opening", "0 ms, cold, over_kept",
        "0 ms, cold, over_mosaicml_cold", "0 ms, cold, over_litdata_cold",
        "1.2 GB/s, cold, over_plain", "1.2 GB/s, cold, over_plain_with_opening", "1.2 GB/s, cold, over_kept",
        "1.2 GB/s, cold, over_mosaicml_cold", "1.2 GB/s, cold, over_litdata_cold",
        "20 ms, cold, over_plain", "20 ms, cold, over_mosaicml_cold",
        "20 ms, cold, over_litdata_cold",
    ]  # fmt: skip


@pytest.mark.parametrize("delay", ["0 ms", "20 ms"])
@pytest.mark.parametrize(("small", "none"), [("small", "none"), ("small, steady", "none, steady")])
@pytest.mark.parametrize(("slower", "holds"), [(3, False), (2, True)])
def test_a_small_cache_is_held_against_none(
    delay: str, small: str, none: str, slower: int, holds: bool
) -> None:
    """It is worse where it took longer in every round; in others chance may have chosen."""
    ways = {name: [passes(2)] * 3 for way in run.WAYS for name, *_ in run.WAYS[way]}
    ways[small] = [passes(2.5)] * slower + [passes(2)] * (3 - slower)
    figures = {delay: report.summary(ways, SAMPLES)}
    ratio = figures[delay][small]["over_" + none.replace(", ", "_")]
    assert ratio["ratio"] == pytest.approx(0.8)
    bar = f"{delay}, {small}, over_none"
    (held,) = [each for each in report.promises(figures) if each["what"].startswith(bar)]
    assert held["what"].endswith(", upper end of 95 %")
    assert held["holds"] == holds
    assert held["found"] == pytest.approx(1 if holds else 0.8)


def test_what_was_not_measured_promises_nothing() -> None:
    ways = {name: [passes(2)] for way in ("plain", "cache", "rows") for name, *_ in run.WAYS[way]}
    held = report.promises({"0 ms": report.summary(ways, SAMPLES)})
    assert [each["what"] for each in held] == [
        "0 ms, cold, over_plain", "0 ms, cold, over_plain_with_opening", "0 ms, cold, bytes_a_byte",
    ]  # fmt: skip
