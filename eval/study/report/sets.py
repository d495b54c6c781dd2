"""The sets and scores of a study: which exist, which are missing, and which score a verdict is by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.format.atomic import read_json

from ...errors import MissingImages
from ...report.compare import Entry
from ...report.entries import ScoredSet, open_one

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
Key = tuple[str, int, int]  # entry, seed, step
Sets = Mapping[Key, ScoredSet]


def open_sets(study: Study) -> dict[Key, ScoredSet]:
    """Returns all complete sets of a study, each by its entry, training seed and step."""
    sets = {}
    for name in study.entries:
        for step in study.steps:
            for seed in study.seeds:
                try:
                    scored = open_one(study.set_folder(name, seed, step))
                except MissingImages:
                    continue
                sets[name, seed, step] = replace(scored, name=f"{name}, seed {seed}")
    return sets


def missing(study: Study, sets: Sets, recorded: Mapping[str, Set[str]]) -> list[Json]:
    """Returns what of the plan does not exist yet: pictures, or scores of them.

    `recorded` are the names of scores that each scorer made, as far as it is known.
    """
    records = []
    for name in study.entries:
        for seed in study.seeds:
            for step in study.steps:
                scored = sets.get((name, seed, step))
                absent = ["pictures"]
                if scored:
                    absent = [s for s, own in recorded.items() if not score_name(s, [scored], own)]
                records += [
                    {"entry": name, "seed": seed, "step": step, "what": what} for what in absent
                ]
    return records


def recorded_names(logs: Path) -> set[str]:
    """Returns the names of the scores that a scorer's commands made, as their records say."""
    names: set[str] = set()
    for path in logs.rglob("*.json"):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            names.update(map(str, read_json(path).get("scores") or ()))
    return names


def score_name(scorer: str, sets: Iterable[ScoredSet], recorded: Set[str]) -> str | None:
    """Returns the score that a scorer's verdict is by; None where no set has it.

    Without records, a scorer's scores are those that begin with its name, or have it after their
    benchmark's (geneval2-softtifa-am-...). Of several, the shortest name has no variant in it
    (dpg-..., not dpg-ungated-...).
    """
    names = {name for scored in sets for name in scored.scores}
    own = sorted(names & recorded) or [
        n for n in names if n == scorer or n.startswith(f"{scorer}-") or f"-{scorer}-" in n
    ]
    return min(own, key=lambda name: (len(name), name), default=None)


def entry_at(study: Study, sets: Sets, name: str, step: int) -> Entry | None:
    """Returns an entry's sets of one step, by training seed; None where there is none."""
    members: dict[int | None, ScoredSet] = {
        seed: sets[name, seed, step] for seed in study.seeds if (name, seed, step) in sets
    }
    return Entry(name, members) if members else None


def prompt_count(scored: ScoredSet | None) -> int | None:
    """Returns how many prompts a set is of."""
    return len(scored.images.prompts.items) if scored and scored.images else None
