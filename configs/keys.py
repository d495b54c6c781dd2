"""The keys of a config, for people and editors: docs/config.md and the JSON schema.

The text of a key is the comment at its field in the model's source: above the field, else behind it.

    # steps of linear warm-up
    warmup: int = 0
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

BASE = "another YAML, by its path from this file, whose values this one changes; one level"
REQUIRED = "required"


@dataclass(frozen=True)
class Key:
    """A key as a YAML has it: `optim.lr`, its default as YAML, and the comment at its field."""

    name: str
    default: str
    text: str


@cache
def comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field that a class itself defines; empty where it has none."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines, remarks = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# type:"):
            alone = lines[token.start[0] - 1].lstrip().startswith("#")
            remarks[token.start[0]] = token.string.lstrip("# "), alone
    texts = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]  # of a class
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        above = first
        while remarks.get(above - 1, ("", False))[1]:
            above -= 1
        places = range(above, first) if above < first else range(first, last + 1)
        texts[node.target.id] = " ".join(remarks[n][0] for n in places if n in remarks)
    return texts


def texts_of(cls: type) -> dict[str, str]:
    """Returns the comment of each key of a model, also of those that it inherits."""
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if parent is not BaseModel and (is_dataclass(parent) or issubclass(parent, BaseModel)):
            for field, text in comments(parent).items():
                info = getattr(cls, "model_fields", {}).get(field)
                name = (info and info.alias) or field
                texts[name] = text or texts.get(name, "")
    return texts


# JSON schema ---------------------------------------------------------------------------------------


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the JSON schema of a YAML for editors. No key is required there, since it may come from
    `base` or from the command line.
    """
    result = model.model_json_schema(by_alias=True)
    classes = {cls.__name__: cls for cls in (model, *models_in(model))}
    for name, definition in {model.__name__: result, **result.get("$defs", {})}.items():
        texts = texts_of(classes[name]) if name in classes else {}
        for key, value in definition.get("properties", {}).items():
            if texts.get(key):
                value["description"] = texts[key]
    result = _open(result)
    base = {"type": "string", "description": BASE}
    properties = {"base": base, **result["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", **result, "properties": properties,
    }  # fmt: skip


def _open(value: Any) -> Any:
    """Returns a schema in which each part may be unfinished."""
    if isinstance(value, list):
        return [_open(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k not in ("discriminator", "title")}
    if isinstance(kept.get("required"), list):
        del kept["required"]
    names = {"oneOf": "anyOf"}  # a column whose kind comes from the base is of several
    return {
        names.get(k, k): {n: _open(p) for n, p in v.items()} if k == "properties" else _open(v)
        for k, v in kept.items()
    }


def schema_text(model: type[BaseModel]) -> str:
    return json.dumps(schema(model), indent=2)


# Tables --------------------------------------------------------------------------------------------


def keys_of(cls: type, above: str = "") -> Iterator[Key]:
    """Yields the keys of a model and of the models in it, by dotted names; of a mapping of models with
    NAME in the place of the user's name.
    """
    texts = texts_of(cls)
    for name, annotation, default in _fields(cls):
        kinds = [kind for kind in _types(annotation) if _is_model(kind)]
        text, values = texts.get(name, ""), _values(annotation)
        if text or not kinds:
            yield Key(above + name, default, _with_values(text, values))
        mapping = get_origin(annotation) is dict
        below = f"{above}{name}.{'NAME.' if mapping else ''}"
        if len(kinds) == 1:
            yield from keys_of(kinds[0], below)
        elif kinds and mapping:
            yield from _keys_of_union(kinds, below)


def _keys_of_union(kinds: Sequence[type], above: str) -> Iterator[Key]:
    """Yields the keys of models of which one is chosen by its `kind`; of a key that not all have,
    the text says which.
    """
    tags = [get_args(dict((n, a) for n, a, _ in _fields(cls))["kind"])[0] for cls in kinds]
    text = texts_of(kinds[0])["kind"]
    yield Key(f"{above}kind", REQUIRED, _with_values(text, tags))
    owners: dict[Key, list[str]] = {}
    for tag, cls in zip(tags, kinds, strict=True):
        for key in keys_of(cls, above):
            if key.name != f"{above}kind":
                owners.setdefault(key, []).append(tag)
    for key, names in sorted(owners.items(), key=lambda item: -len(item[1])):
        of = "" if len(names) == len(tags) else f" (of {', '.join(names)})"
        yield Key(key.name, key.default, key.text + of)


def _with_values(text: str, values: Sequence[str]) -> str:
    listed = ", ".join(f"`{value}`" for value in values)
    return f"{text} ({listed})" if values else text


def table(cls: type) -> str:
    """Returns the keys of a model as a table in Markdown."""
    rows = [f"| `{key.name}` | {_cell(key.default)} | {key.text} |" for key in keys_of(cls)]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def _cell(default: str) -> str:
    return default if default == REQUIRED else f"`{default}`"


def models_in(cls: type) -> Iterator[type]:
    """Yields the models that a model is put together of, at any depth."""
    for _, annotation, _ in _fields(cls):
        for kind in filter(_is_model, _types(annotation)):
            yield kind
            yield from models_in(kind)


def _is_model(kind: type) -> bool:
    return is_dataclass(kind) or issubclass(kind, BaseModel)


def _fields(cls: type) -> Iterator[tuple[str, Any, str]]:
    """Yields name, annotation and default of each key."""
    if issubclass(cls, BaseModel):
        for name, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True, validated_data={})
            yield info.alias or name, info.annotation, _yaml(default)
    else:
        hints = get_type_hints(cls)
        for field in fields(cast(Any, cls)):
            default = PydanticUndefined if field.default is MISSING else field.default
            yield field.name, hints[field.name], _yaml(default)


def _yaml(value: Any) -> str:
    """Returns a default as a YAML has it."""
    if value is PydanticUndefined:
        return REQUIRED
    if isinstance(value, BaseModel):
        return "{...}"
    if isinstance(value, Path):
        return str(value)
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value)
    return str(value) if plain else json.dumps(value)


def _types(annotation: Any) -> list[type]:
    arguments = get_args(annotation)
    if not arguments:
        return [annotation] if isinstance(annotation, type) else []
    return list(dict.fromkeys(kind for argument in arguments for kind in _types(argument)))


def _values(annotation: Any) -> list[str]:
    """Returns the words that a field takes, where they are a fixed few."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for argument in get_args(annotation) for word in _values(argument)]
