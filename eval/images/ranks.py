"""Processes that make one set of pictures together, as torchrun, accelerate or a scheduler's array starts them.

They say nothing to each other: each takes every size-th batch, and whoever sees the last file records the set. So they
may start at different times, and one that dies keeps none of the others waiting.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import BadRanks, BadRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `size` processes, the `local`-th of its machine."""

    number: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """From RANK, WORLD_SIZE and LOCAL_RANK; alone without the first two. BadRanks if they make no sense."""
        if not {"RANK", "WORLD_SIZE"} <= environment.keys():
            return cls()
        given = {name: environment.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        numbers = [int(text) if text.isdecimal() else -1 for text in given.values()]
        if min(numbers) < 0 or numbers[0] >= numbers[1]:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise BadRanks(
                f"found {said} in the environment, expected whole numbers and RANK from 0 to WORLD_SIZE - 1. Start "
                "with torchrun, or set them for each process"
            )
        return cls(*numbers)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Of whole batches, this rank's."""
        return items[self.number :: self.size]

    def device(self, asked: str) -> str:
        """`cuda` becomes this process's own GPU: the `local`-th of those that it sees. BadRequest if it sees none."""
        import torch

        check_device(asked)
        if asked != "cuda" or self.size == 1:
            return asked
        return f"cuda:{self.local % torch.cuda.device_count()}"


def check_device(asked: str) -> None:
    """BadRequest where there is no such device, as torch would say only once it is used."""
    import torch

    try:
        device = torch.device(asked)
    except RuntimeError:
        raise BadRequest(f"--device: found {asked!r}, expected cpu, cuda or cuda:NUMBER") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BadRequest(
            f"--device {asked}: found {count} GPUs, expected at least {(device.index or 0) + 1}. Name one that is "
            "there, or cpu"
        )
