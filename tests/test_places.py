"""Every option and config key that takes a path: urls are served or refused as they were typed, `~` is the home."""

import argparse
import contextlib
import io
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, BeforeValidator

import configs
import encode.__main__ as encode_main
import shards.__main__ as shards_main
import train.__main__ as train_main
from configs import ConfigError
from encode.config import EncodeConfig
from encode.registry import location
from encode.source.places import expand
from eval import commands
from eval.score import SCORERS
from shards import open_store
from shards.places import NotLocal, is_url, local_path, model, place
from tests.bench import reading
from tests.train.conftest import TINY
from train.config import TrainConfig

TYPES = (local_path, place, model)
URLS = (
    "s3://b/x", "gs://b/x", "az://c/x", "http://h/x", "https://h/x", "hf://o/n", "abfs://c@a/x", "S3://b/x", "dbfs:/x",
)  # fmt: skip
# options that take words, and no path
WORDS = {
    *("--groups", "--together"),  # regular expressions of keys
    "--rows",  # of `eval preview`: numbers
    "--device", "--label", "--revision", "--files", "--endpoint", "--older-than", "--readers", "--scorer",
    "config", "dataset", "overrides", "words", "--split", "--note", "--picture", "--caption",
    "--allow-class", "--over", "--time", "--partition", "--account",
}  # fmt: skip
# what `encode init` puts into a config, which checks each
MODELS = {"--sources", "--vae", "--text"}
COLUMNS = {  # served by `shards.open_store`, which writes the home folder out
    "column", "source", "target", "a", "b", "latents", "text", "--also", "--more", "folder", "--source",
}  # fmt: skip


# Command lines -------------------------------------------------------------------------------------------------------


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield "shards", shards_main.parser()
    parser = argparse.ArgumentParser(prog="bench")
    reading.add_options(parser)
    yield "shards bench", parser
    for name in train_main.VERBS:
        yield f"train {name}", train_main.verb_parser(name)[0]
    for name in encode_main.VERBS:
        parser = argparse.ArgumentParser(prog=name)
        encode_main.add_options(name, parser)
        yield f"encode {name}", parser
    for name, (_, flags, _) in commands.VERBS.items():
        parser = argparse.ArgumentParser(prog=name)
        flags(parser)
        yield f"eval {name}", parser
    for name, scorer in SCORERS.items():
        parser = argparse.ArgumentParser(prog=name, conflict_handler="resolve")
        scorer.flags(parser)
        yield f"eval watch --scorer {name}", parser


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)
        elif action.nargs != 0 and action.choices is None:
            yield action


def test_every_option_of_text_is_a_place_or_known_to_be_none() -> None:
    """A new option of a path has one of the types, or the check of urls would be forgotten."""
    for name, parser in parsers():
        for action in options(parser):
            word = action.option_strings[0] if action.option_strings else action.dest
            if action.type in (None, str):
                columns = {"shards": COLUMNS, "encode init": MODELS}.get(name, set())
                assert word in WORDS | columns, f"{name}: {word} takes text: is it a path?"
            assert action.type is not Path, f"{name}: {word}"


def test_the_words_that_are_no_paths_are_options_still() -> None:
    known = {
        action.option_strings[0] if action.option_strings else action.dest
        for _, parser in parsers()
        for action in options(parser)
    }
    assert (WORDS - known) <= {"--device", "--split"}


@pytest.mark.parametrize("words", [
    ["report", "s3://b/set"],
    ["report", "set", "--out", "s3://b/r.html"],
    ["report", "set", "--run", "set=s3://b/run"],
    ["generate", "--checkpoint", "s3://b/run", "--prompts", "p.txt", "--save_dir", "out"],
    ["generate", "--checkpoint", "run", "--prompts", "gs://b/p.txt", "--save_dir", "out"],
    ["generate", "--checkpoint", "run", "--prompts", "p.txt", "--save_dir", "https://h/out"],
    ["generate", "--checkpoint", "run", "--save_dir", "out", "--text_cache", "az://c/text"],
    ["generate", "--checkpoint", "run", "--save_dir", "out", "--vae", "s3://b/vae"],
    ["reconstruct", "column", "--tars", "tars", "--save_dir", "s3://b/out"],
    ["reconstruct", "column", "--tars", "s3://b/tars", "--save_dir", "out"],
    ["score", "fid", "s3://b/set", "--reference", "r"],
    ["score", "fid", "set", "--reference", "s3://b/r"],
    ["score", "reference", "real", "--out", "s3://b/r.safetensors"],
    ["prompts", "fetch", "geneval", "--to", "s3://b/prompts"],
    ["watch", "s3://b/run", "--prompts", "p.txt"],
    ["fid", "a", "hf://datasets/b"],
])  # fmt: skip
def test_eval_refuses_urls_as_they_were_typed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
        commands.main(words)
    url = next(w for w in words if "://" in w).removeprefix("set=")
    assert left.value.code == 2
    assert f"{url}: found a url" in said.getvalue()
    assert list(tmp_path.iterdir()) == []


# Configs -------------------------------------------------------------------------------------------------------------

PATHLIKE = {
    "root",
    "path",
    "source",
    "scratch",
    "runs",
    "init_from",
    "deepspeed",
    "latents",
    "text",
    "also",
    "sources",
}


def leaves(model_: type[BaseModel], at: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below a model with its annotation and the validators on it."""
    for name, field in model_.model_fields.items():
        whole = (
            Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        )  # type: ignore[valid-type]
        below = [
            m for m in parts(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)
        ]
        for inner in below:
            yield from leaves(inner, f"{at}{name}.")
        yield f"{at}{name}", whole


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for argument in typing.get_args(annotation):
        yield from parts(argument)


@pytest.mark.parametrize("config", [TrainConfig, EncodeConfig])
def test_every_field_of_a_path_has_a_type_that_checks_it(config: type[BaseModel]) -> None:
    for name, annotation in leaves(config):
        inside = list(parts(annotation))
        if Path in inside or name.rpartition(".")[2] in PATHLIKE and name not in (
            "columns.source", "sources",  # patterns of tars: `encode.source.tars.expand`
        ):  # fmt: skip
            checks = [p.func for p in inside if isinstance(p, BeforeValidator)]
            assert set(checks) & set(TYPES), f"{config.__name__}.{name}"


DATA = {"latents": "c/vae", "text": "c/text", "lanes": 8}
TRAIN = {"data": DATA, "model": TINY, "steps": 1, "global_batch": 8, "micro_batch": 8}


@pytest.mark.parametrize("url", URLS[:-1])
@pytest.mark.parametrize("key", ["runs", "init_from", "deepspeed"])
def test_train_refuses_urls_as_they_were_typed(key: str, url: str) -> None:
    with pytest.raises(ConfigError, match="found a url") as refused:
        configs.load(TrainConfig, None, [*words(TRAIN), f"{key}={url}"])
    assert url in str(refused.value)


def words(values: dict[str, Any], at: str = "") -> list[str]:
    return [
        word
        for key, value in values.items()
        for word in (
            words(value, f"{at}{key}.")
            if isinstance(value, dict) and value
            else [f"{at}{key}={value}"]
        )
    ]


def test_columns_may_still_be_urls_and_the_home_is_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    some = words(TRAIN)
    config = configs.load(TrainConfig, None, [
        *some, "data.latents=s3://b/vae", "data.text={~/a: 1, gs://b/c: 2}", "data.also=[~/d]", "data.root=~/e",
        "runs=~/runs", "init_from=~/run", "deepspeed=~/ds.json", "validation.source=~/val",
    ])  # fmt: skip
    assert config.data.latents == "s3://b/vae"
    assert config.data.text == {"/home/me/a": 1, "gs://b/c": 2}
    assert (config.data.also, config.data.root) == (("/home/me/d",), "/home/me/e")
    assert [config.runs, config.init_from, config.deepspeed] == [
        Path("/home/me/runs"), Path("/home/me/run"), Path("/home/me/ds.json")
    ]  # fmt: skip
    assert config.validation.source == "/home/me/val"


def test_encode_writes_the_home_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = configs.load(EncodeConfig, None, [
        "root=~/cache", "sources.s=~/{a,b}.tar", "engine.scratch=~/scratch",
        "columns.v={kind: moments, encoder: {class: AutoencoderKL, path: ~/vae}, resolution: 32}",
    ])  # fmt: skip
    assert config.root == "/home/me/cache"
    assert config.engine.scratch == Path("/home/me/scratch")
    assert config.columns["v"].encoder.path == "/home/me/vae"  # type: ignore[union-attr]
    assert expand(config.sources["s"]) == ["/home/me/a.tar", "/home/me/b.tar"]
    for key in ("engine.scratch=s3://b/scratch", "columns.v.encoder.path=s3://b/vae"):
        with pytest.raises(ConfigError, match="s3://b/[a-z]*: found a url"):
            configs.load(EncodeConfig, None, [
                "root=c", "sources.s=a.tar", "columns.v.kind=moments", "columns.v.resolution=32",
                "columns.v.encoder.class=AutoencoderKL", "columns.v.encoder.path=x", key,
            ])  # fmt: skip


# The types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", URLS[:-1])
def test_urls(url: str) -> None:
    assert is_url(url)
    assert place(url) == url
    for check in (local_path, model):
        with pytest.raises(NotLocal) as refused:
            check(url)
        assert str(refused.value).startswith(f"{url}: ")


@pytest.mark.parametrize("url", ["s3://b/x", "gs://b/x", "https://h/x"])
def test_a_url_that_was_a_path_is_refused_too(url: str) -> None:
    with pytest.raises(NotLocal):
        local_path(Path(url))
    with pytest.raises(NotLocal):
        open_store(Path(url))


@pytest.mark.parametrize(
    "word", ["a", "./~", "a/~/b", "a:b", "C:x", "a://b"[:3], "x~", "google/gemma-2b"]
)
def test_other_words_stay(word: str) -> None:
    assert local_path(word) == Path(word)
    assert model(word) == place(word) == word


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~") == Path("/home/me")
    assert open_store("~/c").url == "/home/me/c"
    assert place("~root/x").endswith("/x")
    assert not place("~root/x").startswith("~")
    with pytest.raises(NotLocal, match="no such user"):
        place("~nobody-has-this-name/x")
    assert local_path("file:///a%20b") == Path("/a b")
    with pytest.raises(NotLocal, match="host"):
        local_path("file://h/a")
    assert location("google/gemma") == "google/gemma"
