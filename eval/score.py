"""`python -m eval score SCORER SAVE_DIR ...`: a finished set of pictures in, scores beside it.

A scorer is an entry: the flags it takes, and a function from a set and those flags to scores with their items.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import results
from .imageset import Images
from .results import Item, Score

Scored = Iterable[tuple[Score, Sequence[Item]]]


def nothing(args: argparse.Namespace) -> None:
    pass


def any_number(args: argparse.Namespace, count: int, where: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scorer:
    flags: Callable[[argparse.ArgumentParser], None]  # its docstring is the help
    score: Callable[[Images, argparse.Namespace], Scored]
    # loads weights and checks flags, so that what is missing is said before any picture is read
    ready: Callable[[argparse.Namespace], None] = nothing
    # raises TooFewImages where so many pictures, of the set that the text names, are too few
    enough: Callable[[argparse.Namespace, int, str], None] = any_number


def scorers() -> dict[str, Scorer]:
    """All scorers by name."""
    from .clipscore import CLIPSCORE
    from .distance_scorers import DISTANCES
    from .judges import JUDGES

    return {**DISTANCES, "clipscore": CLIPSCORE, **JUDGES}


def run(scorer: Scorer, args: argparse.Namespace) -> None:
    """Open the sets, score them, write and print what was found."""
    scorer.ready(args)
    sets = [Images.open(folder, args.partial) for folder in args.save_dir]
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


def name(scorer: str, images: Images) -> str:
    """A scorer's name; of a set that is not whole it says how many files were there."""
    if not images.missing or "-partial" in scorer:
        return scorer
    return f"{scorer}-partial-{len(images.files)}-of-{len(images.files) + images.missing}"


def line(folder: Path, score: Score) -> str:
    value = score.value
    interval = "" if value.low is None else f" [{value.low:.4g}, {value.high:.4g}]"
    notes = "".join(f" ({note})" for note in score.notes)
    return f"{folder}: {score.scorer} {value.value:.4g}{interval}{notes}"
