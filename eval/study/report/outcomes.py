"""`python -m eval probe --outcomes STUDY...`: how well figures known before ordered what studies found.

Read are the panels in study.json. Scores of two studies are on different scales, so entries are ranked
within their study: pairs of entries of one study that a figure puts in the order of their primary score are counted,
and rank correlations of studies of four entries or more are averaged by Fisher's z with the weights of their intervals.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import atanh, sqrt, tanh
from pathlib import Path
from statistics import NormalDist
from typing import Any

from shards import atomic_write, canonical_json
from shards.console import render
from shards.format.atomic import read_json

from ...errors import BadReport, BadRequest
from ...scores.ranks import FEWEST, RankCorrelation
from ...scores.results import LEVEL
from .analysis import FORMAT, VERSION

Json = dict[str, Any]
MOST = 1 - 1e-6  # of a rank correlation, whose z is finite


def run(args: argparse.Namespace) -> None:
    """Prints the table of finished studies, and writes the JSON that is asked for."""
    if args.out is not None:
        raise BadRequest("--out: a page is of columns. Outcomes are printed, and written by --json")
    records = outcomes(args.outcomes)
    if args.json is not None:
        atomic_write(args.json, canonical_json(as_json(records)))
    print(as_text(records))


@dataclass
class Record:
    """What some studies say of a figure."""

    right: int = 0  # pairs of entries whose lower figure has the better score
    pairs: int = 0  # of different figures and scores
    studies: int = 0
    ranks: list[RankCorrelation] = field(default_factory=list)

    def pooled(self) -> RankCorrelation | None:
        """Returns the mean rank correlation of the studies, whose entries are added up."""
        ranks = [rank for rank in self.ranks if rank.entries >= FEWEST]
        if not ranks:
            return None
        if len(ranks) == 1:
            return ranks[0]
        weights = [(r.entries - 3) / (1 + r.value**2 / 2) for r in ranks]
        z = [atanh(max(-MOST, min(MOST, r.value))) for r in ranks]
        mean = sum(w * value for w, value in zip(weights, z, strict=True)) / sum(weights)
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) / sqrt(sum(weights))
        return RankCorrelation(
            value=tanh(mean), low=tanh(mean - half), high=tanh(mean + half),
            entries=sum(r.entries for r in ranks),
        )  # fmt: skip


def outcomes(studies: Sequence[Path]) -> dict[str, Record]:
    """Returns what studies say of each figure, by its title; the folders of studies, or their study.json.

    Raises BadReport for what is no study's JSON, or has no panel or no score yet.
    """
    records: dict[str, Record] = {}
    paths = [place / "study.json" if place.is_dir() else place for place in studies]
    if double := [p for p, n in Counter(path.resolve() for path in paths).items() if n > 1]:
        raise BadReport(f"{double[0]}: named twice, and would count twice. Name each study once")
    for path in paths:
        panel, scores = _read(path)
        for figure in panel["figures"]:
            title = figure["title"].partition("-reconstruct-")[0]  # of a score, without its source
            record = records.setdefault(title, Record())
            values = {
                e: v["value"]
                for e, v in figure["entries"].items()
                if v["value"] is not None and e in scores
            }
            if len(values) < 2:
                continue
            record.studies += 1
            for a, b in combinations(values, 2):
                order = (values[a] - values[b]) * (scores[a] - scores[b])
                record.pairs += order != 0
                record.right += order > 0
            if figure["rank"]:
                record.ranks.append(RankCorrelation(**figure["rank"]))
    return records


def _read(path: Path) -> tuple[Json, dict[str, float]]:
    """Returns the panel of a study, and each entry's primary score, negative where higher is better."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise BadReport(
            f"{path}: not readable as a study's JSON ({error}). `python -m eval study report` writes it"
        ) from None
    about = data if isinstance(data, dict) else {}
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise BadReport(
            f"{path}: found format {about.get('format')!r} {about.get('version')}, expected {FORMAT!r} {VERSION}"
        )
    panel, scores = data.get("panel"), data["scores"]
    if not panel or not panel["figures"] or not scores:
        problem = "no score yet" if not scores else (panel or {}).get("why") or "no panel"
        raise BadReport(
            f"{path}: {problem}. Finish the study, then `python -m eval study report` again"
        )
    sign = 1 if scores[0]["better"] == "lower" else -1
    names = [entry["name"] for entry in data["entries"]]
    values = {
        name: sign * entry["over_seeds"]["value"]
        for name, entry in zip(names, scores[0]["entries"], strict=True)
        if entry["over_seeds"]
    }
    return panel, values


def as_text(records: dict[str, Record]) -> str:
    """Returns the table, the figures of the most studies first."""
    from rich.table import Table

    table = Table("figure", "studies", "pairs in order", "rank correlation")
    for title, record in sorted(records.items(), key=lambda item: (-item[1].pairs, item[0])):
        rank = record.pooled()
        text = "" if rank is None else f"{rank.value:+.2f}"
        if rank is not None and rank.low is not None:
            text += f" [{rank.low:+.2f}, {rank.high:+.2f}]"
        if rank is not None:
            text += f", {rank.entries} entries"
        table.add_row(title, str(record.studies), f"{record.right} of {record.pairs}", text)
    note = (
        "in order, and positive: a lower figure went with a better primary score. A figure that was chosen for its "
        "rank here proves nothing: name figures before the studies that are to judge them."
    )
    return render(table, note)


def as_json(records: dict[str, Record]) -> Json:
    """Returns the same as JSON: {figure: studies, pairs, right, rank (value, low, high, entries; or null)}."""
    return {
        title: {
            "studies": record.studies, "pairs": record.pairs, "right": record.right,
            "rank": asdict(rank) if (rank := record.pooled()) else None,
        }
        for title, record in records.items()
    }  # fmt: skip
