"""Write one shard of a column: values block by block, then lengths, status and crc, and the commit
last.

Nothing is ever replaced. Where an object already stands (a crash or a second writer was here) it
is adopted: it is read back, and everything later is derived from the values that stand, so all
attempts end in the same commit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .commits import Commit, commit_path, read_commit
from .errors import CorruptColumn
from .schema import (
    COLUMN,
    HAS_VALUES,
    VERSION,
    ZARR_ROWS,
    ArraySpec,
    ColumnSpec,
    Status,
    refuse_difference,
)
from .storage import Json, put_if_absent, seal, sha256_file, staged, unseal
from .zarrfile import check_index, crc32c, pack, read_elements

BF16_NAN = np.uint16(0x7FC0)
Values = NDArray[Any] | Sequence[NDArray[Any]]


def check_column(column: Path, spec: ColumnSpec) -> str | None:
    """Digest of the column.json that stands in a folder, None if there is none; writes nothing.

    Raises IdentityMismatch, naming every differing field, if it is of another column.
    """
    path = column / "column.json"
    if not path.exists():
        return None
    standing = unseal(path, COLUMN, VERSION)
    digest = standing.pop("digest")
    refuse_difference(
        f"{path}: the column that stands here",
        standing,
        spec.record(),
        "Nothing was changed. Encode into another folder",
    )
    return str(digest)


def create_column(column: Path, spec: ColumnSpec) -> str:
    """Claim a folder for a column and return the digest of column.json; see `check_column`."""
    put_if_absent(column / "column.json", seal(spec.record()))
    digest = check_column(column, spec)
    for name, data in spec.zarr_json().items():
        if not put_if_absent(column / name, data) and (column / name).read_bytes() != data:
            raise CorruptColumn(f"{column / name}: not the Zarr metadata that column.json names")
    return str(digest)


def put_empty(column: Path, spec: ColumnSpec, tokens: NDArray[np.uint16]) -> None:
    """Store the empty caption's embedding, (n, D) bfloat16 words, beside the rows of a token
    column.
    """
    array = spec.arrays()["empty"]
    if tokens.shape != array.shape:
        raise ValueError(f"empty caption of shape {tokens.shape}, the column says {array.shape}")
    with staged(column / "empty" / array.key(0)) as file:
        pack(file, array, [tokens])
        file.publish()


def row_finite(values: Values, ragged: bool) -> NDArray[np.bool_]:
    """Which rows hold finite numbers only; an exponent of all ones is an infinity or a NaN."""
    mask = np.uint16(0x7F80 if ragged else 0x7C00)
    return np.array([bool(((row.view("<u2") & mask) != mask).all()) for row in values])


class ShardWriter:
    """Writes the rows of one shard in blocks of 1,024 (the last may be shorter), then commits.

    `rows` is how many the tar holds; `index` the digest of its index; `column_digest` that of
    column.json.
    """

    def __init__(
        self, column: Path, spec: ColumnSpec, column_digest: str, shard: int, rows: int, index: str
    ) -> None:
        self.column, self.spec, self.shard, self.rows = column, spec, shard, rows
        self._column_digest, self._index = column_digest, index
        self._arrays = spec.arrays()
        self._objects: list[tuple[str, int, str]] = []
        self._blocks: list[str] = []
        self._status = np.full(rows, Status.ABSENT, np.uint8)
        self._lengths = np.zeros(rows, np.uint16)
        self._crc = np.zeros(rows, np.uint32)
        self._next = 0

    def put_block(self, values: Values, status: NDArray[np.uint8]) -> None:
        """Write the next rows: (n, 2C, H, W) float16, or n arrays (tokens, D) of bfloat16 words.

        `status` says what became of each row in the input. A row without values is NaN (moments)
        or has no tokens; a row with a value that is not finite is stored as NaN and gets status
        NON_FINITE.
        """
        layout, start = self.spec.layout, self._next
        number = self.shard * layout.blocks_per_shard + start // ZARR_ROWS
        if start % ZARR_ROWS or len(values) != min(ZARR_ROWS, self.rows - start):
            raise ValueError(f"block of {len(values)} rows at row {start} of {self.rows}")
        has_values = np.isin(status, HAS_VALUES)
        values = self._blanked(values, has_values)
        lengths = np.array([len(v) for v in values] if layout.ragged else [0] * len(values))
        if layout.ragged and lengths.max(initial=0) > layout.row_shape[0]:
            raise ValueError(f"{lengths.max()} tokens in a row of at most {layout.row_shape[0]}")
        if not layout.ragged or lengths.sum():
            values = self._put_values(number, values, lengths)
        status = np.where(
            has_values & ~row_finite(values, layout.ragged), Status.NON_FINITE, status
        )
        at = slice(start, start + len(values))
        self._status[at], self._lengths[at] = status, lengths
        self._crc[at] = [crc32c(np.ascontiguousarray(row)) for row in values]
        self._blocks.append(
            block_digest(values, self._lengths[at] if layout.ragged else None, self._status[at])
        )
        self._next += len(values)

    def _blanked(self, values: Values, has_values: NDArray[np.bool_]) -> Values:
        """Rows without values blanked; a row with any non-finite value becomes NaN as a whole, its
        length kept.
        """
        if self.spec.layout.ragged:
            finite = row_finite(values, True)
            width = self.spec.layout.unit_shape
            return [
                np.zeros((0, *width), np.uint16) if not there
                else np.ascontiguousarray(row, "<u2") if good
                else np.full_like(row, BF16_NAN)
                for row, there, good in zip(values, has_values, finite, strict=True)
            ]  # fmt: skip
        dense = np.array(values, "<f2")
        dense[~(has_values & row_finite(dense, False))] = np.nan
        return dense

    def _put_values(self, number: int, values: Values, lengths: NDArray[Any]) -> Values:
        """Write one values object, or adopt the one that stands; returns the values that stand."""
        kind = self.spec.layout.kind
        array = self._arrays[kind]
        path = f"{kind}/{array.key(number)}"
        if self._put(path, array, [values] if isinstance(values, np.ndarray) else list(values)):
            return values
        count = int(lengths.sum()) if self.spec.layout.ragged else len(values)
        standing = self._read(path, array, count)
        if not self.spec.layout.ragged:
            return standing
        return np.split(standing, np.cumsum(lengths)[:-1])

    def _put(self, path: str, array: ArraySpec, parts: list[NDArray[Any]]) -> bool:
        """Write an object whole, if absent; either way record the size and sha256 of what
        stands.
        """
        with staged(self.column / path) as file:
            pack(file, array, parts)
            new = file.publish()
            size, digest = file.bytes, file.sha256
        if not new:
            size, digest = (self.column / path).stat().st_size, sha256_file(self.column / path)
        self._objects.append((path, size, digest))
        return new

    def _read(self, path: str, array: ArraySpec, count: int) -> NDArray[Any]:
        """The `count` elements of an object that stands, which must hold exactly so many."""
        name = str(self.column / path)
        with opened(self.column / path) as descriptor:
            held = check_index(descriptor, array, name)
            if held != count + -count % array.chunk_len:
                raise CorruptColumn(
                    f"{name}: an object of {held} elements stands where {count} were to be "
                    "written. "
                    "It is of no commit: delete it and encode again"
                )
            return read_elements(descriptor, array, 0, count, name)

    def commit(self, provenance: Json) -> Commit:
        """Write what was learnt of the rows and, last, the commit record; adopts a commit that
        stands.
        """
        if self._next != self.rows:
            raise ValueError(f"commit after {self._next} of {self.rows} rows")
        learnt: dict[str, NDArray[Any]] = {
            "lengths": self._lengths,
            "status": self._status,
            "crc": self._crc,
        }
        for name, data in learnt.items() if self.rows else ():
            if name not in self._arrays:
                continue
            array = self._arrays[name]
            path = f"{name}/{array.key(self.shard)}"
            if not self._put(path, array, [data]) and not np.array_equal(
                self._read(path, array, self.rows), data
            ):
                raise CorruptColumn(
                    f"{self.column / path}: what stands does not fit the values that stand beside "
                    "it. "
                    "It is of no commit: delete it and encode again"
                )
        if "empty" in self._arrays:
            path = f"empty/{self._arrays['empty'].key(0)}"
            file = self.column / path
            self._objects.append((path, file.stat().st_size, sha256_file(file)))
        commit = Commit(
            self.shard, self.rows, runs(self._status), tuple(self._objects), tuple(self._blocks),
            self._index, self._column_digest, provenance,
        )  # fmt: skip
        put_if_absent(commit_path(self.column, self.shard), seal(commit.record()))
        standing = read_commit(self.column, self.shard)
        refuse_difference(
            f"{commit_path(self.column, self.shard)}: the commit of shard {self.shard}",
            standing.content,
            commit.content,
            "Two writers disagree about one shard: run `python -m shards verify` on the column",
        )
        return standing


def block_digest(
    values: Values, lengths: NDArray[np.uint16] | None, status: NDArray[np.uint8]
) -> str:
    """The logical digest of up to 1,024 rows: values, lengths, statuses; the same for every
    backend and codec.
    """
    digest = hashlib.sha256()
    for row in values:
        digest.update(np.ascontiguousarray(row).data)
    if lengths is not None:
        digest.update(lengths.astype("<u2").data)
    digest.update(status.astype(np.uint8).data)
    return digest.hexdigest()


def runs(status: NDArray[np.uint8]) -> tuple[tuple[int, int, int], ...]:
    """Runs of rows that are not ok: (first row, count, status)."""
    edges = np.flatnonzero(np.diff(status, prepend=np.uint8(0), append=np.uint8(0)))
    spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return tuple((a, b - a, int(status[a])) for a, b in spans if status[a] != Status.OK)


@contextmanager
def opened(path: Path) -> Any:
    """A file descriptor for reading."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
