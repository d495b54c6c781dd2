"""The benchmarks at toy size: both ways do the same work, and what is measured is there. Nothing is timed."""

import argparse
import json
from typing import Any

import pytest

from tests.bench.training import add_options, run_bench
from tests.bench.training.resume import FAR, NEAR
from tests.forks import ended


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both parts write down; the temporary folder is empty afterwards."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "work").mkdir()
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--light", "--rounds", "1", "--json", f"{folder}/r.json", "--folder", f"{folder}/work"]
    ended(lambda: run_bench(parser.parse_args(words)), folder / "log")
    assert not list((folder / "work").iterdir())
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    assert {"date", "machine", "threads", "light", "torch", "load_after"} < found.keys()
    return found


def check_ratio(found: dict[str, Any], rounds: int) -> None:
    assert len(found["ratios"]) == rounds
    assert 0 < found["ratio_low"] <= found["ratio"] <= found["ratio_high"]


@pytest.mark.slow
def test_the_trainer_and_the_bare_loop_do_the_same_work(results: dict[str, Any]) -> None:
    found = results["overhead"]
    check_ratio(found, 1)
    assert found["losses_apart"] < 1e-5
    assert 0 <= found["data_wait"] < 1
    assert all(spent > 0 for both in (found["cpu_s"], found["seconds"]) for spent in both.values())
    assert [p["promised"] for p in found["promises"]] == ["<= 1.03", "<= 0.01", "<= 0.0001"]


def test_every_other_step_updates_power_averages(results: dict[str, Any]) -> None:
    found = results["averages"]
    check_ratio(found, 1)
    assert found["updates"] == 3  # of 6 steps
    assert all(spent > 0 for both in (found["cpu_s"], found["seconds"]) for spent in both.values())
    assert [p["promised"] for p in found["promises"]] == ["<= 1.06"]


def test_resuming_is_measured_at_two_steps(results: dict[str, Any]) -> None:
    found = results["resume"]
    assert found["steps"] == [NEAR, FAR]
    for name, rounds in (("cpu", 1), ("seconds", 1), ("order", 2)):
        check_ratio(found[name], rounds)
    assert all(spent > 0 for spent in (*found["cpu_s"], *found["seconds_s"], *found["order"]["ms"]))
