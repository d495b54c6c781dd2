"""`python -m eval score SCORER SAVE_DIR ...`: a finished set of pictures in, scores beside it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from shards.console import positive

from .demo import judge
from .distances.measure import DISTANCES
from .images.flags import device_flag
from .images.imageset import ImageSetReader
from .scorers import clipscore, dpg, genai, geneval, geneval2
from .scores import results
from .scores.results import Score
from .scores.scorer import Scorer, name

SCORERS: dict[str, Scorer] = {
    **DISTANCES,
    "clipscore": clipscore.SCORER,
    "geneval": geneval.SCORER,
    "dpg": dpg.SCORER,
    "genai": genai.SCORER,
    "softtifa": geneval2.SCORER,
    **judge.SCORERS,
}


def add_flags(
    parser: argparse.ArgumentParser, flags: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Adds what every scorer takes, and a scorer's own flags, which may have other defaults of these."""
    device_flag(parser)
    parser.add_argument("--batch_size", type=positive, default=32, help="pictures at a time")
    flags(parser)


def run(scorer: Scorer, args: argparse.Namespace) -> None:
    """Scores each set of `args.save_dir`, writes the scores beside it and prints them."""
    scorer.ready(args)
    sets = [ImageSetReader.open(folder, args.partial) for folder in args.save_dir]
    if half := getattr(args, "half", None):  # of the command alone; a watcher scores whole sets
        sets = [images.half_of(half) for images in sets]
    for images in sets:
        results.refuse_versions(images.folder)
    for images in sets:
        for score in score_set(scorer, images, args):
            print(line(images.folder, score))


def score_set(scorer: Scorer, images: ImageSetReader, args: argparse.Namespace) -> Iterator[Score]:
    """Yields the scores of a set, each once it is written beside the pictures."""
    start = time.perf_counter()
    if images.half:  # files of questions are of all prompts
        args = argparse.Namespace(**{**vars(args), "partial": True})
    for score, items in scorer.score(images, args):
        now = time.perf_counter()
        seconds = now - start if score.seconds is None else score.seconds
        score = replace(
            score, scorer=name(score.scorer, images), missing=score.missing or images.missing_pictures,
            seconds=seconds,
        )  # fmt: skip
        start = now
        results.write(images.folder, score, items)
        yield score


def line(folder: Path, score: Score) -> str:
    value = score.value
    interval = "" if value.low is None else f" [{value.low:.4g}, {value.high:.4g}]"
    notes = "".join(f" ({note})" for note in score.notes)
    return f"{folder}: {score.scorer} {value.value:.4g}{interval}{notes}"
