"""Training seeds: which trainings are one entry, and what its seeds say together.

A seed is drawn as a prompt is, but there are few of them, and resampling two or three says far too
little of how seeds vary. So seeds are never resampled: the mean over seeds has the interval of
Student's t on the seeds' own differences, which are paired (equal seed, equal order of samples),
and the interval over prompts is added to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import hypot, sqrt

import numpy as np

from .results import LEVEL, Value

Seeded = dict[int | None, int]  # index by training seed; None: unknown


def grouped(sets: Sequence[tuple[Hashable | None, int | None]]) -> list[Seeded]:
    """Returns entries in the order of their first set, from sets' keys (all but the seed) and seeds.

    Sets of equal key are one entry; a set without a key, or with a seed that the entry has, is its
    own.
    """
    entries: list[tuple[Hashable | None, Seeded]] = []
    for index, (key, seed) in enumerate(sets):
        for other_key, members in entries:
            if key is not None and other_key == key and seed not in members:
                members[seed] = index
                break
        else:
            entries.append((key, {seed: index}))
    return [members for _, members in entries]


def over_seeds(values: Sequence[Value]) -> Value:
    """Returns the mean over training seeds, with its interval over seeds and prompts.

    The parts of both intervals are added as squares. That over prompts is the mean of the seeds'
    own, as if the seeds' values moved with the prompts together: wide rather than narrow. Without
    intervals over prompts, the interval is over seeds alone; of a single seed it is the value's
    own.
    """
    if len(values) == 1:
        return values[0]
    from scipy.stats import t

    numbers = np.array([value.value for value in values])
    mean = float(numbers.mean())
    quantile = float(t.ppf((1 + LEVEL) / 2, len(values) - 1))
    seeds = quantile * float(numbers.std(ddof=1)) / sqrt(len(values))
    below, above = (
        float(np.mean([0.0 if end is None else abs(value.value - end) for value, end in ends]))
        for ends in ([(v, v.low) for v in values], [(v, v.high) for v in values])
    )
    return Value(mean, mean - hypot(seeds, below), mean + hypot(seeds, above), values[0].count)


def groups_over_seeds(values: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Returns `over_seeds` of each group that all seeds have."""
    names = [name for name in values[0] if all(name in groups for groups in values)]
    return {name: over_seeds([groups[name] for groups in values]) for name in names}
