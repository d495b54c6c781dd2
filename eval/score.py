"""`python -m eval score SCORER SAVE_DIR ...`: a finished set of pictures in, scores beside it.

A scorer is an entry: the flags it takes, and a function from a set and those flags to scores with their items.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import results
from .imageset import Images
from .results import Item, Score

Scored = Iterable[tuple[Score, Sequence[Item]]]


def nothing(args: argparse.Namespace) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scorer:
    flags: Callable[[argparse.ArgumentParser], None]  # its docstring is the help
    score: Callable[[Images, argparse.Namespace], Scored]
    # loads weights and checks flags, so that what is missing is said before any picture is read
    ready: Callable[[argparse.Namespace], None] = nothing


def run(scorer: Scorer, args: argparse.Namespace) -> None:
    """Open the sets, score them, write and print what was found."""
    scorer.ready(args)
    for folder in args.save_dir:
        images = Images.open(folder, args.partial)
        for score, items in scorer.score(images, args):
            results.write(folder, score, items)
            print(line(folder, score))


def line(folder: Path, score: Score) -> str:
    value = score.value
    interval = "" if value.low is None else f" [{value.low:.4g}, {value.high:.4g}]"
    notes = "".join(f" ({note})" for note in score.notes)
    return f"{folder}: {score.scorer} {value.value:.4g}{interval}{notes}"
