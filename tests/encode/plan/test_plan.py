"""`plan` against what `run` then writes, on full and sampled sources, with and without tars."""

import argparse
import json
import math
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import configs
from encode.config import EncodeConfig
from encode.errors import EncodeError
from encode.plan import disk_space
from encode.plan.disk_space import DiskSpace, NoRoom, free_bytes, required_bytes
from encode.plan.plan import ColumnCost, add_options, break_even, interval, run_plan
from encode.plan.probe import Rate, decode_bound, hours, spread, timed
from encode.plan.sample_source import Estimate, Survey, exactly, extrapolate, open_job
from encode.run.job import run, start_executor
from encode.run.prepare import prepare
from shards import IndexRow, Source, open_store, put_index, seal
from shards.column.commits import failure_name
from shards.console import size_text
from shards.format.layout import FAILURE, VERSION
from tests.commands.lines import next_lines
from tests.encode.tiny_models import SIDE, Models
from tests.encode.toy import jpeg, sample, tar_bytes, write_config, write_source
from tests.encode.web import serving


@pytest.fixture
def config(tmp_path: Path, models: Path) -> Path:
    """Moments, tokens, int8 tokens and ids of three tars, one of them with faults."""
    tars = write_source(tmp_path / "tars", 3, 40)
    odd = [
        ("1.jpg", jpeg(1)),
        ("2.txt", b"no picture"),
        ("3.jpg", b"broken"),
        ("3.txt", b"caf\xe9"),
    ]
    members = [member for n in range(300, 330) for member in sample(n)]
    (tmp_path / "tars/1.tar").write_bytes(tar_bytes(members + odd))
    path = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    settings = yaml.safe_load(path.read_text())
    columns = settings["columns"]
    columns["small"] = columns["text"] | {"element": "int8"}
    columns["ids"] = columns["text"] | {"kind": "ids"}
    columns["tarred"] = columns["vae"] | {"backend": "webdataset"}
    path.write_text(yaml.safe_dump(settings))
    return path


def options(config: Path, *words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args([str(config), *map(str, words)])


def planned(capsys: pytest.CaptureFixture[str], config: Path, *words: object) -> Any:
    """The plan as JSON; words with a `=` are for the config, and stand first."""
    run_plan(options(config, *words, "--json"))
    return json.loads(capsys.readouterr().out)


def needed(config: EncodeConfig, retry: bool = False) -> float:
    """Bytes that a run would still write."""
    executor = start_executor(config)
    try:
        jobs = [open_job(config, name) for name in config.sources]
        plan = prepare(config, jobs, executor)
        return executor.ask(partial(required_bytes, config, retry, plan.jobs))
    finally:
        executor.stop()


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def columns_of(found: Any) -> dict[str, Any]:
    return {column["column"]: column for column in found["columns"]}


def test_a_full_plan_is_what_is_then_written(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = planned(capsys, config, "--shards-sampled", 0, "--seconds", 0)
    assert record["fits"] is True
    settings = configs.load(EncodeConfig, config)
    cheap = needed(settings)
    assert not (config.parent / "cache").exists()  # planning writes nothing
    assert run(settings) == 0
    capsys.readouterr()
    root = config.parent / "cache/toy"
    for name, column in columns_of(record).items():
        assert column["bytes"]["value"] == pytest.approx(bytes_below(root / name), rel=0.01), name
        assert column["bytes"]["low"] == column["bytes"]["high"] == column["bytes"]["value"]
        assert column["committed"] == 0
        assert column["missing_bytes"] == column["bytes"]["value"]
    index = record["sources"][0]["index_bytes"]["value"]
    assert index == pytest.approx(bytes_below(root / "index"), rel=0.01)
    assert record["bytes"] == pytest.approx(bytes_below(root), rel=0.01)
    assert cheap == pytest.approx(bytes_below(root), rel=0.15)  # from one tar of three

    costs = columns_of(record)
    assert costs["vae"]["samples"]["value"] == 112  # what cannot be decoded is not known before
    assert costs["text"]["samples"]["value"] == 111
    assert costs["ids"]["mean_tokens"] == costs["text"]["mean_tokens"]
    assert 20 < costs["text"]["mean_tokens"] <= costs["text"]["p99_tokens"] == 24
    assert list(costs["text"]["alternatives"]) == ["int8", "ids"]
    for other, name in (("int8", "small"), ("ids", "ids")):
        size = costs["text"]["alternatives"][other]
        assert size == pytest.approx(costs[name]["bytes"]["value"], rel=0.01)

    again = planned(capsys, config, "--seconds", 0)  # now from the index, and nothing is missing
    assert again["missing_bytes"] == again["sources"][0]["index_missing_bytes"] == 0
    assert columns_of(again)["text"]["bytes"] == costs["text"]["bytes"]
    assert needed(settings) == 0


def test_the_index_serves_without_tars(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and pictures exactly, tokens from the bytes of captions."""
    exact = columns_of(planned(capsys, config, "--shards-sampled", 0, "--seconds", 0))
    assert run(configs.load(EncodeConfig, config)) == 0
    shutil.rmtree(config.parent / "tars")
    capsys.readouterr()
    record = planned(capsys, config, "columns.text.max_tokens=64", "--seconds", 0)
    assert "no tar is in reach" in record["sources"][0]["notes"][-1]
    costs = columns_of(record)
    assert costs["vae"]["bytes"]["value"] == exact["vae"]["bytes"]["value"]
    text = costs["text"]
    assert 6 < text["mean_tokens"] < 20  # 34 bytes a caption, at 4.2 bytes a token
    assert text["samples"]["value"] == 112  # a caption that is no UTF-8 is not known from the index


def test_the_synthetic_index_of_a_large_source(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,000 tars that are nowhere: the total of a column from eight of them, rows of all."""
    sizes = np.random.default_rng(0).integers(50, 150, 200)
    source = Source("toy", tuple((f"{s}.tar", int(n) * 9_000) for s, n in enumerate(sizes)), 1024)
    root = open_store(tmp_path / "cache/toy")
    source.put(root)
    for shard, count in enumerate(sizes.tolist()):
        rows = [
            IndexRow(f"{i}", {"jpg": (512, 8_000), "txt": (9_000, 84)}, {}) for i in range(count)
        ]
        put_index(root, source.fingerprint, shard, rows, None)
    tars = f"{tmp_path}/{{0..199}}.tar"
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    record = planned(capsys, config, "columns.text.max_tokens=64", "--seconds", 0)
    assert record["sources"][0]["rows"]["value"] == sizes.sum()
    assert record["sources"][0]["index_missing_bytes"] == 0
    costs = columns_of(record)
    assert costs["vae"]["samples"]["value"] == pytest.approx(sizes.sum())
    assert costs["text"]["mean_tokens"] == 21  # 84 bytes at 4.2, and one
    values = sum(-(-n // 32) * 32 * 32 * 4 * 4 * 2 for n in sizes.tolist())
    estimate = costs["vae"]["bytes"]
    assert estimate["low"] < estimate["value"] < estimate["high"]
    assert values < estimate["value"] < 3 * values  # and records of 1,000 tiny shards


def test_hours_and_money(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Encoders are tried on real rows; the numbers follow from the rates."""
    prices = ("--price-per-gpu-hour", 2.5, "--price-per-tb-month", 20)
    record = planned(
        capsys, config, "--gpus", 4, "--seconds", 0.4, "--global-batch", 16, *prices
    )  # fmt: skip
    for name, column in columns_of(record).items():
        rate, samples = column["rate"], column["samples"]["value"]
        assert rate["rows_per_s"] > 0
        slowest = min(rate["rows_per_s"], 2 * (rate["decoded_per_s"] or math.inf))
        assert column["gpu_hours"] == pytest.approx(samples / slowest / 3600)
        assert column["hours"] == pytest.approx(column["gpu_hours"] / 4)
        assert column["price_once"] == pytest.approx(column["gpu_hours"] * 2.5)
        assert column["price_a_month"] == pytest.approx(column["bytes"]["value"] / 1e12 * 20)
        share = 1 if "tokens" not in column["kind"] else column["mean_tokens"] / 24
        expected = None if name == "ids" else pytest.approx(samples / 16 * share)
        assert column["break_even_steps"] == expected

    costs = columns_of(record)
    encoding = sum(c["samples"]["value"] / c["rate"]["rows_per_s"] for c in costs.values())
    decoding = max(112 / costs[n]["rate"]["decoded_per_s"] / 2 for n in ("vae", "tarred"))
    assert record["hours"] == pytest.approx(max(encoding, decoding) / 3600 / 4)

    assert run_plan(options(config, "columns.vae.codec=blosc", "--seconds", 0.1, *prices)) == 0
    text = capsys.readouterr().out
    assert next_lines(text) == [f"next: python -m encode run {config} columns.vae.codec=blosc"]
    assert "toy/vae" in text
    assert "it fits" in text
    assert "samples/s on this device" in text
    assert "the same stored otherwise: int8" in text
    assert "steps of a run of global batch 1,024" in text
    assert "a month" in text
    assert "all columns in one pass: < 0.01 h on" in " ".join(text.split())


def test_a_codec_is_measured(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("columns.vae.codec=blosc", "--shards-sampled", 0)
    plain = columns_of(planned(capsys, config, *words, "--seconds", 0))["vae"]
    tried = columns_of(planned(capsys, config, *words, "--seconds", 0.2))["vae"]
    assert tried["rate"]["ratio"] < 1
    assert tried["bytes"]["value"] < plain["bytes"]["value"]


def test_a_plan_says_what_int8_latents_take(
    tmp_path: Path, models: Path, tiny: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    """And moments, which have no int8, have no such alternative."""
    path = write_config(
        tmp_path / "toy.yaml", tmp_path / "cache", write_source(tmp_path / "tars", 2, 40), models
    )
    values = yaml.safe_load(path.read_text())
    dc = {"kind": "latents", "encoder": tiny("dc"), "resolution": SIDE}
    values["columns"] |= {"dc": dc, "half": dc | {"element": "int8"}}
    path.write_text(yaml.safe_dump(values))
    costs = columns_of(planned(capsys, path, "--shards-sampled", 0, "--seconds", 0))
    assert run(configs.load(EncodeConfig, path)) == 0
    capsys.readouterr()
    size = bytes_below(tmp_path / "cache/toy/half")
    assert costs["half"]["bytes"]["value"] == pytest.approx(size, rel=0.01)
    assert costs["dc"]["alternatives"]["int8"] == pytest.approx(size, rel=0.01)
    assert size < costs["dc"]["bytes"]["value"]
    assert costs["vae"]["alternatives"] == costs["half"]["alternatives"] == {}
    assert run_plan(options(path, "--seconds", 0)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "toy/dc: the same stored otherwise: int8" in text


def test_a_codec_of_int8_tokens_is_measured_on_what_is_stored(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("columns.small.codec=blosc", "--shards-sampled", 0, "--seconds", 0.2)
    tried = columns_of(planned(capsys, config, *words))["small"]
    assert 0 < tried["rate"]["ratio"] < 1.1


def test_run_refuses_what_does_not_fit(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk cannot be had in a test: the one figure that the system gives is put in its place."""
    settings = configs.load(EncodeConfig, config)
    need = needed(settings)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda path: usage(1 << 40, 0, int(need * 0.99))
    )
    with pytest.raises(NoRoom, match="are free, what is not committed yet will take about"):
        disk_space.refuse_if_full(settings.root_store, lambda: needed(settings))
    assert NoRoom.exit_code == 2
    assert not (config.parent / "cache").exists()
    assert run_plan(options(config, "--seconds", 0, "--shards-sampled", 0)) == 2
    text = capsys.readouterr().out
    assert "it does NOT fit, `run` will refuse" in text
    assert not next_lines(text)
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda path: usage(1 << 40, 0, int(need * 1.1))
    )
    disk_space.refuse_if_full(settings.root_store, lambda: needed(settings))
    assert needed(settings, retry=True) == 0
    for name in settings.columns:
        column = settings.root_store.child("toy").child(name)
        record = {"format": FAILURE, "version": VERSION, "shard": 1, "reason": "died"}
        column.replace(failure_name(1), seal(record))
    again = needed(settings, retry=True)
    assert 0 < again < need / 2  # of three tars


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    space = free_bytes(open_store(tmp_path / "not/yet"))
    assert space is not None
    assert space == pytest.approx(free, rel=0.05)
    assert free_bytes(open_store("s3://bucket/prefix")) is None
    unknown = DiskSpace("s3://bucket", 1.0, None)
    assert unknown.fits is None
    assert "unknown" in unknown.verdict()


def test_tars_that_are_none_are_passed_over(config: Path) -> None:
    settings = configs.load(EncodeConfig, config)
    (config.parent / "tars/0.tar").write_bytes(b"<html>")
    survey = Survey(open_job(settings, "toy"), 3, {"txt"}, {"jpg"})
    assert [sample.shard for sample in survey.samples] == [1, 2]
    assert "tar 0 passed over" in survey.notes[0]
    assert "extrapolated from 2 of 3 tars" in survey.notes[-1]
    # captions for the scales of an int8 column would be needed
    without_int8 = configs.load(EncodeConfig, config, ["columns.small=null"])
    assert needed(without_int8) > 0
    for shard in range(3):
        (config.parent / f"tars/{shard}.tar").write_bytes(b"<html>")
    assert needed(without_int8) == 0
    with pytest.raises(EncodeError, match="none of 3 tars could be looked into"):
        Survey(open_job(settings, "toy"), 3, {"txt"}, set())


def test_extrapolation_covers_the_truth() -> None:
    """The interval of a ratio estimator, over many samples of a known population."""
    chance = np.random.default_rng(0)
    sizes = chance.integers(500, 1_500, 300).astype(float)
    values = sizes * chance.normal(3, 0.3, 300)
    covered = 0
    for _ in range(200):
        chosen = chance.choice(300, 10, replace=False)
        got = extrapolate(values[chosen].tolist(), sizes[chosen].tolist(), sizes.sum(), 300)
        covered += got.low <= values.sum() <= got.high
    assert 180 <= covered <= 200  # 95 % of 200
    assert extrapolate([1, 2, 3], [1, 1, 1], 3, 3) == exactly(6)
    assert math.isnan(extrapolate([4], [2], 10, 5).low)
    assert extrapolate([4], [2], 10, 5).value == 20


def test_arithmetic_of_rates() -> None:
    rate = Rate(1_000.0, 100.0, 1.0, 5)
    assert hours(3.6e6, rate, 1, 20) == 1
    assert hours(3.6e6, rate, 4, 20) == 0.25
    assert hours(3.6e6, rate, 1, 5) == 2  # decoding is slower
    assert decode_bound(rate, 5) == 10
    assert decode_bound(rate, 10) is None
    assert spread([1, 2, 3], 6) == [1, 1, 2, 2, 3, 3]
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    counts: list[int] = []
    median, calls, last = timed(lambda n: counts.append(n) or n, 64, 0.01)
    assert counts[:3] == [1, 1, 64]
    assert (last, calls, median > 0) == (64, 25, True)


def test_words() -> None:
    assert interval(exactly(3e9), size_text) == "3.00 GB"
    assert interval(Estimate(3e9, math.nan, math.nan), size_text) == "~3.00 GB"
    assert interval(Estimate(3e9, 2e9, 4e9), size_text) == "~3.00 GB (2.00 GB to 4.00 GB)"
    ids = ColumnCost("s", "c", "ids", exactly(10), exactly(10), 0, 0, 1, mean_tokens=2.0)
    assert break_even(ids, 256, 2) is None


def test_tars_elsewhere(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tars of a web server are fetched to be looked into, and go again; the plan is the same."""
    local = columns_of(planned(capsys, config, "--shards-sampled", 0, "--seconds", 0))
    with serving() as web:
        for shard in range(3):
            web.files[f"/d/{shard}.tar"] = (tmp_path / f"tars/{shard}.tar").read_bytes()
        scratch = tmp_path / "scratch"
        words = [f"sources.toy={web.url}/d/{{0..2}}.tar", f"engine.scratch={scratch}"]
        record = planned(capsys, config, *words, "--shards-sampled", 0, "--seconds", 0)
        assert not list(scratch.iterdir())
        settings = configs.load(EncodeConfig, config, words)
        cheap = needed(settings)
        assert cheap == pytest.approx(record["bytes"], rel=0.2)
        assert web.gets("/d/1.tar") > 0
    elsewhere = columns_of(record)
    for name, column in local.items():
        assert elsewhere[name]["bytes"] == column["bytes"]


def test_every_kind_can_be_planned(
    tiny: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latents, features, T5 and a chat template: as many bytes as a run writes."""
    norm = {"shift": [0.0], "scale": [0.41407]}
    columns = {
        "dc": {"kind": "latents", "encoder": tiny("dc"), "resolution": 32, "norm": norm},
        "dino": {"kind": "features", "encoder": tiny("dinov2"), "element": "bfloat16"},
        "dino8": {"kind": "features", "encoder": tiny("dinov2"), "element": "int8"},
        "t5": {"kind": "tokens", "encoder": tiny("t5"), "max_tokens": 24, "backend": "webdataset"},
        "chat": {"kind": "ids", "encoder": tiny("qwen3"), "max_tokens": 16, "chat_template": True},
    }
    settings = {
        "root": str(tmp_path / "cache"), "columns": columns, "shard_rows": 1024,
        "sources": {"toy": write_source(tmp_path / "tars", 2, 35)},
        "engine": {"executor": "inline", "batch": 8, "device": "cpu"},
    }  # fmt: skip
    path = tmp_path / "kinds.yaml"
    path.write_text(yaml.safe_dump(settings))
    record = columns_of(planned(capsys, path, "--shards-sampled", 0, "--seconds", 0.1))
    assert run(configs.load(EncodeConfig, path)) == 0
    for name, column in record.items():
        size = bytes_below(tmp_path / "cache/toy" / name)
        assert column["bytes"]["value"] == pytest.approx(size, rel=0.01), name
        assert column["rate"]["rows_per_s"] > 0
    assert record["dino8"]["alternatives"] == record["chat"]["alternatives"] == {}
    cheaper = record["dino"]["alternatives"]["int8"]
    assert cheaper == pytest.approx(record["dino8"]["bytes"]["value"], rel=0.01)
    assert list(record["dc"]["alternatives"]) == ["int8"]
    assert record["chat"]["break_even_steps"] is None
