"""Config files: defaults, then YAML, then `a.b=value` words, into a frozen pydantic model.

base: tiny.yaml          # at most one level, relative to this file
optim: {lr: 1e-4}        # a float here, although PyYAML alone reads a string

config = load(TrainConfig, "configs/train/tiny.yaml", ["data.latents=cache/flux"])

A config of this package is found from any folder by its name: `configs:train/flux-256`.
"""

from __future__ import annotations

# isort: split
from . import early  # noqa: F401 - before what takes time to load

# isort: split
import argparse
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .kinds import WORDS, of_another_kind
from .messages import did_you_mean, expects, explained, key_types, no_yaml, shown, types_in

__all__ = [
    "ConfigError",
    "Strict",
    "add_config_options",
    "did_you_mean",
    "expects",
    "explained",
    "load",
    "load_text",
    "read_yaml",
    "refuse_existing",
    "shipped",
    "shipped_names",
    "show_config",
    "shown",
    "word",
    "write_new",
]

M = TypeVar("M", bound=BaseModel)
FOLDER = Path(__file__).parent
PARTS = ("train", "encode", "study", "demo")  # folders of configs that a command takes
PREFIX = "configs:"  # of the name of a shipped file
MOST_BYTES = 1 << 22  # of a YAML file
MOST_NODES = 100_000  # values of it, with each alias written out


class ConfigError(ValueError):
    """A config that cannot be used: says what was found, what was expected and what to do."""

    exit_code = 2


class Strict(BaseModel):
    """The parent of every config model: frozen; an unknown key is an error, and so is a number that is none (NaN,
    infinity, true or false)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for name, annotation in key_types(cls).items() if isinstance(values, Mapping) else ():
            kinds = set(types_in(annotation))
            if kinds & {int, float} and bool not in kinds and _holds_truth(values.get(name)):
                raise ValueError(
                    f"{name}: found {shown(values[name])}, expected a number. Write one"
                )
        return values


def _holds_truth(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return any(map(_holds_truth, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, bool)


def load(
    model: type[M],
    path: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    takes_words: bool = True,
) -> M:
    """Fill the model from its defaults, then the YAML file (if any), then the `a.b=value` words.

    `takes_words`: whether the command line may set keys, which messages then say.
    """
    values = {} if path is None else _read_with_base(Path(path))
    for override in overrides:
        values = _merge(values, _override(override))
    where = WORDS if path is None else str(path)
    return _checked(model, values, where, takes_words)


def load_text(model: type[M], text: str, where: str) -> M:
    """Returns the model that the text of a YAML fills, which has no base; `where` is for messages."""
    return _checked(model, _parse(text, where), where, takes_words=False)


def _checked(model: type[M], values: Any, where: str, takes_words: bool) -> M:
    lines = [
        f"{name}: found {shown(value)}, expected a number. Write one"
        for name, value in _not_finite(values)
    ]
    try:
        if not lines:
            return model.model_validate(values)
    except ValidationError as error:
        if line := of_another_kind(key_types(model), values, where):
            raise ConfigError(line) from None
        lines = explained(model, values, error, takes_words=takes_words)
    raise ConfigError("\n  ".join([f"{where} is no valid {model.__name__}:", *lines]))


# ---- the verb `config` of a stage -------------------------------------------------------------


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `show_config` takes."""
    parser.description = (
        "Print a config with every key: those of its base, those of the command line, and the "
        "defaults. With --schema print the JSON schema of all configs, by which editors complete and "
        "check a YAML."
    )
    kinds = "a YAML file, or a shipped one by its name, as configs:train/flux-256"
    parser.add_argument("config", nargs="?", help=kinds)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys to set")
    parser.add_argument("--schema", action="store_true", help="the JSON schema instead")


def show_config(model: type[BaseModel], args: argparse.Namespace) -> int:
    """Prints a config, or the schema of the stage's configs; returns the exit code."""
    from .keys import schema_text

    if args.schema:
        print(schema_text(model))
        return 0
    if args.config is None:
        raise ConfigError("found no config, expected CONFIG or --schema")
    values = load(model, args.config, args.overrides).model_dump(mode="json", by_alias=True)
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0


# ---- a config that is written -----------------------------------------------------------------


def word(text: str) -> str:
    """Returns a string as a YAML has it: quoted unless it reads as itself."""
    plain = re.fullmatch(r"[A-Za-z./_][\w./-]*", text) and _parse(text, text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def write_new(path: Path, text: str, put: Callable[[Path, bytes], bool]) -> None:
    """Writes a config into a new file by `shards.put_if_absent`, which this package may not import.
    ConfigError where a file of its name exists, or it cannot be written.
    """
    try:
        is_new = put(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error}). Name another file by --out"
        ) from error
    if not is_new:
        refuse_existing(path)


def refuse_existing(path: Path) -> None:
    if path.is_symlink() or path.exists():
        raise ConfigError(
            f"{path}: exists already, and is not overwritten. Name another file by --out, or remove it"
        )


# ---- files ------------------------------------------------------------------------------------


def shipped(path: Path | str) -> Path:
    """Returns the path of a file of this package from `configs:NAME`, without `.yaml` if need be; any
    other path as it is. ConfigError names the nearest where there is none.
    """
    name = str(path).removeprefix(PREFIX)
    if name == str(path):
        return Path(path)
    files = (FOLDER / name, FOLDER / f"{name}.yaml")
    for file in files:
        if file.is_file() and file.resolve().is_relative_to(FOLDER.resolve()):
            return file
    names = shipped_names()
    near = difflib.get_close_matches(name, [n.removeprefix(PREFIX) for n in names], n=1)
    hint = f"; did you mean {PREFIX}{near[0]}?" if near else f". Shipped are {', '.join(names)}"
    raise ConfigError(f"{path}: no such config is shipped{hint}")


def shipped_names() -> list[str]:
    """Names of the shipped configs that a command takes, as `configs:train/flux-256`."""
    files = sorted(f for part in PARTS for f in FOLDER.glob(f"{part}/*.yaml"))
    return [f"{PREFIX}{f.relative_to(FOLDER).with_suffix('').as_posix()}" for f in files]


def _elsewhere(path: Path) -> str:
    """Returns what to do about a config that is not there."""
    siblings = {file.stem: file for file in path.parent.glob("*.yaml")}
    names = [name for name in shipped_names() if Path(name).name == path.stem]
    if len(names) > 1:  # of several stages, that of the path's folder
        names = [name for name in names if name.endswith(f":{path.parent.name}/{path.stem}")]
    if names and path.stem not in siblings:
        return f"the shipped config is {names[0]}, from any folder"
    near = difflib.get_close_matches(path.stem, siblings, n=1)
    return f"did you mean {siblings[near[0]]}?" if near else "check the path"


# ---- YAML -------------------------------------------------------------------------------------


class _Yaml(yaml.SafeLoader):
    """Scalars as in YAML 1.2, not PyYAML's 1.1: `1e-4` is a float, `no` is a string."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(
                    problem="found a key in brackets, expected a word. Quote it, or remove them",
                    problem_mark=key_node.start_mark,
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", "~|null|", ["~", "n", ""]),
    ("bool", "true|false", ["t", "f"]),
    ("int", "[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first)


def _parse(text: str, where: str) -> Any:
    loader = None
    try:
        loader = _Yaml(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise ConfigError(f"{where}: its aliases make more than {MOST_NODES} values")
        return loader.construct_document(node)
    except ConfigError:
        raise
    # a ValueError: an integer of thousands of digits
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {no_yaml(error, text)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Values below a node with each alias written out; infinite where one lies within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is being counted
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = chain(*parts) if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in flat)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file; ConfigError where it is none, or none of `key: value` lines."""
    path = shipped(path)
    if not path.is_file():
        found = (
            "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "nothing"
        )
        raise ConfigError(f"found {found} at {path}, expected a YAML file: {_elsewhere(path)}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ConfigError(f"{path}: found {size} bytes, expected at most {MOST_BYTES} of a config")
    try:
        values = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{path}: found {shown(values)}, expected `key: value` lines, each key a word"
        )
    return values


def _read_with_base(path: Path) -> dict[str, Any]:
    path = shipped(path)
    values = read_yaml(path)
    if "base" not in values:
        return values
    named = values.pop("base")
    if not isinstance(named, str):
        raise ConfigError(
            f"{path}: base: found {shown(named)}, expected the path of a YAML, from this one's folder"
        )
    if "://" in named:
        raise ConfigError(f"{path}: base: found the url {named}, expected a path beside this file")
    base = path.parent / os.path.expanduser(named)
    if named.startswith(PREFIX):
        base = shipped(named)
    below = read_yaml(base)
    if "base" in below:
        raise ConfigError(
            f"{path} has the base {base}, which has a base itself: one level is allowed, "
            f"so name {below['base']} or copy its lines"
        )
    return _merge(below, values)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]  # both are mappings
    return merged


def _not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of numbers that are none, also where a model takes anything."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value
    for key, part in parts:
        yield from _not_finite(part, f"{name}.{key}" if name else str(key))


def _override(word: str) -> dict[str, Any]:
    name, equals, text = word.partition("=")
    keys = name.split(".")
    if not equals or not all(keys) or name.startswith("-"):
        raise ConfigError(
            f"found {word!r}, expected KEY=VALUE such as optim.lr=1e-4, without spaces and hyphens"
        )
    value: Any = _parse(text, word)
    for key in reversed(keys):
        value = {key: value}
    return dict(value)
