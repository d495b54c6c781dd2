"""Small columns, written by the real writer, and a run of the command on them."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from shards import ColumnSpec, Layout, Norm, ShardWriter, create_column, put_complete, put_empty
from shards.format.layout import ZARR_ROWS
from tests.demo.drawn import data  # noqa: F401 - a fixture
from tests.train import processes as jobs

# The first backward pass of a process starts autograd's threads, one for each kind of device that is known by then.
# FlexAttention makes another one known, after which no fork could train: so the first pass comes before it.
torch.ones(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call, unused-ignore]  # torch's

ROOT = Path(__file__).parents[2]
CHANNELS, SIDE, WIDTH, TOKENS = 4, 8, 12, 6
TINY = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_size": 48}


def words(values: torch.Tensor) -> np.ndarray[Any, Any]:
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


def write_column(path: Path, spec: ColumnSpec, values: Any, empty: Any = None) -> None:
    digest = create_column(path, spec)
    if empty is not None:
        put_empty(path, spec, empty)
    writer = ShardWriter(path, spec, digest, 0, len(values), "index")
    for start in range(0, len(values), ZARR_ROWS):
        block = values[start : start + ZARR_ROWS]
        writer.put_block(block, np.zeros(len(block), np.uint8))
    writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)


def write_columns(folder: Path, source: str, rows: int, seed: int, model: str = "toy") -> None:
    """`folder/vae` and `folder/text`: latents whose channel means depend on the first token of the caption."""
    g = torch.Generator().manual_seed(seed)
    topic = torch.randn(rows, CHANNELS, generator=g)
    mean = 0.5 * torch.randn(rows, CHANNELS, SIDE, SIDE, generator=g) + topic[:, :, None, None]
    moments = torch.cat([mean, torch.full_like(mean, -6.0)], 1).half().numpy()
    lengths = torch.randint(2, TOKENS + 1, (rows,), generator=g).tolist()
    captions = [torch.randn(n, WIDTH, generator=g) for n in lengths]
    for caption, t in zip(captions, topic, strict=True):
        caption[0, :CHANNELS] = t
    layout = Layout("moments", (2 * CHANNELS, SIDE, SIDE), 1)
    identity = {"source": source, "encoder": model}
    write_column(folder / "vae", ColumnSpec(identity, layout, Norm((0.1,), (0.8,))), moments)
    spec = ColumnSpec(
        {"source": source, "encoder": "text"}, Layout("tokens", (TOKENS, WIDTH), 1), None, 2
    )
    write_column(folder / "text", spec, [words(c) for c in captions], words(torch.zeros(2, WIDTH)))


@pytest.fixture(scope="session")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a training source `toy` and a held-out source `toy-val`."""
    cache = tmp_path_factory.mktemp("cache")
    write_columns(cache / "toy", "toy", 150, 1)
    write_columns(cache / "toy-val", "toy-val", 20, 2)
    return cache


def tiny_config(columns: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "latents": str(columns / "toy/vae"),
            "text": str(columns / "toy/text"),
            "lanes": 8,
        },
        "model": TINY,
        "optim": {"lr": 3e-3},
        "ema": {"decay": 0.9},
        "steps": 20,
        "global_batch": 16,
        "micro_batch": 4,
        "log_every": 1,
        "save_every": 10,
        "runs": str(runs),
        **changes,
    }


def launch(
    folder: Path, columns: Path, *words: str, ranks: int = 1, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """Run `train` on the tiny config in `folder`, as a user would, but each rank in a fork of this process. The exit
    code is that of the first rank that failed; stdout and stderr are those of all ranks, together in both."""
    job = jobs.command(write_config(folder, columns, **changes), words, ranks)
    code = next((code for code in job.wait() if code), 0)
    return subprocess.CompletedProcess(words, code, job.text(), job.text())


def write_config(folder: Path, columns: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(columns, folder, **changes)))
    return path
