"""What is chosen for each entry of a study, and by what: the value of each setting with the best mean score over
the training seeds, an axis after the other, each at what was chosen before.

A choice is made of the scores of half A of the prompts; of learning rates, of the validation losses of the
runs. It is made anew from these files whenever a study is opened, so there is no record of it that could be of
other scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..report.compare import estimate_of
from ..scores.choose import best_mean, edge_of
from ..scores.results import Value
from ..scores.seeds import Estimate, over_seeds
from .graph import Node, nodes_of, trial_score_id
from .reuse import Existing, read_whole
from .study import Study

Json = dict[str, Any]
LOSS = "validation loss"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A value that was chosen for an entry. Fields are those of study.json's `settled`."""

    axis: str
    scorer: str
    better: str
    prompts: int | None  # of half A; None of a loss
    values: tuple[float, ...]  # that were tried, ascending
    over_seeds: tuple[Value, ...]  # the score of each, over training seeds and prompts
    by_seed: tuple[dict[str, Value], ...]  # the score of each, by training seed
    chosen: int  # index

    @property
    def value(self) -> float:
        return self.values[self.chosen]

    @property
    def edge(self) -> str | None:
        """The end of the range at which the value lies, beyond which a better one may be."""
        return edge_of(self.axis, self.values, self.chosen)

    def record(self) -> Json:
        return asdict(self) | {"edge": self.edge}


def settle(study: Study) -> Study:
    """Returns the study with what is chosen for each entry by the scores that exist."""
    while chosen := {c: choice.value for c, choice in _new_choices(study)}:
        settled = {entry: dict(study.settled.get(entry, {})) for entry in study.entries}
        for (entry, axis), value in chosen.items():
            settled[entry][axis] = value
        study = replace(study, settled=settled)
    return study


def choices(study: Study) -> dict[str, list[Choice]]:
    """Returns by entry what was chosen so far, in its order."""
    source = _Source(study)
    made: dict[str, list[Choice]] = {entry: [] for entry in study.entries}
    for entry in study.entries:
        for axis in study.axes:
            if axis in study.settled.get(entry, {}) and (choice := source.choice(entry, axis)):
                made[entry].append(choice)
    return made


def _new_choices(study: Study) -> Iterator[tuple[tuple[str, str], Choice]]:
    """Yields the next choice of each entry that can be made now."""
    if not study.axes or all(map(study.is_settled, study.entries)):
        return
    source = _Source(study)
    for entry in study.entries:
        axis = next((a for a in study.axes if a not in study.settled.get(entry, {})), None)
        if axis is not None and (choice := source.choice(entry, axis)):
            yield (entry, axis), choice


class _Source:
    """What choices are made of."""

    def __init__(self, study: Study) -> None:
        self.study, self.existing = study, Existing(study)
        self.nodes = {node.id: node for node in nodes_of(study)}

    def choice(self, entry: str, axis: str) -> Choice | None:
        """Returns the choice of an axis; None while a score or a training of it is missing."""
        if axis == "lr":
            return self._by_loss(entry)
        scores, estimates = [], []
        for seed in self.study.seeds:
            node = self.nodes[trial_score_id(self.study, entry, seed, axis)]
            if (name := self._score_name(node)) is None:
                return None
            of_seed = [read_whole(folder / f"{name}.json") for folder in node.outputs]
            pairs = zip(node.sets, of_seed, strict=True)
            scores.append(of_seed)
            estimates.append([estimate_of(pictures.folder, score) for pictures, score in pairs])
        first, values = scores[0][0], [[score.value for score in of_seed] for of_seed in scores]
        return self._choice(axis, first.scorer, first.better, first.prompts, estimates, values)

    def _score_name(self, node: Node) -> str | None:
        """Returns the score that a scorer's verdict is by; None while there is none."""
        names = self.existing.score_names(node) if self.existing.done(node) else []
        return min(names, key=lambda name: (len(name), name), default=None)

    def _by_loss(self, entry: str) -> Choice | None:
        """Returns the choice of a learning rate, by the loss of each run at its last step."""
        study = self.study
        losses = []
        for seed in study.seeds:
            of_seed = []
            for name in study.trainings_of(entry):
                loss = self.existing.validation_loss(name, seed)
                phase = len(study.parts(name)) - 1
                if loss is None or not self.existing.trained(name, seed, phase):
                    return None
                of_seed.append(loss)
            losses.append(of_seed)
        estimates = [[Estimate(value=value) for value in of_seed] for of_seed in losses]
        values = [[Value(value) for value in of_seed] for of_seed in losses]
        return self._choice("lr", LOSS, "lower", None, estimates, values)

    def _choice(
        self, axis: str, scorer: str, better: str, prompts: int | None,
        estimates: list[list[Estimate]], values: list[list[Value]],
    ) -> Choice:  # fmt: skip
        """Returns the choice by the estimates and values of each seed's settings (seeds, settings)."""
        seeds, tried = self.study.seeds, self.study.axes[axis]
        of_setting = list(zip(*values, strict=True))
        return Choice(
            axis=axis,
            scorer=scorer,
            better=better,
            prompts=prompts,
            values=tried,
            over_seeds=tuple(over_seeds(each)[0] for each in zip(*estimates, strict=True)),
            by_seed=tuple(
                {str(seed): value for seed, value in zip(seeds, each, strict=True)}
                for each in of_setting
            ),
            chosen=best_mean([[value.value for value in each] for each in of_setting], better),
        )
