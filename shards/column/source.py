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

from ..errors import CorruptColumn, NotAColumn, NotARecord, ShardsError, SourceChanged
from ..format.atomic import WHOLE_BYTES, Json, canonical_json, sha256
from ..format.layout import INDEX, SHARD_ROWS, SOURCE, VERSION, refuse_difference
from ..format.records import INDEX_ROW, SourceRecord, parse, parse_index_head, sealed
from ..store.base import Place, Store
from ..store.open import open_store


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

    def check(self, folder: Place) -> None:
        """Raises IdentityMismatch if source.json exists and is of another source, NotARecord if no
        reader would take this one; writes nothing.
        """
        folder = open_store(folder)
        self._sealed(folder)
        if folder.size("source.json") is not None:
            record = folder.unseal("source.json", SOURCE, VERSION)
            record.pop("digest")
            refuse_difference(
                f"{folder.at('source.json')}: the source recorded here",
                record,
                self.record(),
                "New or changed tars are a new source: give it another name",
            )

    def _sealed(self, folder: Store) -> bytes:
        return sealed(self.record(), SourceRecord, folder.at("source.json"))

    def put(self, folder: Place) -> None:
        """Writes source.json, or checks the one that exists."""
        folder = open_store(folder)
        folder.put_if_absent("source.json", self._sealed(folder))
        self.check(folder)


def open_source(folder: Place) -> Source:
    """Returns the source of `<root>/<source>/source.json`."""
    folder = open_store(folder)
    record = folder.record("source.json", SourceRecord)
    return Source(record.name, tuple(record.tars), record.shard_rows)


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One sample of a tar: its key, where its members are, and what its captions are."""

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
        """Returns the index file: canonical JSON lines, the same bytes for the same tar."""
        head = {
            "format": INDEX, "version": VERSION, "source": source, "shard": shard,
            "rows": len(rows), "note": note,
        }  # fmt: skip
        lines = [canonical_json([row.key, dict(row.members), dict(row.captions)]) for row in rows]
        return b"".join([canonical_json(head), *lines])

    @classmethod
    def decode(cls, data: bytes, path: str) -> ShardIndex:
        try:
            first, *lines = map(json.loads, data.splitlines())
            head = parse_index_head(first, path)
            rows = [IndexRow(*parse(line, INDEX_ROW, path, "index")) for line in lines]
            if head.rows != len(rows):
                raise ValueError(f"{len(rows)} rows, the header says {head.rows}")
        except ShardsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptColumn(f"{path}: damaged index ({error})") from None
        return cls(head.source, head.shard, rows, head.note, sha256(data))


def index_name(shard: int) -> str:
    return f"index/{shard:05d}.jsonl"


def read_index(folder: Place, shard: int) -> ShardIndex:
    """Returns the index of one tar of the source at `folder`."""
    folder, name = open_store(folder), index_name(shard)
    try:
        return ShardIndex.decode(folder.read(name), folder.at(name))
    except FileNotFoundError:
        raise NotAColumn(
            f"{folder.at(name)}: this tar has not been read yet; encode it first"
        ) from None


def put_index(
    folder: Place, source: str, shard: int, rows: Sequence[IndexRow], note: str | None
) -> ShardIndex:
    """Writes the index of a tar, or checks that the one that exists has the same rows (SourceChanged
    otherwise) and returns that one: an older program may have noted less of the same tar.
    """
    folder = open_store(folder)
    data = ShardIndex.encode(source, shard, rows, note)
    index = ShardIndex(source, shard, rows, note, sha256(data))
    if len(data) > WHOLE_BYTES:
        raise NotARecord(
            f"{folder.at(index_name(shard))}: nothing was written: {len(data)} bytes for {len(rows)} "
            f"rows, at most {WHOLE_BYTES} are read back. Split the tar"
        )
    if not folder.put_if_absent(index_name(shard), data):
        first = read_index(folder, shard)
        if first.note is None and first.digest != index.digest:
            data = ShardIndex.encode(source, shard, rows, None)
            index = ShardIndex(source, shard, rows, None, sha256(data))
        if first.digest != index.digest:
            raise SourceChanged(
                f"{folder.at(index_name(shard))}: tar {shard} held {len(first.rows)} rows when "
                f"it was first read and holds {len(rows)} now, or other members or captions. "
                "Columns would no longer line up: restore the tar, or make it a new source"
            )
    return index
