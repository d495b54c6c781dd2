"""Keys of configs: their texts, the schema for editors, shipped configs by name, and near misses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import Field

import configs
from configs import ConfigError, Strict, keys, load, read_yaml, shipped
from encode.config import EncodeConfig
from tests.test_commands import ROOT
from train.config import TrainConfig

MODELS = {"train": TrainConfig, "encode": EncodeConfig}
FILES = {
    "train": [*ROOT.glob("configs/train/*.yaml"), ROOT / "configs/demo/train.yaml"],
    "encode": [*ROOT.glob("configs/encode/**/*.yaml"), ROOT / "configs/demo/encode.yaml"],
}


class Paint(Strict):
    # of a colour wheel,
    # in degrees
    hue: float = 0.5
    shade: Literal["dark", "light"] = "dark"  # how much black


class Wood(Strict):
    kind: Literal["wood"] = "wood"  # what it is made of
    age: int  # years


class Stone(Strict):
    kind: Literal["stone"] = "stone"
    age: int  # years
    # the mineral
    name: str = Field(default="", alias="class")


class House(Strict):
    # one or the other
    walls: dict[str, Wood | Stone]
    paint: Paint = Paint()
    wide: bool = True


def test_keys_with_the_comments_at_their_fields() -> None:
    by_name = {key.name: key for key in keys.keys_of(House)}
    assert by_name["paint.hue"] == keys.Key("paint.hue", "0.5", "of a colour wheel, in degrees")
    assert by_name["paint.shade"].text == "how much black (`dark`, `light`)"
    assert by_name["walls.NAME.kind"].text == "what it is made of (`wood`, `stone`)"
    assert by_name["walls.NAME.age"] == keys.Key("walls.NAME.age", "required", "years")
    assert by_name["walls.NAME.class"] == keys.Key(
        "walls.NAME.class", '""', "the mineral (of stone)"
    )
    assert by_name["wide"] == keys.Key("wide", "true", "")
    assert "paint" not in by_name


@pytest.mark.parametrize("stage", MODELS)
def test_each_key_has_a_text(stage: str) -> None:
    names = list(keys.keys_of(MODELS[stage]))
    assert len(names) > 40
    assert [key.name for key in names if not key.text] == []


# The schema ----------------------------------------------------------------------------------------


def command(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """As the commands print them."""
    printed = {}
    for stage in MODELS:
        result = command(stage, "config", "--schema")
        assert result.returncode == 0, result.stderr
        printed[stage] = json.loads(result.stdout)
        jsonschema.Draft202012Validator.check_schema(printed[stage])
    return printed


@pytest.mark.parametrize("stage", MODELS)
def test_the_schema_takes_what_is_shipped(stage: str, schemas: dict[str, Any]) -> None:
    """Each file as an editor sees it: without its base, and with the numbers of YAML 1.1."""
    assert len(FILES[stage]) > 10
    for file in FILES[stage]:
        jsonschema.validate(read_yaml(file), schemas[stage])
        assert "_0" not in json.dumps(list(yaml.safe_load(file.read_text()).values())[-6:])


@pytest.mark.parametrize(
    ("stage", "text", "part"),
    [
        ("train", "optim: {rl: 1}", "'rl' was unexpected"),
        ("train", "optim: {lr: fast}", "'fast' is not of type 'number'"),
        ("train", "data: {bad: ignore}", "'ignore' is not one of"),
        ("encode", "engine: {executor: spark}", "'spark' is not one of"),
        ("encode", "columns: {flux: {kind: pixels}}", "is not valid under any"),
    ],
)
def test_the_schema_refuses(stage: str, text: str, part: str, schemas: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match=part):
        jsonschema.validate(yaml.safe_load(text), schemas[stage])


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("train", "base: configs:train/dit3b_256\nvalidation: null\nmodel: {layers: 2}"),
        ("train", "data: {sources: {a: 0.5, b: null}}"),
        ("encode", "base: x.yaml\nsources: {journeydb: null, a: [b, c]}\ncolumns: {x: null}"),
        ("encode", "columns: {flux: {resolution: 512}}"),
    ],
)
def test_the_schema_takes_parts(stage: str, text: str, schemas: dict[str, Any]) -> None:
    jsonschema.validate(yaml.safe_load(text), schemas[stage])


def test_the_schema_has_the_texts(schemas: dict[str, Any]) -> None:
    optim = schemas["train"]["$defs"]["OptimConfig"]["properties"]
    assert optim["warmup"]["description"] == "steps of linear warm-up"
    assert optim["warmup"]["default"] == 0
    assert "whose values this one changes" in schemas["encode"]["properties"]["base"]["description"]


# Names ---------------------------------------------------------------------------------------------


def test_a_shipped_config_from_any_folder(tmp_path: Path) -> None:
    words = ("config", "configs:train/flux-256", "seed=3", "data.expect=null")
    result = command("train", *words, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = tmp_path / "full.yaml"
    printed.write_text(result.stdout)
    expected = load(TrainConfig, ROOT / "configs/train/flux-256.yaml", ["seed=3"])
    data = expected.data.model_copy(update={"expect": None})
    assert load(TrainConfig, printed) == expected.model_copy(update={"data": data})
    own = "base: configs:train/dit3b_256\nmodel: {layers: 2}\n"
    (tmp_path / "own.yaml").write_text(own)
    assert load(TrainConfig, tmp_path / "own.yaml").model.layers == 2
    result = command("encode", "config", "configs:demo/encode", folder=tmp_path)
    assert yaml.safe_load(result.stdout)["columns"]["minilm"]["encoder"]["class"] == "AutoModel"


def test_a_training_starts_from_a_shipped_config_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the DeepSpeed file that it names."""
    from train.step.engine import deepspeed_config

    monkeypatch.chdir(tmp_path)
    config = load(TrainConfig, "configs:train/flux-256")
    assert deepspeed_config(config, 1)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs:train/flux-265", "did you mean configs:train/flux-256?"),
        ("configs:nothing-like-it-at-all", "Shipped are configs:demo/encode, "),
        ("configs:../pyproject.toml", "no such config is shipped"),
        ("configs/train/flux-256.yaml", "the shipped config is configs:train/flux-256, from any"),
        ("train/flux-256.yaml", "the shipped config is configs:train/flux-256, from any"),
        ("mien.yaml", "did you mean mine.yaml?"),
        ("train.yml", "did you mean train.yaml?"),
        ("quite-another.yaml", "expected a YAML file: check the path"),
    ],
)
def test_near_misses_of_configs(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("mine.yaml", "train.yaml"):
        (tmp_path / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, name)
    assert message in str(error.value)


def test_a_path_is_no_name(tmp_path: Path) -> None:
    assert shipped(tmp_path / "a.yaml") == tmp_path / "a.yaml"
    assert shipped("configs:train/cpu") == configs.FOLDER / "train/cpu.yaml"
    assert shipped("configs:deepspeed/zero2.json") == configs.FOLDER / "deepspeed/zero2.json"


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("train", "pln"), "plan"),
        (("encode", "rnu", "x.yaml"), "run"),
        (("shards", "verfy"), "verify"),
        (("eval", "genrate"), "generate"),
        (("eval", "study", "reprot"), "report"),
        (("configs.latentbank", "encdoe"), "encode"),
    ],
)
def test_near_misses_of_verbs(words: tuple[str, ...], near: str, tmp_path: Path) -> None:
    start = ["-c", "import sys; from configs.latentbank import main; sys.exit(main())", *words[1:]]
    stage = words[0] != "configs.latentbank"
    result = subprocess.run(
        [sys.executable, *(["-m", *words] if stage else start)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert f"did you mean {near}?" in result.stderr


def test_config_asks_for_something() -> None:
    result = command("train", "config")
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected CONFIG or --schema" in result.stderr
