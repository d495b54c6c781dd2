"""`python -m eval report DIR ...`: sets of pictures side by side, on one self-contained page and in
a JSON beside it.

The JSON is stable: format "latentbank-report", version 1, with these fields (a Value is value, low,
high, count; its interval is 95 %, null where none is known):

    sections[]      one a benchmark, in the order of its first folder
      benchmark     its name; `kind` is "pictures" or "reconstruction"
      sets[]        name, folder, images (digest), prompts (digest), pictures, settings, provenance, cost, notes, entry
                    (its index), training (by part, null where unknown; see train/checkpoints/identity.py),
                    initial_share (of the initial weights in the average, null where unknown)
      entries[]     sets whose trainings differ in the seed alone: name, sets (indices), seeds (of training, or null)
      scores[]      scorer, better, notes, and by set (in the order of sets; null where it was not scored): values,
                    groups {group: [Value]}, made_by, prompts, pictures, seconds; by entry: over_seeds (the mean, its
                    interval over prompts and training seeds where there are several)
      comparisons[] baseline, other (entries), subject, paired (whether they differ in the subject alone; null: not
                    known in full), sentence (that says so), differ {setting: [baseline's, other's]}, training {differ,
                    follow, unknown}, warnings, seeds (that both have), differences[]: scorer, better, value (other
                    minus baseline), groups, by_seed {training seed: Value}, covers_seeds (whether the interval is over
                    training seeds too), parts (of its variance: count of seeds, seeds, prompts, residual; see
                    eval/scores/seeds.py), p (the error rate at which the interval would end at 0), share (of resamples
                    above 0), resolved, identical (0 in [0, 0]), favours (name of the better entry, null unless
                    resolved, or without a verdict), no_verdict (why there is none), warnings, reason (why there is no
                    value)
      shown[]       ids of the prompts whose pictures are on the page, in its order
    sweeps[]        from `python -m eval sweep`, where it lies beside the sets: the fields of eval/report/sweeps.py
    curves[]        from `python -m eval watch`: scorer, run, points [[step, Value]]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards import FormatVersion, atomic_write
from shards.format.atomic import read_json, refuse_version
from shards.printing import one_line, printable

from ..errors import BadReport
from ..scores import results
from ..scores.results import LEVEL
from .compare import Comparison, compare, entries, mean_over_seeds
from .cost import cost_of
from .entries import RECONSTRUCTION, ScoredSet, open_all
from .gallery import Gallery, gallery
from .page import render, training_curves
from .sweeps import sweeps_of

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-report", 1
PICTURES = 24  # prompts shown of a benchmark


def report(
    folders: Sequence[Path],
    out: Path,
    partial: bool = False,
    runs: Mapping[str, Path] | None = None,
    pictures: int = PICTURES,
    note: str = "",
) -> Json:
    """Writes `out` (HTML) and the JSON beside it; returns what the JSON holds.

    `note` is a line of text on the page, such as the pictures' licence. Raises BadReport,
    MissingImages, OtherImages or BadScores before anything is written.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise BadReport(f"{out}: expected the name of a page, such as report.html")
    refuse_other_files(out.with_suffix(".json"), FORMAT, VERSION)
    for name, run in (runs or {}).items():
        if not (run / "metrics.jsonl").is_file():
            raise BadReport(f"--run {name}={run}: found no metrics.jsonl there, expected a run")
    scored_sets = open_all(folders, partial, runs)
    by_benchmark: dict[tuple[str, str], list[ScoredSet]] = {}
    for scored in scored_sets:
        by_benchmark.setdefault((scored.kind, scored.benchmark), []).append(scored)
    galleries = [pictures_of(sets, pictures) for sets in by_benchmark.values()]
    sections = [
        section_of(sets) | {"shown": [record["id"] for record in shown.pictures]}
        for sets, shown in zip(by_benchmark.values(), galleries, strict=True)
    ]
    data: Json = {
        "format": FORMAT, "version": VERSION, "confidence": LEVEL, "sections": sections,
        "sweeps": [asdict(sweep) for sweep in sweeps_of(scored.folder for scored in scored_sets)],
        "curves": curves_of(scored_sets),
    }  # fmt: skip
    page = render(data, galleries, training_curves(_runs(scored_sets)), note)
    atomic_write(out.with_suffix(".json"), json.dumps(data, indent=1, ensure_ascii=False).encode())
    atomic_write(out, printable(page).encode())
    return data


def refuse_other_files(path: Path, format_name: str, version: int) -> None:
    """Raises BadReport where a JSON would replace a file of another format, FormatVersion where it
    would replace another release's.
    """
    if not path.exists():
        return
    try:
        record = read_json(path)
        if record["format"] == format_name:
            return refuse_version(record, str(path), format_name, version)
    except FormatVersion:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadReport(
        f"{path}: found a file that is no report of ours, expected none: choose another --out"
    )


def section_of(sets: Sequence[ScoredSet]) -> Json:
    """Returns the section of one benchmark; the first set is the baseline of all differences."""
    scorers = sorted({scorer for scored in sets for scorer in scored.scores})
    groups = entries(sets)
    index = {scored.name: i for i, scored in enumerate(sets)}
    members = [[index[s.name] for s in entry.members.values()] for entry in groups]
    entry_of = {i: number for number, indices in enumerate(members) for i in indices}
    return {
        "benchmark": sets[0].benchmark,
        "kind": sets[0].kind,
        "sets": [set_of(scored) | {"entry": entry_of[i]} for i, scored in enumerate(sets)],
        "entries": [
            {"name": entry.name, "sets": indices, "seeds": list(entry.members)}
            for entry, indices in zip(groups, members, strict=True)
        ],
        "scores": [_score(sets, scorer, members) for scorer in scorers],
        "comparisons": [comparison_of(compare(groups[0], entry)) for entry in groups[1:]],
    }


def set_of(scored: ScoredSet) -> Json:
    """Returns a set as the JSON has it, without its entry."""
    images, trained = scored.images, scored.trained
    return {
        "training": trained.training or None if trained else None,
        "initial_share": trained.initial_share if trained else None,
        "name": scored.name,
        "folder": one_line(str(scored.folder)),
        "images": images.digest if images else None,
        "prompts": scored.settings.get("prompts"),
        "pictures": images.count if images else None,
        "settings": scored.settings,
        "provenance": scored.provenance,
        "cost": cost_of(scored),
        "notes": list(scored.notes),
    }


def _score(sets: Sequence[ScoredSet], scorer: str, members: Sequence[Sequence[int]]) -> Json:
    by_set = [scored.scores.get(scorer) for scored in sets]
    scores = [score for score in by_set if score]
    by_entry = [mean_over_seeds([sets[i] for i in indices], scorer) for indices in members]
    return {
        "scorer": scorer,
        "better": scores[0].better,
        "notes": list(dict.fromkeys(note for score in scores for note in score.notes)),
        "values": [asdict(score.value) if score else None for score in by_set],
        "over_seeds": [asdict(value) if value else None for value in by_entry],
        "groups": {
            name: [asdict(s.groups[name]) if s and name in s.groups else None for s in by_set]
            for name in dict.fromkeys(name for score in scores for name in score.groups)
        },
        **{
            key: [getattr(score, key) if score else None for score in by_set]
            for key in ("made_by", "prompts", "pictures", "seconds")
        },
    }


def comparison_of(comparison: Comparison) -> Json:
    """Returns a comparison as the JSON has it."""
    pairing, training = comparison.pairing, comparison.pairing.training
    return {
        "baseline": comparison.a,
        "other": comparison.b,
        "subject": pairing.subject,
        "paired": pairing.paired,
        "sentence": pairing.sentence,
        "differ": _lists(pairing.differ),
        "training": training
        and {
            "differ": _lists(training.beside),
            "follow": _lists(training.follow),
            "unknown": list(training.unknown),
        },
        "warnings": list(pairing.warnings),
        "seeds": list(comparison.seeds),
        "differences": [
            asdict(difference)
            | {
                "resolved": difference.resolved,
                "identical": difference.identical,
                "no_verdict": comparison.no_verdict(difference),
                "favours": comparison.favours(difference),
                "covers_seeds": difference.covers_seeds,
                "by_seed": {str(seed): asdict(v) for seed, v in difference.by_seed.items()},
            }
            for difference in comparison.differences
        ],
    }


def _lists(differ: Mapping[str, tuple[Any, Any]]) -> Json:
    return {key: list(values) for key, values in differ.items()}


def curves_of(sets: Sequence[ScoredSet]) -> list[Json]:
    """Returns the scores over steps that a watcher left in the runs of these sets."""
    curves: dict[tuple[str, str], list[Any]] = {}
    for run in _runs(sets):
        for record in results.read_watched(run / "eval" / "metrics.jsonl"):
            for scorer, value in record["scores"].items():
                curves.setdefault((scorer, one_line(str(run))), []).append([record["step"], value])
    return [
        {"scorer": scorer, "run": run, "points": sorted(points, key=lambda point: point[0])}
        for (scorer, run), points in sorted(curves.items())
    ]


def _runs(sets: Sequence[ScoredSet]) -> list[Path]:
    """Returns the training runs behind some sets, each once, where they are known."""
    return list(dict.fromkeys(scored.run for scored in sets if scored.run))


def pictures_of(sets: Sequence[ScoredSet], most: int, most_bytes: int | None = None) -> Gallery:
    """Returns pictures of the same prompts, of each entry from the first of its sets; of
    reconstructions the worst, beside the original and above what they lost.
    """
    shown = [scored for entry in entries(sets) if (scored := entry.first).images]
    pictures = [(scored.name, scored.images) for scored in shown if scored.images]
    originals = {scored.name: scored.originals for scored in shown if scored.originals}
    if originals:
        pictures.insert(
            0,
            (
                "originals" if "original" in originals else "original",
                next(iter(originals.values())),
            ),
        )
    psnr = {
        scored.name: {item.prompt: item.value for item in scored.items("psnr")}
        for scored in shown
        if scored.kind == RECONSTRUCTION
        and "psnr" in scored.scores
        and (scored.score_folder / results.NAME / "psnr.items.jsonl").is_file()
    }
    return gallery(pictures, most, psnr=psnr, originals=originals, most_bytes=most_bytes)
