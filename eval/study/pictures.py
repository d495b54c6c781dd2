"""The prompts of a study, and its sets of pictures: those that it reports, and those of half A of the prompts by
which the settings of sampling are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..errors import BadPrompts
from ..prompts.benchmarks import find, place
from ..prompts.prompts import Half, Prompts
from .axes import setting_names
from .study import Study

TRIED: Half = "a"  # half of the prompts, on which settings are chosen
REPORTED: Half = "b"  # on which they are reported


@dataclass(frozen=True)
class PictureSet:
    """A set of pictures of a training at a step."""

    entry: str
    seed: int
    step: int
    folder: Path
    setting: Mapping[str, float]  # of sampling, in place of what `generate` says
    half: Half | None = None  # of the prompts


def prompts_of(study: Study) -> Prompts:
    """Returns the prompts of a study; BadPrompts, which names the key, where they are absent or damaged."""
    path, name = study.config.prompts, study.benchmark
    if path is None and not (fetched := place(name)).exists():
        raise BadPrompts(
            f"{study.path}: benchmark: found no file {fetched}, expected the prompts of {name}. `python -m eval "
            f"prompts fetch {name}` brings them"
        )
    try:
        return find(name, path)
    except BadPrompts as error:
        key = "benchmark" if path is None else "prompts"
        raise BadPrompts(f"{study.path}: {key}: {error}") from None


def reported_set(study: Study, entry: str, seed: int, step: int) -> PictureSet:
    """Returns the set that a study reports, of all prompts, at the settings that are chosen."""
    folder = study.set_folder(entry, seed, step)
    return PictureSet(entry, seed, step, folder, study.setting(entry))


def trial_folder(study: Study, entry: str, seed: int, axis: str) -> Path:
    """Returns the folder of the sets of an axis, whose name says what was chosen before."""
    before = study.sampling_axes[: study.sampling_axes.index(axis)]
    names = setting_names(study.setting(entry, before))
    name = f"{study.training_name(entry)}-seed{seed}"
    return study.out / "settle" / name / "-".join(["at", *names, axis])


def trial_sets(study: Study, entry: str, seed: int, axis: str) -> tuple[PictureSet, ...]:
    """Returns a set for each value of an axis of sampling, at what was chosen of the axes before it."""
    before = study.setting(entry, study.sampling_axes[: study.sampling_axes.index(axis)])
    folder = trial_folder(study, entry, seed, axis)
    return tuple(
        PictureSet(
            entry, seed, study.steps[-1], folder / setting_names({axis: value})[0],
            {**before, axis: value}, TRIED,
        )
        for value in study.axes[axis]
    )  # fmt: skip


def all_sets(study: Study) -> Iterator[PictureSet]:
    """Yields the sets of a study, those of trials first."""
    for entry, seed in product(study.entries, study.seeds):
        for axis in study.sampling_axes:
            yield from trial_sets(study, entry, seed, axis)
        for step in study.steps:
            yield reported_set(study, entry, seed, step)
