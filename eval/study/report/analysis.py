"""What a study's pictures say: the JSON `study.json`, which holds every number of the page.

Format "latentbank-study", version 1, with these fields (a Value is value, low, high, count; its
interval is 95 %, null where none is known; a difference is an entry minus the baseline):

    name, note, baseline, benchmark (or the prompt file), step (the last), seeds (planned), prompts (their number)
    complete      whether all sets and scores of the plan exist; missing[]: entry, seed, step, what ("pictures", or
                  a scorer)
    primary       what the verdict is by: asked (a scorer of the YAML), scorer (its score; null before there is one)
    verdicts[]    one an entry but the baseline: entry, outcome ("better", "worse", "no difference", "equal", "no
                  verdict"), title (what to read before it), sentence
    covers[]      what the verdicts cover; leaves_open[]: what another study would have to tell
    targets       what each entry's model predicts, and the size of its latents: see eval/study/report/targets.py
    entries[]     baseline first: name, latents (column), sets {seed: folder} and runs {seed: folder} of the last
                  step, notes[] on its sets: note, seeds
    settled[]     what was chosen for each entry, see eval/study/report/settled.py. Where something is to be chosen,
                  scores, comparisons, over_steps and time_to_quality are of half B of the prompts
    whole         then of all prompts at the last step: prompts, scores[], comparisons[]; else null
    scores[]      the primary one first: scorer, better, primary, notes; entries[], one an entry: by_seed {seed: Value},
                  over_seeds (null without scores); deviation: of training seeds, pooled over the entries (null where
                  no entry has two): value, low, high (an 80 % interval), freedom, relative (to the mean score);
                  published: a sentence on what others report, or null
    comparisons[] one an entry, as in report.json (eval/report/report.py); of the primary score's difference also
                  p_adjusted (Holm's, over the entries) and seeds_needed (that resolve a gap of this size in four of
                  five studies, at both ends of the 80 % interval of how seeds scatter: low, high; null as an end: more
                  than 1,000; null where there are not several seeds)
    over_steps[]  where several steps are scored, one a score and entry: scorer, entry, points[]: step, by_seed,
                  over_seeds
    step_costs    where several steps are scored, what a step takes: {entry: {unit: number}}, with units of
                  eval/study/report/time_to_quality.py that are known
    time_to_quality[]  where several steps are scored, one an entry but the baseline: see
                  eval/study/report/time_to_quality.py
    differ        training and settings: {key: [a value an entry]} of what differs; same: {key: value} of what does not
    published     {entry: better, text, source, agrees (with the verdict; null where there is none)}
    cost          see eval/study/report/ledger.py
    panel         what was known before training, see eval/study/report/panel.py; null where the YAML wants none
    validation[]  of the runs' validations, see eval/study/report/losses.py
    commands[]    that make the study, in their order
    shown[]       ids of the prompts whose pictures are on the page; shown_seed: of their training
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoints.identity import leaves

from ...report.compare import Comparison, Entry, compare, mean_over_seeds
from ...report.entries import ScoredSet, half_of
from ...report.report import comparison_of
from ...scores.deviation import pooled_deviation, published_deviation, range_to_resolve
from ...scores.results import LEVEL
from ...scores.seeds import holm
from ..choices import choices
from ..encoders import places
from ..pictures import REPORTED
from ..plan.online import measured
from .ledger import Training, ledger
from .sets import (
    Recorded,
    Sets,
    entry_at,
    made_sets,
    missing,
    open_sets,
    prompt_count,
    recorded_names,
    score_name,
)
from .settled import beyond, edges_of, own_keys, settled_records
from .targets import target_lines, targets_of
from .time_to_quality import step_costs, times_to_quality
from .verdict import Verdict, covers, leaves_open, no_score, verdict_of

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-study", 1


@dataclass(frozen=True)
class Analysis:
    """The JSON of a study, and the sets that the page takes pictures and runs from."""

    data: Json
    sets: Sets
    last: Mapping[str, Entry]  # by name, of the last step; those that have a set


def analyse(study: Study) -> Analysis:
    """Returns what the pictures of a study say, also of an unfinished one.

    Raises BadScores or OtherImages where a set or a score is damaged.
    """
    whole, asked = open_sets(study), study.scorers[0].name
    sets = (
        {key: half_of(scored, REPORTED) for key, scored in whole.items()} if study.halved else whole
    )
    chosen, own = choices(study), own_keys(study)
    step, baseline = study.steps[-1], study.baseline
    last = {name: entry for name in study.entries if (entry := entry_at(study, sets, name, step))}
    names = [name for name in study.entries if name != baseline]
    both = [name for name in names if name in last and baseline in last]
    comparisons = {name: compare(last[baseline], last[name], own) for name in both}
    recorded = recorded_names(study)
    primary = score_name(asked, sets.values(), recorded[asked])
    levels = {name: _p(c, primary) if (c := comparisons.get(name)) else None for name in names}
    adjusted = holm(levels)  # also of those that are yet to come
    first = last[baseline].first if baseline in last else next(iter(sets.values()), None)
    absent = missing(study, sets, recorded)
    if study.halved:
        of_whole = missing(study, whole, recorded, study.steps[-1:])
        absent += [record for record in of_whole if record not in absent]
    costs = step_costs(study)
    verdicts = [
        _verdict(
            study, name, comparisons.get(name), primary, adjusted, edges_of(study, chosen, name)
        )
        for name in names
    ]
    data: Json = {
        "format": FORMAT, "version": VERSION, "confidence": LEVEL, "name": _name(study.path),
        "note": study.config.note, "baseline": baseline, "step": step, "seeds": list(study.seeds),
        "benchmark": study.config.benchmark or str(study.config.prompts), "prompts": prompt_count(first),
        "complete": not absent, "missing": absent, "primary": {"asked": asked, "scorer": primary},
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "entries": [_entry(study, name, last.get(name)) for name in study.entries],
        "settled": settled_records(study, chosen),
        "scores": _scores(study, last, primary),
        "whole": _whole(study, whole, recorded[asked]) if study.halved else None,
        "comparisons": [_comparison(c, primary, adjusted) for c in comparisons.values()],
        "over_steps": over_steps(study, sets),
        "step_costs": costs,
        "time_to_quality": times_to_quality(study, sets, primary, costs),
        "published": _published(study, verdicts),
        "cost": _cost(study, made_sets(study, whole, sets)),
        **_differences(study, last, comparisons), "targets": targets_of(last),
    }  # fmt: skip
    compared = sorted((_seeds(c, primary) for c in comparisons.values()), key=len) or [()]
    prompts = study.config.benchmark or Path(data["benchmark"]).name
    covered, left_open = target_lines(data["targets"])
    axes, settings = study.sampling_axes, first.settings if first else {}
    of_all = [seed for seed in compared[0] if all(seed in seeds for seeds in compared)]
    data["covers"] = covers(of_all, data["prompts"], prompts, len(names), axes) + covered
    data["leaves_open"] = leaves_open(len(of_all), settings, step, axes) + left_open
    data["leaves_open"] += beyond(data["settled"])
    return Analysis(data, sets, last)


def _whole(study: Study, sets: Sets, recorded: Recorded) -> Json:
    """Returns scores and comparisons of all prompts at the last step, with the half that settings were
    chosen on.
    """
    step = study.steps[-1]
    last = {name: entry for name in study.entries if (entry := entry_at(study, sets, name, step))}
    primary = score_name(study.scorers[0].name, sets.values(), recorded)
    others = [name for name in last if name != study.baseline and study.baseline in last]
    return {
        "prompts": prompt_count(next(iter(last.values())).first) if last else None,
        "scores": _scores(study, last, primary),
        "comparisons": [
            comparison_of(compare(last[study.baseline], last[name], own_keys(study)))
            for name in others
        ],
    }


# Parts of the JSON --------------------------------------------------------------------------------


def _name(path: Path) -> str:
    """Returns a study's name: that of its YAML, or of the folder of a study.yaml."""
    return path.stem if path.stem != "study" else path.resolve().parent.name


def _entry(study: Study, name: str, entry: Entry | None) -> Json:
    members = entry.members if entry else {}
    config = study.train_config(name, study.seeds[0])
    notes: dict[str, list[int | None]] = {}
    for seed, scored in members.items():
        for note in scored.notes:
            notes.setdefault(note, []).append(seed)
    return {
        "name": name,
        "latents": config.data.latents,
        "sets": {str(seed): str(scored.folder) for seed, scored in members.items()},
        "runs": {str(seed): str(scored.run) for seed, scored in members.items() if scored.run},
        "notes": [{"note": note, "seeds": seeds} for note, seeds in notes.items()],
    }


def _scores(study: Study, last: Mapping[str, Entry], primary: str | None) -> list[Json]:
    """Returns all scores that some set has, the primary one first."""
    members = {name: list(entry.members.values()) for name, entry in last.items()}
    names = {name for sets in members.values() for scored in sets for name in scored.scores}
    ordered = sorted(names, key=lambda name: (name != primary, name))
    return [
        _score(name, [last.get(entry) for entry in study.entries]) | {"primary": name == primary}
        for name in ordered
    ]


def _score(name: str, entries: Sequence[Entry | None]) -> Json:
    scores = [s.scores[name] for e in entries if e for s in e.members.values() if name in s.scores]
    return {
        "scorer": name,
        "better": scores[0].better,
        "notes": list(dict.fromkeys(note for score in scores for note in score.notes)),
        "entries": [_values(name, entry) for entry in entries],
        "deviation": _deviation(name, entries),
        "published": next((text for s in scores if (text := published_deviation(s))), None),
    }


def _values(scorer: str, entry: Entry | None) -> Json:
    """Returns an entry's values of a score, by training seed and over them."""
    members = entry.members if entry else {}
    value = mean_over_seeds(list(members.values()), scorer) if members else None
    return {
        "by_seed": {
            str(seed): asdict(scored.scores[scorer].value)
            for seed, scored in members.items()
            if scorer in scored.scores
        },
        "over_seeds": asdict(value) if value else None,
    }


def _deviation(scorer: str, entries: Sequence[Entry | None]) -> Json | None:
    """Returns how far training seeds move a score, pooled over the entries."""
    deviation = pooled_deviation(
        [
            [s.scores[scorer].value.value for s in e.members.values() if scorer in s.scores]
            for e in entries
            if e
        ]
    )
    return asdict(deviation) | {"relative": deviation.relative} if deviation else None


def over_steps(study: Study, sets: Sets) -> list[Json]:
    """Returns each score and entry over the scored steps, where there are several."""
    if len(study.steps) < 2:
        return []
    names = sorted({name for scored in sets.values() for name in scored.scores})
    lines = []
    for scorer in names:
        for name in study.entries:
            entries = [(step, entry_at(study, sets, name, step)) for step in study.steps]
            points = [
                {"step": step, **values}
                for step, entry in entries
                if (values := _values(scorer, entry))["by_seed"]
            ]
            if points:
                lines.append({"scorer": scorer, "entry": name, "points": points})
    return lines


def _comparison(
    comparison: Comparison, primary: str | None, adjusted: Mapping[str, float | None]
) -> Json:
    record = comparison_of(comparison)
    for difference in record["differences"]:
        if primary and difference["scorer"] == primary:
            difference["p_adjusted"] = adjusted[comparison.b]
            difference["seeds_needed"] = _seeds_needed(comparison, primary)
    return record


def _seeds_needed(comparison: Comparison, scorer: str) -> Json | None:
    """Returns how many seeds of each entry would resolve a difference as large as this one, at both
    ends of the interval of the differences' deviation; None as an end: not even MOST_SEEDS.
    """
    difference = next(d for d in comparison.differences if d.scorer == scorer)
    deviation = pooled_deviation([[value.value for value in difference.by_seed.values()]])
    if difference.value is None or deviation is None or difference.identical:
        return None
    prompts = difference.parts.of_prompts if difference.parts else 0.0
    low, high = range_to_resolve(abs(difference.value.value), deviation, prompts)
    return {"low": low, "high": high}


def _seeds(comparison: Comparison, scorer: str | None) -> Sequence[int]:
    """Returns the training seeds that a score's difference is over."""
    if len(comparison.seeds) == 1:
        return comparison.seeds
    seeds = [tuple(d.by_seed) for d in comparison.differences if d.scorer == scorer]
    return seeds[0] if seeds else ()


def _p(comparison: Comparison, scorer: str | None) -> float | None:
    """Returns the p of a score's difference; None where it gives no verdict."""
    for difference in comparison.differences:
        if difference.scorer == scorer and not comparison.no_verdict(difference):
            return difference.p
    return None


def _verdict(
    study: Study,
    name: str,
    comparison: Comparison | None,
    primary: str | None,
    adjusted: Mapping[str, float | None],
    edges: str,
) -> Verdict:
    title = study.scorers[0].name
    if comparison is None or primary is None:
        return no_score(name, study.baseline, title)
    if study.halved:
        title = f"{title} on half {REPORTED.upper()} of the prompts"
    planned = len(study.seeds)
    return verdict_of(comparison, primary, title, adjusted[name], len(adjusted), planned, edges)


def _published(study: Study, verdicts: Sequence[Verdict]) -> Json:
    outcome = {verdict.entry: verdict.outcome for verdict in verdicts}
    direction = {"better": True, "worse": False}
    return {
        name: claim.model_dump()
        | {
            "agrees": None
            if (better := direction.get(outcome[name])) is None
            else better == claim.better
        }
        for name, claim in study.config.published.items()
        if name in outcome
    }


def _differences(
    study: Study, last: Mapping[str, Entry], comparisons: Mapping[str, Comparison]
) -> Json:
    """Returns `differ` and `same`: of the trainings and of the pictures, from their own records."""
    if study.baseline not in last:
        return {
            "differ": {"training": {}, "settings": {}},
            "same": {"training": {}, "settings": {}},
        }
    first = last[study.baseline].first
    trainings = {
        name: c.pairing.training.all for name, c in comparisons.items() if c.pairing.training
    }
    settings = {name: c.pairing.differ for name, c in comparisons.items()}
    differ = {
        "training": _by_key(study.entries, study.baseline, trainings),
        "settings": _by_key(study.entries, study.baseline, settings),
    }
    differ["settings"].pop("weights", None)  # which the trainings made
    training = leaves(first.trained.training) if first.trained else {}
    same = {"training": training, "settings": first.settings}
    return {
        "differ": differ,
        "same": {
            part: {
                key: value
                for key, value in values.items()
                if key not in {*differ[part], "seed", "weights"} and ".also." not in key
            }
            for part, values in same.items()
        },
    }


def _cost(study: Study, sets: Sequence[tuple[str, ScoredSet]]) -> Json:
    trainings = {name: list(_trainings(study, name)) for name in study.entries}
    of_entry = {n: [scored for name, scored in sets if name == n] for n in trainings}
    cost = ledger(trainings, of_entry, study.out / "logs", study.config.price)
    return cost | {"measured": measured(study)}


def _trainings(study: Study, name: str) -> Iterator[Training]:
    """Yields the runs of an entry, phase by phase and seed by seed."""
    for each, phase, seed in product(
        study.trainings_of(name), range(len(study.parts(name))), study.seeds
    ):
        config, run = study.train_config(each, seed, phase), study.run_folder(each, seed, phase)
        data = config.data.resolved()
        yield Training(run, config.steps, tuple(places(data.latents)), tuple(places(data.text)))


def _by_key(
    entries: Sequence[str], baseline: str, differences: Mapping[str, Mapping[str, tuple[Any, Any]]]
) -> Json:
    """Returns {key: values of all entries} of what differs in some; null where there is no set."""
    baselines = {k: v for differing in differences.values() for k, (v, _) in differing.items()}
    return {
        key: [
            value
            if name == baseline
            else differences[name].get(key, (None, value))[1]
            if name in differences
            else None
            for name in entries
        ]
        for key, value in sorted(baselines.items())
    }
