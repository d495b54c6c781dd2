"""What a user can get wrong is said by every rank, before the ranks meet or a model is built, with exit code 2;
a disk that fills up later loses no more than it must.
"""

import errno
import json
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from configs import ConfigError
from tests.train.conftest import write_columns
from tests.train.faults import go, saved, scratch, step_folder
from train.model.config import ComputeConfig
from train.ready import check_compiler
from train.report import page
from train.report.metrics import Metrics

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


# What the machine lacks -----------------------------------------------------------------------------

COMPILED = ComputeConfig(compile=True)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def compiler(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return {"PATH": str(folder)}


def test_a_compiler_where_one_is_needed(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path / "nothing")}
    check_compiler(ComputeConfig(), True, nothing)
    with pytest.raises(ConfigError, match=r"no g\+\+, expected.*CXX, or set compute.compile=false"):
        check_compiler(COMPILED, False, nothing)
    with pytest.raises(
        ConfigError, match=r"no gcc and no clang.*by CC, or set compute.compile=false"
    ):
        check_compiler(COMPILED, True, nothing | {"CXX": "g++"})
    there = compiler(tmp_path, "g++")
    check_compiler(COMPILED, False, there)
    check_compiler(COMPILED, False, compiler(tmp_path, "c++-9") | {"CXX": "c++-9"})
    with pytest.raises(ConfigError, match="found no c\\+\\+-8,"):
        check_compiler(COMPILED, False, there | {"CXX": "c++-8"})


def test_every_rank_says_that_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with scratch() as folder:
        job = go(folder, 2, "compute.compile=true")
        assert job.wait() == [2, 2], job.text()
        for rank in (0, 1):
            assert "compute.compile: found no g++, expected" in job.text(rank)
            assert "Traceback" not in job.text(rank)
        assert not (folder / "tiny-vae").exists()


def test_room_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than one is refused before the first step, less than those that are kept is said."""

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, count))

    with scratch() as folder:
        free(1000)
        job = go(folder, 2, "steps=2")
        assert job.wait() == [2, 2], job.text()
        for rank in (0, 1):
            assert "NoRoom: " in job.text(rank)
            assert "1.00 kB are free, and a checkpoint takes " in job.text(rank)
            assert "Traceback" not in job.text(rank)
        assert not (folder / "tiny-vae").exists()
        free(1 << 40)
        assert go(folder, 1, "steps=2").wait() == [0]
        run = folder / "tiny-vae"
        (step,) = saved(run)
        files = [path.stat().st_size for path in step_folder(run, step).iterdir()]
        free(int(0.97 * sum(files)))  # headers and manifest are not counted
        job = go(folder, 1, "steps=4", "keep=2")
        assert job.wait() == [0], job.text()
        assert "not enough for the 2 that are kept at once" in job.text()
        free(int(0.5 * sum(files)))
        assert go(folder, 1, "steps=4", "keep=2").wait() == [0]  # it is done
        assert go(folder, 1, "steps=6", "keep=2").wait() == [2]
        assert saved(run) == [2, 4]
        # a save that was killed has the room that the next one gets, which removes it first
        unfinished = run / "checkpoints/.staging-step-00000006-0123"
        unfinished.mkdir()
        (unfinished / "state-00000-of-00001.safetensors").write_bytes(bytes(sum(files) // 2))
        assert go(folder, 1, "steps=6", "keep=2").wait() == [0]
        assert not unfinished.exists()


def test_a_folder_that_cannot_be_made() -> None:
    with scratch() as folder:
        job = go(folder, 2, "runs=/dev/null")
        assert job.wait() == [2, 2], job.text()
        for rank in (0, 1):
            assert "NotADirectoryError: " in job.text(rank)
            assert "'/dev/null/tiny-vae" in job.text(rank)
            assert "Traceback" not in job.text(rank)


def test_lines_that_cannot_be_written_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/path")

    monkeypatch.setattr(Metrics, "_append", full)
    monkeypatch.setattr(page, "atomic_write", full)
    with scratch() as folder:
        job = go(folder, 1, "steps=4", "log_every=1")
        assert job.wait() == [0], job.text()
        assert saved(folder / "tiny-vae")[-1] == 4
        assert job.text().count("a line could not be written ([Errno 28] No space left") == 1
        assert f"python -m train page {folder / 'tiny-vae'}" in job.text()


def test_a_line_is_written_whole_or_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.path.stat().st_size + 5, before[1]))
    try:
        metrics.write(2, loss=1.0)
        metrics.write(3, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.write(4, loss=1.0)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    assert len(caplog.records) == 1
    assert str(metrics.path) in caplog.text
