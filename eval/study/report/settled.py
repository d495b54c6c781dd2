"""What was chosen for each entry of a study, on half A of the prompts, and what a choice at an edge leaves open.

Of each entry of study.json's `settled`: entry, scorer, better, prompts (of half A), axes[], one a setting, in the
order in which they were chosen: axis, scorer, better, prompts (of a learning rate: the validation loss, null),
values[] that were tried, ascending, over_seeds[] (a Value of each), by_seed[] ({seed: Value} of each), chosen (an
index), edge ("smallest" or "largest" where the chosen value is the last that was tried on that side, else null),
accepted (whether there is a verdict though it is at an edge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...images.flags import plain
from ..choices import Choice
from .verdict import listed

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
Choices = Mapping[str, Sequence[Choice]]


def settled_records(study: Study, choices: Choices) -> list[Json]:
    """Returns what was chosen for each entry that has a choice."""
    accept = study.config.settle is not None and study.config.settle.accept_edge
    return [
        {
            "entry": entry, "scorer": made[-1].scorer, "better": made[-1].better, "prompts": made[-1].prompts,
            "axes": [
                choice.record() | {"accepted": accept and choice.edge is not None} for choice in made
            ],
        }
        for entry, made in choices.items() if made
    ]  # fmt: skip


def edges_of(study: Study, choices: Choices, entry: str) -> str:
    """Returns why a choice for an entry or for the baseline gives no verdict; nothing where none is at an
    edge, or edges are accepted.
    """
    if study.config.settle is None or study.config.settle.accept_edge:
        return ""
    texts = [
        f"{choice.axis} of {name} is best at {plain(choice.value)}, the {choice.edge} that was tried"
        for name in dict.fromkeys((study.baseline, entry))
        for choice in choices[name]
        if choice.edge
    ]
    if not texts:
        return ""
    new = " (of lengths beyond what the runs keep with new trainings)"
    return (
        f"{'; '.join(texts)}. A better one may lie beyond: widen the range in `settle`"
        f"{new if any(text.startswith('ema') for text in texts) else ''}, or accept the edge "
        "(settle: {accept_edge: true}, or study report --accept-edge)"
    )


def beyond(records: Sequence[Json]) -> list[str]:
    """Returns what choices at edges that were accepted leave open, of the records that `settled_records` returns."""
    axes = [axis["axis"] for record in records for axis in record["axes"] if axis["accepted"]]
    if not axes:
        return []
    return [
        f"values of {listed(list(dict.fromkeys(axes)))} beyond those tried: an edge was accepted"
    ]


def own_keys(study: Study) -> set[str]:
    """Returns the settings of sets, and keys of trainings, that were chosen for each entry."""
    return {"optim.lr" if axis == "lr" else axis for axis in study.axes}
