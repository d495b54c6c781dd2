"""Processes that make one set together, as torchrun, accelerate or a scheduler's array starts them.

They do not communicate: each takes every size-th batch, and whoever sees the last file records the
set. So they may start at different times, and none waits for another that died.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shards.launch import launched

from ..errors import BadRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `size` processes, the `local`-th of its machine."""

    number: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """Returns the rank that a launcher gave this process, one of 1 without; see `launched`."""
        return cls(*launched(environment))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's part of whole batches."""
        return items[self.number :: self.size]

    def device(self, name: str) -> str:
        """Returns the device; `cuda` becomes the `local`-th GPU. BadRequest if there is none."""
        import torch

        check_device(name)
        if name != "cuda" or self.size == 1:
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"


def chosen_device(name: str) -> str:
    """Returns the device that a flag names: `auto` is a GPU if there is one. BadRequest if there is none
    of that name.
    """
    import torch  # takes seconds, which --help need not

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def check_device(name: str) -> None:
    """BadRequest where there is no such device, which torch would say only once it is used."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequest(f"--device: found {name!r}, expected cpu, cuda or cuda:NUMBER") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BadRequest(
            f"--device {name}: found {count} GPUs, expected at least {(device.index or 0) + 1}. Name one that is "
            "there, or cpu"
        )
