"""A folder of a report: its pictures, what made them, what scorers found, what it cost.

Two kinds are read: a set that `python -m eval generate` made, and the folder of a reconstruction, which holds two such
sets, `original` and `reconstruction`. Scores lie beside the pictures that they are of.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.format.atomic import read_json
from shards.format.records import finite
from shards.printing import one_line

from ..errors import BadReport, BadScores, MissingImages
from ..images import checks, runs
from ..images.imageset import ImageSetReader
from ..scores import results
from ..scores.aggregate import aggregate
from ..scores.results import Item, Score

Json = dict[str, Any]
RECONSTRUCTION = "reconstruction"
PREFIX = "reconstruct-"  # of reconstruct's benchmarks, which are called as the source
METRICS = {
    "psnr": "10 log10(255^2 / MSE)",
    "ssim": "Gaussian window, 11 x 11, sigma 1.5",
}  # of reconstruct's


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a folder holds. `name` is unique on its report."""

    name: str
    folder: Path
    benchmark: str
    scores: dict[str, Score]  # by scorer, of these pictures alone
    images: ImageSetReader | None = None  # of a reconstruction: the decoded ones
    originals: ImageSetReader | None = None
    provenance: Json
    run: Path | None = None  # the folder of the training run, where it is known
    trained: runs.Run | None = None  # the training, where it was recorded
    notes: tuple[str, ...] = ()
    measured: dict[str, list[Item]] = field(
        default_factory=dict
    )  # items that no file of scores holds

    @property
    def kind(self) -> str:
        alone = self.images is None and self.benchmark.startswith(PREFIX)
        return (
            RECONSTRUCTION if alone or self.settings.get("kind") == RECONSTRUCTION else "pictures"
        )

    @property
    def settings(self) -> Json:
        return self.images.settings if self.images else {}

    @property
    def beside(self) -> Path:
        """Where the scores lie: beside the pictures, where those are there."""
        return self.images.folder if self.images else self.folder

    def items(self, scorer: str) -> list[Item]:
        """What a score was made of; BadScores where the file is damaged."""
        if scorer in self.measured:
            return self.measured[scorer]
        path = self.beside / results.NAME / f"{scorer}.json"
        try:
            return results.read_items(path)
        except (OSError, ValueError) as error:
            raise BadScores(
                f"{path.with_suffix('.items.jsonl')}: not the items of a score ({error}). Score the set again"
            ) from None


def open_all(
    folders: Sequence[Path], partial: bool = False, runs: Mapping[str, Path] | None = None
) -> list[Scored]:
    """All folders of a report, in their order; `runs` are training runs by name of the folder.

    Raises BadReport, MissingImages, OtherImages or BadScores, each naming the folder.
    """
    names = unique_names(folders)
    unknown = sorted((runs or {}).keys() - set(names))
    if unknown:
        raise BadReport(
            f"--run {unknown[0]}=...: no folder of that name, expected one of {', '.join(names)}"
        )
    found = [open_one(folder, partial) for folder in folders]
    return [
        replace(scored, name=name, run=(runs or {}).get(name) or scored.run)
        for name, scored in zip(names, found, strict=True)
    ]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """How folders are called: by their last part, and by as many above it as tell all apart."""
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, count in Counter(resolved).items() if count > 1]
    if twice:
        raise BadReport(f"{twice[0]}: named twice. Name each folder once")
    depth = 1
    while True:
        names = [one_line("/".join(folder.parts[-depth:])) for folder in resolved]
        if len(set(names)) == len(names):
            return names
        depth += 1


def open_one(folder: Path, partial: bool = False) -> Scored:
    """One folder, named by itself."""
    if (folder / "manifest.json").exists():
        return _opened(folder, folder, partial)
    if (folder / RECONSTRUCTION / "manifest.json").exists():
        scored = _opened(folder, folder / RECONSTRUCTION, partial)
        scored = _with_metrics(scored)
        original = folder / "original"
        return replace(
            scored, originals=ImageSetReader.open(original, partial) if original.exists() else None
        )
    scores = results.read_all(folder)
    if not scores:
        what = "no such folder" if not folder.is_dir() else "found neither manifest.json nor scores"
        raise MissingImages(
            f"{folder}: {what}, expected a folder that `python -m eval generate` or `python -m eval reconstruct` made"
        )
    benchmarks = sorted({score.benchmark for score in scores.values()})
    if len(benchmarks) > 1:
        raise BadReport(f"{folder}: found scores of several benchmarks: {', '.join(benchmarks)}")
    return Scored(
        name=folder.name, folder=folder, benchmark=benchmarks[0], scores=scores, provenance={}
    )


def _opened(folder: Path, pictures: Path, partial: bool) -> Scored:
    """Pictures that are all there, and those scores that are of them."""
    images = ImageSetReader.open(pictures, partial)
    provenance = checks.read_manifest(pictures / "manifest.json").get("provenance") or {}
    found, notes = results.read_all(pictures), list[str]()
    of_these = {name: score for name, score in found.items() if score.images == images.digest}
    for name in sorted(found.keys() - of_these.keys()):
        notes.append(
            f"{name} is left out: it is of other pictures than stand here now. Score the set again"
        )
    if images.missing:
        notes.append(f"incomplete: {images.missing} files of the set are missing")
    trained = runs.read(pictures, images.settings.get("weights"))
    if trained:
        notes += trained.warnings(images.settings.get("guidance_scale", 1))
    return Scored(
        name=folder.name, folder=folder, benchmark=images.prompts.benchmark, scores=of_these, images=images,
        provenance=provenance, run=_run_of(folder, provenance), trained=trained, notes=tuple(notes),
    )  # fmt: skip


def _with_metrics(scored: Scored) -> Scored:
    """PSNR and SSIM of each picture, which `python -m eval reconstruct` writes into metrics.json, as scores."""
    path = scored.folder / "metrics.json"
    if not path.is_file() or scored.images is None:
        return scored
    images, measured = scored.images, dict[str, list[Item]]()
    known = {score.stem for score in (scored.beside / results.NAME).glob("*.json")}
    try:
        for picture in read_json(path)["pictures"]:
            for name in METRICS.keys() & picture.keys() - known:
                finite(picture[name])
                item = Item(f"{picture['row']:08d}", 0, float(picture[name]))
                measured.setdefault(name, []).append(item)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadScores(
            f"{path}: not what `python -m eval reconstruct` writes ({error!r}). Run it again"
        ) from None
    made = {
        name: Score(
            scorer=name, benchmark=scored.benchmark, value=aggregate(items)[0], better="higher", prompts=len(items),
            pictures=len(items), images=images.digest, prompt_list=images.prompts.digest, made_by={"by": METRICS[name]},
        )
        for name, items in sorted(measured.items())
    }  # fmt: skip
    return replace(scored, scores=scored.scores | made, measured=measured)


def _run_of(folder: Path, provenance: Json) -> Path | None:
    """The run that a set is of: in which a watcher left it, or whose checkpoint it names, if that is where it was."""
    named = provenance.get("checkpoint")
    places = [folder.resolve().parent.parent] if folder.resolve().parent.name == "eval" else []
    if isinstance(named, str):
        places += [Path(named), *list(Path(named).parents)[:2]]
    return next((place for place in places if (place / "metrics.jsonl").is_file()), None)
