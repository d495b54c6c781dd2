"""What a scorer found, written so that every number can be computed again without a GPU.

    <save_dir>/scores/<scorer>.json           one Score: value, interval, groups, and what it was computed with
    <save_dir>/scores/<scorer>.items.jsonl    one Item a line: each picture's or prompt's own score and raw findings

A score over items is a mean of prompts' means; resampling prompts gives its interval (and, with another set of the
same prompts, the interval of their difference). A distance between sets has no items; its scorer keeps features.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards import FormatVersion, ShardsError, atomic_write, canonical_json, seal, unseal
from shards.format.atomic import LINES_BYTES, parse_json, read_file
from shards.format.records import (
    Check,
    base_name,
    finite,
    having,
    integer,
    listed,
    mapping,
    one_of,
    optional,
    table,
    text,
)
from shards.format.records import fields as exactly

from ..errors import BadScores, NotFinite

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-score", 1
NAME = "scores"


COUNT = integer(0, 1 << 40)
VALUE = exactly(
    {"value": finite, "low": optional(finite), "high": optional(finite), "count": optional(COUNT)}
)
SCORE = having(
    {
        "scorer": base_name, "benchmark": text(), "value": VALUE, "better": one_of("higher", "lower"),
        "groups": table(text(), VALUE, 1 << 20), "overall": one_of("prompts", "groups"), "unit": finite,
        "prompts": COUNT, "pictures": COUNT, "missing": COUNT, "notes": listed(text(), 0, 1 << 16), "images": text(),
        "prompt_list": text(), "made_by": mapping, "seconds": optional(finite),
    }
)  # fmt: skip
ITEM: Check = exactly(
    {"prompt": text(), "number": COUNT, "value": finite, "groups": listed(text(), 0, 1 << 16)}, {"found": mapping}
)  # fmt: skip
WATCHED = having(
    {"step": COUNT, "scores": table(text(), VALUE, 1 << 16)},
    {"asked": listed(text(), 0, 1 << 16), "seconds": table(text(), finite, 1 << 10), "weights": text()},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One picture's score."""

    prompt: str  # its id
    number: int  # of the prompt's pictures
    value: float
    groups: tuple[str, ...] = ()  # tags, categories, skills
    found: Json = field(
        default_factory=dict
    )  # answers, detections, probabilities: what the value follows from


@dataclass(frozen=True, slots=True)
class Value:
    """A number with the ends of its 95 % interval; both None where none is known."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None  # of prompts it is of


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One aggregate of one set of pictures."""

    scorer: str  # with all that makes it comparable: "fid-clean-...", "geneval-hf-...", "dpg-<vlm>"
    benchmark: str
    value: Value
    better: str  # "higher" or "lower"
    groups: dict[str, Value] = field(default_factory=dict)
    overall: str = "prompts"  # how items make the value: mean of "prompts", or of "groups" (each group's mean first)
    unit: float = 1.0  # value = unit x the items' mean
    prompts: int
    pictures: int
    missing: int = 0  # pictures that were not there (--partial); the scorer's name then says so too
    notes: tuple[str, ...] = ()  # "uncalibrated: ..."
    images: str  # digest of the set
    prompt_list: str  # digest of the prompts
    made_by: Json  # weights' digests, versions, preprocessing
    seconds: float | None = None


def write(save_dir: Path, score: Score, items: Sequence[Item] = ()) -> Path:
    """Put a score beside its pictures, replacing an older one of the same scorer; returns its path.

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
        atomic_write(path.with_suffix(".items.jsonl"), b"".join(lines))
    atomic_write(path, record)
    return path


def _finite(write: Callable[[Json], bytes], record: Json, what: str) -> bytes:
    try:
        return write(record)
    except ValueError:
        raise NotFinite(
            f"{what}: found NaN or infinity, expected finite numbers. Look at the scorer's weights"
        ) from None


def read(path: Path) -> Score:
    """A score that `write` put there; BadScores where it is none, or was changed, FormatVersion where another release
    wrote it."""
    try:
        found = unseal(path, FORMAT, VERSION)
        SCORE(found)
        kept = {f.name: found[f.name] for f in fields(Score)}
        groups = {name: Value(**value) for name, value in kept["groups"].items()}
        made = {"value": Value(**kept["value"]), "groups": groups, "notes": tuple(kept["notes"])}
        return Score(**kept | made)
    except FormatVersion:
        raise
    except (ShardsError, ValueError, KeyError, TypeError) as error:
        raise BadScores(f"{path}: not a score of ours ({error}). Score the set again") from None


def read_items(path: Path) -> list[Item]:
    """The items beside a score's file, none where it has none; OSError or ValueError where they are none."""
    path = path.with_suffix(".items.jsonl")
    if not path.exists():
        return []
    items = read_lines(path)
    listed(ITEM, 0, len(items))(items)
    return [Item(**item | {"groups": tuple(item["groups"])}) for item in items]


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; OSError or ValueError where it is none."""
    # not splitlines(), which also ends lines at U+2028 and U+0085, that text may hold
    return [
        parse_json(line) for line in read_file(path, LINES_BYTES).removesuffix(b"\n").split(b"\n")
    ]


def read_watched(path: Path) -> list[Json]:
    """The records that `python -m eval watch` left, a checkpoint each; BadScores where they are others."""
    from train.report.records import read_records

    try:
        records = read_records(path)
        listed(WATCHED, 0, len(records))(records)
        return records
    except (OSError, ValueError) as error:
        raise BadScores(
            f"{path}: not what `python -m eval watch` writes ({error}). Restore it, or move it away"
        ) from None


def refuse_versions(save_dir: Path) -> None:
    """FormatVersion where another release wrote any score of a set: this one must not write over it."""
    for path in sorted((save_dir / NAME).glob("*.json")):
        with suppress(BadScores):
            read(path)


def read_all(save_dir: Path) -> dict[str, Score]:
    """All scores of a set, by scorer."""
    paths = sorted((save_dir / NAME).glob("*.json"))
    scores = [read(path) for path in paths]
    return {score.scorer: score for score in scores}
