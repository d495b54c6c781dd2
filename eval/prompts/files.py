"""Prompt files: of one's own, of the benchmarks' authors, and as the reference keeps them.

A file has one of a few forms; a benchmark names the forms that it takes and how an item of each
becomes a prompt. Nothing is guessed: another form is refused with what was found and what would do.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shards.format.atomic import read_file

from ..errors import BadPrompts
from .prompts import Json, Prompt, Prompts, checked

# The forms, as messages call them.
LIST = "a list of prompts"
NAMED = "{id: prompt}"
RECORDS = "records (JSON lines, a JSON list of objects, or CSV with a header)"
NAMED_RECORDS = "{id: {...}}"
FOLDER = "a folder of .txt files"
LINES = "lines of text"

Items = list[tuple[Any, Any]]  # (id or number, value) in the file's order
Form = Callable[[Any, Any], Prompt]  # an item as a prompt; KeyError or TypeError where it is none
Forms = Mapping[str, Form]


def reader(benchmark: str, forms: Forms) -> Callable[[Path], Prompts]:
    """Returns what reads a benchmark's prompts from the forms that it takes."""

    def read(path: Path) -> Prompts:
        form, items = look_into(path)
        if form == NAMED and RECORDS in forms and not all(isinstance(v, str) for _, v in items):
            form, items = RECORDS, [(0, dict(items))]  # JSON lines of which there is one
        if form not in forms:
            raise BadPrompts(
                f"{path}: found {form}, expected for {benchmark} {', or '.join(forms)}"
            )
        return checked(benchmark, _prompts(forms[form], items, path), path)

    return read


def read_prompts(path: Path) -> Prompts:
    """Returns the prompts of a .txt file (a prompt a line) or a .json file (list or {id: prompt}).

    The benchmark's name is the file's. Prompts without ids are numbered 00000, 00001, ...
    """
    if path.suffix not in (".txt", ".json"):
        raise BadPrompts(f"{path}: expected a name that ends in .txt or .json")
    if path.suffix == ".txt":
        lines = [line.strip() for line in _text(path).split("\n")]
        form, items = LIST, list(enumerate(line for line in lines if line))
    else:
        form, items = look_into(path)
        if form == LINES:
            raise BadPrompts(
                f"{path}: found {form}, expected {LIST} or {NAMED} as JSON; name it .txt if it is text"
            )
    make = Prompt if form in (NAMED, NAMED_RECORDS) else numbered
    return checked(path.stem, _prompts(make, items, path), path)


def look_into(path: Path) -> tuple[str, Items]:
    """Returns the form of a prompt file or folder, and its items."""
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        return FOLDER, [(text.name.removesuffix(".txt"), _text(text).strip()) for text in texts]
    text = _text(path)
    first = text.lstrip()[:1]
    if not first:
        raise BadPrompts(f"{path}: holds no prompt")
    if first not in "[{":
        rows = _rows(text, path) if "," in text.split("\n")[0] else None
        return (LINES if rows is None else RECORDS), list(enumerate(rows or text.split("\n")))
    value = _json(text, path)
    is_object = isinstance(value, dict)
    items = list(value.items() if is_object else enumerate(value))
    has_records = bool(items) and all(isinstance(item, dict) for _, item in items)
    forms = (NAMED, NAMED_RECORDS) if is_object else (LIST, RECORDS)
    return forms[has_records], items


# How items become prompts -------------------------------------------------------------------------


def numbered(number: int, text: Any) -> Prompt:
    return Prompt(f"{number:05d}", text)


def prompt_numbered(number: int, text: Any) -> Prompt:
    """The reference's ids of DPG-Bench's prompts where they are a list."""
    return Prompt(f"prompt_{number:05d}", text)


def dotless(name: str, text: Any) -> Prompt:
    """DPG-Bench's id, which its scorer takes from a file's name up to the first dot."""
    if "." in name:
        raise TypeError(
            f"the id {name!r} has a dot, and DPG-Bench's scorer reads ids up to the first dot"
        )
    return Prompt(name, text)


def with_category(name: str, record: Json) -> Prompt:
    """MJHQ-30K's {"category": ..., "prompt": ...}."""
    return Prompt(name, record["prompt"], group=record["category"])


def with_ratings(name: str, record: Json) -> Prompt:
    """GenAI-Bench's {"prompt": ..., "models": ratings of people}, of which ratings are left out."""
    return Prompt(name, record["prompt"])


def tagged(number: int, record: Json) -> Prompt:
    """GenEval's {"tag": ..., "include": [...], "prompt": ...}, under the number of its line."""
    if not isinstance(record["tag"], str) or not isinstance(record["include"], list):
        raise TypeError("expected a tag and a list of what the picture includes")
    for item in [*record["include"], *record.get("exclude", [])]:
        if not isinstance(item["class"], str) or type(item["count"]) is not int:
            raise TypeError(f"expected a class and a count, found {item!r:.80}")
    return Prompt(f"{number:05d}", record["prompt"], record["tag"], record)


def captioned(number: int, record: Json) -> Prompt:
    """COCO's caption {"id": ..., "image_id": ..., "caption": ...}, under its id."""
    if "annotations" in record:
        raise TypeError(
            "found COCO's whole annotations, expected a list of captions; `python -m eval prompts fetch coco30k` draws "
            "one from them"
        )
    image = {"image_id": int(record["image_id"])}
    return Prompt(str(int(record["id"])), record["caption"], record=image)


def _prompts(form: Form, items: Items, path: Path) -> list[Prompt]:
    prompts = []
    for name, value in items:
        try:
            prompts.append(form(name, value))
        except KeyError as error:
            raise BadPrompts(f"{path}: prompt {name} has no {error}; found {value!r:.80}") from None
        except (TypeError, ValueError) as error:
            raise BadPrompts(f"{path}: prompt {name} is {value!r:.80}: {error}") from None
    return prompts


# Bytes to values ----------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")  # some editors put a byte order mark in front
    except FileNotFoundError:
        raise BadPrompts(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadPrompts(f"{path}: expected UTF-8 ({error})") from None
    except OSError as error:
        raise BadPrompts(f"{path}: cannot be read ({error.strerror or error})") from None


def _json(text: str, path: Path) -> Any:
    """Returns a JSON list or object, or the list of the values of JSON lines; else BadPrompts."""
    try:
        return _parsed(text)
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append(_parsed(line))
        except (ValueError, RecursionError) as error:
            if values:
                problem = f"line {number} is not valid JSON ({error})"
            raise BadPrompts(f"{path}: {problem}") from None
    return values


def _parsed(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    if not isinstance(value, list | dict):
        raise ValueError(f"found {value!r:.80}, expected a list or an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    value: Json = {}
    for key, item in pairs:
        if key in value:  # which dict() would pass over, and a prompt would be lost
            raise ValueError(f"this key occurs more than once: {key}")
        value[key] = item
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _rows(text: str, path: Path) -> list[Json]:
    """Returns the rows under a header."""
    try:
        rows: list[Json] = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BadPrompts(f"{path}: neither JSON nor CSV ({error})") from None
    if any(None in row or None in row.values() for row in rows):
        raise BadPrompts(
            f"{path}: neither JSON, nor CSV with as many fields in each row as in its header"
        )
    return rows
