"""Two sets of one benchmark: what differs between them, and by how much each score of both differs, with its interval.

A difference is b minus a. Where both scores kept items it is resampled over the prompts that the sets share; of a
distance between sets, its scorer's module does that from the features it kept. All scores that both sets have are
compared: none is selected.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from .aggregate import difference_and_share
from .errors import EvalError
from .results import Item, Score, Value
from .scored import Scored

Json = dict[str, Any]
SEVERAL = "several settings"
# What a comparison is of: the first of these that differs. With it go the fields that cannot but differ too.
SUBJECTS = (
    ("VAEs", "vae", {"vae", "decoding", "norm", "weights", "column"}),
    ("weights", "weights", {"weights", "step", "ema"}),
    ("columns", "column", {"column"}),
)
HARMLESS = {"batch_size", "threads"}  # they change rounding only
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

    @property
    def resolved(self) -> bool | None:
        """Whether 0 lies outside the interval; None without one."""
        return None if self.value is None else resolved(self.value)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`b` against the baseline `a`."""

    a: str
    b: str
    subject: str  # what is compared: "VAEs", "weights", or the one setting that differs
    differ: dict[str, tuple[Any, Any]]  # settings, a's and b's
    warnings: tuple[str, ...]
    differences: tuple[Difference, ...]


def resolved(difference: Value) -> bool | None:
    """Whether 0 lies outside a difference's interval; None where it has none."""
    if difference.low is None or difference.high is None:
        return None
    return difference.low > 0 or difference.high < 0


def compare(a: Scored, b: Scored) -> Comparison:
    """All differences of two sets; BadScores where items are damaged."""
    differ = {
        key: (a.settings.get(key), b.settings.get(key))
        for key in sorted(a.settings.keys() | b.settings.keys())
        if a.settings.get(key) != b.settings.get(key)
    }
    subject, warnings = judged(differ)
    warnings += _of_originals(a, b)
    differences = [
        _difference(a, b, scorer) for scorer in sorted(a.scores.keys() & b.scores.keys())
    ]
    return Comparison(
        a=a.name, b=b.name, subject=subject, differ=differ, warnings=tuple(warnings),
        differences=tuple(differences),
    )  # fmt: skip


def judged(differ: dict[str, tuple[Any, Any]]) -> tuple[str, list[str]]:
    """What sets compare that differ in these settings, and what speaks against that."""
    counted = differ.keys() - HARMLESS
    subject, own = next(
        ((name, fields) for name, key, fields in SUBJECTS if key in counted), (None, set[str]())
    )
    others = sorted(counted - own)
    if subject is None:
        subject = others[0] if len(others) == 1 else SEVERAL if others else "equal settings"
    said = "; ".join(f"{key} differs ({_short(differ[key])})" for key in others)
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


def _short(values: tuple[Any, Any]) -> str:
    return ", ".join(v[:12] if isinstance(v, str) else str(v)[:40] for v in values)


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


SetDifference = Callable[[Path, Path, str], tuple[Value, dict[str, Value]]]


def _between_sets(a: Scored, b: Scored, scorer: str) -> tuple[Value, dict[str, Value]]:
    """Of a distance between sets, whose module keeps features."""
    try:
        module = importlib.import_module(".distances", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.distances":
            raise
        raise _NoDifference("it is of the whole set, and no features of it were kept") from None
    difference: SetDifference = module.difference
    try:
        return difference(a.beside, b.beside, scorer)
    except EvalError as error:
        raise _NoDifference(str(error)) from None
