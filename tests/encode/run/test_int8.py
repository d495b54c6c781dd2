"""Columns of pictures that are encoded as int8, beside the same of 16-bit numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encode.config import EncodeConfig
from encode.errors import EncodeError
from encode.run.job import run
from shards import Column, Status, open_join
from shards.read import read_rows
from shards.tools.norm import measure
from shards.tools.verify import verify
from tests.encode.light import write_source
from tests.encode.tiny_models import Models
from tests.encode.toy import tar_bytes
from tests.shards.toy import files_of


def config_of(tiny: Models, folder: Path, **columns: Any) -> EncodeConfig:
    engine = {"executor": "inline", "batch": 8, "device": "cpu"}
    values = {
        "root": str(folder / "cache"), "sources": {"toy": str(folder / "tars/{0..2}.tar")},
        "columns": columns, "shard_rows": 1024, "engine": engine,
    }  # fmt: skip
    return EncodeConfig.model_validate(values)


def columns_of(tiny: Models) -> dict[str, Any]:
    norm = {"shift": [0.0], "scale": [0.41407]}
    latents = {"kind": "latents", "encoder": tiny("dc"), "resolution": 32, "norm": norm}
    features = {"kind": "features", "encoder": tiny("dinov2")}
    return {
        "dc": latents, "dc8": latents | {"element": "int8"},
        "dino": features, "dino8": features | {"element": "int8", "codec": "blosc"},
        "text": {"kind": "tokens", "encoder": tiny("gemma"), "max_tokens": 24},
    }  # fmt: skip


def test_int8_columns_are_encoded_resumed_and_read_as_float16(tiny: Models, tmp_path: Path) -> None:
    write_source(tmp_path / "tars", 3, 30)
    # the first tar has no picture that decodes: scales come from the next, and its rows stay blank
    (tmp_path / "tars/0.tar").write_bytes(tar_bytes([("a.jpg", b"none"), ("a.txt", b"text")]))
    config = config_of(tiny, tmp_path, **columns_of(tiny))
    assert run(config) == 0
    cache = tmp_path / "cache/toy"
    for name in ("dc", "dino"):
        plain, small = Column.open(cache / name), Column.open(cache / f"{name}8")
        assert verify(cache / f"{name}8") == []
        assert small.layout.element == small.spec.identity["dtype"] == "int8"
        assert small.layout.row_shape == plain.layout.row_shape
        assert small.spec.norm == plain.spec.norm
        first = np.array([0, *range(1024, 1024 + 30), *range(2048, 2048 + 30)])
        np.testing.assert_array_equal(small.status(first), plain.status(first))
        assert small.status(first[:1]).tolist() == [Status.IMAGE_UNDECODABLE]
        ok = first[plain.status(first) == Status.OK]
        assert len(ok) > 40
        values = plain.read(ok).astype(np.float64)
        read = small.decoded(small.read(ok, check=True)).astype(np.float64)
        loss = np.linalg.norm(read - values) / np.linalg.norm(values)
        record = small.spec.quantisation or {}
        assert 0 < loss < 0.015
        assert loss == pytest.approx(record["relative_error"], rel=0.3)
        assert record["rows"] <= 30  # of the tar that was measured
    join = open_join(cache / "dc8", cache / "text", extra={"dino": cache / "dino8"})
    latents, _, _ = read_rows(join, join.valid_rows[:4])
    assert tuple(latents.shape[1:]) == join.latent_shape
    # what is missing is made again with the scales that the column has, to the same bytes
    commits = cache / "dc8/commits/00002.json"
    before = commits.read_bytes()
    for path in [commits, *(cache / "dc8/complete").iterdir()]:
        path.unlink()
    values = sorted((cache / "dc8/latents").rglob("c/*/0"))[-1]
    data = values.read_bytes()
    values.unlink()
    assert run(config) == 0
    assert values.read_bytes() == data
    assert commits.stat().st_size == pytest.approx(len(before), abs=200)
    assert verify(cache / "dc8") == []


def test_without_a_picture_there_are_no_scales(tiny: Models, tmp_path: Path) -> None:
    write_source(tmp_path / "tars", 3, 2)
    for shard in range(3):
        data = tar_bytes([("a.jpg", b"none"), ("a.txt", b"text")])
        (tmp_path / f"tars/{shard}.tar").write_bytes(data)
    column = columns_of(tiny)["dc8"]
    with pytest.raises(EncodeError, match=r"3 were looked at\) hold a picture"):
        run(config_of(tiny, tmp_path, dc8=column))
    assert not (tmp_path / "cache/toy/dc8").exists()


@pytest.mark.parametrize("statistics", [True, False])
def test_sums_over_rows_are_kept_of_latents(tiny: Models, tmp_path: Path, statistics: bool) -> None:
    """Those that `shards norm` makes, byte for byte."""
    write_source(tmp_path / "tars", 3, 30)
    config = config_of(tiny, tmp_path, **columns_of(tiny))
    engine = config.engine.model_copy(update={"statistics": statistics})
    config = config.model_copy(update={"engine": engine})
    assert run(config) == 0
    cache = tmp_path / "cache/toy"
    names = ["00000", "00001", "00002"] if statistics else []
    for name in ("dc", "dc8"):
        encoded = files_of(cache / name)
        sums = {path: data for path, data in encoded.items() if path.startswith("statistics/")}
        assert list(sums) == [f"statistics/{shard}" for shard in names]
        measure(cache / name)
        assert sums.items() <= files_of(cache / name).items()
        shutil.rmtree(cache / name / "statistics")
        measure(cache / name)
        assert sums.items() <= files_of(cache / name).items()
    assert not list(cache.glob("dino*/statistics"))
    assert not (cache / "text/statistics").exists()
