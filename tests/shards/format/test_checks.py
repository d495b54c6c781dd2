"""What is wrong with a record is said in plain words, whatever is wrong with it."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shards import Source
from shards.format.checks import EXPECTED, UnknownField, check
from shards.format.records import (
    INDEX_ROW,
    ColumnRecord,
    CommitRecord,
    CompleteRecord,
    Quantisation,
    SourceRecord,
)
from tests.shards.toy import small_moments, small_tokens

OTHERS = (
    None, True, -1, 2**70, 1.5, float("nan"), "x", "x" * 70_000, [], {}, [1], [0] * 5, {"a": 1},
    {"x" * 70_000: "0" * 64},
)  # fmt: skip
# of the library that checks, or of Python
FOREIGN = re.compile(
    r"pydantic|a valid |validation|Input|tuple|\bdict|string|integer|None|True|\w+Type|\.int\b"
)


def records(folder: Path) -> Iterator[tuple[Any, Any]]:
    for column in (small_moments(folder / "moments"), small_tokens(folder / "tokens")):
        yield ColumnRecord, json.loads((column / "column.json").read_bytes())
        yield CommitRecord, json.loads((column / "commits/00000.json").read_bytes())
        yield CompleteRecord, json.loads(next((column / "complete").glob("*.json")).read_bytes())
    yield SourceRecord, {**Source("s", (("a.tar", 1024),)).record(), "digest": "0" * 64}
    yield Quantisation, {"scheme": "s", "channel": [1.0], "relative_error": 1, "rows": 3}
    yield INDEX_ROW, ["key", {"jpg": [1, 2]}, {"txt": "0" * 64}]


def changed(record: Any, path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yields the record with each part of it exchanged for other values, and left out."""
    part = record
    for key in path:
        part = part[key]
    for other in OTHERS:
        yield _with(record, path, other)
    if path and isinstance(path[-1], str):
        yield _with(record, path, ...)
    if isinstance(part, dict | list):
        for key in part if isinstance(part, dict) else range(min(len(part), 2)):
            yield from changed(record, (*path, key))


def _with(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    record = copy.copy(record)
    if value is ... and len(path) == 1:
        del record[path[0]]
    else:
        record[path[0]] = _with(record[path[0]], path[1:], value)
    return record


def test_messages_have_no_words_of_a_library(tmp_path: Path) -> None:
    messages = set()
    for schema, record in records(tmp_path):
        for other in changed(record):
            try:
                check(schema, other)
            except UnknownField:
                continue
            except ValueError as error:
                messages.add(str(error))
    foreign = [message for message in messages if FOREIGN.search(re.sub("'.*?'", "", message))]
    assert not foreign
    assert max(map(len, messages)) < 400
    said = {word for word in EXPECTED.values() if any(word in message for message in messages)}
    assert {"an object", "a list", "text", "a whole number", "a finite number"} <= said
    assert "relative_error: found null, expected a number" in messages


def test_a_kind_of_fault_without_words_of_its_own() -> None:
    class Odd(BaseModel):
        value: complex

    with pytest.raises(ValueError, match="^value: found 'x', expected another value$"):
        check(Odd, {"value": "x"})
