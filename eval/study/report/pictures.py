"""The pictures of a study's page: the same prompts with the same noise, and what reconstructions lose."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shards import ShardsError

from ...errors import EvalError
from ...report.entries import open_one
from ...report.gallery import Gallery, gallery
from ...report.orders import prompt_scores
from ...report.report import pictures_of as gallery_of
from .analysis import Analysis

if TYPE_CHECKING:
    from ..study import Study

log = logging.getLogger(__name__)
# rows of reconstructions, and bytes of both galleries: with charts and script a page has 10 MB at most
ROWS, SAME_BYTES, LOST_BYTES = 6, 6_000_000, 2_500_000


@dataclass(frozen=True)
class Pictures:
    """What a page shows of pictures; `seed` is the training seed of the `same` prompts' pictures."""

    seed: int | None = None
    same: Gallery = field(default_factory=Gallery)
    lost: Gallery = field(default_factory=Gallery)  # of reconstructions


def pictures_of(study: Study, analysis: Analysis, most: int) -> Pictures:
    """Returns pictures of at most `most` prompts, of the training seed that most entries have, the
    first of several; and reconstructions of at most as many rows.

    BadScores where the items of a score are damaged. A folder of reconstructions that cannot be
    shown is left out with a warning: the verdict does not depend on it.
    """
    entries = list(analysis.last.values())
    seeds = [seed for entry in entries for seed in entry.members]
    seed = max(seeds, key=seeds.count, default=None)
    sets = [(entry.name, entry.members[seed]) for entry in entries if seed in entry.members]
    shown = [(name, scored.images) for name, scored in sets if scored.images]
    scorer = analysis.data["primary"]["scorer"]
    names = {name for name, _ in shown}
    compared = [entry for entry in entries if entry.name in names]
    scores = prompt_scores(compared, scorer) if scorer else None
    same = gallery(shown, most, scores=scores, by_difference=True, most_bytes=SAME_BYTES)
    return Pictures(seed, same, _lost(study, min(most, ROWS)))


def _lost(study: Study, most: int) -> Gallery:
    """Returns the worst rows of the reconstructions that the YAML names."""
    folders = study.config.panel.reconstructions if study.config.panel else {}
    sets = []
    for name in study.entries:
        if name in folders:
            try:
                sets.append(replace(open_one(folders[name]), name=name))
            except (EvalError, ShardsError, OSError) as error:
                log.warning("panel.reconstructions: %s: %s", name, error)
    sets = [scored for scored in sets if scored.images and scored.originals]
    try:
        return gallery_of(sets, most, LOST_BYTES) if sets else Gallery()
    except (EvalError, ShardsError, OSError) as error:
        log.warning("panel.reconstructions: %s", error)
        return Gallery()
