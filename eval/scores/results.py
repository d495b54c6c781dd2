"""What a scorer says, written so that every number can be computed again without a GPU.

    <save_dir>/scores/<scorer>.json           one Score: value, interval, groups, provenance
    <save_dir>/scores/<scorer>.items.jsonl    one Item a line: a picture's score and its reasons

A score over items is a mean of prompts' means; resampling prompts gives its interval (and, with
another set of the same prompts, the interval of their difference). A distance between sets has no
items; its scorer keeps features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from shards import FormatVersion, ShardsError, canonical_json, seal, unseal
from shards.format.atomic import LINES_BYTES, parse_json, read_file
from shards.format.checks import BaseName, Text, check
from train.report import read_records

from ..errors import BadScores, NotFinite
from ..fence import publish

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-score", 1
NAME = "scores"
LEVEL = 0.95  # of intervals

Count = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Texts = Annotated[tuple[Text, ...], Field(max_length=1 << 16)]


@dataclass(frozen=True, slots=True)
class Item:
    """One picture's score."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    # the prompt's id, and the picture's number among its pictures
    prompt: Text
    number: Count
    value: Finite
    groups: Texts = ()  # tags, categories, skills
    # answers, detections, probabilities: what the value follows from
    found: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Value:
    """A number with the ends of its 95 % interval; both None where none is known."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    value: Finite
    low: Finite | None = None
    high: Finite | None = None
    count: Count | None = None  # of prompts it is of

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"found the interval {self.low} to {self.high}, expected both ends")


Values = Annotated[dict[Text, Value], Field(max_length=1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One aggregate of one set of pictures."""

    # with all that makes it comparable: "fid-clean-...", "geneval-hf-...", "dpg-<vlm>"
    scorer: BaseName
    benchmark: Text
    value: Value
    better: Literal["higher", "lower"]
    groups: Values = field(default_factory=dict)
    # how items make the value: the mean of prompts, or of groups (each group's mean first)
    overall: Literal["prompts", "groups"] = "prompts"
    unit: Finite = 1.0  # value = unit x the items' mean
    prompts: Count
    pictures: Count
    missing: Count = 0  # pictures that were absent (--partial); the scorer's name then says so too
    notes: Texts = ()  # "uncalibrated: ..."
    images: Text  # digest of the set
    prompt_list: Text  # digest of the prompts
    made_by: Json  # weights' digests, versions, preprocessing
    seconds: Finite | None = None


@dataclass(frozen=True, slots=True)
class Watched:
    """What a record of `python -m eval watch` must hold."""

    step: Count
    scores: Values
    asked: Texts = ()
    seconds: dict[Text, Finite] = field(default_factory=dict)
    weights: Text = ""


SCORE, ITEMS, WATCHED = TypeAdapter(Score), TypeAdapter(list[Item]), TypeAdapter(list[Watched])


def write(save_dir: Path, score: Score, items: Sequence[Item] = ()) -> Path:
    """Puts a score beside its pictures, replacing the scorer's older one; returns its path.

    NotFinite, before anything is written, where a number is none.
    """
    path = save_dir / NAME / f"{score.scorer}.json"
    lines = [
        _finite(canonical_json, asdict(item), f"{path}: picture {item.number} of prompt {item.prompt!r}")
        for item in items
    ]  # fmt: skip
    record = _finite(seal, {"format": FORMAT, "version": VERSION, **asdict(score)}, f"{path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if items:
        publish(path.with_suffix(".items.jsonl"), b"".join(lines))
    publish(path, record)
    return path


def _finite(write: Callable[[Json], bytes], record: Json, where: str) -> bytes:
    try:
        return write(record)
    except ValueError:
        raise NotFinite(
            f"{where}: found NaN or infinity, expected finite numbers. Look at the scorer's weights"
        ) from None


def read(path: Path) -> Score:
    """Returns a score that `write` put there.

    BadScores where it is none, or was changed, FormatVersion where another release wrote it.
    """
    try:
        score: Score = check(SCORE, unseal(path, FORMAT, VERSION))
        return score
    except FormatVersion:
        raise
    except (ShardsError, ValueError, KeyError, TypeError) as error:
        raise BadScores(f"{path}: not a score of ours ({error}). Score the set again") from None


def read_items(path: Path) -> list[Item]:
    """Returns the items beside a score's file, if any; OSError or ValueError of others."""
    path = path.with_suffix(".items.jsonl")
    items: list[Item] = check(ITEMS, read_lines(path)) if path.exists() else []
    return items


def read_lines(path: Path) -> list[Any]:
    """Returns the values of a file of JSON lines; OSError or ValueError where it is none."""
    # not splitlines(), which also ends lines at U+2028 and U+0085, that text may hold
    lines = read_file(path, LINES_BYTES).removesuffix(b"\n").split(b"\n")
    return [parse_json(line) for line in lines]


def read_watched(path: Path) -> list[Json]:
    """Returns the records that `python -m eval watch` left, one a checkpoint; else BadScores."""
    try:
        records = read_records(path)
        check(WATCHED, records)
        return records
    except (OSError, ValueError) as error:
        raise BadScores(
            f"{path}: not what `python -m eval watch` writes ({error}). Restore it, or move it away"
        ) from None


def refuse_versions(save_dir: Path) -> None:
    """FormatVersion where another release wrote a score of a set, which is not replaced."""
    for path in sorted((save_dir / NAME).glob("*.json")):
        with suppress(BadScores):
            read(path)


def read_all(save_dir: Path) -> dict[str, Score]:
    """Returns all scores of a set, by scorer."""
    scores = [read(path) for path in sorted((save_dir / NAME).glob("*.json"))]
    return {score.scorer: score for score in scores}
