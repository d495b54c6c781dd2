"""What models predict of pictures, kept line by line: a scoring that was stopped goes on from it.

    <save_dir>/scores/raw/<scorer>-<key>.jsonl    what predicts; then a line a picture
                          <scorer>-<key>.<n>.jsonl    likewise of the n-th further process

`key` is the digest of all that the predictions follow from besides the pictures (weights,
preprocessing, questions), and a line has its picture file's digest, so predictions of another
model, or of a picture that changed since, are never taken for those of this one. Processes do not
communicate: each takes its share, and whoever sees the last prediction makes the score.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, Literal

from shards import canonical_json, put_if_absent, sha256
from shards.console import Bar
from shards.format.atomic import LINES_BYTES, parse_json, read_file, refuse_version
from shards.format.checks import Fields, Text, check
from shards.read import map_ahead

from ..errors import BadQuestions, BadScores, MissingImages, NotFinite
from ..images.imageset import ImageSetReader, PictureRef
from ..images.layouts import Picture
from ..images.ranks import Rank
from ..scores.results import NAME, Item, Score, Value

Json = dict[str, Any]
Predict = Callable[[Sequence[PictureRef], Sequence[Picture]], list[Json]]
FORMAT, VERSION = "latentbank-findings", 1
ALONE = Rank()
READERS = 4  # threads that decode pictures while the model looks at others
PACKAGES = ("torch", "transformers", "pillow")
NAMED = 5  # of many prompts, how many an error names


class _Line(Fields):
    of: Text
    found: Json
    seconds: float


class Journal:
    """The predictions of one model about one set, those of other processes too."""

    def __init__(self, images: ImageSetReader, scorer: str, made_by: Json, rank: int = 0) -> None:
        record = {"format": FORMAT, "version": VERSION, "made_by": made_by}
        self._head = canonical_json(record)
        self._digests = images.digests
        self._predictions: dict[str, tuple[Json, float]] = {}
        self._stem = f"{scorer}-{sha256(self._head)[:12]}"
        self.path = images.folder / NAME / "raw" / f"{self._stem}{f'.{rank}' if rank else ''}.jsonl"
        self.read()

    def __contains__(self, picture: PictureRef) -> bool:
        return self._key(picture) in self._predictions

    def __getitem__(self, picture: PictureRef) -> Json:
        return self._predictions[self._key(picture)][0]

    def seconds(self, pictures: Iterable[PictureRef]) -> float:
        """Returns what these pictures took, of all processes together."""
        return sum(self._predictions[self._key(picture)][1] for picture in pictures)

    def read(self) -> None:
        """Reads what all processes have predicted so far."""
        for path in sorted(self.path.parent.glob(f"{escape(self._stem)}*.jsonl")):
            head, *lines = read_file(path, LINES_BYTES).split(b"\n")
            if not lines:  # killed within the first line: it holds nothing
                path.unlink(missing_ok=True)
                continue
            with suppress(KeyError, TypeError, json.JSONDecodeError):
                refuse_version(json.loads(head), str(path), FORMAT, VERSION)
            if head + b"\n" != self._head:
                raise BadScores(f"{path}: not the findings of this scorer. Move it away")
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):  # cut off by a kill: made again
                    record = parse_json(line)
                    check(_Line, record)
                    self._predictions[record["of"]] = record["found"], float(record["seconds"])

    def add(
        self, pictures: Sequence[PictureRef], predictions: Sequence[Json], seconds: float
    ) -> None:
        """Appends a block's predictions, which then outlive the process and a loss of power."""
        per_picture = seconds / len(pictures)
        lines = [
            self._line(picture, prediction, per_picture)
            for picture, prediction in zip(pictures, predictions, strict=True)
        ]
        put_if_absent(self.path, self._head)  # or another process wrote it meanwhile
        with self.path.open("ab") as file:
            file.write(self._end_of_cut_line() + b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        for record in map(json.loads, lines):
            self._predictions[record["of"]] = record["found"], per_picture

    def _line(self, picture: PictureRef, prediction: Json, seconds: float) -> bytes:
        try:
            return canonical_json(
                {"of": self._key(picture), "found": prediction, "seconds": seconds}
            )
        except ValueError:
            raise NotFinite(
                f"{picture.path}: found NaN or infinity in what {self._stem} says of picture {picture.number}, "
                "expected finite numbers. Try another precision (--device cpu), or check the model's weights"
            ) from None

    def _end_of_cut_line(self) -> bytes:
        """Returns the line end that a kill kept from the last line, if it did."""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return b"" if file.read() == b"\n" else b"\n"

    def _key(self, picture: PictureRef) -> str:
        path = picture.file.path
        return f"{path}#{picture.number}:{self._digests[path]}"


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of a set's pictures, in their order."""

    images: ImageSetReader
    pairs: list[tuple[PictureRef, Json]]
    seconds: float  # of all processes, also of those that were stopped

    def score(
        self, name: str, items: Sequence[Item], values: tuple[Value, dict[str, Value]], made_by: Json,
        *, notes: tuple[str, ...] = (), absent: int = 0, unit: float = 1.0,
        overall: Literal["prompts", "groups"] = "prompts",
    ) -> Score:  # fmt: skip
        """Returns the score of `values`, the whole's and the groups'.

        `absent`: prompts of the benchmark that the set does not have, which a half never has.
        """
        images = self.images
        per_prompt = int(images.settings["images_per_prompt"])
        missing = images.missing_pictures + (0 if images.half else absent * per_prompt)
        return Score(
            scorer=f"{name}-partial-{len(items)}-of-{len(items) + missing}" if missing else name,
            benchmark=images.prompts.benchmark, value=values[0], better="higher", groups=values[1],
            overall=overall, unit=unit, prompts=len({item.prompt for item in items}), pictures=len(items),
            missing=missing, notes=notes, images=images.digest, prompt_list=images.prompts.digest,
            made_by=made_by | {"versions": {package: version(package) for package in PACKAGES}},
            seconds=self.seconds,
        )  # fmt: skip


def cached_predictions(
    images: ImageSetReader,
    scorer: str,
    made_by: Json,
    block: int,
    predict: Predict,
    condition: Callable[[PictureRef], bool] = lambda _: True,
    rank: Rank = ALONE,
) -> Predictions | None:
    """Returns what `predict` says of pictures of the condition; None if others are still at it.

    It gets `block` pictures at a time. Blocks depend neither on what was predicted before nor on
    the number of processes, so neither do the last bits of a prediction.
    """
    journal = Journal(images, scorer, made_by, rank.number)
    pictures = [picture for picture in images if condition(picture)]
    if not pictures:
        raise MissingImages(
            f"{images.folder}: found no picture of a prompt that counts, expected at least one"
        )
    share = rank.share([pictures[i : i + block] for i in range(0, len(pictures), block)])
    todo = [part for part in share if not all(picture in journal for picture in part)]
    total = sum(map(len, share))
    with ThreadPoolExecutor(READERS) as pool, Bar(scorer, total, "pictures") as bar:
        bar.skip(total - sum(map(len, todo)))
        reading = map_ahead(pool, PictureRef.read, chain.from_iterable(todo), block)
        for part in todo:
            start = time.monotonic()
            predictions = predict(part, list(islice(reading, len(part))))
            journal.add(part, predictions, time.monotonic() - start)
            bar.advance(len(part))
    journal.read()
    missing = sum(picture not in journal for picture in pictures)
    if missing:
        bar.note(
            f"{scorer}: the share of process {rank.number} is done; {missing} pictures are left to the others"
        )
        return None
    pairs = [(picture, journal[picture]) for picture in pictures]
    return Predictions(images, pairs, journal.seconds(pictures))


def count_absent(
    questions: Iterable[str], prompts: Iterable[str], partial: bool, advice: str
) -> int:
    """Returns how many prompts with questions a set does not have: 0, unless `partial` allows some.

    BadQuestions where there are some, or where a prompt of the set has no question.
    """
    expected, present = set(questions), set(prompts)
    unknown, absent = sorted(present - expected), sorted(expected - present)
    if unknown:
        raise BadQuestions(
            f"found {len(unknown)} prompts of the set without a question ({', '.join(unknown[:NAMED])}). {advice}"
        )
    if absent and not partial:
        raise BadQuestions(
            f"found questions to {len(absent)} prompts that the set does not have ({', '.join(absent[:NAMED])}). "
            f"{advice}, all of it, or score what exists with --partial"
        )
    return len(absent)
