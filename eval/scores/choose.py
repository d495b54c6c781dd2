"""Which setting of a sampler to take, such as a guidance scale, from its scores at several values.

The best of several scores is best by luck too, so it says too much of itself: the choice is made on
one half of the prompts, and its score is that of the other half. A value whose paired difference to the
best has an interval that holds 0 is not told apart from it; of those the smallest guidance is taken,
which bends the samples least. How far a setting moves one prompt is the same for both values that are
compared, so differences resolve more than the intervals of the scores do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .results import Value
from .seeds import Estimate, over_seeds

Setting = Mapping[str, float]  # value by name, such as {"guidance_scale": 2.0}
GUIDANCE = "guidance_scale"
NO_GUIDANCE = 1.0  # at this scale or below the prompt alone is run: there is nothing smaller to try


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A setting at an end of the values that were tried, beyond which a better one may lie."""

    name: str
    value: float
    end: str  # "smallest" or "largest"
    of: str  # "best", the best score's, or "chosen"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and why."""

    best: int  # index of the best score
    chosen: int
    differences: tuple[Value, ...]  # of each to the best, over the prompts that both share
    tied: tuple[bool, ...]  # not told apart from the best
    edges: tuple[Edge, ...]


def choose(settings: Sequence[Setting], estimates: Sequence[Estimate], better: str) -> Choice:
    """Returns which of the settings to take, by their scores on the same prompts.

    `better` is "higher" or "lower". Of settings that are tied with the best, those of the smallest
    guidance are taken, and of these the best. Where nothing is known of how prompts move the score,
    only an equal score is tied. OtherImages where the prompts are others.
    """
    sign = 1 if better == "higher" else -1

    def rank(i: int) -> tuple[float, int]:  # of equal scores the first
        return -sign * estimates[i].value, i

    best = min(range(len(settings)), key=rank)
    differences = tuple(over_seeds([estimate - estimates[best]])[0] for estimate in estimates)
    tied = tuple(_holds_zero(difference) for difference in differences)
    chosen = min(
        (i for i, is_tied in enumerate(tied) if is_tied),
        key=lambda i: (max(settings[i].get(GUIDANCE, 0.0), NO_GUIDANCE), *rank(i)),
    )
    return Choice(
        best=best, chosen=chosen, differences=differences, tied=tied,
        edges=_edges(settings, best, chosen),
    )  # fmt: skip


def best_mean(values: Sequence[Sequence[float]], better: str) -> int:
    """Returns the index of the setting with the best mean over training seeds, of equal ones the first;
    `values` (settings, seeds).
    """
    sign = 1 if better == "higher" else -1
    return max(range(len(values)), key=lambda i: sign * fmean(values[i]))


def edge_of(name: str, values: Sequence[float], chosen: int) -> str | None:
    """Returns at which end of the values that were tried, ascending, the chosen one lies, "smallest" or
    "largest"; None where values to both sides were tried, or none is to be: without guidance there is no less.
    """
    if chosen == len(values) - 1:
        return "largest"
    if chosen == 0 and not (name == GUIDANCE and values[0] <= NO_GUIDANCE):
        return "smallest"
    return None


def _holds_zero(difference: Value) -> bool:
    if difference.low is None or difference.high is None:
        return difference.value == 0
    return difference.low <= 0 <= difference.high


def _edges(settings: Sequence[Setting], best: int, chosen: int) -> tuple[Edge, ...]:
    """Returns where the best score lies at an end, and the smallest guidance where a tie chose it."""
    edges = []
    for name, value in settings[best].items():
        values = [setting[name] for setting in settings]
        low, high = min(values), max(values)
        if low == high:
            continue
        untried_below = name != GUIDANCE or low > NO_GUIDANCE
        if value == high or (value == low and untried_below):
            end = "largest" if value == high else "smallest"
            edges.append(Edge(name=name, value=value, end=end, of="best"))
        if name == GUIDANCE and settings[chosen][name] == low < value and untried_below:
            edges.append(Edge(name=name, value=low, end="smallest", of="chosen"))
    return tuple(edges)
