"""From items to scores with intervals and to paired differences, by percentile bootstrap.

What was drawn by chance is prompts, so prompts are resampled, all pictures of a prompt together,
and within their group where each belongs to one. A difference resamples the prompts once for both
sets. A single prompt says nothing of how prompts vary, so there is no interval of it, nor of a
whole that has a stratum of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import OtherImages
from .results import LEVEL, Item, Value
from .seeds import Estimate

RESAMPLES = 10_000
AT_ONCE = 4_000_000  # indices drawn at once: 32 MB

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """Of each prompt: its pictures' scores added, their number, and the groups it is in."""

    prompts: list[str]
    total: Floats  # (P,)
    count: Floats  # (P,)
    groups: dict[str, NDArray[np.bool_]]  # name -> (P,), in the order of appearance

    @classmethod
    def of(cls, items: Sequence[Item]) -> Sums:
        number = {name: i for i, name in enumerate(dict.fromkeys(item.prompt for item in items))}
        index = np.array([number[item.prompt] for item in items])
        total, count = np.zeros(len(number)), np.zeros(len(number))
        np.add.at(total, index, [item.value for item in items])
        np.add.at(count, index, 1)
        groups: dict[str, NDArray[np.bool_]] = {}
        for item in items:
            for name in item.groups:
                groups.setdefault(name, np.zeros(len(number), bool))[number[item.prompt]] = True
        return cls(list(number), total, count, groups)

    def strata(self) -> list[Ints]:
        """Returns indices to resample together: each group's, or all where groups overlap."""
        memberships = sum(self.groups.values(), np.zeros(len(self.prompts), int))
        if self.groups and (memberships == 1).all():
            return [np.flatnonzero(members) for members in self.groups.values()]
        return [np.arange(len(self.prompts))]


def aggregate(
    items: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value]]:
    """Returns the value of all items and of each group, with their intervals."""
    sums = Sums.of(items)
    strata = sums.strata()
    draws = np.concatenate([_means(sums, weights, overall) for weights in _weights(strata, seed)])
    point = _means(sums, np.ones((1, len(sums.prompts))), overall)[0]
    return _values(sums, strata, point, draws, unit)


def means_of(items: Sequence[Item], overall: str, unit: float) -> tuple[float, dict[str, float]]:
    """Returns the value of all items and of each group, without intervals."""
    sums = Sums.of(items)
    value, *groups = unit * _means(sums, np.ones((1, len(sums.prompts))), overall)[0]
    return float(value), dict(zip(sums.groups, map(float, groups), strict=True))


def estimates(
    items: Sequence[Item], overall: str = "prompts", unit: float = 1.0
) -> tuple[Estimate, dict[str, Estimate]]:
    """Returns the value of all items and of each group, with the influence of each prompt.

    A mean is sum over prompts of totals over sum of counts, R = T / C; prompt p with total t and
    count c moves it by (t - R c) / C, to first order. A mean of groups moves by the mean of theirs.
    """
    sums = Sums.of(items)
    means = _means(sums, np.ones((1, len(sums.prompts))), overall)[0]
    every = np.ones(len(sums.prompts), bool)
    influences = [
        np.where(members, sums.total - mean * sums.count, 0.0) / sums.count[members].sum()
        for mean, members in zip(means, [every, *sums.groups.values()], strict=True)
    ]
    if overall == "groups":
        influences[0] = np.mean(influences[1:], axis=0)

    def estimate(mean: float, influence: Floats, members: NDArray[np.bool_]) -> Estimate:
        indices = np.flatnonzero(members)
        strata = [indices] if len(indices) < len(members) else sums.strata()
        return Estimate(
            value=unit * float(mean),
            prompts=tuple(sums.prompts[i] for i in indices),
            influences=unit * influence[members],
            strata=tuple(np.searchsorted(indices, stratum) for stratum in strata),
            additive=True,
        )

    columns = zip(means, influences, [every, *sums.groups.values()], strict=True)
    value, *groups = [estimate(*column) for column in columns]
    return value, dict(zip(sums.groups, groups, strict=True))


def difference_estimates(
    a: Sequence[Item], b: Sequence[Item], overall: str = "prompts", unit: float = 1.0
) -> tuple[Estimate, dict[str, Estimate]]:
    """Returns b minus a, as `estimates` returns each, of the groups of the same prompts in both.

    OtherImages where the prompts differ.
    """
    (before, old), (after, new) = (estimates(items, overall, unit) for items in (a, b))
    shared = [
        name for name in old if name in new and set(old[name].prompts) == set(new[name].prompts)
    ]
    return after - before, {name: new[name] - old[name] for name in shared}


def difference(
    a: Sequence[Item], b: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value]]:
    """Returns b minus a, as `aggregate` returns each; OtherImages where the prompts differ."""
    return difference_and_share(a, b, overall, unit, seed)[:2]


def difference_and_share(
    a: Sequence[Item], b: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value], float | None]:
    """Returns `difference`, and the share of resamples with b above a, None without an interval.

    Groups are those that both have, of the same prompts; OtherImages if the value is made of
    others.
    """
    first, second = Sums.of(a), Sums.of(b)
    if sorted(first.prompts) != sorted(second.prompts):
        raise OtherImages(
            f"found scores of {len(first.prompts)} and of {len(second.prompts)} prompts that are not the same ones: "
            "only sets of the same prompts are compared"
        )
    strata = first.strata()
    place = {name: i for i, name in enumerate(second.prompts)}
    order = np.array([place[name] for name in first.prompts])
    reordered = {name: members[order] for name, members in second.groups.items()}
    shared = [
        name for name, members in first.groups.items()
        if name in reordered and np.array_equal(members, reordered[name])
    ]  # fmt: skip
    if overall == "groups" and not len(shared) == len(first.groups) == len(reordered):
        raise OtherImages(
            f"found the groups {', '.join(first.groups)} and {', '.join(reordered)}, expected the same of the same "
            "prompts: the value is their mean"
        )
    first, second = (
        Sums(first.prompts, total, count, {name: groups[name] for name in shared})
        for total, count, groups in (
            (first.total, first.count, first.groups), (second.total[order], second.count[order], reordered),
        )
    )  # fmt: skip

    def change(weights: Floats) -> Floats:
        return _means(second, weights, overall) - _means(first, weights, overall)

    point = change(np.ones((1, len(first.prompts))))[0]
    draws = np.concatenate([change(weights) for weights in _weights(strata, seed)])
    value, groups = _values(first, strata, point, draws, unit)
    return value, groups, None if value.low is None else float((draws[:, 0] > 0).mean())


def _values(
    sums: Sums, strata: Sequence[Ints], point: Floats, draws: Floats, unit: float
) -> tuple[Value, dict[str, Value]]:
    """Returns all's and each group's, from `point` (1 + groups,) and `draws` (n, 1 + groups)."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    sizes = [len(sums.prompts), *(int(members.sum()) for members in sums.groups.values())]
    vary = [min(map(len, strata)) > 1, *(size > 1 for size in sizes[1:])]
    columns = zip(point, low, high, sizes, vary, strict=True)
    value, *groups = [_value(unit, *column) for column in columns]
    return value, dict(zip(sums.groups, groups, strict=True))


def _value(unit: float, point: float, low: float, high: float, count: int, varies: bool) -> Value:
    """Returns the value, without an interval of what does not vary."""
    if not varies:
        return Value(unit * float(point), count=count)
    return Value(unit * float(point), unit * float(low), unit * float(high), count)


def _weights(strata: Sequence[Ints], seed: int) -> Iterator[Floats]:
    """Yields how often each prompt is drawn, (n, P) a block, RESAMPLES in all."""
    generator = np.random.default_rng(seed)
    size = sum(map(len, strata))
    block = max(1, min(RESAMPLES, AT_ONCE // size))
    for start in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - start)
        weights, rows = np.empty((draws, size)), np.arange(draws)[:, None]
        for stratum in strata:
            count = len(stratum)
            indices = generator.integers(0, count, (draws, count)) + count * rows
            counts = np.bincount(indices.ravel(), minlength=draws * count)
            weights[:, stratum] = counts.reshape(draws, count)
        yield weights


def _means(sums: Sums, weights: Floats, overall: str) -> Floats:
    """Returns (n, 1 + groups): the value of all and of each group, by rows of weights (n, P)."""
    members = np.stack([np.ones(len(sums.prompts)), *sums.groups.values()], 1)  # (P, 1 + groups)
    columns = [sums.total[:, None] * members, sums.count[:, None] * members]
    total, count = np.split(weights @ np.concatenate(columns, 1), 2, axis=1)
    with np.errstate(invalid="ignore"):  # a group of which no prompt was drawn is NaN
        means: Floats = total / count
    if overall == "groups":
        means[:, 0] = means[:, 1:].mean(1)
    return means


def pooled(
    parts: Mapping[str, Sequence[Item]], unit: float = 1.0, seed: int = 0
) -> dict[str, Value]:
    """Returns the mean over each part's items, all parts under the same resamples of prompts.

    For parts that cut through prompts, such as categories of questions; `aggregate` has groups of
    whole prompts.
    """
    prompts = dict.fromkeys(item.prompt for items in parts.values() for item in items)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    total, count = np.zeros((2, len(number), len(parts)))
    for column, items in enumerate(parts.values()):
        index = np.array([number[item.prompt] for item in items])
        np.add.at(total[:, column], index, [item.value for item in items])
        np.add.at(count[:, column], index, 1)
    strata = [np.arange(len(number))]
    with np.errstate(invalid="ignore"):  # a part of which no prompt was drawn is NaN
        draws = np.concatenate([(w @ total) / (w @ count) for w in _weights(strata, seed)])
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    point, sizes = total.sum(0) / count.sum(0), (count > 0).sum(0)
    return {
        name: _value(unit, point[i], low[i], high[i], int(sizes[i]), bool(sizes[i] > 1))
        for i, name in enumerate(parts)
    }
