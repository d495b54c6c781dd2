"""`python -m eval score SCORER SAVE_DIR ...`: a finished set of pictures in, scores beside it.

A scorer is an entry: the flags it takes, and a function from a set and those flags to scores with their items.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from .images.imageset import ImageSetReader
from .scores import results
from .scores.results import Score
from .scores.scorer import Scorer, name


def scorers() -> dict[str, Scorer]:
    """All scorers by name."""
    from .distances.scorers import DISTANCES
    from .scorers.clipscore import CLIPSCORE
    from .scorers.judges import JUDGES

    return {**DISTANCES, "clipscore": CLIPSCORE, **JUDGES}


def run(scorer: Scorer, args: argparse.Namespace) -> None:
    """Open the sets, score them, write and print what was found."""
    scorer.ready(args)
    sets = [ImageSetReader.open(folder, args.partial) for folder in args.save_dir]
    for images in sets:
        results.refuse_versions(images.folder)
    for images in sets:
        start = time.perf_counter()
        for score, items in scorer.score(images, args):
            now = time.perf_counter()
            named = replace(
                score, scorer=name(score.scorer, images), missing=score.missing or images.missing,
                seconds=now - start if score.seconds is None else score.seconds,
            )  # fmt: skip
            start = now
            results.write(images.folder, named, items)
            print(line(images.folder, named))


def line(folder: Path, score: Score) -> str:
    value = score.value
    interval = "" if value.low is None else f" [{value.low:.4g}, {value.high:.4g}]"
    notes = "".join(f" ({note})" for note in score.notes)
    return f"{folder}: {score.scorer} {value.value:.4g}{interval}{notes}"
