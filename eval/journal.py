"""What models find in pictures, kept line by line while they look: a scoring that was stopped goes on from there.

    <save_dir>/scores/raw/<scorer>-<key>.jsonl    what finds; then a line a picture, with its file's digest

`key` is the digest of all that the findings follow from besides the pictures (weights, preprocessing, questions). So
findings of another model, or of a picture that changed since, are never taken for those of this one.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shards import canonical_json, sha256

from .bar import Bar
from .errors import BadScores, MissingImages
from .imageset import Images, One
from .layouts import Picture
from .results import NAME

Json = dict[str, Any]
Find = Callable[[Sequence[One], Sequence[Picture]], list[Json]]
READERS = 4  # threads that decode pictures while the model looks at others


class Journal:
    """The findings of one finder about one set."""

    def __init__(self, images: Images, scorer: str, made_by: Json) -> None:
        head = {
            "format": "latentbank-findings",
            "version": 1,
            "made_by": json.loads(canonical_json(made_by)),
        }
        self._digests, self._found = images.digests, dict[str, Json]()
        self._head = canonical_json(head)
        self.path = images.folder / NAME / "raw" / f"{scorer}-{sha256(self._head)[:12]}.jsonl"
        if self.path.exists():
            self._read()

    def __contains__(self, one: One) -> bool:
        return self._name(one) in self._found

    def __getitem__(self, one: One) -> Json:
        return self._found[self._name(one)]

    def add(self, found: Iterable[tuple[One, Json]]) -> None:
        """Append findings, so that they outlive the process and the machine's power."""
        pairs = [(self._name(one), json.loads(canonical_json(what))) for one, what in found]
        lines = b"".join(canonical_json({"of": name, "found": what}) for name, what in pairs)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(self._opening(file.tell()) + lines)
            file.flush()
            os.fsync(file.fileno())
        self._found.update(pairs)

    def _opening(self, size: int) -> bytes:
        """The head of a new file; the end of a line that a kill has left in the middle."""
        if size == 0:
            return self._head
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return b"" if file.read() == b"\n" else b"\n"

    def _read(self) -> None:
        head, *lines = self.path.read_bytes().split(b"\n")
        if head + b"\n" != self._head and lines:
            raise BadScores(f"{self.path}: not the findings of this scorer. Move it away")
        for line in lines:
            try:
                told = json.loads(line)
                self._found[told["of"]] = told["found"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill: it is found again
        if not lines:  # killed within the head
            self.path.unlink()

    def _name(self, one: One) -> str:
        return f"{one.file.path}#{one.number}:{self._digests[one.file.path]}"


def findings(
    images: Images,
    scorer: str,
    made_by: Json,
    block: int,
    find: Find,
    wanted: Callable[[One], bool] = lambda _: True,
) -> list[tuple[One, Json]]:
    """What `find` says of each wanted picture, in their order; `block` pictures are shown to it at a time.

    Blocks do not depend on what was found before, so neither do the last bits of what a model says.
    """
    journal = Journal(images, scorer, made_by)
    ones = [one for one in images if wanted(one)]
    if not ones:
        raise MissingImages(
            f"{images.folder}: found no picture of a prompt that counts, expected at least one"
        )
    blocks = [ones[i : i + block] for i in range(0, len(ones), block)]
    todo = [some for some in blocks if not all(one in journal for one in some)]
    with ThreadPoolExecutor(READERS) as pool, Bar(scorer, len(ones), "pictures") as bar:
        bar.skip(len(ones) - sum(map(len, todo)))
        ahead = [pool.submit(one.read) for one in (todo or [[]])[0]]
        for i, some in enumerate(todo):
            pictures = [reading.result() for reading in ahead]
            ahead = [pool.submit(one.read) for one in todo[i + 1]] if i + 1 < len(todo) else []
            journal.add(zip(some, find(some, pictures), strict=True))
            bar.advance(len(some))
    return [(one, journal[one]) for one in ones]
