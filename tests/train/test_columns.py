"""Which columns a run reads: config, several sources and captions, and generations that checkpoints pin."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import ConfigError, load
from shards import (
    BadRows,
    Column,
    ColumnSpec,
    IncompleteColumn,
    ShardWriter,
    Status,
    create_column,
    put_complete,
    put_empty,
    seal,
)
from tests.shards.objects import Server
from tests.train.conftest import launch, tiny_config, words, write_columns
from train.checkpoints import checkpoint
from train.config import DataConfig, TrainConfig, run_folder
from train.run import open_columns
from train.step.validate import open_held_out


def config_of(columns: Path, **data: Any) -> TrainConfig:
    values = tiny_config(columns, columns / "runs")
    return TrainConfig.model_validate({**values, "data": {**values["data"], **data}})


def test_a_run_is_called_after_its_latents(columns: Path, tmp_path: Path) -> None:
    def name(*latents: str) -> str:
        config = config_of(columns, latents=latents, text=["t"] * len(latents))
        return run_folder(config, Path("configs/dit.yaml")).name

    link = tmp_path / "link"
    link.symlink_to(columns / "toy/vae")
    assert name("cache/flux/") == "dit-flux"
    assert name(str(link)) == "dit-vae"
    assert name("s3://bucket/cache/flux") == "dit-flux"
    assert name("long/flux", "short/flux") == "dit-flux"
    assert name("long/flux", "short/sd") == "dit-flux+sd"


def test_one_of_each_a_source() -> None:
    with pytest.raises(ConfigError, match="one of each a source expected, found 2 latents, 1 text"):
        load(DataConfig, None, ["latents=[a, b]", "text=t"])
    words = ["latents=[a, b]", "text=[t, {u: 0.5, v: 0.5}]"]
    config = load(DataConfig, None, [*words, "weights=[3, 1]"])
    assert config.text == ("t", {"u": 0.5, "v": 0.5})
    assert config.first == ("a", "t")
    with pytest.raises(ConfigError, match="2 latents, 2 text, 3 weights"):
        load(DataConfig, None, [*words, "weights=[3, 1, 1]"])


@pytest.mark.parametrize(
    ("cache", "way"),
    [("1", "in pages, kept in {}"), ("1e-06", "row by row, for the cache cannot hold all columns"),
     ("0", "row by row, without a cache")],
)  # fmt: skip
def test_a_run_says_before_its_first_step_how_a_store_is_read(
    columns: Path, server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cache: str, way: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("LATENTBANK_CACHE_GB", cache)
    server.take(columns / "toy", f"{url}/toy")
    data = {"latents": f"{url}/toy/vae", "text": f"{url}/toy/text", "lanes": 8}
    process = launch(tmp_path, columns, data=data, steps=1)
    assert process.returncode == 0, process.stdout
    start, _, _ = process.stdout.partition("step 1/1")
    way = f"{way.format(tmp_path / 'cache')} (LATENTBANK_CACHE_GB: {cache}"
    for column in (data["latents"], data["text"]):
        assert re.search(
            rf"^{column}: \S+ \S+ of values, read {re.escape(way)}", start, re.MULTILINE
        )
    assert cache == "1" or not any((tmp_path / "cache").glob("*/0"))  # no page is kept


def test_nothing_to_validate_on_is_said_at_once(columns: Path, tmp_path: Path) -> None:
    for name in ("text", "vae"):
        spec = Column.open(columns / "toy-val" / name).spec
        digest = create_column(tmp_path / name, spec)
        if spec.layout.ragged:
            put_empty(tmp_path / name, spec, Column.open(columns / "toy-val" / name).empty())
        with ShardWriter(tmp_path / name, spec, digest, 0, 2, "index") as writer:
            writer.put_block(_no_values(spec), np.full(2, Status.IMAGE_UNDECODABLE, np.uint8))
            writer.commit({})
        put_complete(tmp_path / name, digest, 1, allow_failed=False)
    values = tiny_config(columns, tmp_path, validation={"source": str(tmp_path)})
    config = TrainConfig.model_validate(values)
    with pytest.raises(BadRows, match="found no row that is ok in vae and text"):
        open_held_out(config, open_columns(config, None))


def _no_values(spec: ColumnSpec) -> Any:
    shape = spec.layout.row_shape
    if spec.layout.ragged:
        return [np.zeros((0, shape[1]), np.uint16)] * 2
    return np.zeros((2, *shape), np.float16)


def write_shards(path: Path, spec: ColumnSpec, shards: range) -> str:
    """Shards of 40 rows."""
    digest = create_column(path, spec)
    for shard in shards:
        writer = ShardWriter(path, spec, digest, shard, 40, f"index {shard}")
        generator = np.random.default_rng(shard)
        values: Any = generator.normal(size=(40, *spec.layout.row_shape)).astype(np.float16)
        if spec.layout.ragged:
            values = [words(torch.from_numpy(v[: 1 + i % 6])) for i, v in enumerate(values)]
        writer.put_block(values, np.zeros(40, np.uint8))
        writer.commit({})
    return digest


@pytest.fixture
def growing(columns: Path, tmp_path: Path) -> tuple[Path, ColumnSpec, str]:
    """`toy/vae` and `toy/text` of three shards, of which two are there."""
    for name in ("text", "vae"):
        standing = Column.open(columns / "toy" / name)
        spec = replace(standing.spec, layout=replace(standing.layout, shards=3))
        digest = create_column(tmp_path / "toy" / name, spec)
        if spec.layout.ragged:
            put_empty(tmp_path / "toy" / name, spec, standing.empty())
        write_shards(tmp_path / "toy" / name, spec, range(2))
    return tmp_path, spec, digest


def test_a_run_on_unfinished_columns(growing: tuple[Path, ColumnSpec, str], columns: Path) -> None:
    """Two sources, one of them still being encoded and with two captions a row; resumed when more is there."""
    folder, spec, digest = growing
    data = {
        "latents": [str(folder / "toy/vae"), str(columns / "toy-val/vae")],
        "text": [{str(folder / "toy/text"): 1.0}, str(columns / "toy-val/text")],
        "lanes": 8, "partial": True, "weights": [0.75, 0.25],
    }  # fmt: skip
    process = launch(folder, columns, "steps=3", "save_every=3", data=data)
    assert process.returncode == 0, process.stderr
    run = folder / "tiny-vae"
    before = checkpoint.pins(run / "checkpoints")
    assert before is not None
    assert before["latents"]["shards"] == [[0, 2]]
    assert before["more"][0]["latents"].get("shards") is None
    write_shards(folder / "toy/vae", spec, range(2, 3))
    put_complete(folder / "toy/vae", digest, 3, allow_failed=False)
    process = launch(folder, columns, "steps=5", "save_every=3", data=data)
    assert process.returncode == 0, process.stderr
    assert "resumed from" in process.stdout
    manifest = json.loads((run / "checkpoints/step-00000005/manifest.json").read_text())
    assert manifest["data"] == before
    assert manifest["order"]["weights"] == [0.75, 0.25]


def test_a_run_goes_on_with_more_required_columns_if_its_rows_stay(
    columns: Path, tmp_path: Path
) -> None:
    """As where a study gets another entry, whose column is then in `also` of all runs."""

    def trained(steps: int, *also: str) -> Any:
        data = {
            "latents": str(columns / "toy/vae"), "text": str(columns / "toy/text"), "lanes": 8,
            "also": [str(tmp_path / name / "vae") for name in also],
        }  # fmt: skip
        return launch(tmp_path, columns, f"steps={steps}", "save_every=2", data=data)

    write_columns(tmp_path / "same", "toy", 150, 3, "same")
    spec = Column.open(tmp_path / "same/vae").spec
    digest = create_column(tmp_path / "fewer/vae", spec)
    writer = ShardWriter(tmp_path / "fewer/vae", spec, digest, 0, 150, "index")
    status = np.zeros(150, np.uint8)
    status[7] = Status.IMAGE_UNDECODABLE
    writer.put_block(np.zeros((150, *spec.layout.row_shape), np.float16), status)
    writer.commit({})
    put_complete(tmp_path / "fewer/vae", digest, 1, allow_failed=True)
    assert trained(2).returncode == 0
    process = trained(4, "same")
    assert process.returncode == 0, process.stderr
    assert "resumed from" in process.stdout
    process = trained(6, "same", "fewer")
    assert process.returncode == 2
    assert "order.valid" in process.stderr


def test_pins_are_taken_from_a_checkpoint(
    growing: tuple[Path, ColumnSpec, str],
) -> None:
    folder, spec, _ = growing
    config = config_of(folder, partial=True)
    sources = open_columns(config, None)
    pins = json.loads(json.dumps(sources.identity()))
    write_shards(folder / "toy/vae", spec, range(2, 3))
    assert open_columns(config, pins).identity() == pins
    np.testing.assert_array_equal(open_columns(config, pins).valid_masks, sources.valid_masks)
    assert open_columns(config, None).identity() != pins
    (folder / "toy/vae/commits/00000.json").unlink()
    with pytest.raises(IncompleteColumn, match="This run has read that shard"):
        open_columns(config, pins)


def test_pins_survive_damaged_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.pins(tmp_path) is None
    for step, data in ((1, {"latents": 1}), (2, {"latents": 1})):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        record = {
            "format": checkpoint.KIND,
            "version": checkpoint.VERSION,
            "data": data,
            "step": step,
            "model": {},
            "files": {},
        }
        (path / "manifest.json").write_bytes(seal(record))
    newest = tmp_path / "step-00000002/manifest.json"
    newest.write_bytes(newest.read_bytes()[:-5])
    assert checkpoint.pins(tmp_path) == {"latents": 1}
    (tmp_path / "step-00000001/manifest.json").unlink()
    assert checkpoint.pins(tmp_path) is None
