"""Which prompts there are: of each benchmark, and in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shards import sha256_file

from .benchmarks import BENCHMARKS, PLACE, find, place


def listed(folder: Path = PLACE) -> Iterator[str]:
    """Yields a line a benchmark: what it asks for, and whether its prompts are in `folder`."""
    for name, benchmark in BENCHMARKS.items():
        count, state = "any", "a file of yours: --prompts FILE"
        if benchmark.sources:
            path = place(name, folder=folder)
            count, state = str(benchmark.prompts or "?"), f"not there: prompts fetch {name}"
            if path.is_file():
                state = f"{path}, sha256 {sha256_file(path)[:12]}"
        prompts = f"{count:>6} prompts x {benchmark.images_per_prompt}"
        yield f"{name:<14} {prompts}, layout {benchmark.layout:<8}  {state}"


def shown(name: str, path: Path | None, folder: Path = PLACE) -> Iterator[str]:
    """Yields what a prompt file holds, as a benchmark reads it. Raises BadPrompts."""
    prompts, total = find(name, path, folder), BENCHMARKS[name].prompts
    count = len(prompts.items)
    part = f" of {total:,}: not the whole benchmark" if total not in (count, None) else ""
    lengths = sorted(len(prompt.text) for prompt in prompts.items)
    first = prompts.items[0]
    yield f"benchmark   {prompts.benchmark}"
    yield f"prompts     {count:,}{part}"
    yield f"digest      {prompts.digest}"
    yield f"characters  {lengths[0]} to {lengths[-1]:,}, median {lengths[count // 2]}"
    yield f"first       {first.id}: {first.text[:100]}"
    groups = Counter(prompt.group for prompt in prompts.items)
    for group, members in groups.items():
        if group is not None:
            yield f"  {group:<20} {members:,}"
    if BENCHMARKS[name].layout == "by-group" and None in groups:
        yield "no categories: the pictures will lie in one folder, and there is no score of each category"
