"""What a scorer is: its options, and how it goes from pictures to scores.

A scorer is a file with a `SCORER`, and an entry of `eval.score.SCORERS`. The file imports torch
inside its functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..images.imageset import ImageSetReader
from ..prompts.prompts import Prompts
from .results import Item, Score

# ends of a name, in either order: a label or a model's name may hold such words too
HALF = re.compile(r"-half-[ab](-partial-\d+-of-\d+)?$")
PARTIAL = re.compile(r"-partial-\d+-of-\d+(-half-[ab])?$")


@dataclass(frozen=True, slots=True)
class Scorer:
    # adds the options; its docstring is the scorer's line of help
    flags: Callable[[argparse.ArgumentParser], None]
    score: Callable[[ImageSetReader, argparse.Namespace], Iterable[tuple[Score, Sequence[Item]]]]
    # loads weights and checks options, so that what is missing is reported before pictures are read
    ready: Callable[[argparse.Namespace], object] = lambda args: None
    # raises TooFewImages where a count of pictures, of the set that the text names, is too small
    enough: Callable[[argparse.Namespace, int, str], None] = lambda args, count, where: None
    # raises BadPrompts or BadQuestions where pictures of these prompts cannot be scored
    suits: Callable[[argparse.Namespace, Prompts], None] = lambda args, prompts: None


def name(scorer: str, images: ImageSetReader) -> str:
    """Returns a scorer's name, with the half of the prompts that it is of, and the number of files
    where the set is not complete; a name that says so already stays as it is.
    """
    says_half, says_part = (pattern.search(scorer) for pattern in (HALF, PARTIAL))
    if images.half and not says_half:
        scorer = f"{scorer}-half-{images.half}"
    if not images.missing or says_part:
        return scorer
    return f"{scorer}-partial-{len(images.files)}-of-{len(images.files) + images.missing}"


def label(path: str) -> str:
    """Returns what a score's name calls a model: the end of its hub name or folder."""
    parts = Path(path).resolve().parts if Path(path).is_dir() else tuple(path.split("/"))
    if parts[-2:-1] == ("snapshots",):  # the hub's cache: models--OWNER--NAME/snapshots/<revision>
        parts = parts[:-2]
    return parts[-1].rpartition("--")[2].lower()
