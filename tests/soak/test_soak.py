"""The runner's own work: sums, resumption, samples; a failure stops nothing and can be run again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.soak import kernels, registry, report, runner
from tests.soak.drawn import INPUTS, properties
from tests.soak.sweep import Case, Outcome, Sweep, limit, run, sample

NUMBERS = Sweep(
    "numbers", "a number", lambda: [(kind, n) for kind in ("a", "b", "rare") for n in of(kind)],
    lambda kind, n: fail_on(n), lambda case: str(case[0]),
)  # fmt: skip


def of(kind: str) -> range:
    return range(1 if kind == "rare" else 500)


def fail_on(number: int) -> None:
    if number % 100 == 99:
        raise ValueError(f"{number} is not borne")


def test_failures_are_kept_with_their_cases_and_stop_nothing() -> None:
    outcome = run(NUMBERS, NUMBERS.cases())
    assert outcome.cases == 1001
    assert outcome.groups == {"a": 500, "b": 500, "rare": 1}
    assert [case for case, _ in outcome.failures] == [
        (kind, n) for kind in "ab" for n in range(99, 500, 100)
    ]
    assert outcome.failures[0][1] == "ValueError: 99 is not borne"


def test_a_sample_is_the_same_again_and_has_every_group() -> None:
    first = sample(NUMBERS, 20)
    assert first == sample(NUMBERS, 20)
    assert len(set(first)) == 20
    assert {case[0] for case in first} == {"a", "b", "rare"}
    assert set(sample(NUMBERS, 20, seed=1)) != set(first)
    assert len(sample(NUMBERS, 5000)) == 1001


def test_a_case_that_hangs_is_a_failure() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no end after 0.1 s"), limit(0.1):
        time.sleep(20)
    assert time.monotonic() - started < 10


def test_chunks_hold_every_case_once() -> None:
    cases: list[Case] = [(n,) for n in range(1001)]
    parts = runner.chunks(cases)
    mixed = [case for _, part in parts for case in part]
    assert sorted(mixed) == cases
    assert mixed != cases  # so that an early end leaves an even sample
    assert parts == runner.chunks(cases)  # the same when it goes on
    assert [mixed[first] for first, _ in parts] == [part[0] for _, part in parts]
    assert len(parts) <= runner.CHUNKS


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STATE", tmp_path / "soak")
    state = runner.State("numbers", "code 1")
    state.add(0, Outcome(10, [1, 2], {"a": 10}, [(("a", 9), "why")], 1.5))
    state.add(10, Outcome(5, [2, 3], {"a": 1, "b": 4}, [], 0.5))
    with state.path.open("a") as file:
        file.write('{"code": "code 1", "first": 15, "ca')  # killed while it wrote
    again = runner.State("numbers", "code 1")
    assert again.done == state.done
    assert again.total() == Outcome(15, [1, 2, 2, 3], {"a": 11, "b": 4}, [(("a", 9), "why")], 2.0)
    again.add(15, Outcome(1))
    assert set(runner.State("numbers", "code 1").done) == {0, 10, 15}
    assert runner.State("numbers", "code 2").done == {}  # other code starts anew
    assert runner.State("numbers", "code 1", new=True).done == {}


def die(kind: str, number: int) -> None:
    if number == 3:
        os.kill(os.getpid(), 9)


def test_a_process_that_dies_fails_its_cases_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = Sweep("deadly", "a number", list, die, lambda case: "all")
    monkeypatch.setitem(registry.SWEEPS, "deadly", sweep)
    monkeypatch.setattr(runner, "METHOD", "fork")  # so that the processes know of it
    parts: list[tuple[int, list[Case]]] = [(n, [("a", n)]) for n in range(8)]
    outcomes = dict(runner.spread("deadly", parts))
    assert set(outcomes) == set(range(8))
    failed = {first: o.failures for first, o in outcomes.items() if o.failures}
    assert list(failed) == [3]
    assert failed[3][0][0] == ("a", 3)
    assert "died" in failed[3][0][1]


def test_drawn_inputs_are_counted_once_and_come_again() -> None:
    def small(number: int) -> None:
        assert number < 90

    sweep = properties("small", {"below 50": (small, (st.integers(0, 50),))}, seeds=3)
    assert sweep.cases() == [("below 50", 0), ("below 50", 1), ("below 50", 2)]
    digests = sweep.check("below 50", 1)
    assert digests == sweep.check("below 50", 1)
    assert digests is not None
    assert 10 < len(set(digests)) <= INPUTS
    broken = properties("broken", {"below 90": (small, (st.integers(0, 200),))}, seeds=1)
    outcome = run(broken, broken.cases())
    assert len(outcome.failures) == 1
    assert "AssertionError" in outcome.failures[0][1]


def test_the_report_tells_what_failed_and_how_to_run_it_again() -> None:
    case: tuple[Any, ...] = ("moments", "anew", "tear", 5, "5 write c/.tmp-*")
    outcomes = {
        "kills": Outcome(
            1200, [], {"tear write": 200, "kill before link": 1000}, [(case, "why")], 60
        ),
        "hostile": Outcome(2, [5, 6, 6], {"commits": 3}, [], 1),
    }
    text = report.text(outcomes)
    assert "| kills | a system call of a writer" in text
    whole = len(registry.SWEEPS["kills"].cases())
    assert f"| 1,200 of {whole:,} | 1,200 | 2 | 1 | 60 |" in text
    assert "| 2 | 1 | 0 | 1 |" in text  # inputs that are equal count once
    assert "kill before link 1,000, tear write 200" in text
    line = next(line for line in text.splitlines() if "--case" in line)
    assert tuple(json.loads(line.split("'")[1])) == case


def test_a_sweep_that_is_run_alone_leaves_the_lines_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case: Case = ("moments", "anew", "tear", 5, "5 write c/.tmp-*")
    before = report.text({"kills": Outcome(7, [], {"tear write": 7}, [(case, "why")], 60)})
    before = before.replace("## Kinds", "## Notes\n\nIt was mended.\n\nTwice.\n\n## Kinds")
    alone = Sweep(
        "deaths", "a death", lambda: [("a",)], die, lambda case: "all", not_run=lambda: ["b: none"]
    )
    monkeypatch.setitem(registry.SWEEPS, "deaths", alone)
    after = report.text({"deaths": Outcome(1, [], {"all": 1})}, before)
    assert set(before.splitlines()) < set(after.splitlines())
    assert "| deaths | a death | 1 of 1 |" in after
    assert "## Not run\n- deaths: b: none\n" in after
    again = report.text({"deaths": Outcome(1, [], {"all": 1}), "kills": Outcome(8)}, after)
    assert again.count("| kills |") == again.count("| deaths |") == 1
    assert "| 8 of " in again
    assert "why" not in again  # the failure was of the run before
    assert again.count("It was mended.\n\nTwice.") == 1


LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*(file for module in sys.modules.values() if (file := getattr(module, "__file__", None))), sep="\\n")
"""


@pytest.mark.parametrize(
    "module", ["shards.sweeps", "encode.faults", "train.faults", "eval.faults", "proxy.sweep"]
)
def test_a_sweep_begins_anew_when_a_module_that_it_loads_changes(module: str) -> None:
    sweep = {
        "shards": "kills", "encode": "encode", "train": "training", "eval": "generate",
        "proxy": "stores",
    }  # fmt: skip
    lines = subprocess.run(
        [sys.executable, "-c", LOADED, f"tests.{module}"], cwd=runner.ROOT, check=True, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(runner.ROOT)},
    ).stdout.splitlines()  # fmt: skip
    ours = {path for path in map(Path, lines) if path.is_relative_to(runner.ROOT)}
    ours = {path for path in ours if ".venv" not in path.parts}
    assert len(ours) > 20
    assert ours <= set(runner.files(sweep[module.partition(".")[0]]))


def test_every_sweep_is_large_enough() -> None:
    """The counts that the soak run promises, from the lists of cases alone."""
    counts = {name: len(sweep.cases()) for name, sweep in registry.SWEEPS.items()}
    assert counts["kills"] >= 1000
    assert counts["races"] >= 50
    assert counts["deaths"] >= 100
    assert counts["flips"] >= 50_000
    assert counts["cuts"] >= 50_000
    assert counts["hostile"] * 20 >= 100_000
    assert counts["order"] * INPUTS >= 10_000
    assert counts["checkpoints"] >= 30_000
    assert counts["training"] >= 150
    assert counts["generate"] >= 20
    assert counts["interrupts"] >= 200
    assert not kernels.flags() or counts["kernels"] >= 50
    for name in (
        "kills",
        "power",
        "errors",
        "reads",
        "flips",
        "cuts",
        "swaps",
        "checkpoints",
        "training",
        "generate",
        "kernels",
    ):
        cases = registry.SWEEPS[name].cases()
        assert len(set(cases)) == len(cases), f"{name} repeats a case"
