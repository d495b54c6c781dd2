"""Which prompts there are: of each benchmark, and in a file."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shards import sha256_file

from .benchmarks import BENCHMARKS, PLACE, find, place


def listed(folder: Path = PLACE) -> Iterator[str]:
    """A line for each benchmark: what it asks for, and whether its prompts are in `folder`."""
    for name, benchmark in BENCHMARKS.items():
        if benchmark.sources:
            path = place(name, folder=folder)
            there = (
                f"{path}, sha256 {sha256_file(path)[:12]}"
                if path.is_file()
                else f"not there: prompts fetch {name}"
            )
            asked = f"{benchmark.prompts or '?':>6} prompts x {benchmark.images_per_prompt}"
        else:
            asked, there = (
                f"    any prompts x {benchmark.images_per_prompt}",
                "a file of yours: --prompts FILE",
            )
        yield f"{name:<14} {asked}, layout {benchmark.layout:<8}  {there}"


def shown(name: str, path: Path | None, folder: Path = PLACE) -> Iterator[str]:
    """What a prompt file holds, as a benchmark reads it. Raises BadPrompts."""
    prompts, whole = find(name, path, folder), BENCHMARKS[name].prompts
    count = len(prompts.items)
    yield f"benchmark   {prompts.benchmark}"
    yield f"prompts     {count:,}" + (
        f" of {whole:,}: not the whole benchmark" if whole not in (count, None) else ""
    )
    yield f"digest      {prompts.digest}"
    lengths = sorted(len(prompt.text) for prompt in prompts.items)
    yield f"characters  {lengths[0]} to {lengths[-1]:,}, median {lengths[count // 2]}"
    first = prompts.items[0]
    yield f"first       {first.id}: {first.text[:100]}"
    groups = Counter(prompt.group for prompt in prompts.items)
    for group, members in groups.items():
        if group is not None:
            yield f"  {group:<20} {members:,}"
    if BENCHMARKS[name].layout == "by-group" and None in groups:
        yield "no categories: the pictures will lie in one folder, and there is no score of each category"
