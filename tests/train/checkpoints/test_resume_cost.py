"""Going on after a million steps costs what it costs after ten: counted, not timed."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shards import Order
from shards.read.batch_layout import Planner
from tests.bench.training.resume import FAR, NEAR, first_run, go_on
from tests.bench.training.runs import TOY
from train.config import TrainConfig
from train.report.records import forget_after
from train.run import open_columns

Runs = tuple[TrainConfig, dict[int, Path], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run after ten steps, and one that says of itself that it has made a million."""
    folder = tmp_path_factory.mktemp("runs")
    return *first_run(folder, TOY), folder / "scratch"


class Counted(Order):
    """An order that knows how many samples were asked of it."""

    asked = 0

    def at(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        self.asked += samples.size
        return super().at(samples)


def test_the_first_batch_is_all_that_is_looked_up_and_read(runs: Runs) -> None:
    config, _, _ = runs
    sources, batch = open_columns(config, None), config.global_batch
    first = {}
    for step in (NEAR, FAR):
        order = Counted(sources.valid_masks, config.seed, config.data.lanes)
        plan = next(Planner(sources, order, batch).plans(step * batch, batch))
        first[step] = order.asked, [reads.rows.size for reads in plan.reads]
        assert plan.position == step * batch
    assert first[NEAR] == first[FAR] == (batch, [batch, batch])  # of latents and of text


def test_no_more_is_read_after_a_million_steps(runs: Runs) -> None:
    config, reached, scratch = runs
    sizes = {s: (run / "metrics.jsonl").stat().st_size for s, run in reached.items()}
    assert sizes[FAR] - sizes[NEAR] > 2_000_000  # what the far run has written by then
    near, far = (go_on(config, run, step, scratch) for step, run in reached.items())
    assert [near.position, far.position] == [s * config.global_batch for s in (NEAR, FAR)]
    assert far.bytes_read == pytest.approx(near.bytes_read, abs=200_000)


RECORDS = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 1, 2, 5, 9))


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (1, 2), (4, 3), (5, 4), (9, 5), (10**6, 5)])
@pytest.mark.parametrize("cut", ["", '{"step": 10, "lo'])
def test_records_after_a_step_are_dropped(tmp_path: Path, step: int, kept: int, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(RECORDS + cut)
    forget_after(path, step)
    assert path.read_text() == "".join(RECORDS.splitlines(keepends=True)[:kept])


def test_nothing_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    for text in ("", '{"step": 1'):
        path.write_text(text)
        forget_after(path, 3)
        assert path.read_text() == ""
