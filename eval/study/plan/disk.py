"""Whether the disks have the room that a study needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shards.console import size_text
from shards.places import is_url

from ...errors import NoSpace
from .cost import NodeCost


@dataclass(frozen=True)
class Room:
    """What a study needs in a place, and what is free there, in bytes."""

    place: str
    needed: float
    free: int | None  # None: an object store, which does not say

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.free >= self.needed

    def verdict(self) -> str:
        needed = f"{self.place}: {size_text(self.needed)} needed"
        if self.free is None:
            return f"{needed}, free space unknown (an object store does not say)"
        verdict = "it fits" if self.fits else "it does NOT fit, `study run` will refuse"
        return f"{needed}, {size_text(self.free)} free: {verdict}"


def rooms(costs: Iterable[NodeCost]) -> list[Room]:
    """Returns what nodes need, by place; places on one disk are one."""
    sizes: dict[str, float] = {}
    for cost in costs:
        sizes[cost.place] = sizes.get(cost.place, 0.0) + cost.bytes
    disks: dict[object, list[str]] = {}
    for place in (place for place, size in sizes.items() if size):
        disks.setdefault(place if is_url(place) else _existing(place).stat().st_dev, []).append(
            place
        )
    return [
        Room(" and ".join(places), sum(sizes[place] for place in places), _free(places[0]))
        for places in disks.values()
    ]


def _free(place: str) -> int | None:
    return None if is_url(place) else shutil.disk_usage(_existing(place)).free


def _existing(place: str) -> Path:
    """Returns the folder, or the nearest above it that exists."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def refuse_if_full(costs: Iterable[NodeCost]) -> None:
    """Raises NoSpace where a disk has less room than what is to be made needs."""
    for room in rooms(costs):
        if room.fits is False and room.free is not None:
            raise NoSpace(
                f"{room.place}: {size_text(room.free)} are free, expected {size_text(room.needed)} for what is "
                "still to be made (`python -m eval study plan` lists it). Make room, name another --out, or "
                "choose fewer checkpoints or seeds"
            )
