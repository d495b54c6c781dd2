"""`python -m eval report DIR ...`: sets of pictures side by side, on one self-contained page and in a JSON beside it.

The JSON is stable: format "latentbank-report", version 1, with these fields (a Value is value, low, high, count; its
interval is 95 %, null where none is known):

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
                    training seeds too), share (of resamples above 0), resolved, favours (name of the better entry, null
                    unless resolved, or where training seeds are others), warnings, reason (why there is no value)
      shown[]       ids of the prompts whose pictures are on the page
    curves[]        from `python -m eval watch`: scorer, run, points [[step, Value]]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shards import FormatVersion, atomic_write, charts
from shards.format.atomic import read_json, refuse_version
from shards.printing import one_line, printable
from train.checkpoints.identity import leaves

from ..errors import BadReport
from ..scores import results
from ..scores.intervals import LEVEL
from ..scores.seeds import over_seeds
from .compare import Comparison, brief, compare, entries
from .cost import cost_of
from .entries import Scored, open_all
from .gallery import gallery
from .pages import environment

Json = dict[str, Any]
FORMAT, VERSION = "latentbank-report", 1
LONGEST = 100  # characters of a setting on the page
HARD = "\u00a0"  # a space at which no line ends
PICTURES = 24  # prompts shown of a benchmark


def report(
    folders: Sequence[Path],
    out: Path,
    partial: bool = False,
    runs: Mapping[str, Path] | None = None,
    pictures: int = PICTURES,
) -> Json:
    """Write `out` (HTML) and the JSON beside it; returns what the JSON holds.

    Raises BadReport, MissingImages, OtherImages or BadScores before anything is written.
    """
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise BadReport(f"{out}: expected the name of a page, such as report.html")
    _refuse_others(out.with_suffix(".json"))
    for name, run in (runs or {}).items():
        if not (run / "metrics.jsonl").is_file():
            raise BadReport(f"--run {name}={run}: found no metrics.jsonl there, expected a run")
    found = open_all(folders, partial, runs)
    by_benchmark: dict[tuple[str, str], list[Scored]] = {}
    for scored in found:
        by_benchmark.setdefault((scored.kind, scored.benchmark), []).append(scored)
    sections, shown = list[Json](), list[list[Json]]()
    for sets in by_benchmark.values():
        shown.append(_gallery(sets, pictures))
        sections.append(section_of(sets) | {"shown": [record["id"] for record in shown[-1]]})
    data: Json = {
        "format": FORMAT, "version": VERSION, "confidence": LEVEL, "sections": sections, "curves": curves_of(found),
    }  # fmt: skip
    page = render(data, shown)
    atomic_write(out.with_suffix(".json"), json.dumps(data, indent=1, ensure_ascii=False).encode())
    atomic_write(out, printable(page).encode())
    return data


def _refuse_others(path: Path) -> None:
    """BadReport where the JSON would take the place of a file that is no report, FormatVersion where of another
    release's."""
    if not path.exists():
        return
    try:
        found = read_json(path)
        if found["format"] == FORMAT:
            return refuse_version(found, str(path), FORMAT, VERSION)
    except FormatVersion:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadReport(
        f"{path}: found a file that is no report of ours, expected none: choose another --out"
    )


# What it holds -------------------------------------------------------------------------------------------------------


def section_of(sets: Sequence[Scored]) -> Json:
    """Sets of one benchmark; the first is the baseline of all differences."""
    scorers = sorted({scorer for scored in sets for scorer in scored.scores})
    groups = entries(sets)
    place = {scored.name: i for i, scored in enumerate(sets)}
    of_entry = {s.name: i for i, entry in enumerate(groups) for s in entry.members.values()}
    members = [[place[s.name] for s in entry.members.values()] for entry in groups]
    return {
        "benchmark": sets[0].benchmark,
        "kind": sets[0].kind,
        "sets": [_set(scored) | {"entry": of_entry[scored.name]} for scored in sets],
        "entries": [
            {"name": entry.name, "sets": own, "seeds": list(entry.members)}
            for entry, own in zip(groups, members, strict=True)
        ],
        "scores": [_score(sets, scorer, members) for scorer in scorers],
        "comparisons": [_comparison(compare(groups[0], other)) for other in groups[1:]],
    }


def _set(scored: Scored) -> Json:
    images, trained = scored.images, scored.trained
    return {
        "training": trained.training or None if trained else None,
        "initial_share": trained.initial_share if trained else None,
        "name": scored.name,
        "folder": one_line(str(scored.folder)),
        "images": images.digest if images else None,
        "prompts": scored.settings.get("prompts"),
        "pictures": sum(len(file.numbers) for file in images.files) if images else None,
        "settings": scored.settings,
        "provenance": scored.provenance,
        "cost": cost_of(scored),
        "notes": list(scored.notes),
    }


def _score(sets: Sequence[Scored], scorer: str, entries: Sequence[Sequence[int]]) -> Json:
    found = [scored.scores.get(scorer) for scored in sets]
    known = [score for score in found if score]
    groups = list(dict.fromkeys(name for score in known for name in score.groups))
    by_entry = [[score.value for i in sets_of if (score := found[i])] for sets_of in entries]
    return {
        "scorer": scorer,
        "better": known[0].better,
        "notes": list(dict.fromkeys(note for score in known for note in score.notes)),
        "values": [asdict(score.value) if score else None for score in found],
        "over_seeds": [asdict(over_seeds(values)) if values else None for values in by_entry],
        "groups": {
            name: [asdict(s.groups[name]) if s and name in s.groups else None for s in found]
            for name in groups
        },
        **{
            key: [getattr(score, key) if score else None for score in found]
            for key in ("made_by", "prompts", "pictures", "seconds")
        },
    }


def _comparison(comparison: Comparison) -> Json:
    pairing, training = comparison.pairing, comparison.pairing.training
    return {
        "baseline": comparison.a,
        "other": comparison.b,
        "subject": comparison.subject,
        "paired": pairing.paired,
        "sentence": pairing.sentence,
        "differ": _lists(pairing.differ),
        "training": training
        and {
            "differ": _lists(training.beside),
            "follow": _lists(training.follow),
            "unknown": list(training.unknown),
        },
        "warnings": list(comparison.warnings),
        "seeds": list(comparison.seeds),
        "differences": [
            asdict(d)
            | {
                "resolved": d.resolved,
                "favours": comparison.favours(d),
                "covers_seeds": d.covers_seeds,
                "by_seed": {str(seed): asdict(value) for seed, value in d.by_seed.items()},
            }
            for d in comparison.differences
        ],
    }


def _lists(differ: Mapping[str, tuple[Any, Any]]) -> Json:
    return {key: list(values) for key, values in differ.items()}


def curves_of(found: Sequence[Scored]) -> list[Json]:
    """Scores over steps that a watcher left in the runs of these sets."""
    runs = dict.fromkeys(scored.run for scored in found if scored.run)
    curves: dict[tuple[str, str], list[Any]] = {}
    for run in runs:
        for record in results.read_watched(run / "eval" / "metrics.jsonl"):
            for scorer, value in record["scores"].items():
                curves.setdefault((scorer, one_line(str(run))), []).append([record["step"], value])
    return [
        {"scorer": scorer, "run": run, "points": sorted(points, key=lambda point: point[0])}
        for (scorer, run), points in sorted(curves.items())
    ]


# How it looks --------------------------------------------------------------------------------------------------------


def _gallery(sets: Sequence[Scored], most: int) -> list[Json]:
    """The same prompts of each entry, from the first of its sets."""
    first_sets = [entry.first for entry in entries(sets)]
    shown = [(scored.name, scored.images) for scored in first_sets if scored.images]
    original = next((scored.originals for scored in sets if scored.originals), None)
    first = [("original", original)] if original else []
    return gallery([*first, *shown], most)


def render(data: Json, shown: Sequence[Sequence[Json]]) -> str:
    """The page, of what the JSON holds and of pictures, a list a section."""
    made = environment()
    made.filters |= {
        "figure": charts.figure, "value": _value, "change": _change, "seconds": _seconds, "short": _short,
    }  # fmt: skip
    page: str = made.get_template("report/report.html.j2").render(
        r=data, galleries=shown, plot=_plot, groups_plot=_groups_plot, difference_plot=_difference_plot,
        trainings=_trainings,
        title=" and ".join(section["benchmark"] for section in data["sections"]),
        charts=_curves(data["curves"]), style=Markup(charts.style()),
    )  # fmt: skip
    return page


def _curves(curves: Sequence[Json]) -> list[Markup]:
    """Returns a chart a scorer, with a line a run."""
    lines: dict[str, list[charts.Curve]] = {}
    for curve in curves:
        points = [(step, value["value"]) for step, value in curve["points"]]
        lines.setdefault(curve["scorer"], []).append((Path(curve["run"]).name, points))
    return [Markup(charts.curves(title, of_runs)) for title, of_runs in lines.items()]


def _plot(section: Json, score: Json) -> Markup:
    """A line an entry; each training seed is a ring, where there are several."""
    entries, values = section["entries"], score["over_seeds"]
    lines = [(e["name"], v and _estimate(v)) for e, v in zip(entries, values, strict=True)]
    seeds = [[v["value"] for i in entry["sets"] if (v := score["values"][i])] for entry in entries]
    points = [numbers if len(numbers) > 1 else [] for numbers in seeds]
    return Markup(charts.intervals(f"{score['scorer']} with intervals", lines, points))


def _trainings(section: Json) -> list[Json]:
    """The parts of the trainings: key, values by set, whether they differ, and what a difference is."""
    trainings = [leaves(s["training"] or {}) for s in section["sets"]]
    shares = [s["initial_share"] for s in section["sets"]]
    rows = [
        {
            "key": "initial weights in the average",
            "badge": "",
            "differs": any(share is not None for share in shares),
            "values": ["unknown" if share is None else f"{share:.1%}" for share in shares],
        }
    ]
    compared = [c["training"] for c in section["comparisons"] if c["training"]]
    follow, beside = ({key for c in compared for key in c[kind]} for kind in ("follow", "differ"))
    for key in sorted({key for training in trainings for key in training}):
        known = [training[key] for training in trainings if key in training]
        differs = any(value != known[0] for value in known)
        badge = "differs" if key in beside else "follows the VAE" if key in follow else ""
        values = [
            _short(training[key]) if key in training else "–" if training else "unknown"
            for training in trainings
        ]
        rows.append(
            {"key": key, "badge": badge if differs else "", "differs": differs, "values": values}
        )
    return rows


def _groups_plot(
    title: str, groups: Mapping[str, Sequence[Json | None]], sets: Sequence[Json]
) -> Markup:
    count = len(next(iter(groups.values())))
    of_sets = [
        {name: _estimate(v) for name, values in groups.items() if (v := values[i])}
        for i in range(count)
    ]
    return Markup(charts.groups(title, list(groups), of_sets, [s["entry"] for s in sets]))


def _difference_plot(title: str, value: Json) -> Markup:
    return Markup(charts.difference(title, _estimate(value)))


def _estimate(value: Json) -> charts.Estimate:
    return value["value"], value["low"], value["high"]


def _value(value: Json | None) -> str:
    """ "0.512 [0.488, 0.536]", or without an interval "0.512"."""
    if value is None:
        return "–"
    if value["low"] is None:
        return charts.figure(value["value"])
    low, high = charts.figure(value["low"]), charts.figure(value["high"])
    return f"{charts.figure(value['value'])} [{low},{HARD}{high}]"


def _change(value: Json) -> str:
    if value["low"] is None:
        return f"{value['value']:+,.3g}"
    return f"{value['value']:+,.3g} [{value['low']:+,.3g},{HARD}{value['high']:+,.3g}]"


def _seconds(seconds: float) -> str:
    """For people: "3.2 s", "12 min", "5.1 h"."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def _short(value: Any) -> str:
    """A setting, as `brief` says it, with an end."""
    text = brief(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
