"""What the benchmarks train: columns of made-up samples, a config of a run over them, and a process for each run."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.bench.reading.readers import write_columns
from tests.bench.reading.samples import Samples
from train.config import TrainConfig

FOR_EVER = 10**9  # steps
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Size:
    """A model, the samples that it sees, and how many of them a step."""

    model: dict[str, Any]
    samples: Samples
    batch: int


TOY = Size(
    {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_size": 48, "sample_size": 8},
    Samples(64, (8, 8, 8), 16),
    4,
)  # fmt: skip


def model(width: int, layers: int) -> dict[str, Any]:
    """A model of the reference's proportions: grouped queries, a gated MLP of four widths."""
    heads = width // 64
    return {
        "hidden_size": width, "layers": layers, "heads": heads, "kv_heads": max(1, heads // 4), "head_dim": 64,
        "mlp_size": 4 * width,
    }  # fmt: skip


def config_of(folder: Path, size: Size, **changes: Any) -> TrainConfig:
    """Write the columns into `folder`, and say how to train from them: the loss is logged at each step."""
    columns = folder / "columns"
    if not columns.exists():
        columns.mkdir(parents=True)
        write_columns(columns, size.samples)
    return TrainConfig.model_validate({
        "data": {
            "latents": str(columns / "latents"), "text": str(columns / "text"), "lanes": size.batch,
        },
        "model": size.model, "steps": FOR_EVER, "global_batch": size.batch, "micro_batch": size.batch,
        "log_every": 1, "save_every": FOR_EVER, "runs": str(folder), **changes,
    })  # fmt: skip


def load_all() -> None:
    """Import what a run imports when it starts, so that its forks do not."""
    import torch.utils.tensorboard

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = (
            "cpu"  # as the trainer sets it: read when deepspeed is imported
        )
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - which brings the whole of torch.compile


def forked(work: Callable[[], Found]) -> Found:
    """Do something in a process of its own, which has imported all that this one has: DeepSpeed starts once in each."""
    context = multiprocessing.get_context("fork")
    answers, answer = context.Pipe(duplex=False)

    def run() -> None:
        gc.freeze()  # what this process has left to its collector is not the fork's to end
        answer.send(work())

    process = context.Process(target=run)
    process.start()
    answer.close()  # what is left to write belongs to the child: its death is the end of the answers
    try:
        found: Found = answers.recv()
    except EOFError:
        raise RuntimeError("a run of the benchmark ended early; what it said is above") from None
    finally:
        process.join()
    return found
