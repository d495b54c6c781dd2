"""Prompt files: what is asked for, under ids that become file names."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards import canonical_json, sha256

from .errors import BadPrompts

Json = dict[str, Any]
LONGEST_ID = 200  # bytes; file systems stop at 255, and a suffix follows


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked for. `id` names its files and is part of its pictures' seeds."""

    id: str
    text: str
    group: str | None = None  # category or tag
    record: Json | None = None  # the benchmark's own, where its scorer wants it


@dataclass(frozen=True, slots=True)
class Prompts:
    """Ordered prompts. `benchmark` is part of every picture's seed."""

    benchmark: str
    items: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        return sha256(canonical_json(self.to_json()))

    def to_json(self) -> list[Json]:
        return [asdict(prompt) for prompt in self.items]

    @classmethod
    def from_json(cls, benchmark: str, items: list[Json]) -> "Prompts":
        return cls(benchmark, tuple(Prompt(**item) for item in items))


def read_prompts(path: Path) -> Prompts:
    """Read a .txt file (a prompt a line) or a .json file (a list of prompts, or {id: prompt}).

    The benchmark's name is the file's. Prompts without ids are numbered 00000, 00001, ...
    """
    if path.suffix not in READERS:
        raise BadPrompts(f"{path}: expected a name that ends in {' or '.join(READERS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadPrompts(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadPrompts(f"{path}: expected UTF-8 ({error})") from None
    items = READERS[path.suffix](text, path)
    if not items:
        raise BadPrompts(f"{path}: holds no prompt")
    _check(items, path)
    return Prompts(path.stem, tuple(Prompt(name, text) for name, text in items))


def _from_lines(text: str, path: Path) -> list[tuple[str, Any]]:
    return _numbered([line.strip() for line in text.splitlines() if line.strip()])


def _from_json(text: str, path: Path) -> list[tuple[str, Any]]:
    try:  # pairs, so that an id that stands twice is seen
        found = json.loads(text, object_pairs_hook=tuple)
    except ValueError as error:
        raise BadPrompts(f"{path}: not valid JSON ({error})") from None
    if isinstance(found, list):
        return _numbered(found)
    if isinstance(found, tuple):
        return list(found)
    raise BadPrompts(f"{path}: found {found!r:.80}, expected a list of prompts or {{id: prompt}}")


READERS = {".txt": _from_lines, ".json": _from_json}


def _numbered(prompts: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{i:05d}", prompt) for i, prompt in enumerate(prompts)]


def _check(items: list[tuple[str, Any]], path: Path) -> None:
    for name, prompt in items:
        if not isinstance(prompt, str):
            raise BadPrompts(f"{path}: prompt {name} is {prompt!r:.80}, expected text")
        bad = not name or name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name)
        if bad or len(name.encode()) > LONGEST_ID:
            raise BadPrompts(
                f"{path}: the id {name!r:.80} cannot name a file; use at most {LONGEST_ID} bytes, no path separators "
                "and no dot in front"
            )
    twice = [name for name, count in Counter(name for name, _ in items).items() if count > 1]
    if twice:
        raise BadPrompts(f"{path}: these ids stand more than once: {', '.join(twice[:5])}")
