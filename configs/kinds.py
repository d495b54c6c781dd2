"""Which package a config is for, by its keys: the one of another package gets a sentence of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

WORDS = "the command line"  # where values are from, in place of a YAML
# of each kind: the keys that tell it, and the command that takes it
KINDS = {
    "an encode config": ({"root", "sources", "columns"}, "python -m encode run"),
    "a training config": ({"data", "model", "steps", "global_batch"}, "python -m train"),
    "a study": ({"entries", "scorers", "train"}, "python -m eval study run"),
}


def of_another_kind(known: Collection[str], values: Any, where: str) -> str:
    """Returns a message where the values of a YAML are of another package's config than the one whose
    keys are `known`; empty where they are not.
    """
    keys = set(values) if isinstance(values, dict) else set()
    expected = [kind for kind, (own, _) in KINDS.items() if own <= set(known)]
    others = [kind for kind, (own, _) in KINDS.items() if len(own & keys) > 1]
    if len(expected) != 1 or len(others) != 1 or KINDS[expected[0]][0] & keys:
        return ""
    command = KINDS[others[0]][1]
    if where != WORDS:
        command += f" {where}"
    return f"{where} is {others[0]}, expected {expected[0]}. `{command}` takes it"
