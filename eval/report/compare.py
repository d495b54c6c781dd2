"""Two entries of one benchmark: what differs between them, and by how much each score differs, with its interval.

An entry is a set of pictures, or several whose trainings differ in the seed alone; those of equal seed are paired.
Whether the sets differ in what is compared alone follows from their settings and from the trainings behind them.

A difference is b minus a. Where both scores kept items it is resampled over the prompts that the sets share; of a
distance between sets, its scorer's module does that from the features it kept. All scores that both sets have are
compared: none is selected.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from typing import Any

import numpy as np

from shards import canonical_json
from train.checkpoints.identity import TrainingDifferences, compared, leaves, without_seed

from ..errors import EvalError
from ..scores.aggregate import difference_and_share
from ..scores.results import Item, Score, Value
from ..scores.seeds import grouped, groups_over_seeds, over_seeds
from .entries import RECONSTRUCTION, Scored

Json = dict[str, Any]
SEVERAL = "several settings"
# What a comparison is of: the first of these that differs. With it go the fields that cannot but differ too.
SUBJECTS = (
    ("VAEs", "vae", {"vae", "decoding", "norm", "weights", "column"}),
    ("weights", "weights", {"weights", "step", "ema"}),
    ("columns", "column", {"column"}),
)
HARMLESS = {"batch_size", "threads"}  # they change rounding only
PROGRESS = {"step", "position"}  # of a training
NAMES = {
    "seed": "training seed"
}  # of a training's parts, where a setting of the pictures is called so
LISTED = 12  # differences that a warning names
UNPAIRED = ("seed", "prompts")  # alone they leave nothing to compare
NOT_MAKING = {"subsets", "summary", "paths"}  # what made_by holds of findings and places


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of two sets. `value` is None where there is no difference to be had, and `reason` says why."""

    scorer: str
    better: str  # "higher" or "lower"
    value: Value | None = None
    groups: dict[str, Value] = field(default_factory=dict)
    share: float | None = None  # of the resamples in which b's value is above a's
    warnings: tuple[str, ...] = ()
    reason: str | None = None
    by_seed: dict[int, Value] = field(default_factory=dict)  # where there are several

    @property
    def resolved(self) -> bool | None:
        """Whether 0 lies outside the interval; None without one."""
        return None if self.value is None else resolved(self.value)

    @property
    def covers_seeds(self) -> bool:
        """Whether its interval is over training seeds too."""
        return len(self.by_seed) > 1


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What two sets compare, and whether they differ in nothing else."""

    subject: str  # "VAEs", "weights", or the one setting that differs
    differ: dict[str, tuple[Any, Any]]  # settings, a's and b's
    training: TrainingDifferences | None  # None: one of the trainings is unknown
    warnings: tuple[str, ...]
    paired: bool | None  # None: as far as is known, but a training is unknown in part
    same_seed: bool  # unless it is known that the trainings had other seeds

    @property
    def sentence(self) -> str:
        if self.paired:
            return f"Compares {self.subject}, on the prompts that both share."
        if self.paired is None:
            return f"Compares {self.subject} as far as is known: how the weights were trained is not known in full."
        if self.subject in UNPAIRED:
            return f"Compares sets of another {self.subject}: not a paired comparison."
        more = "" if self.subject == SEVERAL else "more than "
        return f"Compares sets that differ in {more}{self.subject}."


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`b` against the baseline `a`."""

    a: str
    b: str
    pairing: Pairing
    seeds: tuple[int, ...]  # of training, which both have; none where they are unknown or others
    differences: tuple[Difference, ...]

    @property
    def subject(self) -> str:
        return self.pairing.subject

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.pairing.warnings

    def favours(self, difference: Difference) -> str | None:
        """The better entry, None unless the interval shows one; other training seeds show nothing."""
        if difference.value is None or not difference.resolved or not self.pairing.same_seed:
            return None
        above = difference.value.value > 0
        return self.b if above == (difference.better == "higher") else self.a


@dataclass(frozen=True)
class Entry:
    """Sets whose trainings differ in the seed alone."""

    name: str
    members: dict[int | None, Scored]  # by training seed; None: unknown

    @property
    def first(self) -> Scored:
        return next(iter(self.members.values()))


def entries(sets: Sequence[Scored]) -> list[Entry]:
    """The entries of some sets, in the order of their first sets, each named by its first set without the seed."""
    groups = grouped([(_but_for_the_seed(s), s.trained.seed if s.trained else None) for s in sets])
    members = [{seed: sets[i] for seed, i in group.items()} for group in groups]
    names = [_name(entry) for entry in members]
    return [
        Entry(name if names.count(name) == 1 else next(iter(entry.values())).name, entry)
        for name, entry in zip(names, members, strict=True)
    ]


def _but_for_the_seed(scored: Scored) -> bytes | None:
    """What sets of one entry share; None where that is unknown."""
    if scored.trained is None or scored.trained.seed is None:
        return None
    settings = {k: v for k, v in scored.settings.items() if k not in HARMLESS | {"weights"}}
    return canonical_json([settings, without_seed(scored.trained.training)])


def _name(members: Mapping[int | None, Scored]) -> str:
    seed, first = next(iter(members.items()))
    return first.name.removesuffix(f"-seed{seed}") if len(members) > 1 else first.name


def resolved(difference: Value) -> bool | None:
    """Whether 0 lies outside a difference's interval; None where it has none."""
    if difference.low is None or difference.high is None:
        return None
    return difference.low > 0 or difference.high < 0


def compare(a: Scored | Entry, b: Scored | Entry) -> Comparison:
    """All differences of two entries; BadScores where items are damaged."""
    first, second = (x if isinstance(x, Entry) else entries([x])[0] for x in (a, b))
    shared = [seed for seed in first.members if seed is not None and seed in second.members]
    pairs = [(first.members[seed], second.members[seed]) for seed in sorted(shared)]
    pairs = pairs or [(first.first, second.first)]
    pairing = pairing_of(*pairs[0])
    used = [scored.name for pair in pairs for scored in pair]
    left = [s.name for x in (first, second) for s in x.members.values() if s.name not in used]
    if left:
        warning = f"left out, for want of a partner: {', '.join(left)}"
        pairing = replace(pairing, warnings=(*pairing.warnings, warning))
    return Comparison(
        a=first.name,
        b=second.name,
        pairing=pairing,
        seeds=tuple(sorted(shared)),
        differences=tuple(_differences(pairs, sorted(shared))),
    )


def _differences(pairs: Sequence[tuple[Scored, Scored]], seeds: Sequence[int]) -> list[Difference]:
    """Of each score that all of these pairs of sets have, the mean over the pairs."""
    scorers = sorted({scorer for a, b in pairs for scorer in a.scores.keys() & b.scores.keys()})
    return [_over_pairs(pairs, seeds, scorer) for scorer in scorers]


def _over_pairs(
    pairs: Sequence[tuple[Scored, Scored]], seeds: Sequence[int], scorer: str
) -> Difference:
    scored = [scorer in a.scores and scorer in b.scores for a, b in pairs]
    each = [_difference(a, b, scorer) for (a, b), both in zip(pairs, scored, strict=True) if both]
    without = next((difference for difference in each if difference.value is None), None)
    if without or len(pairs) == 1:
        return without or each[0]
    values = [difference.value for difference in each if difference.value]
    of = [seed for seed, both in zip(seeds, scored, strict=True) if both]
    warnings = list(dict.fromkeys(w for difference in each for w in difference.warnings))
    if len(of) < len(seeds):
        warnings.append(f"of training seed {', '.join(map(str, of))} alone: others are not scored")
    return Difference(
        scorer=scorer,
        better=each[0].better,
        value=over_seeds(values),
        groups=groups_over_seeds([difference.groups for difference in each]),
        warnings=tuple(warnings),
        share=each[0].share if len(each) == 1 else None,
        by_seed=dict(zip(of, values, strict=True)),
    )


def pairing_of(a: Scored, b: Scored) -> Pairing:
    """What two sets compare, from their settings and trainings."""
    differ = {
        key: (a.settings.get(key), b.settings.get(key))
        for key in sorted(a.settings.keys() | b.settings.keys())
        if a.settings.get(key) != b.settings.get(key)
    }
    trained = a.kind != RECONSTRUCTION and "weights" in differ
    if not trained:
        training: TrainingDifferences | None = TrainingDifferences()
    elif a.trained and b.trained:
        training = compared(a.trained.training, b.trained.training)
    else:
        training = None
    subject, warnings = judged(differ, training)
    warnings += [*_of_originals(a, b), *_of_other_decoders(a, b)]
    paired = None if not warnings else False
    if training is not None and not training.unknown:
        paired = not warnings
    else:
        warnings += _unknown(a, b, training)
    seeds = [scored.trained.seed if scored.trained else None for scored in (a, b)]
    return Pairing(
        subject=subject, differ=differ, training=training, warnings=tuple(warnings), paired=paired,
        same_seed=not trained or None in seeds or seeds[0] == seeds[1],
    )  # fmt: skip


def _unknown(a: Scored, b: Scored, training: TrainingDifferences | None) -> list[str]:
    if training is None:
        names = " and ".join(scored.name for scored in (a, b) if scored.trained is None)
        return [
            f"how the weights of {names} were trained is not known: `python -m eval generate` with the settings of the "
            "set records it, where the checkpoint says it"
        ]
    return [f"of the trainings this is not known: {', '.join(training.unknown)}"]


def judged(
    differ: Mapping[str, tuple[Any, Any]], training: TrainingDifferences | None = None
) -> tuple[str, list[str]]:
    """What sets compare that differ in these settings and in their trainings, and what speaks against that."""
    counted = differ.keys() - HARMLESS
    subject, own = next(
        ((name, fields) for name, key, fields in SUBJECTS if key in counted), (None, set[str]())
    )
    of_training = {} if training is None else training.beside if subject == "VAEs" else training.all
    trained = {NAMES.get(key, key): value for key, value in of_training.items()}
    if subject == "weights" and trained:
        own = {"weights"}
        if trained.keys() <= PROGRESS:
            subject, own = "steps", own | PROGRESS
        elif len(trained) == 1:
            subject = next(iter(trained))
            own = own | {subject}
    precisions = [v.get("precision") for v in differ.get("decoding", ()) if isinstance(v, Mapping)]
    if len(set(precisions)) > 1:  # which is no part of a VAE
        own = own - {"decoding"}
    differ = {**trained, **differ}
    others = sorted((counted | trained.keys()) - own)
    if subject is None:
        subject = others[0] if len(others) == 1 else SEVERAL if others else "equal settings"
    said = "; ".join(f"{key} differs ({_short(differ[key])})" for key in others[:LISTED])
    if len(others) > LISTED:
        said += f"; and {len(others) - LISTED} more"
    if subject in UNPAIRED:
        return subject, [f"not a paired comparison: {said}"]
    if not others or others == [subject]:
        return subject, []
    return subject, [f"not a paired comparison of {subject} alone: {said}"]


def _of_originals(a: Scored, b: Scored) -> list[str]:
    """A warning where two reconstructions are not of the same pictures: of another source, resolution or rows."""
    first, second = a.originals, b.originals
    if first is None or second is None or first.digest == second.digest:
        return []
    keys = sorted(first.settings.keys() | second.settings.keys())
    changed = [key for key in keys if first.settings.get(key) != second.settings.get(key)]
    said = f"{', '.join(changed)} differs" if changed else "their pictures differ"
    return [f"of other originals: {said}"]


def _of_other_decoders(*sets: Scored) -> list[str]:
    """A warning for each set whose pictures another VAE decoded than the one that its model was trained on."""
    warnings = []
    for scored in sets:
        known = leaves(scored.trained.training.get("data") if scored.trained else None)
        trained_on = [v for k, v in known.items() if k.endswith(".latents.encoder.weights")]
        vae = scored.settings.get("vae")
        if trained_on and vae not in trained_on:
            warnings.append(
                f"{scored.name}: decoded by the VAE {brief(vae)}, its model was trained on latents of "
                f"{brief(trained_on[0])}"
            )
    return warnings


def _short(values: tuple[Any, Any]) -> str:
    return ", ".join(brief(value)[:40] for value in values)


def brief(value: Any) -> str:
    """A setting for people; of digests the first twelve characters."""
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(brief, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _difference(a: Scored, b: Scored, scorer: str) -> Difference:
    first, second = a.scores[scorer], b.scores[scorer]
    warnings = tuple(_warnings(first, second))
    try:
        value, groups, share = _by_items(a, b, scorer) or (*_between_sets(a, b, scorer), None)
    except _NoDifference as error:
        return Difference(scorer=scorer, better=first.better, reason=str(error), warnings=warnings)
    return Difference(
        scorer=scorer, better=first.better, value=value, groups=groups, share=share, warnings=warnings,
    )  # fmt: skip


class _NoDifference(Exception):
    """Why two scores cannot be compared."""


def _warnings(first: Score, second: Score) -> list[str]:
    """What else than the pictures may have moved a score."""
    keys = sorted((first.made_by.keys() | second.made_by.keys()) - NOT_MAKING)
    changed = [key for key in keys if first.made_by.get(key) != second.made_by.get(key)]
    found = [f"scored differently: {', '.join(changed)}"] if changed else []
    if first.missing or second.missing:
        found.append(f"incomplete sets: {first.missing} and {second.missing} pictures are missing")
    return found


def _by_items(
    a: Scored, b: Scored, scorer: str
) -> tuple[Value, dict[str, Value], float | None] | None:
    """From the items of both; None where they kept none."""
    found = [(side.items(scorer), side.scores[scorer]) for side in (a, b)]
    if not any(items for items, _ in found):
        return None
    for (items, score), side in zip(found, (a, b), strict=True):
        if not items:
            raise _NoDifference(f"{side.name} has no items of it. Score that set again")
        if not isclose(mean_of(items, score), score.value.value, rel_tol=1e-6, abs_tol=1e-9):
            raise _NoDifference(
                f"the items of {side.name} do not add up to its score. Score that set again"
            )
    (first, score), (second, other) = found
    if score.prompt_list != other.prompt_list:  # ids may be the same
        raise _NoDifference("it is of other prompts in each")
    if (score.overall, score.unit) != (other.overall, other.unit):
        raise _NoDifference("the scores are made of their items in different ways")
    try:
        value, groups, share = difference_and_share(first, second, score.overall, score.unit)
    except EvalError as error:
        raise _NoDifference(str(error)) from None
    same = [name for name in groups if all(_made_of(name, *each) for each in found)]
    return value, {name: groups[name] for name in same}, share


def _made_of(group: str, items: Sequence[Item], score: Score) -> bool:
    """Whether a group's value is the mean of its items: of some scores it is not."""
    values = [item.value for item in items if group in item.groups]
    return group in score.groups and isclose(
        score.unit * float(np.mean(values)), score.groups[group].value, rel_tol=1e-6, abs_tol=1e-9
    )


def mean_of(items: Sequence[Item], score: Score) -> float:
    """The value that items make, as the score says they do."""
    if score.overall == "groups":
        names = list(dict.fromkeys(name for item in items for name in item.groups))
        means = [np.mean([i.value for i in items if name in i.groups]) for name in names]
    else:
        means = [np.mean([item.value for item in items])]
    return score.unit * float(np.mean(means))


def _between_sets(a: Scored, b: Scored, scorer: str) -> tuple[Value, dict[str, Value]]:
    """Of a distance between sets, whose module keeps features."""
    from ..distances.measure import difference  # which loads torch

    try:
        return difference(a.beside, b.beside, scorer)
    except EvalError as error:
        raise _NoDifference(str(error)) from None
