"""From items to scores with intervals, and to paired differences of two sets.

What was drawn by chance is prompts, so prompts are resampled, all pictures of one together, and within their group
where each belongs to one. A difference resamples the prompts once for both sets. One prompt alone says nothing of how
prompts vary, so there is no interval of it, nor of a whole that has a stratum of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import OtherImages
from .results import LEVEL, Item, Value

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
    def of(cls, items: Sequence[Item]) -> "Sums":
        number = {name: i for i, name in enumerate(dict.fromkeys(item.prompt for item in items))}
        at = np.array([number[item.prompt] for item in items])
        total, count = np.zeros(len(number)), np.zeros(len(number))
        np.add.at(total, at, [item.value for item in items])
        np.add.at(count, at, 1)
        groups: dict[str, NDArray[np.bool_]] = {}
        for item in items:
            for name in item.groups:
                groups.setdefault(name, np.zeros(len(number), bool))[number[item.prompt]] = True
        return cls(list(number), total, count, groups)

    def strata(self) -> list[Ints]:
        """Indices that are resampled among themselves: the groups, or all prompts where groups overlap."""
        inside = sum(self.groups.values(), np.zeros(len(self.prompts), int))
        if self.groups and (inside == 1).all():
            return [np.flatnonzero(members) for members in self.groups.values()]
        return [np.arange(len(self.prompts))]


def aggregate(
    items: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value]]:
    """The value of all items and of each group, with their intervals."""
    sums = Sums.of(items)
    strata = sums.strata()
    draws = np.concatenate([_means(sums, weights, overall) for weights in _weights(strata, seed)])
    point = _means(sums, np.ones((1, len(sums.prompts))), overall)[0]
    return _values(sums, strata, point, draws, unit)


def difference(
    a: Sequence[Item], b: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value]]:
    """b minus a over the same prompts, as `aggregate` gives each; OtherImages where the prompts differ."""
    return difference_and_share(a, b, overall, unit, seed)[:2]


def difference_and_share(
    a: Sequence[Item], b: Sequence[Item], overall: str = "prompts", unit: float = 1.0, seed: int = 0
) -> tuple[Value, dict[str, Value], float | None]:
    """`difference`, and the share of the resamples in which b's value is above a's, None without an interval.

    Groups are those that both have, of the same prompts; OtherImages if the value is made of others too.
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
    others = {name: members[order] for name, members in second.groups.items()}
    shared = [
        name for name, members in first.groups.items()
        if name in others and np.array_equal(members, others[name])
    ]  # fmt: skip
    if overall == "groups" and not len(shared) == len(first.groups) == len(others):
        raise OtherImages(
            f"found the groups {', '.join(first.groups)} and {', '.join(others)}, expected the same ones of the same "
            "prompts: the value is their mean"
        )
    first, second = (
        Sums(first.prompts, total, count, {name: groups[name] for name in shared})
        for total, count, groups in (
            (first.total, first.count, first.groups), (second.total[order], second.count[order], others),
        )
    )  # fmt: skip
    drawn = [
        _means(second, weights, overall) - _means(first, weights, overall)
        for weights in _weights(strata, seed)
    ]
    ones = np.ones((1, len(first.prompts)))
    point = (_means(second, ones, overall) - _means(first, ones, overall))[0]
    draws = np.concatenate(drawn)
    value, groups = _values(first, strata, point, draws, unit)
    return value, groups, None if value.low is None else float((draws[:, 0] > 0).mean())


def _values(
    sums: Sums, strata: Sequence[Ints], point: Floats, draws: Floats, unit: float
) -> tuple[Value, dict[str, Value]]:
    """Of all and of each group, from `point` (1 + groups,) and `draws` (n, 1 + groups)."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    sizes = [len(sums.prompts), *(int(members.sum()) for members in sums.groups.values())]
    known = [min(map(len, strata)) > 1, *(size > 1 for size in sizes[1:])]
    made = [_value(unit, *one) for one in zip(point, low, high, sizes, known, strict=True)]
    return made[0], dict(zip(sums.groups, made[1:], strict=True))


def _value(unit: float, point: float, low: float, high: float, count: int, known: bool) -> Value:
    """Without an interval unless it is known."""
    if not known:
        return Value(unit * float(point), count=count)
    return Value(unit * float(point), unit * float(low), unit * float(high), count)


def _weights(strata: Sequence[Ints], seed: int) -> Iterator[Floats]:
    """How often each prompt is drawn, (n, P) a block, RESAMPLES in all."""
    generator = np.random.default_rng(seed)
    size = sum(map(len, strata))
    block = max(1, min(RESAMPLES, AT_ONCE // size))
    for start in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - start)
        weights, rows = np.empty((draws, size)), np.arange(draws)[:, None]
        for stratum in strata:
            inside = len(stratum)
            drawn = generator.integers(0, inside, (draws, inside)) + inside * rows
            counts = np.bincount(drawn.ravel(), minlength=draws * inside)
            weights[:, stratum] = counts.reshape(draws, inside)
        yield weights


def _means(sums: Sums, weights: Floats, overall: str) -> Floats:
    """(n, 1 + groups): the value of all, then of each group, under each row of weights (n, P)."""
    members = np.stack([np.ones(len(sums.prompts)), *sums.groups.values()], 1)  # (P, 1 + groups)
    both = weights @ np.concatenate(
        [sums.total[:, None] * members, sums.count[:, None] * members], 1
    )
    total, count = np.split(both, 2, axis=1)
    with np.errstate(invalid="ignore"):  # a group of which no prompt was drawn is NaN
        means: Floats = total / count
    if overall == "groups":
        means[:, 0] = means[:, 1:].mean(1)
    return means


def pooled(
    parts: Mapping[str, Sequence[Item]], unit: float = 1.0, seed: int = 0
) -> dict[str, Value]:
    """The mean over each part's items, all parts under the same resamples of prompts.

    For parts that cut through prompts, such as categories of questions, where `aggregate` has groups of whole prompts.
    """
    place: dict[str, int] = {}
    for items in parts.values():
        for item in items:
            place.setdefault(item.prompt, len(place))
    total, count = np.zeros((2, len(place), len(parts)))
    for column, items in enumerate(parts.values()):
        at = np.array([place[item.prompt] for item in items])
        np.add.at(total[:, column], at, [item.value for item in items])
        np.add.at(count[:, column], at, 1)
    every = [np.arange(len(place))]
    with np.errstate(invalid="ignore"):  # a part of which no prompt was drawn is NaN
        draws = np.concatenate([(w @ total) / (w @ count) for w in _weights(every, seed)])
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    point, sizes = total.sum(0) / count.sum(0), (count > 0).sum(0)
    return {
        name: _value(unit, point[i], low[i], high[i], int(sizes[i]), bool(sizes[i] > 1))
        for i, name in enumerate(parts)
    }
