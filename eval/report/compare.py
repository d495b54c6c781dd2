"""Two entries of one benchmark, and by how much each score differs, with its interval.

An entry is a set of pictures, or several whose trainings differ in the seed alone; sets of equal seed
are paired. A difference is b minus a. Of one pair, where both scores kept items, it is resampled over
the prompts that the sets share; of a distance between sets, the influences of prompts that the
distance's module kept say the same. Of several pairs, its interval is that of `scores.seeds`. All
scores that both sets have are compared: none is selected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isclose
from pathlib import Path

from shards import canonical_json
from train.checkpoints.identity import without_seed

from ..distances.influences import path_of
from ..errors import EvalError, OtherImages
from ..scores import aggregate
from ..scores.results import LEVEL, Item, Score, Value
from ..scores.seeds import (
    SEEDS_OF_A_VERDICT,
    Estimate,
    Variances,
    error_level,
    grouped,
    over_seeds,
)
from .entries import ScoredSet, items_of
from .pairing import ROUNDING, Pairing, pairing_of

# parts of a score's made_by that say what was measured, and where, not how
NOT_MAKING = {"subsets", "summary", "paths", "model", "validation_distance"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of two sets. Without a `value` there is a `reason`."""

    scorer: str
    better: str  # "higher" or "lower"
    value: Value | None = None
    groups: dict[str, Value] = field(default_factory=dict)
    share: float | None = None  # of the resamples in which b's value is above a's
    warnings: tuple[str, ...] = ()
    reason: str | None = None
    by_seed: dict[int, Value] = field(default_factory=dict)  # where there are several
    parts: Variances | None = None  # of the value's variance
    p: float | None = None  # the error rate at which the interval would end at 0, for `seeds.holm`

    @property
    def resolved(self) -> bool | None:
        """Whether 0 lies outside the interval; None without one."""
        if self.value is None or self.value.low is None or self.value.high is None:
            return None
        return self.value.low > 0 or self.value.high < 0

    @property
    def covers_seeds(self) -> bool:
        """Whether its interval is over training seeds too."""
        return len(self.by_seed) > 1

    @property
    def identical(self) -> bool:
        """Whether each prompt moves both alike in every seed, as equal pictures do: 0 in [0, 0]."""
        return self.value is not None and self.value.value == self.value.low == self.value.high == 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Entry `b` against the baseline `a`."""

    a: str
    b: str
    pairing: Pairing
    seeds: tuple[int, ...]  # of training, that both have; none where they are unknown or others
    differences: tuple[Difference, ...]
    same_pictures: bool = False  # weights, VAE, prompts and all that makes them have equal digests

    def favours(self, difference: Difference, p: float | None = None) -> str | None:
        """Returns the better entry; None unless the interval shows one, or if there is no verdict.

        `p` in place of the difference's own: one of `seeds.holm`, where there are more entries.
        """
        if difference.value is None or not difference.resolved or self.no_verdict(difference):
            return None
        if p is not None and p > 1 - LEVEL:
            return None
        above = difference.value.value > 0
        return self.b if above == (difference.better == "higher") else self.a

    def no_verdict(self, difference: Difference) -> str | None:
        """Returns why a difference gives no verdict, whatever its interval; None if it may."""
        seeds, parts = len(difference.by_seed), difference.parts
        if difference.value is None:
            return difference.reason
        if not self.pairing.same_seed:
            return "other training seeds"
        if 1 < seeds < SEEDS_OF_A_VERDICT:
            return f"{seeds} training seeds are too few, {SEEDS_OF_A_VERDICT} are the least"
        if parts is not None and parts.prompts is None:
            return "how prompts move it is not known, since one is alone in its group"
        return None


@dataclass(frozen=True)
class Entry:
    """Sets whose trainings differ in the seed alone."""

    name: str
    members: dict[int | None, ScoredSet]  # by training seed; None: unknown

    @property
    def first(self) -> ScoredSet:
        return next(iter(self.members.values()))


def entries(sets: Sequence[ScoredSet]) -> list[Entry]:
    """Returns the entries of some sets, in the order of their first sets, each named by its first set
    without the seed.
    """
    groups = grouped([(_key_without_seed(scored), scored.seed) for scored in sets])
    members = [{seed: sets[i] for seed, i in group.items()} for group in groups]
    names = [_name(group) for group in members]
    return [
        Entry(name if names.count(name) == 1 else next(iter(group.values())).name, group)
        for name, group in zip(names, members, strict=True)
    ]


def _key_without_seed(scored: ScoredSet) -> bytes | None:
    """Returns what sets of one entry share; None where that is unknown."""
    if scored.trained is None or scored.seed is None:
        return None
    settings = {k: v for k, v in scored.settings.items() if k not in ROUNDING | {"weights"}}
    return canonical_json([settings, without_seed(scored.trained.training)])


def _name(members: Mapping[int | None, ScoredSet]) -> str:
    seed, first = next(iter(members.items()))
    return first.name.removesuffix(f"-seed{seed}") if len(members) > 1 else first.name


def compare(a: ScoredSet | Entry, b: ScoredSet | Entry, own: Collection[str] = ()) -> Comparison:
    """Returns all differences of two entries, whose `own` settings were chosen for each; BadScores where
    items are damaged.
    """
    first, second = (x if isinstance(x, Entry) else entries([x])[0] for x in (a, b))
    seeds = sorted(s for s in first.members if s is not None and s in second.members)
    pairs = [(first.members[seed], second.members[seed]) for seed in seeds]
    pairs = pairs or [(first.first, second.first)]
    pairing = pairing_of(*pairs[0], own)
    paired = {id(scored) for pair in pairs for scored in pair}  # names need not be unique
    members = [*first.members.values(), *second.members.values()]
    unpaired = [scored.name for scored in members if id(scored) not in paired]
    if unpaired:
        warning = f"left out, for want of a partner: {', '.join(unpaired)}"
        pairing = replace(pairing, warnings=(*pairing.warnings, warning))
    scorers = sorted({scorer for x, y in pairs for scorer in x.scores.keys() & y.scores.keys()})
    return Comparison(
        a=first.name, b=second.name, pairing=pairing, seeds=tuple(seeds),
        differences=tuple(_over_pairs(pairs, seeds, scorer) for scorer in scorers),
        same_pictures=all(x.settings == y.settings for x, y in pairs),
    )  # fmt: skip


def mean_over_seeds(sets: Sequence[ScoredSet], scorer: str) -> Value | None:
    """Returns an entry's score: the mean of its sets, over training seeds and prompts.

    Where nothing is known of how prompts move it, its interval is over training seeds alone. None
    where no set has the score; BadScores where items are damaged.
    """
    values = [scored.scores[scorer].value for scored in sets if scorer in scored.scores]
    if len(values) < 2:
        return values[0] if values else None
    try:
        estimates = [
            _estimate(scored.score_folder, scored.scores[scorer], scored.items(scorer))
            for scored in sets if scorer in scored.scores
        ]  # fmt: skip
        return over_seeds(estimates)[0]
    except (OtherImages, _NoDifference):
        return over_seeds([Estimate(value=value.value) for value in values])[0]


def estimate_of(folder: Path, score: Score) -> Estimate:
    """Returns a score that lies in a folder, and how prompts move it, as far as that is known."""
    try:
        return _estimate(folder, score, items_of(folder, score.scorer))
    except _NoDifference:
        return Estimate(value=score.value.value)


def _estimate(folder: Path, score: Score, items: Sequence[Item]) -> Estimate:
    """Returns a score and how prompts move it; _NoDifference where that is not known."""
    if items:
        estimate, _ = aggregate.estimates(items, score.overall, score.unit)
        if _equal(estimate.value, score.value):
            return estimate
    else:
        from ..distances.measure import estimates  # which loads torch

        with suppress(EvalError):
            return estimates(folder, score.scorer)[0]
    raise _NoDifference


def _over_pairs(
    pairs: Sequence[tuple[ScoredSet, ScoredSet]], seeds: Sequence[int], scorer: str
) -> Difference:
    """Returns the mean over those pairs of sets that both have the score."""
    has_score = [scorer in a.scores and scorer in b.scores for a, b in pairs]
    results = [
        _difference(a, b, scorer) for (a, b), scored in zip(pairs, has_score, strict=True) if scored
    ]
    differences = [difference for difference, _ in results]
    for difference in differences:
        if difference.value is None:
            return difference
    estimates = [estimate for _, estimate in results if estimate]
    if len(pairs) == 1:
        return _with_parts(differences[0], estimates)
    scored_seeds = [seed for seed, scored in zip(seeds, has_score, strict=True) if scored]
    warnings = list(dict.fromkeys(w for difference in differences for w in difference.warnings))
    if len(scored_seeds) < len(seeds):
        names = ", ".join(map(str, scored_seeds))
        warnings.append(f"of training seed {names} alone: others are not scored")
    values = [difference.value for difference in differences if difference.value]
    return _with_parts(
        replace(
            differences[0],
            warnings=tuple(warnings),
            share=differences[0].share if len(differences) == 1 else None,
            by_seed=dict(zip(scored_seeds, values, strict=True)),
        ),
        estimates,
    )


def _with_parts(difference: Difference, estimates: Sequence[_Estimates]) -> Difference:
    """Returns it with the parts of its variance; of several seeds, with their mean and interval.

    The interval of one seed is that of its resamples.
    """
    assert difference.value is not None
    try:
        value, parts = over_seeds([whole for whole, _ in estimates])
        shared = [g for g in difference.groups if all(g in groups for _, groups in estimates)]
        groups = {g: over_seeds([groups[g] for _, groups in estimates])[0] for g in shared}
    except OtherImages as error:
        return replace(difference, value=None, groups={}, by_seed={}, reason=str(error))
    if len(estimates) == 1:
        value, groups = difference.value, difference.groups
    p = error_level(value, parts)
    return replace(difference, value=value, groups=groups, parts=parts, p=p)


# of all, and of each group
_Estimates = tuple[Estimate, dict[str, Estimate]]
_Compared = tuple[Value, dict[str, Value], float | None, _Estimates]


class _NoDifference(Exception):
    """Why two scores cannot be compared."""


def _difference(a: ScoredSet, b: ScoredSet, scorer: str) -> tuple[Difference, _Estimates | None]:
    """Returns the difference of one pair of sets, and how prompts move it, where it has a value."""
    first, second = a.scores[scorer], b.scores[scorer]
    difference = Difference(
        scorer=scorer, better=first.better, warnings=tuple(_warnings(first, second))
    )
    try:
        value, groups, share, estimates = _by_items(a, b, scorer) or _between_sets(a, b, scorer)
    except _NoDifference as error:
        return replace(difference, reason=str(error)), None
    return replace(difference, value=value, groups=groups, share=share), estimates


def _warnings(first: Score, second: Score) -> list[str]:
    """Returns what else than the pictures may have moved a score."""
    keys = sorted((first.made_by.keys() | second.made_by.keys()) - NOT_MAKING)
    changed = [key for key in keys if first.made_by.get(key) != second.made_by.get(key)]
    warnings = [f"scored differently: {', '.join(changed)}"] if changed else []
    if first.missing or second.missing:
        missing = f"{first.missing} and {second.missing}"
        warnings.append(f"incomplete sets: {missing} pictures are missing")
    return warnings


def _by_items(a: ScoredSet, b: ScoredSet, scorer: str) -> _Compared | None:
    """Returns the difference from the items of both; None where neither kept any."""
    scores = a.scores[scorer], b.scores[scorer]
    items = a.items(scorer), b.items(scorer)
    if not any(items):
        if not any(path_of(side.score_folder, scorer).exists() for side in (a, b)):
            raise _NoDifference(
                f"neither set has {scorer}.items.jsonl (of a distance: .influences.jsonl) beside the score. Score both "
                "again"
            )
        return None
    for side, side_items in zip((a, b), items, strict=True):
        if not side_items:
            raise _NoDifference(f"{side.name} has no items of it. Score that set again")
    means = [aggregate.means_of(i, s.overall, s.unit) for i, s in zip(items, scores, strict=True)]
    for side, (mean, _) in zip((a, b), means, strict=True):
        if not _equal(mean, side.scores[scorer].value):
            raise _NoDifference(
                f"the items of {side.name} do not add up to its score. Score that set again"
            )
    first, second = scores
    if first.prompt_list != second.prompt_list:  # ids may be the same
        raise _NoDifference("it is of other prompts in each")
    if (first.overall, first.unit) != (second.overall, second.unit):
        raise _NoDifference("the scores are made of their items in different ways")
    try:
        value, groups, share = aggregate.difference_and_share(*items, first.overall, first.unit)
        estimates = aggregate.difference_estimates(*items, first.overall, first.unit)
    except EvalError as error:
        raise _NoDifference(str(error)) from None
    # of some scores a group's value is not the mean of its items, which were resampled here
    of_items = {
        name: group
        for name, group in groups.items()
        if all(_equal(m[name], s.groups.get(name)) for (_, m), s in zip(means, scores, strict=True))
    }
    return value, of_items, share, estimates


def _equal(mean: float, value: Value | None) -> bool:
    return value is not None and isclose(mean, value.value, rel_tol=1e-6, abs_tol=1e-9)


def _between_sets(a: ScoredSet, b: ScoredSet, scorer: str) -> _Compared:
    """Returns the difference of a distance, which keeps features and influences in place of items."""
    from ..distances.measure import difference_estimates  # which loads torch

    try:
        whole, groups = difference_estimates(a.score_folder, b.score_folder, scorer)
    except EvalError as error:
        raise _NoDifference(str(error)) from None
    values = {name: over_seeds([group])[0] for name, group in groups.items()}
    return over_seeds([whole])[0], values, None, (whole, groups)
