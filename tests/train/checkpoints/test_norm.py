"""Runs whose latents are normalised by what was measured of their rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from configs import ConfigError, load
from eval.images.checkpoint import _Data
from shards.column.statistics import MeasuredNorm
from shards.errors import BadStatistics
from shards.format.checks import check
from shards.read.latents import draw
from shards.read.stream import read_rows
from shards.tools.norm import measure
from tests.train.conftest import launch, tiny_config
from tests.train.here import manifest
from train.checkpoints.identity import compared, training_of
from train.checkpoints.norm import norm_tensors
from train.config import DataConfig, TrainConfig
from train.run import expected_record, open_columns
from train.step.validate import open_held_out


@pytest.fixture
def measured(columns: Path, tmp_path: Path) -> tuple[Path, MeasuredNorm]:
    """A copy of the columns, of which the norm was measured."""
    copy = tmp_path / "cache"
    shutil.copytree(columns, copy)
    return copy, measure(copy / "toy/vae")


def config_of(columns: Path, runs: Path, norm: str, **changes: Any) -> TrainConfig:
    values = tiny_config(columns, runs, **changes)
    return TrainConfig.model_validate({**values, "data": {**values["data"], "norm": norm}})


def test_a_run_pins_the_norm_and_keeps_it(
    measured: tuple[Path, MeasuredNorm], tmp_path: Path
) -> None:
    columns, norm = measured

    def trained(steps: int, named: str) -> Any:
        data = {**tiny_config(columns, tmp_path)["data"], "norm": named}
        return launch(tmp_path, columns, f"steps={steps}", "save_every=2", data=data)

    process = trained(2, "measured")
    assert process.returncode == 0, process.stderr
    line = f"norm of latents: measured over {norm.rows:,} rows, divides by "
    assert line in process.stdout
    assert norm.digest[:12] in process.stdout
    data = manifest(tmp_path / "tiny-vae", 2)["data"]
    record = data["latents"]
    assert record["measured"]["digest"] == norm.digest
    assert record["norm"] == norm.norm.record()
    # what `eval generate` reads of the checkpoint and undoes is the same one
    assert check(_Data, data).latents.norm == norm.norm
    step = tmp_path / "tiny-vae/checkpoints/step-00000002"
    tensors = load_file(step / "norm.safetensors")
    assert {name: values.tolist() for name, values in tensors.items()} == {
        "shift": list(norm.norm.shift), "scale": list(norm.norm.scale)
    }  # fmt: skip
    # another norm is another run
    process = trained(4, "config")
    assert process.returncode == 2
    assert "data.latents.norm" in process.stderr
    # the checkpoint has a copy: the run goes on without the column's, also by its digest
    shutil.rmtree(columns / "toy/vae/norms")
    process = trained(4, norm.digest)
    assert process.returncode == 0, process.stderr
    assert "resumed from" in process.stdout


def test_a_run_with_its_columns_norm_has_no_file_of_it(
    measured: tuple[Path, MeasuredNorm], tmp_path: Path
) -> None:
    assert norm_tensors(expected_record(config_of(measured[0], tmp_path, "config"))) == {}


def test_latents_have_mean_0_and_deviation_1(
    measured: tuple[Path, MeasuredNorm], tmp_path: Path
) -> None:
    columns, norm = measured
    validation = {"source": str(columns / "toy-val")}
    config = config_of(columns, tmp_path, "measured", validation=validation)
    sources = open_columns(config, None)
    moments, _, _ = read_rows(sources, sources.valid_rows)
    mean, logvar = (part.double() for part in moments.chunk(2, 1))
    z = draw(moments, sources.norm, mean.float() * 0).double()
    scale = np.array(norm.norm.scale)[:, None, None]
    noise = (logvar.exp().numpy() * scale**2).mean((0, 2, 3))
    np.testing.assert_allclose(z.numpy().mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(z.numpy().var((0, 2, 3)) + noise, 1, rtol=1e-5)
    held_out = open_held_out(config, sources)
    assert held_out is not None
    assert held_out.norm == norm.norm


def test_the_norm_is_part_of_what_a_run_is_and_follows_the_latents(
    measured: tuple[Path, MeasuredNorm], tmp_path: Path
) -> None:
    columns, norm = measured

    def training(named: str) -> Any:
        return training_of(expected_record(config_of(columns, tmp_path, named)))

    plain, by_digest, by_name = map(training, ("config", norm.digest, "measured"))
    assert not compared(by_digest, by_name).all
    differences = compared(plain, by_name)
    assert not differences.beside
    assert any(".norm." in key for key in differences.follow)


def test_a_norm_that_was_not_measured(columns: Path, tmp_path: Path) -> None:
    for named in ("measured", "0" * 64):
        with pytest.raises(BadStatistics, match=r"python -m shards norm .*toy/vae`"):
            open_columns(config_of(columns, tmp_path, named), None)
    data = {**tiny_config(columns, tmp_path)["data"], "norm": "measured-per-place"}
    process = launch(tmp_path, columns, data=data)
    assert process.returncode == 2
    assert "--per-place" in process.stderr
    assert not (tmp_path / "tiny-vae/checkpoints").exists()
    with pytest.raises(ConfigError, match="norm"):
        load(DataConfig, None, ["latents=a", "text=b", "norm=mean"])
