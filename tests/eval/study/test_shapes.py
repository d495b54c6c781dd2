"""A study of latent spaces of other shapes, from tars to the page: one training config, another column an entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shards import Column
from tests.encode.tiny_models import save_dc, save_hunyuan, save_rae, saved
from tests.eval.study.small_study import SIDE, study, study_yaml, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # fifteen processes that import torch

SD = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 16, 16, 16], "latent_channels": 4, "norm_num_groups": 4, "sample_size": SIDE,
    "scaling_factor": 0.18215,
}  # fmt: skip


def test_one_config_serves_flux_sd_hunyuan_dc_and_rae(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path)
    models = {
        "sd": ("moments", "AutoencoderKL", saved(folder / "sd", "diffusers", "AutoencoderKL", SD)),
        "hunyuan": ("moments", "AutoencoderKLHunyuanImage", save_hunyuan(folder / "hunyuan")),
        "dc": ("latents", "AutoencoderDC", save_dc(folder / "dc")),
        "rae": ("latents", "AutoencoderRAE", save_rae(folder / "rae")),
    }
    entries = {"plain": "plain"} | {
        name: {
            "latents": name, "kind": kind, "encoder": {"class": cls, "path": str(path)}, "resolution": SIDE,
        }
        for name, (kind, cls, path) in models.items()
    }  # fmt: skip
    train = yaml.safe_load((folder / "train.yaml").read_text())
    for key in ("patch_size", "pos_embed_max_size", "sample_size"):
        train["model"].pop(key, None)
    train["model"] |= {"patch_size": "auto", "image_tokens": 16}
    train["flow"] = {"shift": "auto"}
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    config = study_yaml(folder, entries=entries)
    result = study("run", config, "--out", folder / "out", "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    report = study("report", config, "--out", folder / "out")
    assert report.returncode == 0, report.stdout + report.stderr
    data = json.loads((folder / "out/study.json").read_text())
    names = [entry["name"] for entry in data["entries"]]
    assert data["complete"]
    shapes = {name: Column.open(folder / "cache/pets" / name).layout.row_shape for name in names}
    assert len(set(shapes.values())) > 2, shapes
    differ = data["differ"]["training"]
    shifts = dict(zip(names, differ["flow.shift"], strict=True))
    for name, shape in shapes.items():
        channels = shape[0] // 2 if name not in ("dc", "rae") else shape[0]
        values = channels * shape[1] * shape[2]
        assert shifts[name] == pytest.approx((values / 4096) ** 0.5, rel=1e-3)
        start = (folder / f"out/logs/train/{name}/seed0.log").read_text()
        assert "tokens of a picture:" in start
        assert f"shift {shifts[name]:.4g}" in start
    assert set(differ) & {"tokens", "model.patch_size"}
    page = (folder / "out/report.html").read_text()
    assert "flow.shift" in page
