"""Prompts: what is asked for, under ids that become file names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256 as digest_of
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from shards import canonical_json, sha256
from shards.format.checks import Text, check

from ..errors import BadPrompts

Json = dict[str, Any]
Half = Literal["a", "b"]
LONGEST_ID = 200  # bytes; file systems stop at 255, and a suffix follows
MOST_PROMPTS = 1 << 22
LEAST_HALVED = 4  # prompts, so that those of each half vary
NAMED = 5  # of many ids, how many an error names


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked for. `id` names its files and is part of its pictures' seeds."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    id: Text
    text: Annotated[str, Field(max_length=1 << 24)]
    group: Text | None = None  # category or tag
    record: Json | None = None  # the benchmark's own, where its scorer wants it


PROMPTS = TypeAdapter(Annotated[list[Prompt], Field(max_length=MOST_PROMPTS, fail_fast=True)])


@dataclass(frozen=True, slots=True)
class Prompts:
    """Ordered prompts. `benchmark` is part of every picture's seed."""

    benchmark: str
    items: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        return sha256(canonical_json(self.to_json()))

    def half(self, name: Half) -> Prompts:
        """Returns one half of the prompts, as `halves` divides them, in their order."""
        ids = set(halves([(prompt.id, prompt.group) for prompt in self.items])["ab".index(name)])
        return replace(self, items=tuple(prompt for prompt in self.items if prompt.id in ids))

    def to_json(self) -> list[Json]:
        return [asdict(prompt) for prompt in self.items]

    @classmethod
    def from_json(cls, benchmark: str, items: Any) -> Prompts:
        """Returns what `to_json` was made of; ValueError or TypeError where the items are none."""
        return cls(benchmark, tuple(check(PROMPTS, items)))


def halves(prompts: Sequence[tuple[str, str | None]]) -> tuple[list[str], list[str]]:
    """Returns the ids of two halves of prompts (id, group), of equal number.

    Prompts are ordered by group and by the digest of their id, and go to the halves in turns, so that
    each group is halved too, whatever the order of the list. Of an odd number the last is left out.
    """
    ordered = sorted(prompts, key=lambda p: (p[1] or "", digest_of(p[0].encode()).digest()))
    names = [name for name, _ in ordered[: len(ordered) // 2 * 2]]
    return names[::2], names[1::2]


def checked(benchmark: str, items: Iterable[Prompt], path: Path) -> Prompts:
    """Returns prompts whose ids can name files and whose texts are text; else BadPrompts of `path`.

    Two ids that differ only in case, or in how Unicode composes their letters, are refused too: on
    some file systems they are one file, and a set that is copied there would lose a picture.
    """
    prompts = Prompts(benchmark, tuple(items))
    if not prompts.items:
        raise BadPrompts(f"{path}: holds no prompt")
    for prompt in prompts.items:
        if not isinstance(prompt.text, str) or not _encodes(prompt.text):
            raise BadPrompts(f"{path}: prompt {prompt.id} is {prompt.text!r:.80}, expected text")
        _check_name(prompt.id, "id", path)
        if prompt.group is not None:
            _check_name(prompt.group, "category", path)
    _check_once([prompt.id for prompt in prompts.items], path)
    return prompts


def _encodes(text: str) -> bool:
    """Whether text has no half of a surrogate pair, which JSON can hold and no file can."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_name(name: Any, role: str, path: Path) -> None:
    usable = isinstance(name, str) and name.strip() == name != "" and name.isprintable()
    if not usable or name[0] == "." or {*"/\\"} & {*name} or len(name.encode()) > LONGEST_ID:
        raise BadPrompts(
            f"{path}: the {role} {name!r:.80} cannot name a file; use 1 to {LONGEST_ID} bytes, no path separators, no "
            "dot in front and no space at an end"
        )


def _check_once(ids: list[str], path: Path) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise BadPrompts(f"{path}: these ids occur more than once: {', '.join(twice[:NAMED])}")
    alike: dict[str, list[str]] = {}
    for name in ids:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    clashes = [" and ".join(map(ascii, names)) for names in alike.values() if len(names) > 1]
    if clashes:
        raise BadPrompts(
            f"{path}: these ids differ only in case or in how Unicode composes them, so some file systems take them "
            f"for one file: {', '.join(clashes[:NAMED])}. Rename them"
        )
