"""Where a set's pictures go: the folders and names that each official scorer reads.

A layout turns prompts into the files of `<save_dir>/images`. A file shows one picture of a prompt,
or several as tiles of a square grid, row by row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from ..prompts.prompts import Prompt, Prompts

Picture = NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True, slots=True)
class File:
    """One file of a set, and which of a prompt's pictures it shows."""

    path: str  # below images/, with "/" between folders
    prompt: Prompt
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """`files` lists the pictures, in the order of the prompts; `sidecars` what else a scorer reads.

    A layout of .jpeg files is written as the official generator of GenAI-Bench does, with Pillow's
    defaults.
    """

    files: Callable[[Prompts, int], list[File]]
    sidecars: Callable[[Prompts], dict[str, bytes]] = lambda prompts: {}


def flat(suffix: str, prompts: Prompts, count: int) -> list[File]:
    """`<id><suffix>`; with several pictures of a prompt `<id>_<k><suffix>`."""
    names = [""] if count == 1 else [f"_{k}" for k in range(count)]
    return [
        File(f"{prompt.id}{name}{suffix}", prompt, (k,))
        for prompt in prompts.items
        for k, name in enumerate(names)
    ]


def by_group(prompts: Prompts, count: int) -> list[File]:
    """`<group>/<id>.png`, as MJHQ-30K has them; without the folder where a prompt has no group."""
    return [
        File(f"{f.prompt.group}/{f.path}" if f.prompt.group else f.path, f.prompt, f.numbers)
        for f in flat(".png", prompts, count)
    ]


def folders(prompts: Prompts, count: int) -> list[File]:
    """GenEval's `<id>/samples/<k>.png`."""
    return [
        File(f"{p.id}/samples/{k:05d}.png", p, (k,)) for p in prompts.items for k in range(count)
    ]


def records(prompts: Prompts) -> dict[str, bytes]:
    """GenEval's `<id>/metadata.jsonl`: the prompt's record, ASCII as the scorer names no encoding."""
    return {
        f"{p.id}/metadata.jsonl": json.dumps(p.record, sort_keys=True).encode() + b"\n"
        for p in prompts.items
    }


def grids(prompts: Prompts, count: int) -> list[File]:
    """DPG-Bench's `<id>.png`, all pictures of a prompt as tiles."""
    return [File(f"{p.id}.png", p, tuple(range(count))) for p in prompts.items]


LAYOUTS = {
    "flat": Layout(partial(flat, ".png")),
    "jpeg": Layout(partial(flat, ".jpeg")),
    "by-group": Layout(by_group),
    "folders": Layout(folders, records),
    "grids": Layout(grids),
}


def joined(tiles: Sequence[Picture]) -> Picture:
    """Returns pictures (H, W, 3), a square number of them, as one, row by row and without a gap."""
    side = isqrt(len(tiles))
    if side**2 != len(tiles):
        raise ValueError(f"found {len(tiles)} tiles, expected a square number")
    rows = [np.concatenate(tiles[i : i + side], 1) for i in range(0, len(tiles), side)]
    return np.concatenate(rows, 0)


def parted(grid: Picture, count: int) -> list[Picture]:
    """Returns the tiles that `joined` made a grid of."""
    side = isqrt(count)
    height, width = grid.shape[0] // side, grid.shape[1] // side
    return [
        grid[y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y in range(side)
        for x in range(side)
    ]
