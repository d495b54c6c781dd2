"""Work in several processes: results and reports come back, deaths and errors end it at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shards.errors import CorruptColumn, WorkerDied
from shards.tools.parallel import SILENT, Report, processes_for, spread


def double(task: int, report: Report) -> int:
    for _ in range(3):
        report(task)
    return 2 * task


def die(task: int, report: Report) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail_or_go_on(task: int, report: Report) -> None:
    if task == 0:
        raise CorruptColumn("column: object 7")
    while True:  # a large shard
        time.sleep(0.01)
        report(1)


@pytest.mark.parametrize("processes", [1, 2])
def test_results_and_reports(processes: int) -> None:
    counts: list[int] = []
    results = dict(spread(double, list(range(40)), processes, counts.append))
    assert results == {task: 2 * task for task in range(40)}
    assert sum(counts) == 3 * sum(range(40))


def test_a_process_that_is_killed_ends_the_work_with_a_message() -> None:
    with pytest.raises(WorkerDied, match="fewer --processes"):
        list(spread(die, list(range(6)), 2, SILENT.advance))


def test_an_error_ends_what_the_others_do() -> None:
    start = time.monotonic()
    with pytest.raises(CorruptColumn, match="object 7"):
        list(spread(fail_or_go_on, [0, 1, 2, 3], 2, SILENT.advance))
    assert time.monotonic() - start < 30


def test_how_many() -> None:
    assert processes_for(None, 0, 0) == 1
    assert processes_for(None, 100, 1000) == 1, "starting a process would cost more"
    assert processes_for(None, 100, 1 << 40) == len(os.sched_getaffinity(0))
    assert processes_for(None, 1, 1 << 40) == 1
    assert processes_for(7, 5, 0) == 5
