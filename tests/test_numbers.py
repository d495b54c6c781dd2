"""A number that is none, or out of its range, is refused at load with its key: of every config, and of every option."""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import configs
from configs import ConfigError
from encode.config import EncodeConfig
from train.config import TrainConfig
from train.model.config import DiTConfig

MODEL = {"hidden_size": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 4, "mlp_size": 4}
SPEC = {"encoder": {"class": "AutoencoderKL", "path": "vae"}}
COLUMNS: dict[str, dict[str, Any]] = {
    "moments": {**SPEC, "resolution": 64},
    "latents": {**SPEC, "resolution": 64},
    "features": SPEC,
    "tokens": SPEC,
    "ids": SPEC,
}
ROOTS: dict[type[BaseModel], dict[str, Any]] = {
    TrainConfig: {
        "data": {"latents": "c/vae", "text": "c/text"},
        "model": MODEL,
        "steps": 10,
        "global_batch": 64,
        "micro_batch": 8,
    },
    EncodeConfig: {
        "root": "columns",
        "sources": {"toy": "a.tar"},
        "columns": {kind: {"kind": kind, **fields} for kind, fields in COLUMNS.items()},
    },
    DiTConfig: {**MODEL, "in_channels": 4, "out_channels": 4, "text_width": 8},
}
# may be negative; a norm's shift and scale are looked at together
SIGNED = {"hidden_state", "logit_mean", "mode_scale", "shift", "scale", "mean"}
MAY_BE_ZERO = SIGNED | {
    "ahead", "betas", "caption_dropout", "decay", "hang", "initializer_range", "norm_eps", "remote_decode", "seed",
    "warmup", "weight_decay", "window", "workers",
}  # fmt: skip
AT_MOST_ONE = {"betas", "caption_dropout", "decay", "remote_decode"}

Leaf = tuple[
    type[BaseModel], tuple[str, ...], Callable[[Any], Any]
]  # root, path, value -> what to put there


def leaves(annotation: Any, path: tuple[str, ...], wrap: Callable[[Any], Any]) -> Iterator[Any]:
    """Where a number may be in a value of this type: its path, and the value that has a given number there."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        yield path, wrap
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from leaves(field.annotation, (*path, field.alias or name), lambda value: value)
    elif isinstance(annotation, type) and is_dataclass(annotation):
        names = get_type_hints(annotation)
        for name in (name for name in names if not name.startswith("_")):
            others = dict.fromkeys(names.keys() - {"__pydantic_config__"}, 1)
            yield from leaves(int, path, lambda v, name=name, others=others: {**others, name: v})  # type: ignore[misc]
    elif origin in (list, tuple) and arguments:
        count = len(arguments) if origin is tuple and arguments[-1] is not ... else 3
        yield from leaves(arguments[0], path, lambda value: wrap([value] * count))
    elif origin in (dict, Mapping):
        inside = arguments[1]
        if path[-1] == "columns":
            for kind, member in zip(COLUMNS, get_args(get_args(inside)[0]), strict=True):
                yield from leaves(member, (*path, kind), wrap)
        else:
            yield from leaves(inside, path, lambda value: wrap({"a": value}))
    elif origin is not Literal:
        for argument in arguments[: 1 if origin is Annotated else None]:
            yield from leaves(argument, path, wrap)


LEAVES: dict[str, Leaf] = {
    f"{root.__name__}.{'.'.join(path)}.{number}": (root, path, wrap)
    for root in ROOTS
    for number, (path, wrap) in enumerate(leaves(root, (), lambda value: value))
}


def with_value(base: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    below = base.get(path[0]) if isinstance(base, dict) else None
    return {**(base or {}), path[0]: with_value(below or {}, path[1:], value)}


def loads(leaf: Leaf, number: Any) -> None:
    root, path, wrap = leaf
    root.model_validate(with_value(ROOTS[root], path, wrap(number)))


def refuses(leaf: Leaf, number: Any, folder: Path) -> None:
    """From a YAML, and with the key; nested in what was loaded before, too."""
    root, path, wrap = leaf
    values = with_value(ROOTS[root], path, wrap(number))
    text = repr(values).replace("nan", ".nan").replace("inf", ".inf").replace("None", "null")
    file = folder / "config.yaml"
    file.write_text(text.replace("True", "true").replace("False", "false"))
    with pytest.raises(ConfigError) as caught:
        configs.load(root, file)
    assert path[-1] in str(caught.value), str(caught.value)
    with pytest.raises(ValueError, match=path[-1]):
        root.model_validate(values)


def test_every_number_of_every_config_is_met() -> None:
    names = {path[-1] for _, path, _ in LEAVES.values()}
    assert {
        "lr",
        "betas",
        "clip",
        "weights",
        "sources",
        "expect",
        "patience",
        "shift",
        "std",
        "text",
    } <= names
    assert len(LEAVES) > 70


@pytest.mark.parametrize("name", LEAVES)
def test_a_number_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    leaf = LEAVES[name]
    key = leaf[1][-1]
    for number in (math.nan, math.inf, -math.inf, True):
        refuses(leaf, number, tmp_path)
    if key not in SIGNED:
        refuses(leaf, -1, tmp_path)
    if key not in MAY_BE_ZERO:
        refuses(leaf, 0, tmp_path)
    if key in AT_MOST_ONE:
        refuses(leaf, 1.5, tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(LEAVES)), st.floats() | st.integers())
def test_what_loads_is_a_number_of_its_range(name: str, number: float) -> None:
    leaf = LEAVES[name]
    key = leaf[1][-1]
    try:
        loads(leaf, number)
    except ValueError:
        return
    assert math.isfinite(number)
    assert number >= 0 or key in SIGNED
    assert number or key in MAY_BE_ZERO
    assert number <= 1 or key not in AT_MOST_ONE


def test_infinity_where_a_model_takes_anything(tmp_path: Path) -> None:
    words = [
        "deepspeed={zero_optimization: {stage: 1, reduce_bucket_size: .inf}}",
        "optim.lr=-.inf",
    ]
    config = tmp_path / "config.yaml"
    config.write_text(repr(ROOTS[TrainConfig]))
    with pytest.raises(ConfigError) as caught:
        configs.load(TrainConfig, config, words)
    assert "deepspeed.zero_optimization.reduce_bucket_size: found .inf, expected" in str(
        caught.value
    )
    assert "optim.lr: found -.inf, expected a number" in str(caught.value)


# Options -------------------------------------------------------------------------------------------------------------


class Met(Exception):
    """A parser is about to read its words."""


COMMANDS = [
    "shards info", "shards order", "encode plan", "encode download", "encode status", "encode bench", "train plan",
    "train import", "train export", "train bench", "train page", "eval generate", "eval watch", "eval score fid",
    "eval.demo.vae", "tests.bench.evaluation.generate", "tests.bench.evaluation.features",
    "tests.bench.evaluation.online", "tests.bench.evaluation.distances",
]  # fmt: skip
# that may be zero
ZERO = {
    "--seconds", "--shards-sampled", "--price-per-gpu-hour", "--price-per-tb-month", "--tokens", "--tag", "--seed",
    "--position", "--rank", "--window", "--pictures", "--guidance_scale", "--guidance_interval",
}  # fmt: skip


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    package, *words = command.split()
    module = f"{package}.__main__" if "." not in package else package
    caught: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        caught.append(parser)
        raise Met

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
        patch.setattr(sys, "argv", [package, *words])
        with pytest.raises(Met):
            importlib.import_module(module).main()
    return caught[0]


def numeric(parser: argparse.ArgumentParser) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Names and types of the options that are numbers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from numeric(inner)
        elif callable(action.type):
            try:
                value = action.type("1")
            except (ValueError, argparse.ArgumentTypeError):
                continue
            one = value[0] if isinstance(value, list) else value
            if isinstance(one, int | float):
                yield action.option_strings[0], action.type


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_no_number_is_refused(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in numeric(parser_of(command, monkeypatch)):
        bad = ["nan", "inf", "-inf", "1e999", "", "one"]
        bad += [] if name == "--guidance_interval" else ["-1"]  # its range is looked at later
        for text in [*bad, *(["0"] if name not in ZERO else [])]:
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                print(f"{command} {name}: {text!r} became", kind(text))


def test_options_of_all_packages_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name for command in COMMANDS for name, _ in numeric(parser_of(command, monkeypatch))}
    assert {
        "--weights",
        "--mfu",
        "--samples",
        "--gpus",
        "--batch_size",
        "--threads",
        "--tag",
    } <= found
