"""What was known of the entries' columns before any training, set beside what the study finds.

The figures are those of `eval probe`, of the first latent column of each entry, and the scores of
reconstructions that the YAML names. They are kept in OUT/probe.json under the digests of what they
are of, and made when the page is: a column that cannot be probed leaves the page without them, and says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards import Column, ShardsError, atomic_write, canonical_json
from shards.format.atomic import read_json

from ...errors import EvalError
from ...report.panel import FIGURES
from ...scores import results
from ...scores.ranks import rank_correlation
from ..encoders import places

if TYPE_CHECKING:
    from ..study import Study

Json = dict[str, Any]
FILE = "probe.json"
log = logging.getLogger(__name__)
FEWEST = 3  # entries of a rank correlation: the order of two is right or wrong


def panel(study: Study, scores: Sequence[Json]) -> Json | None:
    """Returns the panel of a study; None where the YAML wants none.

    `scores` are those of study.json, the primary one first. Fields: rows (read of each column), outcome (the primary
    score; null before there is one), figures[]: name, title, entries {entry: value, low, high, and why where there is
    none}, rank (with the outcome, positive where a lower figure went with a better score: value, low, high,
    entries; null for fewer than three entries); why (there are no figures of the columns, or null).
    """
    config = study.config.panel
    if config is None:
        return None
    columns, why = {}, None
    try:
        columns = _probed(study)
    except (ShardsError, EvalError, OSError) as error:
        why = f"{type(error).__name__}: {error}"
    figures: list[Json] = [
        {"name": name, "title": about.title, "entries": {e: c[name] for e, c in columns.items()}}
        for name, about in FIGURES.items()
        if columns
    ]
    figures += _reconstructions(config.reconstructions)
    outcome = scores[0] if scores else None
    for figure in figures:
        figure["rank"] = _rank(study, figure["entries"], outcome)
    return {
        "rows": next((c["rows"] for c in columns.values()), None),
        "outcome": outcome and outcome["scorer"],
        "figures": figures,
        "why": why,
    }


def first_columns(study: Study) -> dict[str, str]:
    """Returns the latent column of each entry that is probed: that of its first source, in its last phase."""
    data = {
        name: study.train_config(name, study.seeds[0]).data.resolved() for name in study.entries
    }
    return {name: next(places(each.latents)) for name, each in data.items()}


def first_text(study: Study) -> str | None:
    """Returns the text column of the baseline's first source."""
    data = study.train_config(study.baseline, study.seeds[0]).data.resolved()
    return next(iter(places(data.text)), None) if data.text else None


def _probed(study: Study) -> dict[str, Json]:
    """Returns the record of each entry's column: the kept ones where they are of these columns."""
    from ...probe import probe

    assert study.config.panel is not None
    flags = study.config.panel.model_dump(include={"rows", "groups", "together"})
    columns, text = first_columns(study), first_text(study)
    unique = list(dict.fromkeys(columns.values()))
    digests = [_digests(place) for place in [*unique, *([text] if text else [])]]
    request = {"columns": digests, **flags}
    path = study.out / FILE
    kept: Json = {}
    with suppress(OSError, ValueError, ShardsError):
        kept = read_json(path)
    if kept.get("request") != request:
        kept = {"request": request, "probe": probe(unique, text, **flags)}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, canonical_json(kept))
    records = dict(zip(unique, kept["probe"]["columns"], strict=True))
    return {name: records[place] for name, place in columns.items()}


def _digests(place: str) -> list[str]:
    """Returns what a column is of, and what of it is complete."""
    column = Column.open(place)
    try:
        return [column.digest, column.snapshot.digest]
    finally:
        column.close()


def _reconstructions(folders: Mapping[str, Path]) -> list[Json]:
    """Returns the scores that all named reconstructions have, a figure each."""
    scores = {}
    for entry, folder in folders.items():
        images = folder / "reconstruction"
        try:
            scores[entry] = results.read_all(images if images.is_dir() else folder)
        except (EvalError, ShardsError, OSError) as error:  # the verdict does not depend on them
            log.warning("panel.reconstructions: %s: %s", entry, error)
            scores[entry] = {}
        else:
            if not scores[entry]:
                log.warning("panel.reconstructions: %s: found no score in %s", entry, folder)
    shared = [
        name for name in next(iter(scores.values()), {}) if all(name in s for s in scores.values())
    ]
    return [
        {
            "name": name,
            "title": f"reconstruction: {name}",
            "entries": {entry: asdict(s[name].value) for entry, s in scores.items()},
        }
        for name in shared
    ]


def _rank(study: Study, figures: Mapping[str, Json], outcome: Json | None) -> Json | None:
    """Returns the rank correlation of a figure with the outcome, over the entries that have both."""
    if outcome is None:
        return None
    sign = 1 if outcome["better"] == "lower" else -1
    pairs = [
        (figures[name]["value"], sign * entry["over_seeds"]["value"])
        for name, entry in zip(study.entries, outcome["entries"], strict=True)
        if entry["over_seeds"] and name in figures and figures[name]["value"] is not None
    ]
    if len(pairs) < FEWEST:
        return None
    rank = rank_correlation(*map(list, zip(*pairs, strict=True)))
    return asdict(rank) if rank else None
