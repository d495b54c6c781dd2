"""A run that an earlier version has written opens, goes on and samples: tests/golden/run.tar.gz, a folder with

    run.yaml             the config
    columns/toy          24 rows, and toy-val 8 rows, of one channel of 4 x 4
    run-vae              two steps of it, the checkpoint of the second, the metrics of both

All names of its files, the keys of its records and its exact bytes are as they were written then.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.processes import command
from train.checkpoints import checkpoint, folders

ARCHIVE = Path(__file__).parents[1] / "golden/run.tar.gz"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def train(golden: Path, *words: str, ranks: int = 1) -> str:
    places = (f"data.root={golden}/columns", f"validation.source={golden}/columns/toy-val")
    job = command(golden / "run.yaml", (*places, f"runs={golden}", *words), ranks)
    assert job.wait() == [0] * ranks, job.text()
    return job.text(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_goes_on(golden: Path, ranks: int) -> None:
    run = golden / "run-vae"
    earlier = run / "checkpoints/step-00000002"
    files = {path: path.read_bytes() for path in earlier.iterdir()}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    text = train(golden, "steps=4", "micro_batch=2", ranks=ranks)
    assert "step-00000002: step 2, position 16" in text
    assert {path: path.read_bytes() for path in earlier.iterdir()} == files
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(lines)] == lines
    path, manifest = checkpoint.newest(run / "checkpoints") or (None, {})
    assert path == run / "checkpoints/step-00000004"
    before = json.loads((earlier / "manifest.json").read_text())
    assert manifest["position"] == 32
    assert {key: manifest[key] for key in ("model", "data", "order", "objective", "seed")} == {
        key: before[key] for key in ("model", "data", "order", "objective", "seed")
    }


def test_the_run_is_finished(golden: Path) -> None:
    """Started again, it has nothing to do: its weights are taken as they are."""
    run = golden / "run-vae"
    train(golden)
    assert [path.name for path in folders.steps(run / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize("ema", [True, False])
def test_the_checkpoint_samples(golden: Path, ema: bool) -> None:
    model, manifest = checkpoint.load_for_sampling(golden / "run-vae", ema)
    name = "ema.safetensors" if ema else "weights.safetensors"
    stored = load_file(golden / "run-vae/checkpoints/step-00000002" / name)
    result = model.state_dict()
    assert result.keys() == stored.keys()
    assert all(torch.equal(result[key], stored[key]) for key in stored)
    assert manifest["step"] == 2
    with torch.no_grad():
        ends = torch.tensor([0, 3], dtype=torch.int32)
        out = model(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(3, 2), ends)
    assert out.shape == (1, 1, 4, 4)
    assert out.isfinite().all()
