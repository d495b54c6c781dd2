"""Runs that train on the rows that a mask names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import load
from shards import SourceMismatch
from shards.tools.mask import make_mask
from tests.train.conftest import launch, tiny_config
from tests.train.here import manifest
from train.checkpoints.identity import compared, training_of, without_seed
from train.config import DataConfig, TrainConfig
from train.plan.survey import of_columns
from train.run import expected_record, open_columns, order_of
from train.step.validate import open_held_out

KEPT = np.arange(0, 150, 3)


def mask_of(columns: Path, path: Path, rows: Any, source: str = "toy") -> str:
    np.save(path.with_suffix(".npy"), rows)
    make_mask(columns / source / "vae", path.with_suffix(".npy"))[0].put(path)
    return str(path)


def config_of(columns: Path, runs: Path, mask: Any = None, **changes: Any) -> TrainConfig:
    values = tiny_config(columns, runs, **changes)
    return TrainConfig.model_validate({**values, "data": {**values["data"], "mask": mask}})


def test_a_run_trains_on_the_rows_that_are_named_and_goes_on_with_no_others(
    columns: Path, tmp_path: Path
) -> None:
    def trained(steps: int, mask: str) -> Any:
        data = {**tiny_config(columns, tmp_path)["data"], "mask": mask}
        return launch(tmp_path, columns, f"steps={steps}", "save_every=2", data=data)

    mask = mask_of(columns, tmp_path / "mask", KEPT)
    process = trained(2, mask)
    assert process.returncode == 0, process.stderr
    assert f"mask {mask}: 50 of the 150 valid rows are read" in process.stdout
    record = manifest(tmp_path / "tiny-vae", 2)
    again = make_mask(columns / "toy/text", tmp_path / "mask.npy")[0]
    assert record["data"]["masks"] == [again.digest]
    # of other rows: refused before anything is built
    process = trained(4, mask_of(columns, tmp_path / "other", KEPT[1:]))
    assert process.returncode == 2
    assert "data.masks" in process.stderr
    # the same rows of another file: the same run
    process = trained(4, mask_of(columns, tmp_path / "same", KEPT[::-1]))
    assert process.returncode == 0, process.stderr
    assert "resumed from" in process.stdout


def test_every_row_of_the_order_is_named(columns: Path, tmp_path: Path) -> None:
    config = config_of(columns, tmp_path, mask_of(columns, tmp_path / "mask", KEPT))
    sources = open_columns(config, None)
    order = order_of(config, sources)
    assert order.epoch_samples == 48  # of 50, in eight lanes
    rows = np.concatenate([order(p, 16)[1] for p in range(0, 48 * 3, 16)])
    assert set(rows.tolist()) == set(KEPT.tolist())


def test_the_mask_is_part_of_what_a_run_is(columns: Path, tmp_path: Path) -> None:
    def training(mask: str | None) -> Any:
        return training_of(expected_record(config_of(columns, tmp_path, mask)))

    masked = training(mask_of(columns, tmp_path / "a", KEPT))
    rest = training(mask_of(columns, tmp_path / "b", KEPT[1:]))
    whole, everything = training(None), training(mask_of(columns, tmp_path / "c", range(150)))
    for other in (whole, rest):
        beside = compared(masked, other).beside
        assert {"data.sources.0.masks", "order.valid_rows"} <= beside.keys()
        assert without_seed(masked) != without_seed(other)
    # that leaves nothing out: the same rows, hence the same training
    assert not compared(whole, everything).all
    assert without_seed(whole) == without_seed(everything)


def test_a_plan_shows_how_many_rows_are_read(columns: Path, tmp_path: Path) -> None:
    mask = mask_of(columns, tmp_path / "mask", KEPT)
    data = of_columns(config_of(columns, tmp_path, mask))
    assert data.rows == 50
    assert any("50 of the 150 valid rows" in note for note in data.notes)


def test_one_source_is_parted_into_training_and_validation(
    columns: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = mask_of(columns, tmp_path / "training", KEPT)
    held_out = np.setdiff1d(np.arange(150), KEPT)
    validation = {
        "source": str(columns / "toy"),
        "mask": mask_of(columns, tmp_path / "held", held_out),
    }
    config = config_of(columns, tmp_path, training, validation=validation)
    sources = open_columns(config, None)
    join = open_held_out(config, sources)
    assert join is not None
    assert join.valid_rows.tolist() == held_out.tolist()
    assert sources.valid_rows.tolist() == KEPT.tolist()
    assert not caplog.messages
    # without a mask of its own, the rows of the validation are those of the training, too
    del validation["mask"]
    assert open_held_out(config_of(columns, tmp_path, training, validation=validation), sources)
    (message,) = caplog.messages
    assert message.startswith(
        f"validation.source: {len(KEPT)} of the 150 rows of {columns / 'toy'} "
    )
    caplog.clear()
    # the training mask is no matter of another source that is validated on
    config = config_of(columns, tmp_path, training, validation={"source": str(columns / "toy-val")})
    join = open_held_out(config, sources)
    assert join is not None
    assert len(join.valid_rows) == 20


def test_a_mask_of_another_source_stops_a_run_at_once(columns: Path, tmp_path: Path) -> None:
    mask = mask_of(columns, tmp_path / "mask", range(9), "toy-val")
    with pytest.raises(SourceMismatch, match="a mask of source toy-val"):
        open_columns(config_of(columns, tmp_path, mask), None)
    data = {**tiny_config(columns, tmp_path)["data"], "mask": mask}
    process = launch(tmp_path, columns, data=data)
    assert process.returncode == 2
    assert "SourceMismatch" in process.stderr
    assert not (tmp_path / "tiny-vae/checkpoints").exists()


def test_masks_beside_the_columns_of_each_source(tmp_path: Path) -> None:
    words = ["root=/cols", "sources=[long, short]", "latents=flux", "text=t", "mask=aesthetic.mask"]
    masks = load(DataConfig, None, words).resolved().masks
    assert masks == ("/cols/long/aesthetic.mask", "/cols/short/aesthetic.mask")
    words[-1] = "mask=[/elsewhere/one.mask, aesthetic.mask]"
    masks = load(DataConfig, None, words).resolved().masks
    assert masks == ("/elsewhere/one.mask", *masks[1:])
    assert load(DataConfig, None, ["latents=a", "text=b"]).resolved().mask is None
    assert json.dumps(load(DataConfig, None, ["latents=a", "text=b", "mask=m"]).masks) == '["m"]'
