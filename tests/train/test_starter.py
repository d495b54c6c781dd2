"""`train init`: a config for columns of one's own, from which training starts as it is."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import ConfigError, load
from shards import (
    ColumnSpec,
    Layout,
    Norm,
    NotAColumn,
    ShardsError,
    ShardWriter,
    create_column,
    put_complete,
)
from tests.train import processes as jobs
from tests.train.conftest import TOKENS, words, write_column, write_columns
from train import __main__ as command
from train.config import TrainConfig
from train.model.dit import DiT
from train.run import model_config, open_columns, shape_of
from train.starter import SIZES

PARAMETERS = {  # of columns as the shipped configs have them
    "small": 32_000_000,
    "700m": 700_691_392,
    "1b": 1_049_217_600,
    "3b": 2_660_490_816,
}


def init(monkeypatch: pytest.MonkeyPatch, *parts: object) -> int | None:
    monkeypatch.setattr(sys, "argv", ["train", "init", *map(str, parts)])
    try:
        return command.main()
    finally:
        logging.getLogger().setLevel(logging.WARNING)


def named(cache: Path) -> tuple[object, ...]:
    return ("--latents", cache / "toy/vae", "--text", cache / "toy/text")


def test_training_starts_from_it_as_it_is(
    columns: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two steps of it, with the held-out source, and no file edited by hand."""
    monkeypatch.chdir(tmp_path)
    options = (*named(columns), "--size", "tiny", "--held-out", columns / "toy-val")
    assert init(monkeypatch, *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote train.yaml: 1,000 steps of 32 samples, 213 epochs of 150 rows",
        "next: python -m train train.yaml",
    ]
    config = load(TrainConfig, "train.yaml")
    assert (config.validation.source, config.data.lanes) == (str(columns / "toy-val"), 8)
    job = jobs.command(Path("train.yaml"), ["steps=2"], 1)
    assert job.wait() == [0], job.text()
    assert "done: step 2 of 2" in job.text()
    assert "validation" in job.text()
    assert (tmp_path / "runs/train-vae/checkpoints/step-00000002/manifest.json").is_file()


@pytest.mark.parametrize("size", SIZES)
def test_each_size_fits_its_columns(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of 16 x 32 x 32 and text of 2,048, as of the shipped configs."""
    rows = 70
    moments = np.zeros((rows, 32, 32, 32), np.float16)
    identity = {"source": "toy", "encoder": {"class": "AutoencoderKL", "path": "a\nsteps: 1"}}
    layout = Layout("moments", (32, 32, 32), 1)
    write_column(tmp_path / "toy/vae", ColumnSpec(identity, layout, Norm((0.0,), (1.0,))), moments)
    tokens = words(torch.zeros(2, 2048))
    spec = ColumnSpec({"source": "toy"}, Layout("tokens", (4, 2048), 1), None, 2)
    write_column(tmp_path / "toy/text", spec, [tokens] * rows, tokens)
    out = tmp_path / "new folder/of: mine #1.yaml"
    assert init(monkeypatch, *named(tmp_path), "--size", size, "--out", out) == 0
    config = load(TrainConfig, out)
    assert config.validation.source is None
    assert (config.global_batch, config.data.lanes) == (32 if size == "tiny" else 64, 4)
    assert config.accumulation(1) >= 1
    sources = open_columns(config, None)
    with torch.device("meta"):
        model = DiT(model_config(config, shape_of(sources)))
    assert (model.config.patch_size, model.config.pos_embed_max_size) == (2, 64)
    count = sum(p.numel() for p in model.parameters())
    expected = PARAMETERS.get(size)
    assert count < 4e6 if expected is None else count == pytest.approx(expected, rel=0.3)
    if size in ("700m", "1b", "3b"):
        assert count == expected


def test_nothing_is_overwritten(
    columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, link = tmp_path / "mine.yaml", tmp_path / "link.yaml"
    out.write_text("steps: 7")
    link.symlink_to(tmp_path / "nowhere")
    for path in (out, link):
        with pytest.raises(ConfigError, match="exists already, and is not overwritten"):
            init(monkeypatch, *named(columns), "--out", path)
    assert out.read_text() == "steps: 7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.yaml", "mine.yaml"]


def test_columns_that_cannot_be_trained_on(
    columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named errors, and no file."""
    other, bad = tmp_path / "other", tmp_path / "bad"
    write_columns(other / "toy", "another", 20, 3)
    write_columns(bad / "val", "val", 20, 3, model="another")
    spec = ColumnSpec({"source": "toy"}, Layout("moments", (8, 8, 8), 1), Norm((0.1,), (0.8,)))
    void = tmp_path / "void"
    digest = create_column(void, spec)
    writer = ShardWriter(void, spec, digest, 0, 150, "index")
    writer.put_block(np.zeros((150, 8, 8, 8), np.float16), np.full(150, 2, np.uint8))
    writer.commit({})
    put_complete(void, digest, 1, allow_failed=False)
    out = tmp_path / "train.yaml"
    text = ("--text", columns / "toy/text", "--out", out)
    for error, part, parts in (
        (ConfigError, "no row that is valid in both", ("--latents", void, *text)),
        (NotAColumn, "nothing", ("--latents", tmp_path / "nothing", *text)),
        (ShardsError, "source", ("--latents", other / "toy/vae", *text)),
        (ShardsError, "text", ("--latents", columns / "toy/text", *text)),
        (
            ShardsError,
            "made otherwise",
            ("--latents", columns / "toy/vae", *text, "--held-out", bad / "val"),
        ),
        (NotAColumn, "gone", ("--latents", columns / "toy/vae", *text, "--held-out", bad / "gone")),
    ):
        with pytest.raises(error, match=part):
            init(monkeypatch, *parts)
    assert not out.exists()


def test_ids_are_trained_by_eval(
    columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    spec = ColumnSpec({"source": "toy", "encoder": "t"}, Layout("ids", (TOKENS,), 1), None, 1)
    ids = np.array([3], np.int32)
    write_column(tmp_path / "ids", spec, [ids] * 150, ids)
    out = tmp_path / "train.yaml"
    latents = ("--latents", columns / "toy/vae", "--size", "tiny")
    assert init(monkeypatch, *latents, "--text", tmp_path / "ids", "--out", out) == 0
    assert f"next: python -m eval train {out}" in capsys.readouterr().out
    assert "which runs in the step" in out.read_text()
    assert load(TrainConfig, out).data.text == str(tmp_path / "ids")
