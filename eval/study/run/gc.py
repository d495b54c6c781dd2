"""`python -m eval study gc STUDY.yaml`: what a finished study holds and nothing needs any more.

    images/ENTRY-seed0/step-00001000/removed.json    written before a picture goes: the set's digest, files that stay

Pictures go whose scores are kept with all that an interval takes: the items, or of a distance its
influences. Those of the prompts that the study's page shows are left, in all sets. Scores, features,
weights and sets that were made by hand are never touched. A scorer that the YAML names later has the
pictures made again, by the same weights and noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards import ShardsError, atomic_write
from shards.console import counted, size_text
from shards.format.atomic import read_json

from ...distances import influences
from ...errors import BadScores, BadStudy, EvalError
from ...images.checks import REMOVED, read_manifest, removed_record
from ...images.imageset import ImageSetReader
from ...scores import results
from ..earlier import refuse_changed, take_over
from ..graph import Node, nodes_of
from ..reuse import Existing, recorded_digest
from ..status import states
from ..study import Study
from .edited import refuse_edited
from .workers import alone


@dataclass(frozen=True)
class Removal:
    """Pictures of a set that may go, by their paths below its images/, and those that are left."""

    folder: Path
    files: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int


def removals(study: Study) -> tuple[list[Removal], list[str]]:
    """Returns what may go of a study, and which sets are left alone with the reason.

    Raises BadStudy where something of the study is still to be made, or its page was not made yet,
    StudyChanged where its folder is of another YAML, and OutputEdited where a file was edited.
    """
    refuse_edited(study)
    refuse_changed(study)
    study = take_over(study)
    left = [name for name, done in states(study).items() if not done]
    if left:
        raise BadStudy(
            f"{study.out}: {counted(len(left), 'command')} of {study.path} are still to be run ({left[0]} first), and "
            "may need the pictures. Run `python -m eval study run` to its end, then remove them"
        )
    shown, nodes, existing = shown_prompts(study), nodes_of(study), Existing(study)
    found, remaining = list[Removal](), list[str]()
    for node in nodes:
        if node.kind == "generate":
            scores = [score for score in nodes if node.id in score.needs and score.kind == "score"]
            of_page = frozenset[str]() if node.axis else shown  # a page shows no trials
            for i, folder in enumerate(node.outputs):
                if reason := _needed(study, existing, folder, i, scores):
                    remaining.append(f"{folder}: {reason}")
                elif (removal := _removal(folder, of_page)).files:
                    found.append(removal)
    return found, remaining


def shown_prompts(study: Study) -> frozenset[str]:
    """Returns the ids of the prompts that the study's page shows; BadStudy before there is one."""
    path = study.out / "study.json"
    try:
        shown = read_json(path)["shown"]
        if isinstance(shown, list) and all(isinstance(prompt, str) for prompt in shown):
            return frozenset(shown)
        problem = "names no prompts that are shown"
    except FileNotFoundError:
        problem = "no such file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"not the numbers of a study ({error})"
    raise BadStudy(
        f"{path}: {problem}. Run `python -m eval study report` first: the pictures that its page shows are left"
    )


def _needed(
    study: Study, existing: Existing, folder: Path, number: int, scores: Sequence[Node]
) -> str:
    """Returns why the pictures of a set, of this number in what scores it, must stay; nothing where they
    may go.
    """
    if study.out.resolve() not in folder.resolve().parents:
        return "it is not in the study's folder"
    try:
        ImageSetReader.open(folder, scored=True)  # what is there is what was scored
        for score in scores:
            for name in existing.score_names(score):
                scored = score.outputs[number]
                if not results.read_items(scored / f"{name}.json"):
                    digest = recorded_digest(folder, score.half)
                    assert digest is not None  # as the node is done
                    influences.read(scored.parent, name, digest)
    except BadScores as error:
        return f"a score has neither items nor influences: {error}"
    except (EvalError, ShardsError, OSError, ValueError) as error:
        return str(error)
    return "" if scores else "no scorer has judged it"


def _removal(folder: Path, shown: frozenset[str]) -> Removal:
    images = ImageSetReader.open(folder, scored=True)
    files = [file for file in images.files if file.prompt.id not in shown]
    kept = tuple(file.path for file in images.files if file.prompt.id in shown)
    size = sum((images.images / file.path).stat().st_size for file in files)
    return Removal(folder, tuple(file.path for file in files), kept, size)


def remove(removal: Removal) -> None:
    """Removes the pictures of a set. What is left of a call that was killed goes with the next one."""
    manifest = read_manifest(removal.folder / "manifest.json")
    atomic_write(removal.folder / REMOVED, removed_record(manifest, removal.kept))
    for name in removal.files:
        (removal.folder / "images" / name).unlink(missing_ok=True)


def resume_states(study: Study) -> tuple[int, int]:
    """Returns how many checkpoints of a study's trainings hold the ranks' states, which only going on
    with the training takes, and the bytes of these.
    """
    folders = {
        study.own_run_folder(entry, seed, phase) / "checkpoints"
        for entry in study.trainings
        for seed in study.seeds
        for phase in range(len(study.parts(entry)))
    }
    files = [path for folder in folders for path in folder.glob("step-*/state-*.safetensors")]
    return len({path.parent for path in files}), sum(path.stat().st_size for path in files)


def run_gc(args: argparse.Namespace) -> int:
    """Runs `python -m eval study gc`: lists what may go and, with --yes, removes it."""
    study = Study.open(args.study, args.out)
    if args.yes:
        with alone(study):
            found, remaining = removals(study)
            for removal in found:
                remove(removal)
    else:
        found, remaining = removals(study)
    for line in remaining:
        print(f"left alone: {line}")
    verb = "deleted" if args.yes else "would delete"
    for removal in found:
        total = len(removal.files) + len(removal.kept)
        print(
            f"{verb}: {removal.folder}: {len(removal.files):,} of {counted(total, 'file')} "
            f"({size_text(removal.bytes)}; all scores are kept)"
        )
    count, size = resume_states(study)
    if count:
        print(
            f"left alone: the states of {counted(count, 'checkpoint')} ({size_text(size)}), which only a longer "
            "training needs"
        )
    total_size = size_text(sum(removal.bytes for removal in found))
    state = "deleted" if args.yes else "to be deleted" + "; do it with --yes" * bool(found)
    print(f"{study.out}: pictures of {counted(len(found), 'set')}, {total_size} {state}")
    return 0
