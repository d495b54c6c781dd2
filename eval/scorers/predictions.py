"""What models find in pictures, kept line by line while they look: a scoring that was stopped goes on from there.

    <save_dir>/scores/raw/<scorer>-<key>.jsonl    what finds; then a line a picture, with its file's digest
                          <scorer>-<key>.<n>.jsonl    likewise of the n-th further process

`key` is the digest of all that the findings follow from besides the pictures (weights, preprocessing, questions). So
findings of another model, or of a picture that changed since, are never taken for those of this one. Processes say
nothing to each other: each looks at its share, and whoever sees the last finding makes the score.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from itertools import chain, islice
from typing import Any

from shards import atomic_write, canonical_json, put_if_absent, sha256
from shards.console import Bar
from shards.format.atomic import LINES_BYTES, parse_json, read_file, refuse_version
from shards.format.records import finite, having, mapping, text
from shards.read.prefetch import map_ahead

from ..errors import BadScores, MissingImages, NotFinite
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..scores.results import NAME

Json = dict[str, Any]
Find = Callable[[Sequence[PictureRef], Sequence[Picture]], list[Json]]
FORMAT, VERSION = "latentbank-findings", 1
FOUND = having({"of": text(), "found": mapping, "seconds": finite})
ALONE = Rank()
READERS = 4  # threads that decode pictures while the model looks at others


class Journal:
    """The findings of one finder about one set."""

    def __init__(self, images: ImageSetReader, scorer: str, made_by: Json, rank: int = 0) -> None:
        told = json.loads(canonical_json(made_by))
        self._head = canonical_json({"format": FORMAT, "version": VERSION, "made_by": told})
        self._digests, self._found = images.digests, dict[str, tuple[Json, float]]()
        self._stem = f"{scorer}-{sha256(self._head)[:12]}"
        self.path = images.folder / NAME / "raw" / f"{self._stem}{f'.{rank}' if rank else ''}.jsonl"
        self._begun = False  # whether the file has its first line, as far as this process knows
        self.read()

    def __contains__(self, one: PictureRef) -> bool:
        return self._name(one) in self._found

    def __getitem__(self, one: PictureRef) -> Json:
        return self._found[self._name(one)][0]

    def seconds(self, ones: Iterable[PictureRef]) -> float:
        """What these pictures took, of all processes together."""
        return sum(self._found[self._name(one)][1] for one in ones)

    def read(self) -> None:
        """Take up what all processes have found so far."""
        for path in sorted(self.path.parent.glob(f"{escape(self._stem)}*.jsonl")):
            head, *lines = read_file(path, LINES_BYTES).split(b"\n")
            if not lines:  # killed within the first line
                continue
            self._refuse_version(head, str(path))
            if head + b"\n" != self._head:
                raise BadScores(f"{path}: not the findings of this scorer. Move it away")
            self._begun |= path == self.path
            for line in lines:
                try:
                    told = parse_json(line)
                    FOUND(told)
                    self._found[told["of"]] = told["found"], float(told["seconds"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill: it is found again

    @staticmethod
    def _refuse_version(head: bytes, path: str) -> None:
        """FormatVersion where another release wrote the findings."""
        with suppress(KeyError, TypeError, json.JSONDecodeError):
            refuse_version(json.loads(head), path, FORMAT, VERSION)

    def add(self, ones: Sequence[PictureRef], found: Sequence[Json], seconds: float) -> None:
        """Append what was found in a block, so that it outlives the process and the machine's power."""
        each = seconds / len(ones)
        lines = b"".join(self._line(one, what, each) for one, what in zip(ones, found, strict=True))
        if not self._begun:
            self._begin()
        with self.path.open("ab") as file:
            file.write(self._end_of_cut_line() + lines)
            file.flush()
            os.fsync(file.fileno())
        self._found |= {
            line["of"]: (line["found"], each) for line in map(json.loads, lines.splitlines())
        }

    def _line(self, one: PictureRef, found: Json, seconds: float) -> bytes:
        try:
            return canonical_json({"of": self._name(one), "found": found, "seconds": seconds})
        except ValueError:
            raise NotFinite(
                f"{one.path}: found NaN or infinity in what {self._stem} says of picture {one.number}, expected finite "
                "numbers. Try another precision (--device cpu), or look at the model's weights"
            ) from None

    def _begin(self) -> None:
        """The first line, unless another process wrote it meanwhile; one that a kill cut off is written anew."""
        if not put_if_absent(self.path, self._head):
            with self.path.open("rb") as file:
                whole = file.readline().endswith(b"\n")
            if not whole:
                atomic_write(self.path, self._head)
        self._begun = True

    def _end_of_cut_line(self) -> bytes:
        """What a kill may have kept from the last line."""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return b"" if file.read() == b"\n" else b"\n"

    def _name(self, one: PictureRef) -> str:
        return f"{one.file.path}#{one.number}:{self._digests[one.file.path]}"


@dataclass(frozen=True)
class Pass:
    """What was found in a set."""

    found: list[tuple[PictureRef, Json]]
    seconds: float  # of all processes, also of those that were stopped


def cached_predictions(
    images: ImageSetReader,
    scorer: str,
    made_by: Json,
    block: int,
    find: Find,
    wanted: Callable[[PictureRef], bool] = lambda _: True,
    rank: Rank = ALONE,
) -> Pass | None:
    """What `find` says of each wanted picture, in their order; None if other processes are still looking.

    `block` pictures are shown to it at a time. Blocks do not depend on what was found before nor on the number of
    processes, so neither do the last bits of what a model says.
    """
    journal = Journal(images, scorer, made_by, rank.number)
    ones = [one for one in images if wanted(one)]
    if not ones:
        raise MissingImages(
            f"{images.folder}: found no picture of a prompt that counts, expected at least one"
        )
    mine = rank.share([ones[i : i + block] for i in range(0, len(ones), block)])
    todo = [some for some in mine if not all(one in journal for one in some)]
    with ThreadPoolExecutor(READERS) as pool, Bar(scorer, sum(map(len, mine)), "pictures") as bar:
        bar.skip(sum(map(len, mine)) - sum(map(len, todo)))
        reading = map_ahead(pool, PictureRef.read, chain.from_iterable(todo), block)
        for some in todo:
            start = time.monotonic()
            found = find(some, list(islice(reading, len(some))))
            journal.add(some, found, time.monotonic() - start)
            bar.advance(len(some))
    journal.read()
    left = sum(one not in journal for one in ones)
    if left:
        bar.note(
            f"{scorer}: the share of process {rank.number} is done; {left} pictures are left to the others"
        )
        return None
    return Pass([(one, journal[one]) for one in ones], journal.seconds(ones))
