"""The linear reference of a run: what it is, where it is kept, and that nothing of the training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import Norm, open_join
from shards.column.statistics import MeasuredNorm
from shards.format.atomic import seal
from shards.probe import ColumnRows, pooled_text
from shards.probe.held_out import held_out_reference
from tests.shards.probe.known import SIGMAS, ArrayRows, mixed, white
from tests.train.conftest import TINY, write_columns
from tests.train.here import losses, trained
from train.config import TrainConfig
from train.model.flow import FlowConfig, fixed_sigmas
from train.step.linear_reference import NAME, LinearReference, over, reference_of_run


def test_held_out_rows_of_known_spectra_and_captions() -> None:
    shape = (8, 8, 8)
    residual, variances = mixed(white(2304, shape))
    generator = np.random.default_rng(5)
    text = generator.standard_normal((2304, 6)).astype(np.float32)
    maps = generator.standard_normal((6, *shape)).astype(np.float32)
    latents = residual + np.einsum("nd,dchw->nchw", text, maps, optimize=True) + 3
    noise = np.full_like(latents, 0.1)
    training, held_out = (
        ArrayRows(latents[part], noise[part]) for part in (slice(2048), slice(2048, None))
    )
    truth = [np.mean((v := variances + 0.1) / ((1 - s) ** 2 * v + s**2)) for s in SIGMAS]
    given = held_out_reference(training, held_out, SIGMAS, (text[:2048], text[2048:]))
    np.testing.assert_allclose(given.levels, truth, rtol=0.02)
    plain = held_out_reference(training, held_out, SIGMAS)
    assert np.mean(plain.levels) > 1.1 * np.mean(truth)
    assert plain.text_r2 is None
    assert given.text_r2 is not None
    explained = np.square(maps).sum() / np.prod(shape)
    assert given.text_r2 == pytest.approx(explained / (explained + variances.mean()), abs=0.02)


def config_of(folder: Path, **validation: Any) -> dict[str, Any]:
    return {
        "data": {"latents": f"{folder}/a/vae", "text": f"{folder}/a/text", "lanes": 8},
        "model": TINY | {"patch_size": 2}, "steps": 4, "global_batch": 8, "micro_batch": 8,
        "log_every": 1, "save_every": 2, "runs": str(folder / "runs"),
        "metrics": {"to": []},
        "validation": {"source": f"{folder}/b", "every": 2, "rows": 40, "batch": 8} | validation,
    }  # fmt: skip


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    write_columns(folder / "a", "a", 200, 1)
    write_columns(folder / "b", "b", 50, 2)
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, bytes]:
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_a_run_keeps_it_and_trains_as_without(columns: Path, tmp_path: Path) -> None:
    config = config_of(columns) | {"runs": str(tmp_path / "with")}
    run = trained(config)
    record = json.loads((run / NAME).read_bytes())
    checks = [line["validation"] for line in lines(run) if line.get("validation")]
    assert len(checks) == 2
    assert record["condition"] == "caption"
    assert record["text_r2"] > 0.1  # one token of several says the channel means
    for check in checks:
        ratios = [a / b for a, b in zip(check["levels"], record["levels"], strict=True)]
        assert check["levels_over_reference"] == pytest.approx(ratios)
        mean = sum(check["levels"]) / sum(record["levels"])
        assert check["over_reference"] == pytest.approx(mean)
    page = (run / "page.html").read_text()
    assert "of the linear reference" in page
    assert "ranks nothing by itself" in " ".join(page.split())

    without = trained(config_of(columns, reference=False) | {"runs": str(tmp_path / "without")})
    assert not (without / NAME).exists()
    assert losses(without) == losses(run)
    assert weights_of(without) == weights_of(run)
    assert "over_reference" not in next(v for x in lines(without) if (v := x.get("validation")))
    assert "ranks nothing" not in (without / "page.html").read_text()


def joins(folder: Path) -> tuple[Any, Any]:
    return tuple(open_join(f"{folder}/{name}/vae", f"{folder}/{name}/text") for name in "ab")


def test_it_is_read_again_where_it_is_of_the_same_rows(
    columns: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrainConfig.model_validate(config_of(columns))
    first = reference_of_run(config, tmp_path, *joins(columns))
    assert first is not None
    marked = {**json.loads((tmp_path / NAME).read_bytes()), "schedule": 123.0}
    del marked["digest"]
    (tmp_path / NAME).write_bytes(seal(marked))
    again = reference_of_run(config, tmp_path, *joins(columns))
    assert again is not None
    assert again.schedule == 123.0  # that of the file
    fewer = TrainConfig.model_validate(config_of(columns, rows=30))
    other = reference_of_run(fewer, tmp_path, *joins(columns))
    assert other is not None
    assert other.schedule != 123.0
    (tmp_path / NAME).write_bytes(b"{}")  # damaged
    assert reference_of_run(fewer, tmp_path, *joins(columns)) == other


def test_it_is_of_latents_of_the_norm_that_was_measured(columns: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(config_of(columns))
    training, held_out = joins(columns)
    first = reference_of_run(config, tmp_path, training, held_out)
    shift, scale = training.norm.arrays
    channels, height, width = training.latent_shape
    gain = np.linspace(0.02, 0.05, channels * height * width).reshape(training.latent_shape)
    norm = Norm(
        np.broadcast_to(shift, training.latent_shape).tolist(), (gain * scale).tolist()
    )  # by place
    training.measured = MeasuredNorm("measured-per-place", norm, 200, "c" * 64, "d" * 64)
    other = reference_of_run(config, tmp_path, training, held_out)
    assert first is not None
    assert other is not None  # not the one that is kept
    assert max(other.levels) < 0.1 * max(first.levels)
    latents = [ColumnRows(join.latents, join.valid_rows, norm) for join in (training, held_out)]
    rows = latents[0].rows, latents[1].rows[:40]
    texts = tuple(
        pooled_text(join.text, ids) for join, ids in zip((training, held_out), rows, strict=True)
    )
    held = ColumnRows(held_out.latents, rows[1], norm)
    expected = held_out_reference(latents[0], held, fixed_sigmas(), (texts[0], texts[1]))
    assert other.levels == pytest.approx(expected.levels)


def test_too_few_rows_are_a_line_and_no_reference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_columns(tmp_path / "a", "a", 40, 1)
    write_columns(tmp_path / "b", "b", 50, 2)
    caplog.set_level("INFO")
    config = TrainConfig.model_validate(config_of(tmp_path))
    assert reference_of_run(config, tmp_path, *joins(tmp_path)) is None
    assert "40 training rows, 64 are needed" in caplog.text
    assert not (tmp_path / NAME).exists()


def test_it_is_weighted_as_the_loss_is() -> None:
    reference = LinearReference({}, "caption", (1.0,) * 8, 1.0, 0.5)
    sigma = torch.tensor(fixed_sigmas(), dtype=torch.float64)
    assert reference.losses(FlowConfig()) == (1.0,) * 8
    estimate = reference.losses(FlowConfig(precondition=True))
    assert estimate == pytest.approx(sigma.square().tolist())
    weighted = reference.losses(FlowConfig(weighting="sigma_sqrt"))
    assert weighted == pytest.approx((sigma**-2).tolist())
    assert over((2.0, 3.0), (4.0, 1.0)) == (0.5, 3.0)
