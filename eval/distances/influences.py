"""How much each picture adds to a distance: its interval, and the interval of a difference of two sets.

    <save_dir>/scores/<scorer>.influences.jsonl    the set's digest, then a line for each picture

A distance is no mean over pictures, but how it moves with the pictures that were drawn is, to first order, the mean of
their influences; so prompts are counted as units, and two sets of the same prompts are paired. Where the two
distributions agree the first order vanishes, and the interval is then too wide rather than too narrow.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import atomic_write, canonical_json
from shards.format.records import fields, finite, listed, optional, text

from ..errors import BadScores
from ..scores.results import COUNT, NAME, Value, read_lines

INFLUENCE = fields(
    {"prompt": text(), "number": COUNT, "all": finite}, {"group": optional(text()), "own": optional(finite)}
)  # fmt: skip
NORMAL = 1.96  # deviations on either side: 95 %

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Influence:
    """One picture's, in units of the score; of mean 0 over the set and over the group."""

    prompt: str
    number: int
    all: float  # on the distance of the whole set
    group: str | None = None
    own: float | None = None  # on the distance of its group


def value(
    found: float, by_prompt: dict[str, float], strata: dict[str, str | None], more: float = 0.0
) -> Value:
    """A distance with its interval; `by_prompt` from `totals`, `more` a variance to add (of drawn subsets)."""
    variance = spread(by_prompt, strata)
    if variance is None:
        return Value(found, None, None, len(by_prompt))
    half = NORMAL * float(np.sqrt(variance + more))
    return Value(found, found - half, found + half, len(by_prompt))


def totals(influences: Sequence[Influence], group: str | None = None) -> dict[str, float]:
    """Each prompt's part of the distance: its pictures' influences over the number of all."""
    taken = [i for i in influences if group is None or i.group == group]
    sums: dict[str, float] = {}
    for i in taken:
        added = i.all if group is None else i.own or 0.0
        sums[i.prompt] = sums.get(i.prompt, 0.0) + added / len(taken)
    return sums


def spread(by_prompt: dict[str, float], strata: dict[str, str | None]) -> float | None:
    """Variance of the sum over prompts that were drawn within their groups; None where one is alone in its own."""
    parts: dict[str | None, list[float]] = {}
    for prompt, part in by_prompt.items():
        parts.setdefault(strata[prompt], []).append(part)
    if min(map(len, parts.values())) < 2:
        return None
    return float(sum(len(part) * np.var(part, ddof=1) for part in parts.values()))


def strata_of(influences: Sequence[Influence]) -> dict[str, str | None]:
    """The group of each prompt, None for all where one has none."""
    groups = {i.prompt: i.group for i in influences}
    return groups if None not in groups.values() else dict.fromkeys(groups)


def path_of(save_dir: Path, scorer: str) -> Path:
    return save_dir / NAME / f"{scorer}.influences.jsonl"


def write(save_dir: Path, scorer: str, images: str, influences: Sequence[Influence]) -> None:
    """Keep them for paired differences; `images` is the set's digest."""
    lines = [{"images": images}, *map(asdict, influences)]
    atomic_write(path_of(save_dir, scorer), b"".join(map(canonical_json, lines)))


def read(save_dir: Path, scorer: str, images: str) -> list[Influence]:
    """Those of a score of this set; BadScores where they are missing or of other pictures."""
    path = path_of(save_dir, scorer)
    try:
        first, *lines = read_lines(path)
        listed(INFLUENCE, 0, len(lines))(lines)
        if first["images"] == images:
            return [Influence(**line) for line in lines]
        found = "of other pictures"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"not readable ({error})"
    raise BadScores(f"{path}: {found}. Score the set again")
