"""A folder of a report: its pictures, what made them, their scores, their training run.

Two kinds are read: a set that `python -m eval generate` made, and the folder of a reconstruction,
which holds two sets, `original` and `reconstruction`. Scores lie beside the pictures that they are of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.console import counted
from shards.printing import one_line

from ..errors import BadReport, BadScores, MissingImages
from ..images import checks, runs
from ..images.imageset import ImageSetReader
from ..prompts.prompts import Half
from ..scores import results
from ..scores.results import Item, Score

Json = dict[str, Any]
RECONSTRUCTION = "reconstruction"
LEFT_OUT = " is left out: it is of other pictures than are here now"
PREFIX = "reconstruct-"  # of a reconstruction's benchmark, before the name of the source


@dataclass(frozen=True, kw_only=True)
class ScoredSet:
    """The pictures of a folder and their scores. `name` is unique in its report."""

    name: str
    folder: Path
    benchmark: str
    scores: dict[str, Score]  # by scorer, of these pictures alone
    images: ImageSetReader | None = None  # of a reconstruction: the decoded ones
    originals: ImageSetReader | None = None
    provenance: Json
    run: Path | None = None  # folder of the training run, where it is known
    trained: runs.Run | None = None  # the training, where it was recorded
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        without_pictures = self.images is None and self.benchmark.startswith(PREFIX)
        decoded = self.settings.get("kind") == RECONSTRUCTION
        return RECONSTRUCTION if without_pictures or decoded else "pictures"

    @property
    def settings(self) -> Json:
        return self.images.settings if self.images else {}

    @property
    def seed(self) -> int | None:
        """The training seed; None where it is unknown."""
        return self.trained.seed if self.trained else None

    @property
    def score_folder(self) -> Path:
        """The folder in which `scores` lies: beside the pictures, where there are any."""
        return self.images.folder if self.images else self.folder

    def items(self, scorer: str) -> list[Item]:
        """Returns the items that a score was made of; BadScores where the file is damaged."""
        return items_of(self.score_folder, scorer)


def items_of(folder: Path, scorer: str) -> list[Item]:
    """Returns the items of a score in a folder; BadScores where the file is damaged."""
    path = folder / results.NAME / f"{scorer}.json"
    try:
        return results.read_items(path)
    except (OSError, ValueError) as error:
        raise BadScores(
            f"{path.with_suffix('.items.jsonl')}: not the items of a score ({error}). Score the set again"
        ) from None


def open_all(
    folders: Sequence[Path], partial: bool = False, runs: Mapping[str, Path] | None = None
) -> list[ScoredSet]:
    """Returns all folders of a report, in their order; `runs` are training runs by the folder's name.

    Raises BadReport, MissingImages, OtherImages or BadScores, each naming the folder.
    """
    runs = runs or {}
    names = unique_names(folders)
    if unknown := sorted(runs.keys() - set(names)):
        raise BadReport(
            f"--run {unknown[0]}=...: no folder of that name, expected one of {', '.join(names)}"
        )
    sets = [open_one(folder, partial) for folder in folders]
    return [
        replace(scored, name=name, run=runs.get(name) or scored.run)
        for name, scored in zip(names, sets, strict=True)
    ]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Returns the last part of each folder, with as many parts above it as tell all apart."""
    resolved = [folder.resolve() for folder in folders]
    repeated = [folder for folder, count in Counter(resolved).items() if count > 1]
    if repeated:
        raise BadReport(f"{repeated[0]}: named twice. Name each folder once")
    depth = 1
    while True:
        names = [one_line("/".join(folder.parts[-depth:])) for folder in resolved]
        if len(set(names)) == len(names):
            return names
        depth += 1


def half_of(scored: ScoredSet, half: Half) -> ScoredSet:
    """Returns the pictures of a half of a set's prompts, with the scores of these alone."""
    assert scored.images is not None
    images = scored.images.half_of(half)
    scores, notes = _scores_of(images)
    about = [note for note in scored.notes if LEFT_OUT not in note]
    return replace(scored, images=images, scores=scores, notes=(*about, *notes))


def open_one(folder: Path, partial: bool = False) -> ScoredSet:
    """Returns the set of one folder, under the folder's own name."""
    if (folder / "manifest.json").exists():
        return _open_pictures(folder, folder, partial)
    if (folder / RECONSTRUCTION / "manifest.json").exists():
        scored = _open_pictures(folder, folder / RECONSTRUCTION, partial)
        original = folder / "original"
        pictures = ImageSetReader.open(original, partial) if original.exists() else None
        return replace(scored, originals=pictures)
    scores = results.read_all(folder)
    if not scores:
        content = "found neither manifest.json nor scores" if folder.is_dir() else "no such folder"
        raise MissingImages(
            f"{folder}: {content}, expected a folder that `python -m eval generate` or "
            "`python -m eval reconstruct` made"
        )
    benchmarks = sorted({score.benchmark for score in scores.values()})
    if len(benchmarks) > 1:
        raise BadReport(f"{folder}: found scores of several benchmarks: {', '.join(benchmarks)}")
    return ScoredSet(
        name=folder.name, folder=folder, benchmark=benchmarks[0], scores=scores, provenance={}
    )


def _open_pictures(folder: Path, pictures: Path, partial: bool) -> ScoredSet:
    """Returns the pictures, after a check that all exist, and the scores that are of them."""
    images = ImageSetReader.open(pictures, partial, scored=True)
    provenance = checks.read_manifest(pictures / "manifest.json").get("provenance") or {}
    current, notes = _scores_of(images)
    if images.missing:
        notes.append(f"incomplete: the set lacks {counted(images.missing, 'file')}")
    if images.removed:
        notes.append(
            f"{counted(images.removed, 'file')} of pictures were removed once they were scored, and "
            f"{len(images.files):,} are left"
        )
    trained = runs.read(pictures, images.settings.get("weights"))
    if trained:
        notes += trained.warnings(images.settings.get("guidance_scale", 1))
    return ScoredSet(
        name=folder.name, folder=folder, benchmark=images.prompts.benchmark, scores=current, images=images,
        provenance=provenance, run=_run_of(folder, provenance), trained=trained, notes=tuple(notes),
    )  # fmt: skip


def _scores_of(images: ImageSetReader) -> tuple[dict[str, Score], list[str]]:
    """Returns the scores that are of some pictures, and what is said of the others beside them."""
    scores = results.read_all(images.folder)
    current = {name: score for name, score in scores.items() if score.images == images.digest}
    return current, [
        f"{name}{LEFT_OUT}. Score the set again" for name in sorted(scores.keys() - current.keys())
    ]


def _run_of(folder: Path, provenance: Json) -> Path | None:
    """Returns the run that a set belongs to: the one a watcher put it in, or that of the checkpoint
    its provenance names, if that exists here.
    """
    checkpoint = provenance.get("checkpoint")
    watched = folder.resolve().parent
    candidates = [watched.parent] if watched.name == "eval" else []
    if isinstance(checkpoint, str):
        candidates += [Path(checkpoint), *list(Path(checkpoint).parents)[:2]]
    return next((run for run in candidates if (run / "metrics.jsonl").is_file()), None)
