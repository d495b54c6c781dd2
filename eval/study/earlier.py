"""What was made before a study as its YAML is now: by hand, which is taken over where it fits, or by the
study itself under another YAML, which is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import configs
from shards import ShardsError
from train.checkpoints.folders import steps
from train.config import TrainConfig

from ..errors import EvalError, StudyChanged
from ..images.checks import read_manifest
from .axes import loss_at
from .choices import settle
from .graph import generate_id, train_id
from .pictures import all_sets, reported_set
from .reuse import Existing, has_pictures, has_steps, is_saved, recorded_digest
from .study import Study

SETS_DEEP, RUNS_DEEP = 3, 2  # levels of folders below `reuse`
MOST_LINES = 6  # of differences that a message names
log = logging.getLogger(__name__)


def refuse_changed(study: Study) -> None:
    """Raises StudyChanged where the study's own folders hold runs or sets of another study, or runs
    that are beyond a step which is still to be saved.
    """
    study = settle(study)
    existing, lines, passed = Existing(study), [], False
    for entry in study.trainings:
        for seed in study.seeds:
            for phase in range(len(study.parts(entry))):
                run = study.own_run_folder(entry, seed, phase)
                if differ := existing.run_differences(entry, seed, phase, run):
                    lines += [f"{run}:", *(f"  {line}" for line in differ[:MOST_LINES])]
                elif line := _beyond(
                    run, study.train_config(entry, seed, phase), existing.weights_file(entry, phase)
                ):
                    lines += [f"{run}:", f"  {line}"]
                    passed = True
    for pictures in all_sets(study):
        if "lr" in study.axes and not study.is_settled(pictures.entry, ("lr",)):
            continue  # of which training they are is not known yet
        if differ := existing.set_differences(pictures):
            lines += [f"{pictures.folder}:", *(f"  {line}" for line in differ[:MOST_LINES])]
    if lines:
        title = f"{study.path} says something else than what was made in {study.out}:"
        advice = "Go back to the former settings, move these away to make them again, or name another --out"
        if passed and (former := _former_checkpoints(study)):
            before = f"say `checkpoints: {former}`, as the study said when it last ran"
            advice = f"To go on with what exists {before}. {advice}"
        raise StudyChanged("\n  ".join([title, *lines]) + f"\n{advice}")


def _former_checkpoints(study: Study) -> str:
    """Returns the `checkpoints` of a study's last run, as its YAML would say them; nothing where they
    are as they are now, or no run has left a study.yaml.
    """
    try:
        former = configs.read_yaml(study.out / "study.yaml").get("checkpoints")
    except configs.ConfigError:
        return ""
    now = study.config.model_dump(mode="json")["checkpoints"]
    return "" if former in (None, now) else str(former)


def _beyond(run: Path, config: TrainConfig, file: str) -> str:
    """Returns that a run has no checkpoint of a wanted step and has one of a later; else nothing.
    A training goes on from its newest checkpoint, and so cannot save the step any more."""
    folders = steps(run / "checkpoints")
    names = (path.name.removeprefix("step-") for path in folders if is_saved(path, file))
    saved = {int(name) for name in names if name.isdecimal()}
    wanted = {*config.save_at, config.steps} - saved
    absent = sorted(step for step in wanted if step < max(saved, default=0))
    if not absent:
        return ""
    listed = ", ".join(f"{step:,}" for step in absent)
    return (
        f"no checkpoint of step {listed} there, and the training is already at step {max(saved):,}"
    )


def take_over(study: Study) -> Study:
    """Returns the study with the runs and sets made by hand that fit where it has none of its own, and
    with what is chosen for its entries by the scores that exist.
    """
    study = replace(study, hand_runs={}, hand_sets={}, settled={})
    folders = study.reuse
    for folder in study.config.reuse or ():
        if not folder.is_dir():
            log.warning(
                "%s: reuse: found no folder %s: nothing of it is taken over", study.path, folder
            )
    existing = Existing(study)
    by_seed: dict[Any, list[Path]] = {}
    for run in _below(folders, "config.yaml", RUNS_DEEP, study.out):
        with suppress(configs.ConfigError):
            seed = configs.read_yaml(run / "config.yaml").get("seed")
            by_seed.setdefault(seed if isinstance(seed, int) else None, []).append(run)
    for entry in study.trainings if by_seed else ():
        for seed in study.seeds:
            for phase in range(len(study.parts(entry))):
                _take_run(existing, entry, seed, phase, by_seed.get(seed, ()))
    existing = Existing(settle(existing.study))
    study = existing.study
    sets: dict[Any, list[Path]] = {}
    for folder in _below(folders, "manifest.json", SETS_DEEP, study.out):
        with suppress(EvalError, ShardsError, OSError):  # of a checkpoint, too
            manifest = read_manifest(folder / "manifest.json")
            if manifest["complete"] and has_pictures(folder):
                sets.setdefault(manifest["settings"].get("weights"), []).append(folder)
    by_hand = {}
    for entry in study.entries if sets else ():
        for seed in study.seeds:
            for step in study.steps:
                pictures = reported_set(study, entry, seed, step)
                if study.is_settled(entry) and recorded_digest(pictures.folder) is None:
                    for folder in sets.get(existing.weights(pictures) or "", ()):
                        if existing.set_differences(pictures, folder) == []:
                            by_hand[entry, seed, step] = folder
    return replace(study, hand_sets=by_hand)


def _take_run(existing: Existing, entry: str, seed: int, phase: int, runs: Sequence[Path]) -> None:
    """Puts the first run that fits into the study, unless it has one of its own."""
    study = existing.study
    config = study.train_config(entry, seed, phase)
    file = existing.weights_file(entry, phase)
    if has_steps(study.own_run_folder(entry, seed, phase), config, file):
        return
    if not runs or existing.training(entry, seed, phase) is None:
        return
    last = phase == len(study.parts(entry)) - 1
    for run in (run for run in runs if has_steps(run, config, file)):
        with suppress(ValueError):  # of another release
            manifest = existing.newest(run)
            if manifest is None or not (last or manifest["step"] == config.steps):
                continue  # the next phase would start from its newest checkpoint
            if last and "lr" in study.axes and loss_at(run, config.steps) is None:
                continue  # it would be trained here, and what was made not be looked for
            if existing.run_differences(entry, seed, phase, run) == []:
                by_hand = {**study.hand_runs, (entry, seed, phase): run}
                existing.study = replace(study, hand_runs=by_hand)
                return
    for run in runs:
        with suppress(ValueError):
            line = _beyond(run, config, file)
            if line and existing.run_differences(entry, seed, phase, run) == []:
                log.warning(
                    "%s: %s is the training of %s with seed %d, but is not taken over: %s. `checkpoints: 1` scores "
                    "the last step alone, and a list the steps that it names",
                    study.path,
                    run,
                    entry,
                    seed,
                    line,
                )


def _below(folders: Sequence[Path], name: str, deep: int, own: Path) -> Iterator[Path]:
    """Yields the folders at most so deep that hold a file of this name, but those of the study itself."""
    for folder in folders:
        for level in range(1, deep + 1):
            for path in sorted(folder.glob("/".join(["*"] * level + [name]))):
                if own.resolve() not in path.resolve().parents:
                    yield path.parent


def taken_over(study: Study) -> Mapping[str, Path]:
    """Returns the folders made by hand that are used, by the id of the node that need not run."""
    runs = {train_id(study, *key): path for key, path in study.hand_runs.items()}
    sets = {generate_id(*key): path for key, path in study.hand_sets.items()}
    return runs | sets
