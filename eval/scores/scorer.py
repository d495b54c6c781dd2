"""What a scorer is: its name, its flags, and how it goes from pictures to scores."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..images.imageset import ImageSetReader
from .results import Item, Score

Scored = Iterable[tuple[Score, Sequence[Item]]]


def nothing(args: argparse.Namespace) -> None:
    pass


def any_number(args: argparse.Namespace, count: int, where: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scorer:
    flags: Callable[[argparse.ArgumentParser], None]  # its docstring is the help
    score: Callable[[ImageSetReader, argparse.Namespace], Scored]
    # loads weights and checks flags, so that what is missing is said before any picture is read
    ready: Callable[[argparse.Namespace], None] = nothing
    # raises TooFewImages where so many pictures, of the set that the text names, are too few
    enough: Callable[[argparse.Namespace, int, str], None] = any_number


def name(scorer: str, images: ImageSetReader) -> str:
    """A scorer's name; of a set that is not whole it says how many files were there."""
    if not images.missing or "-partial" in scorer:
        return scorer
    return f"{scorer}-partial-{len(images.files)}-of-{len(images.files) + images.missing}"
