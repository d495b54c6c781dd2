"""Which prompts are shown whose pictures lie side by side, and in which order: the worst, those in
which the entries differ most, or a fair sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import TypeVar

import numpy as np
from PIL import Image

from shards.console import counted

from ..images.layouts import Picture
from ..prompts.prompts import Prompt
from .compare import Entry
from .entries import ScoredSet

T = TypeVar("T")
SIDE = 64  # pixels at which pictures are compared: what they show, not their grain


@dataclass(frozen=True)
class PromptScores:
    """A score of single prompts: of each entry the mean over the training seeds that all have."""

    scorer: str
    higher: bool  # whether more is better
    seeds: tuple[int | None, ...]
    by_entry: Mapping[str, Mapping[str, float]]  # by name, and by the prompt's id

    def difference(self, prompt: str) -> float:
        """Returns how far the best and the worst entry are apart in a prompt."""
        values = [by_prompt[prompt] for by_prompt in self.by_entry.values()]
        return max(values) - min(values)

    def lead(self, entry: str, prompt: str) -> float:
        """Returns by how much an entry is better than the best other one; below 0 where it is not."""
        sign = 1 if self.higher else -1
        values = {name: sign * by_prompt[prompt] for name, by_prompt in self.by_entry.items()}
        return values.pop(entry) - max(values.values())

    def leading(self, prompts: Sequence[Prompt], count: int) -> list[Prompt]:
        """Returns `count` prompts: in turn for each entry the one in which it leads most."""
        turns = (
            sorted(prompts, key=lambda p, name=entry: -self.lead(name, p.id))  # type: ignore[misc]
            for entry in self.by_entry
        )
        chosen: dict[str, Prompt] = {}
        for prompt in chain.from_iterable(zip(*turns, strict=True)):
            if len(chosen) < count:
                chosen.setdefault(prompt.id, prompt)
        return list(chosen.values())


def prompt_scores(entries: Sequence[Entry], scorer: str) -> PromptScores | None:
    """Returns a score of those prompts that all entries have it of, in those training seeds in which
    all kept its items; None for fewer than two entries or where there is no such seed or prompt.

    BadScores where items are damaged.
    """
    if len(entries) < 2:
        return None
    values = {
        (entry.name, seed): _by_prompt(scored, scorer)
        for entry in entries
        for seed, scored in entry.members.items()
    }
    names = [entry.name for entry in entries]
    seeds = [seed for seed in entries[0].members if all(values.get((n, seed)) for n in names)]
    if not seeds:
        return None
    shared = set.intersection(*(set(values[name, seed]) for name in names for seed in seeds))
    by_entry = {
        name: {p: float(np.mean([values[name, seed][p] for seed in seeds])) for p in shared}
        for name in names
    }
    better = entries[0].members[seeds[0]].scores[scorer].better
    return PromptScores(scorer, better == "higher", tuple(seeds), by_entry) if shared else None


def _by_prompt(scored: ScoredSet, scorer: str) -> dict[str, float]:
    """Returns a set's score by the prompt's id, the mean over its pictures; empty without items."""
    items: dict[str, list[float]] = {}
    for item in scored.items(scorer) if scorer in scored.scores else ():
        items.setdefault(item.prompt, []).append(item.value)
    unit = scored.scores[scorer].unit if items else 1.0
    return {prompt: unit * float(np.mean(numbers)) for prompt, numbers in items.items()}


def distance(pictures: Sequence[Picture]) -> float:
    """Returns the largest root mean square difference of two of the pictures (H, W, 3), each made
    SIDE x SIDE pixels large, in 8-bit values; 0 for one picture.
    """
    small = [
        np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
        for p in pictures
    ]
    return max(
        (float(np.sqrt(np.square(a - b).mean())) for a, b in combinations(small, 2)), default=0.0
    )


@dataclass(frozen=True)
class Choice:
    """Prompts that are shown, why these, and how they are ordered."""

    prompts: Sequence[Prompt]
    chosen: str
    orders: Mapping[str, Callable[[Prompt], float]]  # the prompt of the smallest value first
    sample: Collection[str] = ()  # of several kinds, ids of those that were picked by their place

    def ranks(self) -> dict[str, list[int]]:
        """Returns each prompt's place in all orders, by its id."""
        ranks: dict[str, list[int]] = {prompt.id: [] for prompt in self.prompts}
        for value in self.orders.values():
            for rank, prompt in enumerate(sorted(self.prompts, key=value)):
                ranks[prompt.id].append(rank)
        return ranks


def choose(
    common: Sequence[Prompt],
    most: int,
    *,
    psnr: Mapping[str, Mapping[str, float]],
    scores: PromptScores | None,
    apart: Callable[[Prompt], float] | None,
    by_difference: bool,
    exists: Callable[[Prompt], bool] = lambda prompt: True,
) -> Choice:
    """Returns at most `most` of the prompts that all sets have, by the first that is there of `psnr`
    (the worst), `scores` (half of them where the entries differ most), and their place.

    `apart` is how far the pictures of a prompt are apart; with `by_difference` those come first
    that are so most. Prompts whose pictures do not exist any more are left out once they are chosen.
    """
    place = {prompt.id: i for i, prompt in enumerate(common)}

    def in_list(prompt: Prompt) -> float:
        return place[prompt.id]

    if any(psnr.values()):
        prompts = worst(common, most, psnr)
        text = (
            f"{counted(len(prompts), 'picture')}, the worst first: those with the lowest PSNR of any set, so they are "
            "no fair sample of the rest. Each has its PSNR from the original below it."
        )
        return Choice(prompts, text, {"the worst first": prompts.index})
    scored = [p for p in common if scores and p.id in next(iter(scores.by_entry.values()))]
    if scores and scored:
        return _by_score(scores, scored, common, most, in_list, exists)
    chosen = spread(common, most)
    sample = [prompt for prompt in chosen if exists(prompt)]
    text = f"{counted(len(sample), 'prompt')}: {_sampled(chosen, common)}.{_gone(chosen, sample)}"
    orders: dict[str, Callable[[Prompt], float]] = {"as in the list of prompts": in_list}
    if apart:
        distances = {prompt.id: apart(prompt) for prompt in sample}
        by_pixels = {"most different pixels first": lambda prompt: -distances[prompt.id]}
        orders = by_pixels | orders if by_difference else orders | by_pixels
        if by_difference:
            text += (
                " The first are those whose pictures are furthest apart in pixels (root mean square of "
                f"{SIDE} x {SIDE} pixels), since the primary score is not known of single prompts."
            )
    return Choice(sample, text, orders)


def _gone(chosen: Sequence[Prompt], left: Sequence[Prompt]) -> str:
    """Returns a sentence on those of the chosen prompts whose pictures were removed."""
    count = len(chosen) - len(left)
    return f" The pictures of {counted(count, 'more prompt')} were removed." if count else ""


def _sampled(sample: Sequence[Prompt], common: Sequence[Prompt]) -> str:
    """Returns how a fair sample was picked."""
    if len(sample) == len(common):
        return "all that every set has"
    kind = (
        "of all groups alike, every n-th of each" if common[0].group else "every n-th of the list"
    )
    return f"{kind}, picked by their place alone"


def _by_score(
    scores: PromptScores,
    scored: Sequence[Prompt],
    common: Sequence[Prompt],
    most: int,
    in_list: Callable[[Prompt], float],
    exists: Callable[[Prompt], bool],
) -> Choice:
    """Returns a fair sample of the prompts with a score, and as many in which the entries differ most."""
    fair = spread(scored, most if most >= len(scored) else most - most // 2)
    ids = {prompt.id for prompt in fair}
    chosen = [*fair, *scores.leading([p for p in scored if p.id not in ids], most - len(fair))]
    prompts = sorted(filter(exists, chosen), key=in_list)
    sample = [prompt for prompt in prompts if prompt.id in ids]
    others = len(prompts) - len(sample)
    over = (
        f", mean over {counted(len(scores.seeds), 'training seed')}"
        if len(scores.seeds) > 1
        else ""
    )
    text = f"Below each picture is its entry's {scores.scorer} in the prompt{over}."
    text += _gone(chosen, prompts)
    if others:
        text = (
            f"{counted(others, 'prompt')} in which, in turn, each entry leads most by {scores.scorer}, and "
            f"{len(sample)} {_sampled(fair, common)}: only these, marked as sample, are fair. {text}"
        )
    else:
        text = f"{counted(len(sample), 'prompt')}: {_sampled(fair, common)}. {text}"
    orders: dict[str, Callable[[Prompt], float]] = {
        f"most different {scores.scorer} first": lambda prompt: -scores.difference(prompt.id)
    }
    for name in scores.by_entry:
        orders[f"best for {name} first"] = partial(_lead, scores, name)
    orders["as in the list of prompts"] = in_list
    return Choice(prompts, text, orders, ids if others else ())


def _lead(scores: PromptScores, entry: str, prompt: Prompt) -> float:
    return -scores.lead(entry, prompt.id)


def worst(
    prompts: Sequence[Prompt], most: int, values: Mapping[str, Mapping[str, float]]
) -> list[Prompt]:
    """Returns the `most` prompts whose lowest value of any set is lowest, in this order; those without
    a value are left out.
    """
    lowest: dict[str, float] = {}
    for by_prompt in values.values():
        for prompt, value in by_prompt.items():
            lowest[prompt] = min(value, lowest.get(prompt, value))
    return sorted((p for p in prompts if p.id in lowest), key=lambda p: lowest[p.id])[:most]


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """Returns `most` prompts in the order of the list: from all groups alike, and of each group every
    n-th. Where there are more groups than `most`, every n-th group has one.

    They are picked by their place alone, never by what their pictures look like.
    """
    groups: dict[str | None, list[str]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt.id)
    members = _every_nth(list(groups.values()), most)
    counts, left = [0] * len(members), min(most, sum(map(len, members)))
    while left:
        for i, names in enumerate(members):
            if left and counts[i] < len(names):
                counts[i], left = counts[i] + 1, left - 1
    chosen = {
        name
        for names, count in zip(members, counts, strict=True)
        for name in _every_nth(names, count)
    }
    return [prompt for prompt in prompts if prompt.id in chosen]


def _every_nth(items: Sequence[T], count: int) -> list[T]:
    """Returns at most `count` items, evenly apart, from the middle of each part of the sequence."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
