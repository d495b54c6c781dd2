"""Prompt files: of one's own, of the benchmarks' authors, and as the reference keeps them.

A file is looked into and found to be of one of a few forms; a benchmark names the forms that it takes and how each
becomes prompts. Nothing is guessed: another form is refused with what was found and what would do.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shards.format.atomic import read_file

from ..errors import BadPrompts
from .prompts import Json, Prompt, Prompts, checked

# The forms: what a message calls them.
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
    """How a benchmark's prompts are read: the forms that it takes."""

    def read(path: Path) -> Prompts:
        form, items = look_into(path)
        texts = all(isinstance(value, str) for _, value in items)
        if RECORDS in forms and form == NAMED and not texts:
            form, items = RECORDS, [(0, dict(items))]  # JSON lines of which there is one
        if form not in forms:
            raise BadPrompts(
                f"{path}: found {form}, expected for {benchmark} {', or '.join(forms)}"
            )
        return checked(benchmark, _made(forms[form], items, path), path)

    return read


def read_prompts(path: Path) -> Prompts:
    """Read a .txt file (a prompt a line) or a .json file (a list of prompts, or {id: prompt}).

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
    make = named if form in (NAMED, NAMED_RECORDS) else numbered
    return checked(path.stem, _made(make, items, path), path)


def look_into(path: Path) -> tuple[str, Items]:
    """The form of a prompt file or folder, and its items."""
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        return FOLDER, [(text.name.removesuffix(".txt"), _text(text).strip()) for text in texts]
    text = _text(path)
    start = text.lstrip()[:1]
    if not start:
        raise BadPrompts(f"{path}: holds no prompt")
    if start not in ("[", "{"):
        rows = _rows(text, path) if "," in text.split("\n")[0] else None
        return (LINES if rows is None else RECORDS), list(enumerate(rows or text.split("\n")))
    try:
        found = _parsed(text)
    except (ValueError, RecursionError) as error:
        found = _lines(text, path, error)
    if isinstance(found, list):
        holds_records = bool(found) and all(isinstance(item, Pairs) for item in found)
        return (RECORDS if holds_records else LIST), [
            (i, plain(item)) for i, item in enumerate(found)
        ]
    holds_records = bool(found) and all(isinstance(value, Pairs) for _, value in found)
    return (NAMED_RECORDS if holds_records else NAMED), [
        (key, plain(value)) for key, value in found
    ]


class Pairs(tuple[tuple[str, Any], ...]):
    """A JSON object as it stands in the file, so that a key that stands twice is seen."""


def plain(value: Any) -> Any:
    """Objects as dicts."""
    if isinstance(value, Pairs):
        return {key: plain(inner) for key, inner in value}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


# How items become prompts ------------------------------------------------------------------------


def numbered(number: int, text: Any) -> Prompt:
    return Prompt(f"{number:05d}", text)


def named(name: str, text: Any) -> Prompt:
    return Prompt(name, text)


def prompt_numbered(number: int, text: Any) -> Prompt:
    """As the reference numbers DPG-Bench's prompts where they are a list."""
    return Prompt(f"prompt_{number:05d}", text)


def dotless(name: str, text: Any) -> Prompt:
    """DPG-Bench's scorer takes a file's name up to the first dot for the id."""
    if "." in name:
        raise TypeError(
            f"the id {name!r} has a dot, and DPG-Bench's scorer reads ids up to the first dot"
        )
    return Prompt(name, text)


def with_category(name: str, record: Json) -> Prompt:
    """MJHQ-30K's {"category": ..., "prompt": ...}."""
    return Prompt(name, record["prompt"], group=record["category"])


def with_ratings(name: str, record: Json) -> Prompt:
    """GenAI-Bench's {"prompt": ..., "models": ratings of people}: the ratings are left."""
    return Prompt(name, record["prompt"])


def tagged(number: int, record: Json) -> Prompt:
    """GenEval's {"tag": ..., "include": [...], "prompt": ...}, under the number of its line."""
    if not isinstance(record["tag"], str) or not isinstance(record["include"], list):
        raise TypeError("expected a tag and a list of what the picture includes")
    for asked in [*record["include"], *record.get("exclude", [])]:
        if not isinstance(asked["class"], str) or type(asked["count"]) is not int:
            raise TypeError(f"expected a class and a count, found {asked!r:.80}")
    return Prompt(f"{number:05d}", record["prompt"], record["tag"], record)


def captioned(number: int, record: Json) -> Prompt:
    """COCO's caption {"id": ..., "image_id": ..., "caption": ...}, under its id."""
    if "annotations" in record:
        raise TypeError(
            "found COCO's whole annotations, expected a list of captions; `python -m eval prompts fetch coco30k` draws "
            "one from them"
        )
    return Prompt(
        str(int(record["id"])), record["caption"], record={"image_id": int(record["image_id"])}
    )


def _made(form: Form, items: Items, path: Path) -> list[Prompt]:
    made = []
    for name, value in items:
        try:
            made.append(form(name, value))
        except KeyError as error:
            raise BadPrompts(f"{path}: prompt {name} has no {error}; found {value!r:.80}") from None
        except (TypeError, ValueError) as error:
            raise BadPrompts(f"{path}: prompt {name} is {value!r:.80}: {error}") from None
    return made


# Bytes to values -----------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8-sig")  # some editors put a mark in front
    except FileNotFoundError:
        raise BadPrompts(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadPrompts(f"{path}: expected UTF-8 ({error})") from None
    except OSError as error:
        raise BadPrompts(f"{path}: cannot be read ({error.strerror or error})") from None


def _parsed(text: str) -> Any:
    found = json.loads(text, object_pairs_hook=Pairs, parse_constant=_no_number)
    if not isinstance(found, (list, Pairs)):
        raise ValueError(f"found {found!r:.80}, expected a list or an object")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _lines(text: str, path: Path, whole: Exception) -> list[Any]:
    """A JSON object a line; where the first line is none, the file is JSON that is not valid."""
    found = []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_parsed(line))
        except (ValueError, RecursionError) as error:
            told = f"line {i} is not valid JSON ({error})" if found else f"not valid JSON ({whole})"
            raise BadPrompts(f"{path}: {told}") from None
    return found


def _rows(text: str, path: Path) -> list[Json]:
    """Rows under a header."""
    try:
        rows: list[Json] = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise BadPrompts(f"{path}: neither JSON nor CSV ({error})") from None
    if any(None in row or None in row.values() for row in rows):
        raise BadPrompts(
            f"{path}: neither JSON, nor CSV with as many fields in each row as in its header"
        )
    return rows
