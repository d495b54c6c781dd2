"""How much each picture adds to a distance, which gives intervals of it and of differences.

    <save_dir>/scores/<scorer>.influences.jsonl    the set's digest, then a line for each picture

A distance is no mean over pictures, but how it moves with the pictures that were drawn is, to first
order, the mean of their influences (the infinitesimal jackknife); so prompts are counted as units,
and two sets of the same prompts are paired. Where the two distributions agree the first order
vanishes, and the interval is then too wide rather than too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from shards import canonical_json
from shards.format.checks import Text, check

from ..errors import BadScores
from ..fence import publish
from ..scores.results import NAME, Count, Finite, read_lines
from ..scores.seeds import Estimate


@dataclass(frozen=True, slots=True)
class Influence:
    """One picture's, in units of the score; of mean 0 over the set and over the group."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    prompt: Text
    number: Count
    all: Finite  # on the distance of the whole set
    group: Text | None = None
    own: Finite | None = None  # on the distance of its group


INFLUENCES = TypeAdapter(list[Influence])


def estimate(
    distance: float,
    influences: Sequence[Influence],
    group: str | None = None,
    subsets: Sequence[float] = (),
) -> Estimate:
    """Returns a distance, of all or of a group, with each prompt's influence on it.

    `subsets`: the values whose mean it is, where subsets of the pictures were drawn.
    """
    by_prompt, labels = totals(influences, group), strata_of(influences)
    strata: dict[str | None, list[int]] = {}
    for index, prompt in enumerate(by_prompt):
        strata.setdefault(labels[prompt], []).append(index)
    return Estimate(
        value=distance,
        prompts=tuple(by_prompt),
        influences=np.array(list(by_prompt.values())),
        strata=tuple(np.array(indices) for indices in strata.values()),
        subsets=np.array(subsets, np.float64),
    )


def totals(influences: Sequence[Influence], group: str | None = None) -> dict[str, float]:
    """Returns each prompt's part of the distance: its influences over the number of all."""
    members = [i for i in influences if group is None or i.group == group]
    sums: dict[str, float] = {}
    for i in members:
        share = i.all if group is None else i.own or 0.0
        sums[i.prompt] = sums.get(i.prompt, 0.0) + share / len(members)
    return sums


def strata_of(influences: Sequence[Influence]) -> dict[str, str | None]:
    """Returns the group of each prompt, None for all where a prompt has none."""
    groups = {i.prompt: i.group for i in influences}
    return groups if None not in groups.values() else dict.fromkeys(groups)


def path_of(save_dir: Path, scorer: str) -> Path:
    return save_dir / NAME / f"{scorer}.influences.jsonl"


def write(save_dir: Path, scorer: str, images: str, influences: Sequence[Influence]) -> None:
    """Writes them for paired differences; `images` is the set's digest."""
    lines = [{"images": images}, *map(asdict, influences)]
    publish(path_of(save_dir, scorer), b"".join(map(canonical_json, lines)))


def read(save_dir: Path, scorer: str, images: str) -> list[Influence]:
    """Returns those of a score of this set; BadScores where they are missing or of another."""
    path = path_of(save_dir, scorer)
    try:
        first, *lines = read_lines(path)
        influences: list[Influence] = check(INFLUENCES, lines)
        if first["images"] == images:
            return influences
        problem = "of other pictures"
    except FileNotFoundError:
        problem = "missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"not readable ({error})"
    raise BadScores(f"{path}: {problem}. Score the set again")
