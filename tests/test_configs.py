"""The config loader, and that every shipped YAML loads."""

import importlib
import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, model_validator

import configs
from configs import ConfigError, Strict, load
from encode.config import EncodeConfig
from eval.study.config import StudyConfig
from train.config import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"


class Optim(Strict):
    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


class Jpeg(Strict):
    quality: int
    kind: str = Field("x", alias="class")


class Pair(Strict):
    batch: int = 8
    micro: int = 4

    @model_validator(mode="after")
    def _fit(self) -> "Pair":
        if self.batch % self.micro:
            raise ValueError(f"batch {self.batch} is no multiple of micro {self.micro}: change one")
        return self


class Cat(Strict):
    kind: Literal["cat"]
    lives: int


class Dog(Strict):
    kind: Literal["dog"]
    food: str | Jpeg


class Zoo(Strict):
    animals: dict[str, Annotated[Cat | Dog, Field(discriminator="kind")]]


class Example(Strict):
    name: str = "x"
    steps: int = 1
    fast: bool = False
    optim: Optim = Optim()
    image: Jpeg | None = None
    many: tuple[Optim, ...] = ()


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_alone() -> None:
    assert load(Example, None) == Example()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("optim: {lr: 1e-4}", "optim", Optim(lr=0.0001)),  # PyYAML alone: the string '1e-4'
        ("optim: {lr: 2.5E+3}", "optim", Optim(lr=2500.0)),
        ("optim: {lr: .5}", "optim", Optim(lr=0.5)),
        ("optim: {lr: 1}", "optim", Optim(lr=1.0)),
        ("name: no", "name", "no"),  # PyYAML alone: False
        ("name: 2026-01-31", "name", "2026-01-31"),  # PyYAML alone: a date
        ("name: 1:30", "name", "1:30"),  # PyYAML alone: 90
        ("name: Null", "name", "Null"),
        ("name: 00000100", "name", "00000100"),  # PyYAML alone: 64
        ("fast: true", "fast", True),
        ("steps: 500_000", "steps", 500_000),
        ("image: ", "image", None),
        ("image: null", "image", None),
        ("optim: {betas: [0.9, 0.95]}", "optim", Optim(betas=(0.9, 0.95))),
        ("", "steps", 1),
    ],
)
def test_yaml_values(tmp_path: Path, text: str, field: str, value: object) -> None:
    found = getattr(load(Example, write(tmp_path, text)), field)
    assert found == value
    assert type(found) is type(value)


def test_overrides_reach_into_nested_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: {lr: 3.0, betas: [0.5, 0.6]}\nsteps: 7")
    words = ["optim.lr=1e-4", "image.quality=90", "name=s3://bucket/a=b", "fast=true"]
    config = load(Example, str(path), words)
    assert config.optim == Optim(lr=0.0001, betas=(0.5, 0.6))
    assert config.image == Jpeg(quality=90)
    assert (config.name, config.fast, config.steps) == ("s3://bucket/a=b", True, 7)
    assert load(Example, path, ["image.quality=90", "image=null"]).image is None


def test_base_is_merged_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "steps: 5\noptim: {lr: 2.0, betas: [0.1, 0.2]}", "below.yaml")
    path = write(tmp_path / "sub", "base: ../below.yaml\noptim: {lr: 3.0}")
    config = load(Example, path)
    assert (config.steps, config.optim) == (5, Optim(lr=3.0, betas=(0.1, 0.2)))


def test_a_second_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "steps: 5", "one.yaml")
    write(tmp_path, "base: one.yaml", "two.yaml")
    with pytest.raises(ConfigError, match=r"two\.yaml, which has a base itself"):
        load(Example, write(tmp_path, "base: two.yaml"))


def test_unknown_key_names_the_known_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        load(Example, None, ["optim.rl=1", "stepz=3", "image.qualty=1", "many=[{lrr: 1}]"])
    message = str(error.value)
    assert "optim.rl: unknown key; did you mean lr? Known keys there: betas, lr" in message
    assert "stepz: unknown key; did you mean steps? Known keys there: fast, image, many" in message
    assert "image.qualty: unknown key; did you mean quality? Known keys there: class, qu" in message
    assert "image.quality: missing. Put it into the YAML or say image.quality=VALUE" in message
    assert "many.0.lrr: unknown key; did you mean lr?" in message


@pytest.mark.parametrize("name", ["encode/flux-256", "train/flux-256", "study/flux", "demo/study"])
@pytest.mark.parametrize("model", [EncodeConfig, TrainConfig, StudyConfig])
def test_a_config_of_another_package_is_said_to_be_one(name: str, model: type[Strict]) -> None:
    """Shipped configs, so that the keys which tell a kind stay those of the models."""
    kinds = {
        "encode": (EncodeConfig, "an encode config", "python -m encode run"),
        "train": (TrainConfig, "a training config", "python -m train"),
        "study": (StudyConfig, "a study", "python -m eval study run"),
    }
    own, kind, command = kinds[Path(name).name if Path(name).name in kinds else name.split("/")[0]]
    expected = next(text for other, text, _ in kinds.values() if other is model)
    path = f"configs:{name}"
    if own is model:
        load(model, path)
        return
    with pytest.raises(ConfigError) as error:
        load(model, path)
    assert str(error.value) == f"{path} is {kind}, expected {expected}. `{command} {path}` takes it"


def test_words_of_another_package_name_its_command_alone() -> None:
    with pytest.raises(ConfigError) as error:
        configs.load(TrainConfig, None, ["root=cache", "sources={a: b.tar}", "columns={}"])
    message = "the command line is an encode config, expected a training config. `python -m encode run` takes it"
    assert str(error.value) == message


def test_words_are_named_where_the_command_line_takes_them(tmp_path: Path) -> None:
    path = write(tmp_path, "image: {class: x}")
    with pytest.raises(ConfigError, match="image.quality=VALUE on the command line"):
        load(Example, path)
    with pytest.raises(ConfigError, match=r"image\.quality: missing\. Put it into the YAML$"):
        load(Example, path, takes_words=False)


def test_members_of_unions_are_named_as_written() -> None:
    with pytest.raises(ConfigError) as error:
        load(
            Zoo, None, ["animals={rex: {kind: dog, food: {qality: 3}, lives: 9}, tom: {kind: cat}}"]
        )
    message = str(error.value)
    assert "animals.rex.food.qality: unknown key; did you mean quality?" in message
    assert "animals.rex.food.quality: missing." in message
    assert "animals.rex.lives: unknown key. Known keys there: food, kind\n" in message
    assert "animals.tom.lives: missing." in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "steps: many",
            "steps: found 'many', expected a whole number. Correct it, or leave it out for 1",
        ),
        ("steps: 1.5", "steps: found 1.5"),
        ("optim: 3", "optim: found 3"),
        ("- 1", "found [1], expected `key: value` lines"),
        ("a: [1", "is not valid YAML"),
        ("steps: 1\nsteps: 2", "the key 'steps' stands twice"),
        ("1: 2", "found {1: 2}, expected `key: value` lines"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(Example, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_and_bad_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found nothing at .*gone\.yaml"):
        load(Example, tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="found a folder"):
        load(Example, tmp_path)
    for word in ("steps", "=3", "optim..lr=1", "--steps=3"):
        with pytest.raises(ConfigError, match="expected KEY=VALUE"):
            load(Example, None, [word])


def test_a_validator_of_the_whole_speaks_for_itself() -> None:
    with pytest.raises(ConfigError) as error:
        load(Pair, None, ["batch=9"])
    assert str(error.value).endswith("Pair:\n  batch 9 is no multiple of micro 4: change one")


def test_models_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(Example, None).steps = 3  # type: ignore[misc]  # the point of the test


# ---- what is shipped ----------------------------------------------------------------------------

MODELS = {
    "encode": "encode.config:EncodeConfig",
    "train": "train.config:TrainConfig",
    "study": "eval.study.config:StudyConfig",
    "settled": "eval.study.config:StudyConfig",
}


def shipped() -> list[Path]:
    return sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=str)
def test_every_shipped_yaml_loads(path: Path) -> None:
    """A folder's name says which model, or the file's own: configs/train/x.yaml, configs/demo/train.yaml."""
    kinds = [part for part in (*path.parent.parts, path.stem) if part in MODELS]
    assert kinds, f"{path}: no model is known for it, add one to MODELS"
    module, _, name = MODELS[kinds[0]].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    load(model, CONFIGS / path)


# Files of strangers ------------------------------------------------------------------------------


def bomb(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(30, 9), "aliases make more than"),
        (
            bomb(12, 9).replace("[", "{k: [").replace("]", "]}"),
            "aliases make more than|not valid YAML",
        ),
        ("a: &a [*a]", "aliases make more than"),
        ("a: &a {b: *a}", "aliases make more than"),
        ("[" * 5000, "not valid YAML"),
        ("a: " + "{b: " * 5000, "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_yaml_that_is_an_attack(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(Example, path)
    with pytest.raises(ConfigError, match=message):
        load(Example, None, [f"name={text}"])


def test_some_aliases_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {b: [1, 2]}\nc: [*x, *x]")
    assert configs.read_yaml(tmp_path / "a.yaml")["c"][1] == {"b": [1, 2]}


def test_what_is_no_file_of_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4")
    os.mkfifo(tmp_path / "pipe.yaml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 34)
    for name, message in (("latin", "UTF-8"), ("pipe", "a pipe"), ("huge", "at most")):
        with pytest.raises(ConfigError, match=message):
            configs.read_yaml(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("base", ["3", "[x]", "null"])
def test_a_base_that_is_no_path(tmp_path: Path, base: str) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError) as error:
        load(Example, tmp_path / "a.yaml")
    assert f"a.yaml: base: found {base}, expected the path of a YAML" in str(error.value)


@pytest.mark.parametrize("base", ["s3://b/base.yaml", "https://h/base.yaml"])
def test_a_base_that_is_a_url(tmp_path: Path, base: str) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError, match=f"base: found the url {base}"):
        load(Example, tmp_path / "a.yaml")
