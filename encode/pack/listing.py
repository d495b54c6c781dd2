"""The rows that will be packed, sorted by key, in a database on disk: memory does not grow with them.

A sort needs all keys, so the first pass reads names and captions of tables alone, no picture; the
database (SQLite, in the target's working folder) keeps them in order while they come.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.format.atomic import Json
from shards.format.checks import MAX_TEXT

from ..source.members import PICTURES

CAPTIONS = ("txt", "caption")  # suffixes of files that hold a caption as they are
JSON = "json"
SHOWN = 3  # places that are named of each kind of trouble
SUFFIXES = 20  # of files that are neither, counted by name
AT_ONCE = 256  # rows between two words of progress
CACHE = -(1 << 16)  # kB of the database that are kept in memory
# what may be wrong with a source's files or lines, in the words of the report
TROUBLES = {  # for a count of one, and of several
    "without_caption": ("packed without a caption",) * 2,
    "caption_without_picture": ("caption without a picture", "captions without a picture"),
    "picture_missing": (
        "picture that a table names and that does not exist",
        "pictures that a table names and that do not exist",
    ),
    "outside": ("path that leaves the folder, or url", "paths that leave the folder, and urls"),
    "unreadable": ("file that cannot be read", "files that cannot be read"),
    "doubles": ("more picture of a key", "more pictures of one key"),
    "broken_lines": ("line of a table that cannot be read", "lines of a table that cannot be read"),
    "case_only": (
        "key that differs from another in case only (packed)",
        "keys that differ from another in case only (packed)",
    ),
}
PACKED = ("without_caption", "case_only")  # counted of rows that are packed all the same


def trouble_text(trouble: str, count: int) -> str:
    """Returns the words that follow the count of a trouble."""
    return TROUBLES[trouble][count != 1]


def utf8(place: object) -> str:
    """Returns a path or message as JSON can hold it: bytes of names that are not UTF-8 as `\\udce9`."""
    return str(place).encode(errors="backslashreplace").decode()


class Troubles:
    """How often each of TROUBLES happened, and the first places where it did."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, trouble: str, place: object) -> None:
        self.counts[trouble] += 1
        places = self.places.setdefault(trouble, [])
        if len(places) < SHOWN:
            places.append(utf8(place))

    def record(self) -> Json:
        return {"counts": dict(self.counts), "places": self.places}

    def merge(self, record: Json) -> None:
        """Adds what another attempt has counted."""
        self.counts.update(record["counts"])
        for trouble, places in record["places"].items():
            known = self.places.setdefault(trouble, [])
            known += places[: SHOWN - len(known)]


@dataclass(frozen=True, slots=True)
class Item:
    """A row to be: its key and where its members are. `number` is its place in the order."""

    number: int
    key: bytes
    suffix: str
    picture: Path | bytes
    size: int  # bytes of the picture
    caption: Path | None = None  # a file of CAPTIONS
    text: str | None = None  # a caption of a table; stronger than `caption`
    fields: Path | None = None  # a JSON file of the same name


@dataclass
class Source:
    """What a listing found beside its rows."""

    kind: str
    folder: Path
    troubles: Troubles = field(default_factory=Troubles)
    others: Counter[str] = field(default_factory=Counter)  # files by suffix that are neither


def key_of(path: str) -> bytes:
    """Returns the key of a picture: its path in the folder without the suffix. A key ends at the first
    dot of its last part, so dots there become underscores.
    """
    stem = path.rpartition(".")[0]
    folder, slash, base = stem.rpartition("/")
    return os.fsencode(f"{folder}{slash}{base.replace('.', '_')}")


def suffix_of(name: str) -> str:
    """Returns the suffix of a file's name in lower case; empty where it has none."""
    stem, _, suffix = name.rpartition(".")
    return suffix.lower() if stem else ""


class Listing:
    """The rows of files, which are added in any order and come back sorted by the bytes of their keys.
    Of several pictures of one key the first by `rank`, suffix and name is the row. Without a `path` the
    database is a temporary file of SQLite's own, which has no name and ends with the process.
    """

    def __init__(self, path: Path | None, source: Source, advance: Callable[[int], None]) -> None:
        self.source, self._advance = source, advance
        if path is not None:
            path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path or "", isolation_level=None)
        # a database of one run, made again by the next: nothing of it must outlive a crash
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size={CACHE}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute(
            "CREATE TABLE items (key BLOB, rank INT, suffix INT, picture BLOB, line INT, size INT,"
            " time INT, caption BLOB, caption_time INT, text TEXT, fields BLOB,"
            " PRIMARY KEY (key, rank, suffix, picture, line)) WITHOUT ROWID"
        )
        self._database.execute("CREATE TABLE folded (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction: else each row is written by itself
        self._line = 0
        self.rows = self.bytes = 0
        self.digest = ""

    def close(self) -> None:
        self._database.close()

    def add(
        self, picture: str, status: os.stat_result, caption: str | None = None,
        caption_time: int = 0, text: str | None = None, fields: str | None = None, rank: int = 0,
    ) -> None:  # fmt: skip
        """Adds a picture by its path in the folder, with the files of its captions likewise."""
        suffix = suffix_of(picture)
        self._line += 1
        if self._line % AT_ONCE == 0:
            self._advance(AT_ONCE)
        files = (None if name is None else os.fsencode(name) for name in (caption, fields))
        caption_name, fields_name = files
        self._database.execute(
            "INSERT INTO items VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (key_of(picture), rank, PICTURES.index(suffix), os.fsencode(picture), self._line,
             status.st_size, status.st_mtime_ns, caption_name, caption_time, text, fields_name),
        )  # fmt: skip

    def finish(self) -> None:
        """Counts the rows and what of them is not packed, once all are added."""
        self._advance(self._line % AT_ONCE)
        digest, database = hashlib.sha256(), self._database
        for row in self._sorted():
            key, _, _, picture, _, size, time, caption, caption_time, text, fields = row
            words = (key, picture, size, time, caption, caption_time, text, fields)
            digest.update(repr(words).encode(errors="surrogateescape"))
            self.rows += 1
            self.bytes += size
            folded = os.fsencode(os.fsdecode(key).lower())
            if not database.execute("INSERT OR IGNORE INTO folded VALUES (?)", (folded,)).rowcount:
                self.source.troubles.add("case_only", os.fsdecode(key))
        database.execute("COMMIT")
        self.digest = digest.hexdigest()

    def _sorted(self) -> Iterator[tuple[Any, ...]]:
        """Yields the first row of each key, and counts the others once."""
        last: tuple[Any, ...] = (None,)
        with closing(self._database.cursor()) as cursor:
            for row in cursor.execute(
                "SELECT * FROM items ORDER BY key, rank, suffix, picture, line"
            ):
                if row[0] != last[0]:
                    last = row
                    yield row
                elif not self.digest and not (row[1] > last[1] and row[3] == last[3]):
                    self.source.troubles.add("doubles", os.fsdecode(row[3]))

    def items(self, start: int) -> Iterator[Item]:
        """Yields the rows in their order, from number `start` on."""
        folder = self.source.folder

        def path(name: bytes | None) -> Path | None:
            return None if name is None else folder / os.fsdecode(name)

        for number, row in enumerate(self._sorted()):
            if number >= start:
                key, _, suffix, picture, _, size, _, caption, _, text, fields = row
                yield Item(
                    number, key, PICTURES[suffix], folder / os.fsdecode(picture), size, path(caption),
                    text, path(fields),
                )  # fmt: skip


class Inside:
    """Says whether a path is below a folder, links followed. Of text, which is several times faster
    than `Path` for millions of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._root = f"{self.folder}/" if self.folder.name else "/"
        self._parents: dict[str, str | None] = {}

    def full(self, name: str) -> str:
        """Returns the absolute path of a file that is named from the folder."""
        return self._root + name

    def path(self, place: str) -> str | None:
        """Returns the path in the folder of a file that is named in full or from the folder; None for
        one that is elsewhere.
        """
        parent, name = os.path.split(os.path.join(self._root, place))
        folder = self._parent(parent)
        if folder is None or name in ("", ".", ".."):
            return None
        full = folder + name
        if os.path.islink(full):
            full = os.path.realpath(full)
        return full.removeprefix(self._root) if full.startswith(self._root) else None

    def _parent(self, parent: str) -> str | None:
        """Returns a folder's own path with a slash at its end; None where it is elsewhere."""
        if parent not in self._parents:
            if len(self._parents) > 1 << 16:
                self._parents.clear()
            path = os.path.join(os.path.realpath(parent), "")
            self._parents[parent] = path if path.startswith(self._root) else None
        return self._parents[parent]


def status_of(path: str) -> os.stat_result:
    """Returns the status of a regular file; OSError for what is none, or has no name that fits."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path}: no file, but a pipe, a device or a folder")
    if len(path) > MAX_TEXT:
        raise OSError(f"{path}: a name of over {MAX_TEXT} characters")
    return status
