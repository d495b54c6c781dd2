"""`fit` in a fork of the test's process: nothing is imported again, and no process group is left behind."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard

from shards import JoinedColumns, Order, exits
from shards.read.stream import Batch, Stream
from tests.forks import fork, leave_pytest, wait
from train.config import TrainConfig, run_folder
from train.loop import Batches
from train.ranks.world import World
from train.run import fit, open_columns, order_of

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the trainer sets it
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - which brings the whole of torch.compile


def forked(work: Callable[[], int | None], log: Path) -> tuple[int, str]:
    """Exit code of an entry point's work, and what it said, which also stands in `log`."""

    def alone() -> None:
        leave_pytest()
        exits.run(work)

    return wait(fork(alone, log)), log.read_text()


def fitted(config: dict[str, Any], **more: Any) -> tuple[int, str, Path]:
    """Exit code, what was said, and the run's folder; `more` are further arguments of `fit`."""
    checked = TrainConfig.model_validate(config)
    run = run_folder(checked, Path("tiny.yaml"))
    checked.runs.mkdir(parents=True, exist_ok=True)

    def work() -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        return fit(checked, run, **more)

    return *forked(work, checked.runs / "log"), run


def trained(config: dict[str, Any], **more: Any) -> Path:
    """The folder of a run that came to its end."""
    code, output, run = fitted(config, **more)
    assert code == 0, output
    return run


def losses(run: Path) -> dict[int, float]:
    """By step."""
    result = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in result if "loss" in r}


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def manifest(run: Path, step: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((step_folder(run, step) / "manifest.json").read_text())
    return result


def written_down(config: TrainConfig, path: Path) -> Batches:
    """The columns' batches, each appended to a file as position, samples, sources and rows."""

    def batches(position: int, world: World) -> Iterator[Batch]:
        sources = open_columns(config, None)
        order = order_of(config, sources)
        with Stream(sources, order, position=position, global_batch=config.global_batch) as stream:
            for batch in stream:
                record = [
                    batch.position, batch.samples.tolist(), batch.sources.tolist(), batch.rows.tolist()
                ]  # fmt: skip
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                yield batch

    return batches


def columns_of(config: TrainConfig) -> tuple[JoinedColumns, Order]:
    sources = open_columns(config, None)
    return sources, order_of(config, sources)
