"""The sets and scores of a study: which exist, which are missing, and which score a verdict is by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import EvalError, MissingImages
from ...report.compare import Entry
from ...report.entries import ScoredSet, open_one
from ..graph import nodes_of
from ..pictures import all_sets
from ..reuse import is_record_of, names_in, read_record

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
Key = tuple[str, int, int]  # entry, seed, step
Sets = Mapping[Key, ScoredSet]


def open_sets(study: Study) -> dict[Key, ScoredSet]:
    """Returns all complete sets of a study, each by its entry, training seed and step."""
    sets = {}
    for name in filter(study.is_settled, study.entries):
        for step in study.steps:
            for seed in study.seeds:
                try:
                    scored = open_one(study.set_folder(name, seed, step))
                except MissingImages:
                    continue
                sets[name, seed, step] = replace(scored, name=f"{name}, seed {seed}")
    return sets


def made_sets(study: Study, whole: Sets, sets: Sets) -> list[tuple[str, ScoredSet]]:
    """Returns by entry all sets that were made for a study, those of trials too, and the halves of sets that were
    scored, as if these took no pictures: what all of it took is the sum.
    """
    made = [(name, scored) for (name, _, _), scored in whole.items()]
    if study.halved:
        made += [(name, replace(scored, provenance={})) for (name, _, _), scored in sets.items()]
    for pictures in all_sets(study) if study.halved else ():
        if pictures.half:
            with suppress(EvalError):  # a damaged score chooses nothing, and is said there
                made.append((pictures.entry, open_one(pictures.folder)))
    return made


def missing(
    study: Study, sets: Sets, recorded: Mapping[str, Recorded], steps: Sequence[int] = ()
) -> list[Json]:
    """Returns what of the plan does not exist yet: pictures, or scores of them.

    `recorded` are the names of scores that each scorer made, as far as it is known.
    """
    records = []
    for name in study.entries:
        for seed in study.seeds:
            for step in steps or study.steps:
                scored = sets.get((name, seed, step))
                absent = ["pictures"]
                if scored:
                    absent = [s for s, own in recorded.items() if not score_name(s, [scored], own)]
                records += [
                    {"entry": name, "seed": seed, "step": step, "what": what} for what in absent
                ]
    return records


class Recorded(NamedTuple):
    """Names of the scores that a scorer's commands made, as their records say."""

    made: set[str]  # by the flags that the study says now
    former: set[str]  # by others


def recorded_names(study: Study) -> dict[str, Recorded]:
    """Returns of each scorer the names of the scores that its commands made, as far as they are recorded."""
    names = {scorer.name: Recorded(set(), set()) for scorer in study.scorers}
    for node in nodes_of(study):
        record = read_record(study, node.id) if node.kind == "score" else None
        if record is not None:
            made, former = names[node.scorer]
            (made if is_record_of(record, node) else former).update(names_in(record))
    return names


def score_name(scorer: str, sets: Iterable[ScoredSet], recorded: Recorded) -> str | None:
    """Returns the score that a scorer's verdict is by; None where no set has it.

    Without records of its flags as they are now, a scorer's scores are those that begin with its name, or have it
    after their benchmark's (geneval2-softtifa-am-...), but for those by former flags. Of several, the shortest name
    has no variant in it (dpg-..., not dpg-ungated-...).
    """
    names = {name for scored in sets for name in scored.scores}
    by_name = {n for n in names if n == scorer or f"-{scorer}-" in f"-{n}-"} - recorded.former
    own = recorded.made or by_name
    return min(names & own, key=lambda name: (len(name), name), default=None)


def entry_at(study: Study, sets: Sets, name: str, step: int) -> Entry | None:
    """Returns an entry's sets of one step, by training seed; None where there is none."""
    members: dict[int | None, ScoredSet] = {
        seed: sets[name, seed, step] for seed in study.seeds if (name, seed, step) in sets
    }
    return Entry(name, members) if members else None


def prompt_count(scored: ScoredSet | None) -> int | None:
    """Returns how many prompts a set is of."""
    return len(scored.images.prompts.items) if scored and scored.images else None
