"""`python -m eval report DIR ...`: sets of pictures side by side, on one self-contained page and in a JSON beside it.

The JSON is stable: format "latentbank-report", version 1, with these fields (a Value is value, low, high, count; its
interval is 95 %, null where none is known):

    sections[]      one a benchmark, in the order of its first folder
      benchmark     its name; `kind` is "pictures" or "reconstruction"
      sets[]        name, folder, images (digest), prompts (digest), pictures, settings, provenance, cost, notes
      scores[]      scorer, better, notes, and by set (in the order of sets; null where it was not scored): values,
                    groups {group: [Value]}, made_by, prompts, pictures, seconds
      comparisons[] baseline, other, subject, differ {setting: [baseline's, other's]}, warnings, differences[]: scorer,
                    better, value (other minus baseline), groups, share (of resamples above 0), resolved, favours (name
                    of the better set, null unless resolved), warnings, reason (why there is no value)
      shown[]       ids of the prompts whose pictures are on the page
    curves[]        from `python -m eval watch`: scorer, run, points [[step, Value]]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shards import FormatVersion, atomic_write
from shards.storage import read_json, refuse_version
from train.page import chart

from . import plots, results
from .compare import Comparison, Difference, compare
from .cost import cost_of
from .errors import BadReport
from .gallery import gallery
from .intervals import LEVEL
from .pages import environment
from .results import Value
from .scored import Scored, open_all

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
    atomic_write(out, page.encode())
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
    return {
        "benchmark": sets[0].benchmark,
        "kind": sets[0].kind,
        "sets": [_set(scored) for scored in sets],
        "scores": [_score(sets, scorer) for scorer in scorers],
        "comparisons": [_comparison(compare(sets[0], other)) for other in sets[1:]],
    }


def _set(scored: Scored) -> Json:
    images = scored.images
    return {
        "name": scored.name,
        "folder": str(scored.folder),
        "images": images.digest if images else None,
        "prompts": scored.settings.get("prompts"),
        "pictures": sum(len(file.numbers) for file in images.files) if images else None,
        "settings": scored.settings,
        "provenance": scored.provenance,
        "cost": cost_of(scored),
        "notes": list(scored.notes),
    }


def _score(sets: Sequence[Scored], scorer: str) -> Json:
    found = [scored.scores.get(scorer) for scored in sets]
    known = [score for score in found if score]
    groups = list(dict.fromkeys(name for score in known for name in score.groups))
    return {
        "scorer": scorer,
        "better": known[0].better,
        "notes": list(dict.fromkeys(note for score in known for note in score.notes)),
        "values": [asdict(score.value) if score else None for score in found],
        "groups": {
            name: [asdict(s.groups[name]) if s and name in s.groups else None for s in found]
            for name in groups
        },
        **{
            key: [getattr(score, key) if score else None for score in found]
            for key in ("made_by", "prompts", "pictures", "seconds")
        },
    }


def _comparison(found: Comparison) -> Json:
    return {
        "baseline": found.a,
        "other": found.b,
        "subject": found.subject,
        "differ": {key: list(values) for key, values in found.differ.items()},
        "warnings": list(found.warnings),
        "differences": [
            asdict(d) | {"resolved": d.resolved, "favours": favours(d, found.a, found.b)}
            for d in found.differences
        ],
    }


def favours(found: Difference, a: str, b: str) -> str | None:
    """The better set of a difference, None unless its interval shows one."""
    if found.value is None or not found.resolved:
        return None
    return b if (found.value.value > 0) == (found.better == "higher") else a


def curves_of(found: Sequence[Scored]) -> list[Json]:
    """Scores over steps that a watcher left in the runs of these sets."""
    runs = dict.fromkeys(scored.run for scored in found if scored.run)
    curves: dict[tuple[str, str], list[Any]] = {}
    for run in runs:
        for record in results.read_watched(run / "eval" / "metrics.jsonl"):
            for scorer, value in record["scores"].items():
                curves.setdefault((scorer, str(run)), []).append([record["step"], value])
    return [
        {"scorer": scorer, "run": run, "points": sorted(points, key=lambda point: point[0])}
        for (scorer, run), points in sorted(curves.items())
    ]


# How it looks --------------------------------------------------------------------------------------------------------


def _gallery(sets: Sequence[Scored], most: int) -> list[Json]:
    shown = [(scored.name, scored.images) for scored in sets if scored.images]
    original = next((scored.originals for scored in sets if scored.originals), None)
    first = [("original", original)] if original else []
    return gallery([*first, *shown], most)


def render(data: Json, shown: Sequence[Sequence[Json]]) -> str:
    """The page, of what the JSON holds and of pictures, a list a section."""
    made = environment()
    made.filters |= {
        "figure": plots.figure, "value": _value, "change": _change, "seconds": _seconds, "short": _short,
    }  # fmt: skip
    page: str = made.get_template("report.html.j2").render(
        r=data, galleries=shown, plot=_plot, groups_plot=_groups_plot, difference_plot=_difference_plot,
        title=" and ".join(section["benchmark"] for section in data["sections"]),
        charts=[Markup(chart(*lines)) for lines in _charts(data["curves"])],
    )  # fmt: skip
    return page


def _charts(
    curves: Sequence[Json],
) -> list[tuple[str, list[tuple[str, list[tuple[float, float]]]]]]:
    """Of each scorer the lines of all runs."""
    titles = dict.fromkeys(curve["scorer"] for curve in curves)
    return [
        (
            title,
            [
                (Path(curve["run"]).name, [(step, v["value"]) for step, v in curve["points"]])
                for curve in curves
                if curve["scorer"] == title
            ],
        )
        for title in titles
    ]


def _plot(title: str, sets: Sequence[Json], values: Sequence[Json | None]) -> Markup:
    lines = [(s["name"], Value(**v) if v else None) for s, v in zip(sets, values, strict=True)]
    return Markup(plots.intervals(title, lines))


def _groups_plot(title: str, groups: Mapping[str, Sequence[Json | None]]) -> Markup:
    count = len(next(iter(groups.values())))
    sets = [
        {name: Value(**found) for name, values in groups.items() if (found := values[i])}
        for i in range(count)
    ]
    return Markup(plots.groups(title, list(groups), sets))


def _difference_plot(title: str, value: Json) -> Markup:
    return Markup(plots.difference(title, Value(**value)))


def _value(value: Json | None) -> str:
    """ "0.512 [0.488, 0.536]", or without an interval "0.512"."""
    if value is None:
        return "–"
    if value["low"] is None:
        return plots.figure(value["value"])
    low, high = plots.figure(value["low"]), plots.figure(value["high"])
    return f"{plots.figure(value['value'])} [{low},{HARD}{high}]"


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
    """A setting; of a digest the first twelve characters."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    if is_digest:
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
