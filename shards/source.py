"""What a source is, and what its tars hold row by row.

    <root>/<source>/source.json        the tars in order, their sizes, the fingerprint
    <root>/<source>/index/<s>.jsonl    tar s: a header line, then a line a row; written once by whoever reads it first

A row is the position of a sample in its tar. It is never renumbered: a sample that cannot be
decoded keeps its row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import CorruptColumn, FormatVersion, NotAColumn, SourceChanged
from .schema import INDEX, SHARD_ROWS, SOURCE, VERSION, refuse_difference
from .storage import Json, canonical_json, put_if_absent, seal, sha256, unseal


@dataclass(frozen=True, slots=True)
class Source:
    """An ordered list of tars, known by base name and size. Other tars, or another order, are
    another source.
    """

    name: str
    tars: tuple[tuple[str, int], ...]  # (base name, bytes)
    shard_rows: int = SHARD_ROWS

    @property
    def fingerprint(self) -> str:
        return sha256(canonical_json([list(tar) for tar in self.tars]))

    def record(self) -> Json:
        return {
            "format": SOURCE,
            "version": VERSION,
            "name": self.name,
            "tars": [list(tar) for tar in self.tars],
            "shard_rows": self.shard_rows,
            "fingerprint": self.fingerprint,
        }

    def check(self, folder: Path) -> None:
        """Raise IdentityMismatch if source.json stands and is of another source; writes nothing."""
        path = folder / "source.json"
        if path.exists():
            standing = unseal(path, SOURCE, VERSION)
            standing.pop("digest")
            refuse_difference(
                f"{path}: the source recorded here",
                standing,
                self.record(),
                "New or changed tars are a new source: give it another name",
            )

    def put(self, folder: Path) -> None:
        """Write source.json, or check the one that stands."""
        put_if_absent(folder / "source.json", seal(self.record()))
        self.check(folder)


def open_source(folder: Path) -> Source:
    """Read source.json of `<root>/<source>`."""
    record = unseal(folder / "source.json", SOURCE, VERSION)
    tars = tuple((str(name), int(size)) for name, size in record["tars"])
    return Source(record["name"], tars, record["shard_rows"])


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a tar: its key, where its members stand, and what its captions are."""

    key: str
    members: Mapping[str, tuple[int, int]]  # suffix -> (offset of the bytes in the tar, size)
    captions: Mapping[str, str]  # suffix -> sha256 of the caption's bytes


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The rows of one tar, with a note where the tar is cut off."""

    source: str
    shard: int
    rows: Sequence[IndexRow]
    note: str | None
    digest: str

    @staticmethod
    def encode(source: str, shard: int, rows: Sequence[IndexRow], note: str | None) -> bytes:
        """The index file: canonical JSON lines, the same bytes for the same tar."""
        head = {
            "format": INDEX, "version": VERSION, "source": source, "shard": shard,
            "rows": len(rows), "note": note,
        }  # fmt: skip
        lines = [canonical_json([row.key, dict(row.members), dict(row.captions)]) for row in rows]
        return b"".join([canonical_json(head), *lines])

    @classmethod
    def decode(cls, data: bytes, path: Path) -> ShardIndex:
        try:
            head, *lines = map(json.loads, data.splitlines())
            found, version = head["format"], head["version"]
            if (found, version) != (INDEX, VERSION):
                raise FormatVersion(
                    f"{path}: found format {found!r} version {version!r}, this program reads "
                    f"{INDEX!r} version {VERSION}. Use the release that wrote it"
                )
            rows = [
                IndexRow(key, {k: (o, n) for k, (o, n) in members.items()}, captions)
                for key, members, captions in lines
            ]
            index = cls(head["source"], head["shard"], rows, head["note"], sha256(data))
            if head["rows"] != len(rows):
                raise ValueError(f"{len(rows)} rows, the header says {head['rows']}")
        except FormatVersion:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptColumn(f"{path}: damaged index ({error})") from None
        return index


def index_path(folder: Path, shard: int) -> Path:
    return folder / "index" / f"{shard:05d}.jsonl"


def read_index(folder: Path, shard: int) -> ShardIndex:
    """The index of one tar of the source at `folder`."""
    path = index_path(folder, shard)
    try:
        return ShardIndex.decode(path.read_bytes(), path)
    except FileNotFoundError:
        raise NotAColumn(f"{path}: this tar has not been read yet; encode it first") from None


def put_index(
    folder: Path, source: str, shard: int, rows: Sequence[IndexRow], note: str | None
) -> ShardIndex:
    """Write the index of a tar, or check that the one standing says the same (SourceChanged
    otherwise).
    """
    data, path = ShardIndex.encode(source, shard, rows, note), index_path(folder, shard)
    index = ShardIndex(source, shard, rows, note, sha256(data))
    if not put_if_absent(path, data):
        standing = read_index(folder, shard)
        if standing.digest != index.digest:
            raise SourceChanged(
                f"{path}: tar {shard} held {len(standing.rows)} rows when it was first read and "
                "holds "
                f"{len(rows)} now, or other members or captions. Columns would no longer line up: "
                "restore the tar, or make it a new source"
            )
    return index
