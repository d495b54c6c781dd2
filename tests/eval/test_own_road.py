"""Columns by classes of a user's own all the way: encoded, verified, converted, trained on, sampled, decoded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from encode.config import EncodeConfig
from encode.errors import ModelNotUsable
from encode.run.job import run as encode
from eval.commands import main
from eval.images.encoders import vae_of
from eval.images.generate import Request, generate
from eval.reconstruct import reconstruct
from shards import Column, Norm
from shards.tools.convert import convert
from shards.tools.verify import examine
from tests.encode.adapters import ADAPTERS, SIDE, own, save_weights
from tests.encode.toy import save_gemma, write_source
from tests.train.conftest import TINY, tiny_config
from tests.train.here import forked, manifest, trained

GRIDS = {"Tokens": (1, "1d-rope"), "Posterior.load": (1, "1d-rope"), "Pixels": (4, "ape")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A column by each adapter and one of text, of 24 pictures, made in one pass."""
    folder = tmp_path_factory.mktemp("own")
    save_weights(folder / "models")
    gemma = {"class": "GemmaModel", "path": str(save_gemma(folder / "gemma"))}
    columns: dict[str, Any] = {"text": {"kind": "tokens", "encoder": gemma, "max_tokens": 24}}
    for name, (kind, _, _) in ADAPTERS.items():
        encoder = own(name, folder / "models")
        columns[name] = {"kind": kind, "encoder": encoder, "resolution": SIDE}
    config = {
        "root": str(folder), "sources": {"toy": write_source(folder / "tars", 2, 12)}, "columns": columns,
        "shard_rows": 1024, "engine": {"executor": "inline", "device": "cpu"},
    }  # fmt: skip
    assert encode(EncodeConfig.model_validate(config)) == 0
    return folder


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_whole_road(name: str, cache: Path, tmp_path: Path) -> None:
    """One config for all; what follows the latent is its patch and its positions."""
    kind, shape, _ = ADAPTERS[name]
    column, cls = Column.open(cache / "toy" / name), f"tests.encode.adapters:{name}"
    assert examine(column.path).faults == []
    stored = convert(column.path, tmp_path / "stored", backend="webdataset")
    assert (stored.layout.row_shape, stored.spec.norm) == (shape, column.spec.norm)
    rows = np.arange(5)
    assert np.array_equal(stored.read(rows), column.read(rows))

    config = tiny_config(
        cache, tmp_path, steps=4, save_every=4,
        model={**TINY, "hidden_size": 64, "heads": 4, "patch_size": "auto", "image_tokens": 64},
        data={"latents": str(column.path), "text": str(cache / "toy/text"), "lanes": 8},
        validation=None,
    )  # fmt: skip
    run = trained(config)
    model = manifest(run, 4)["model"]
    assert (model["patch_size"], model["pos_embed"]) == GRIDS.get(name, (1, "ape"))
    said = next(line for line in (tmp_path / "log").read_text().splitlines() if "positions" in line)
    assert ("1d-rope" in said) == (shape[1] == 1), said

    (tmp_path / "prompts.txt").write_text("picture number 3 of a toy source\nanother\n")
    request = Request(
        checkpoint=run, prompts=tmp_path / "prompts.txt", save_dir=tmp_path / "images", num_inference_steps=2,
        allow_class=[cls],
    )  # fmt: skip
    with pytest.raises(ModelNotUsable, match=f"say --allow-class {cls}"):
        generate(replace(request, allow_class=["another.module:Class"]))
    assert not (tmp_path / "images").exists()
    paths = (
        "--checkpoint",
        run,
        "--prompts",
        tmp_path / "prompts.txt",
        "--save_dir",
        tmp_path / "images",
    )
    command = ["generate", *map(str, paths), "--device", "cpu"]
    code, output = forked(lambda: main(command), tmp_path / "log")
    assert code == 2, output
    assert f"say --allow-class {cls}" in output
    assert not (tmp_path / "images").exists()
    generate(request)
    files = sorted((tmp_path / "images/images").iterdir())
    assert [Image.open(file).size for file in files] == [(SIDE, SIDE)] * 2
    record = manifest(run, 4)["data"]["latents"]["norm"]
    assert column.spec.norm == Norm(**record)
    assert '"float32"' not in (tmp_path / "images/run.json").read_text()  # a digest in its place
    norm = json.loads((tmp_path / "images/manifest.json").read_bytes())["settings"]["norm"]
    assert norm == column.spec.norm.summary() if column.spec.norm else False

    where = {"column": column.path, "tars": cache / "tars", "save_dir": tmp_path / "decoded"}
    with pytest.raises(ModelNotUsable, match=f"say --allow-class {cls}"):
        reconstruct(**where, count=4)  # type: ignore[arg-type]  # a dictionary of its arguments
    assert not (tmp_path / "decoded").exists()
    mean = reconstruct(**where, count=4, allow_class=[cls])["mean"]  # type: ignore[arg-type]
    assert mean["psnr"] > 30


def test_weights_that_lie_elsewhere_now(cache: Path, tmp_path: Path) -> None:
    column = Column.open(cache / "toy/Tokens").identity
    shutil.copy(cache / "models/weights.safetensors", tmp_path / "moved.safetensors")
    allow = [column.encoder.cls]
    moved = vae_of(column, str(tmp_path / "moved.safetensors"), "cpu", False, allow)
    assert moved.weights == column.encoder.weights
    tensors = load_file(tmp_path / "moved.safetensors")
    save_file({**tensors, "basis": 2 * tensors["basis"]}, tmp_path / "other.safetensors")
    with pytest.raises(ModelNotUsable, match="the column was made with") as error:
        vae_of(column, str(tmp_path / "other.safetensors"), "cpu", False, allow)
    assert error.value.exit_code == 2
    other = vae_of(column, str(tmp_path / "other.safetensors"), "cpu", True, allow)
    assert other.weights != column.encoder.weights
    with pytest.raises(ModelNotUsable, match="say --allow-class"):
        vae_of(column, str(tmp_path / "other.safetensors"), "cpu", True)


def test_a_norm_of_each_place_is_undone(cache: Path) -> None:
    """Training sees (latent - shift) * scale; the inverse is what the class decodes."""
    from shards.read.latents import draw, undraw

    column = Column.open(cache / "toy/Representation")
    norm = column.spec.norm
    assert norm is not None
    stored = torch.from_numpy(column.read(np.arange(4)))
    shift, scale = (torch.tensor(values) for values in (norm.shift, norm.scale))
    assert shift.shape == (48, 4, 4)
    torch.testing.assert_close(draw(stored, norm, None), (stored.float() - shift) * scale)
    torch.testing.assert_close(undraw(draw(stored, norm, None), norm), stored.float())
