"""A mask of rows: one file that names rows of a source, for a run that trains on these alone.

    line 1       a sealed JSON record: the source, rows and index digest of each tar, what it was made of
    the rest     a bit a row, as beside a COMPLETE record: uint32 words, ceil(rows / 32) of each tar

It is joined like the statuses of a column, and belongs to all columns of its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import BadMask, CorruptColumn, FormatVersion
from ..format.atomic import WHOLE_BYTES, Json, canonical_json, sha256, unseal_bytes
from ..format.layout import BLOCK, MASK, VERSION
from ..format.records import MaskRecord, parse, sealed
from ..store.base import Place, Store
from ..store.open import open_store
from .commits import spread_words

MAKE = "Make one with `python -m shards mask COLUMN --keys FILE --out MASK`"


@dataclass(frozen=True, slots=True)
class Mask:
    """Rows of a source. `words` has the bits of all tars laid end to end, of row 32b + i of a tar in
    bit i of its word b; `made` says what it was made of.
    """

    path: str
    source: str
    shard_rows: int
    rows: tuple[int, ...]  # of each tar; 0 where it had not been read
    index: tuple[str | None, ...]  # digest of each tar's index, as commits name it
    words: NDArray[np.uint32]
    made: Json

    @property
    def digest(self) -> str:
        """Returns the digest of which rows of which source are named, whatever file named them."""
        bits = sha256(self.row_bits().astype("<u4").tobytes())
        return sha256(canonical_json([self.source, self.shard_rows, bits]))

    @property
    def kept(self) -> int:
        """Returns how many rows are named."""
        return int(np.bitwise_count(self.words).sum())

    def row_bits(self) -> NDArray[np.uint32]:
        """Returns one bit for each row id, as `Column.valid_mask` does."""
        return spread_words(self.words, self.rows, self.shard_rows)

    def record(self) -> Json:
        """Returns the first line before sealing."""
        return {
            "format": MASK,
            "version": VERSION,
            "source": self.source,
            "shard_rows": self.shard_rows,
            "shards": [list(shard) for shard in zip(self.rows, self.index, strict=True)],
            "kept": self.kept,
            "made": self.made,
            "valid": {"words": self.words.size, "sha256": sha256(self._bytes())},
        }

    def put(self, file: Place) -> bool:
        """Writes the file, unless it exists: BadMask then if it holds another mask; returns whether it
        is new.
        """
        store, name = _split(file)
        data = sealed(self.record(), MaskRecord, store.at(name)) + self._bytes()
        if len(data) > WHOLE_BYTES:
            raise BadMask(
                f"{store.at(name)}: {len(data)} bytes, at most {WHOLE_BYTES} are read back"
            )
        if store.put_if_absent(name, data):
            return True
        if store.read(name) != data:
            raise BadMask(
                f"{store.at(name)}: another file of this name exists, and was left as it is. Name "
                "another one with --out, or remove it first: runs that were begun with it do not go on "
                "without it"
            )
        return False

    def _bytes(self) -> bytes:
        return self.words.astype("<u4").tobytes()


def read_mask(file: Place) -> Mask:
    """Returns the mask in a file; BadMask where there is none or it is damaged, FormatVersion for one
    of a newer release.
    """
    store, name = _split(file)
    path = store.at(name)
    try:
        size = store.size(name)
        if size is None:
            raise FileNotFoundError
        if size > WHOLE_BYTES:
            raise CorruptColumn(f"{path}: {size} bytes")
        line, _, bits = store.read(name).partition(b"\n")
        record = parse(unseal_bytes(line + b"\n", path, MASK, VERSION), MaskRecord, path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadMask(f"{path}: no such file, expected a mask of rows. {MAKE}") from None
    except FormatVersion as error:
        if error.newer:
            raise
        raise BadMask(f"{path}: found a record of another kind, no mask of rows. {MAKE}") from None
    except CorruptColumn:
        raise BadMask(
            f"{path}: found no sound mask of rows: a list of keys, or a damaged file. {MAKE}"
        ) from None
    if len(bits) != 4 * record.valid.words or sha256(bits) != record.valid.sha256:
        raise BadMask(
            f"{path}: its bits are damaged or cut off. Copy it again, or remake it. {MAKE}"
        )
    words = np.frombuffer(bits, "<u4").astype(np.uint32)
    mask = Mask(
        path, record.source, record.shard_rows, tuple(rows for rows, _ in record.shards),
        tuple(index for _, index in record.shards), words, record.made,
    )  # fmt: skip
    if mask.kept != record.kept or np.any(words & ~all_rows(mask.rows)):
        raise BadMask(f"{path}: its bits are not those of its rows. {MAKE}")
    return mask


def all_rows(rows: Sequence[int]) -> NDArray[np.uint32]:
    """Returns the words of a mask that names every row of tars of so many rows."""
    parts = [np.zeros(0, np.uint32)]
    for count in rows:
        part = np.full(-(-count // BLOCK), 2**BLOCK - 1, np.uint32)
        if count % BLOCK:
            part[-1] = (1 << count % BLOCK) - 1
        parts.append(part)
    return np.concatenate(parts)


def _split(file: Place) -> tuple[Store, str]:
    """Returns the folder of a file, and its name there."""
    if isinstance(file, Store):
        return file.parent, file.name
    folder, _, name = str(file).rpartition("/")
    local = isinstance(file, Path) or "://" not in str(file)
    if not name or name in (".", ".."):
        raise BadMask(f"{file}: a folder, expected the file of a mask. {MAKE}")
    if local:
        return open_store(Path(file).parent), name
    return open_store(folder), name
