"""What a user can get wrong is said by every rank, before the ranks meet or a model is built, with exit code 2."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import write_columns
from tests.train.faults import go, saved, scratch

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ranks that do not divide the batch": (
        {"global_batch": 32, "data.lanes": 16},
        "a world of 3 ranks does not divide the global batch 32",
    ),
    "micro-batches that do not": (
        {"global_batch": 24, "micro_batch": 5},
        "global_batch 24 cannot be cut into micro-batches of 5 on 3 ranks",
    ),
    "a batch of no whole lanes": ({"global_batch": 12}, "no multiple of data.lanes 8"),
    "an unknown key of DeepSpeed": (
        {"deepspeed": "{zero_optimization: {stage: 2, overlap: true}}"},
        "deepspeed.zero_optimization.overlap: unknown key",
    ),
    "a key of DeepSpeed that is ours": (
        {"deepspeed": "{zero_optimization: {stage: 2}, gradient_clipping: 1}"},
        "set optim.clip instead",
    ),
    "an unknown key of ours": ({"guard.patience": 3}, "guard.patience: unknown key"),
    "columns of different sources": (
        {"data.text": "OTHER/text"}, "OTHER/text"
    ),
    "latents that no patches cover": ({"model.patch_size": 3}, "patches of 3"),
    "tokens of more values than the model is wide": (
        {"model.patch_size": 4}, "4 x 4 x 4 = 64 values and a model of width 32",
    ),
    "two estimates of the latent": (
        {"flow.prediction": "latent", "flow.precondition": "true"}, "expected one of them",
    ),
    "a shift below zero": ({"flow.shift": -1}, "flow.shift: found -1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    write_columns(folder, "another", 150, 1)
    return folder


@pytest.mark.parametrize("fault", BAD)
def test_every_rank_says_what_is_wrong(other: Path, fault: str) -> None:
    changes, message = BAD[fault]
    words = [f"{key}={value}".replace("OTHER", str(other)) for key, value in changes.items()]
    with scratch() as folder:
        job = go(folder, 3, "global_batch=24", *words)
        assert job.wait() == [2, 2, 2], job.text()
        for rank in range(3):
            assert message.replace("OTHER", str(other)) in job.text(rank)
            assert "Traceback" not in job.text(rank)
        assert not (folder / "tiny-vae").exists()


def test_a_column_that_changed_since_the_checkpoint() -> None:
    with scratch() as folder:
        write_columns(folder / "toy", "toy", 150, 1)
        columns = {"latents": str(folder / "toy/vae"), "text": str(folder / "toy/text"), "lanes": 8}
        job = go(folder, 1, "steps=2", data=columns)
        assert job.wait() == [0], job.text()
        shutil.rmtree(folder / "toy/vae")
        shutil.rmtree(folder / "toy/text")
        write_columns(folder / "toy", "toy", 150, 2)  # other values of the same source and encoder
        job = go(folder, 2, "steps=4", data=columns)
        assert job.wait() == [2, 2], job.text()
        for rank in (0, 1):
            assert str(folder / "toy/vae") in job.text(rank)
            assert "Traceback" not in job.text(rank)
        assert saved(folder / "tiny-vae") == [2]
