"""Read a column: every row straight from its place in a file into the caller's array, no decoding
in between.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .commits import Generation, generation_of_commits, read_complete
from .errors import CorruptColumn, NotAColumn
from .schema import BLOCK, COLUMN, VERSION, ZARR_ROWS, ArraySpec, ColumnSpec
from .storage import unseal
from .zarrfile import check_index, crc32c, read_elements, read_into

OPEN_FILES = 256


class Files:
    """Open objects of a column, each checked once when it is opened; the least recently used are
    closed.
    """

    def __init__(self, column: Path, arrays: dict[str, ArraySpec]) -> None:
        self._column, self._arrays = column, arrays
        self._open: OrderedDict[tuple[str, int], int] = OrderedDict()

    def get(self, array: str, number: int) -> tuple[int, str]:
        """Descriptor and name of an object."""
        key, spec = (array, number), self._arrays[array]
        path = f"{self._column}/{array}/{spec.key(number)}"
        if key not in self._open:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptColumn(
                    f"{path}: the object is missing though its shard is committed. Restore it, or "
                    "repair the column"
                ) from None
            try:
                check_index(descriptor, spec, path)
            except CorruptColumn:
                os.close(descriptor)
                raise
            self._open[key] = descriptor
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(key)
        return self._open[key], path

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def open_spec(path: Path) -> tuple[ColumnSpec, str]:
    """What column.json says, and its digest."""
    if not path.is_dir():
        raise NotAColumn(
            f"{path}: no such folder. Expected a column, as `python -m encode run` makes"
        )
    record = unseal(path / "column.json", COLUMN, VERSION)
    try:
        return ColumnSpec.from_record(record), str(record["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptColumn(f"{path / 'column.json'}: damaged record ({error})") from None


class Column:
    """One column, open for reading. Rows are named by row id, in any order.

    `spec` says what the column is, `generation` which rows it holds. Safe to use from one thread
    at a time; a copy made by pickle opens its own files.
    """

    def __init__(self, path: Path, spec: ColumnSpec, digest: str, generation: Generation) -> None:
        self.path, self.spec, self.digest, self.generation = path, spec, digest, generation
        self.layout = spec.layout
        self._arrays = spec.arrays()
        self._files = Files(path, self._arrays)
        self._small: dict[tuple[str, int], NDArray[Any]] = {}

    @classmethod
    def open(cls, path: Path | str, partial: bool = False) -> Column:
        """Open a column by its newest COMPLETE record, or with `partial` by the commits that stand
        now.

        Raises NotAColumn, IncompleteColumn, FormatVersion or CorruptColumn.
        """
        path = Path(path)
        spec, digest = open_spec(path)
        generation = (
            generation_of_commits(path, digest, spec.layout.shards)
            if partial
            else read_complete(path, digest)
        )
        return cls(path, spec, digest, generation)

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.path, self.spec, self.digest, self.generation)

    def words(self, truncated: bool = False) -> NDArray[np.uint32]:
        """Valid-row bits over all row ids, (shards * shard_rows / 32,) uint32; with status 1
        admitted if asked.
        """
        per_shard = self.layout.shard_rows // BLOCK
        words = np.zeros(self.layout.shards * per_shard, np.uint32)
        start = 0
        for shard, rows in enumerate(self.generation.rows):
            count = -(-rows // BLOCK)
            words[shard * per_shard :][:count] = self.generation.words[start : start + count]
            start += count
        for shard, first, count in self.generation.truncated if truncated else ():
            ids = shard * self.layout.shard_rows + np.arange(first, first + count)
            np.bitwise_or.at(words, ids // BLOCK, np.uint32(1) << (ids % BLOCK).astype(np.uint32))
        return words

    def _of_block(self, array: str, block: int) -> NDArray[Any]:
        """`lengths`, `status` or `crc` of the 1,024 rows from row id block * 1024 on; kept, 2-4 KB
        each.
        """
        key = (array, block)
        if key not in self._small:
            shard, inner = divmod(block, self.layout.blocks_per_shard)
            descriptor, name = self._files.get(array, shard)
            rows = min(ZARR_ROWS, self.generation.rows[shard] - inner * ZARR_ROWS)
            if rows <= 0:
                raise IndexError(f"{self.path}: no row {block * ZARR_ROWS} in shard {shard}")
            self._small[key] = read_elements(
                descriptor, self._arrays[array], inner * ZARR_ROWS, rows, name
            )
        return self._small[key]

    def _starts(self, block: int) -> NDArray[np.int64]:
        """Token offset at which each row of a block starts, and the end of the last: (rows +
        1,).
        """
        key = ("starts", block)
        if key not in self._small:
            lengths = self._of_block("lengths", block)
            self._small[key] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return self._small[key]

    def status(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Status of each row id."""
        return np.array([self._of_block("status", b)[i] for b, i in split(rows)], np.uint8)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of tokens of each row id (0 where the column holds moments)."""
        if not self.layout.ragged:
            return np.zeros(len(rows), np.int64)
        return np.array([self._of_block("lengths", b)[i] for b, i in split(rows)], np.int64)

    def checksums(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        """crc32c of each row id's values as stored."""
        return np.array([self._of_block("crc", b)[i] for b, i in split(rows)], np.uint32)

    def read_into(self, rows: NDArray[np.int64], out: NDArray[Any], check: bool = False) -> None:
        """Read rows into `out`: (B, 2C, H, W) float16, or (sum of lengths, D) bfloat16 words laid
        end to end.

        With `check`, every row's crc32c is compared with the stored one (CorruptColumn names shard
        and row).
        """
        unit, kind, at = self.layout.unit_bytes, self.layout.kind, 0
        for row, (block, inside) in zip(rows.tolist(), split(rows), strict=True):
            if self.layout.ragged:
                starts = self._starts(block)
                first, count = int(starts[inside]), int(starts[inside + 1] - starts[inside])
            else:
                first, count = inside, 1
            target = out[at : at + count]
            at += count
            if count:
                descriptor, name = self._files.get(kind, block)
                read_into(descriptor, target, first * unit, name)
            if check and crc32c(target.reshape(-1)) != self._of_block("crc", block)[inside]:
                shard, place = divmod(row, self.layout.shard_rows)
                raise CorruptColumn(
                    f"{self.path}: row {place} of shard {shard} (row id {row}) does not fit its "
                    "checksum. Run "
                    f"`python -m shards verify {self.path}` for all that is damaged, then restore "
                    "or encode it again"
                )

    def read(self, rows: NDArray[np.int64], check: bool = False) -> NDArray[Any]:
        """Rows as a new array; see `read_into`."""
        count = int(self.lengths(rows).sum()) if self.layout.ragged else len(rows)
        out = np.empty((count, *self.layout.unit_shape), self.layout.dtype)
        self.read_into(rows, out, check)
        return out

    def empty(self) -> NDArray[np.uint16]:
        """The empty caption's tokens, (n, D) bfloat16 words."""
        spec = self._arrays["empty"]
        descriptor, name = self._files.get("empty", 0)
        return read_elements(descriptor, spec, 0, spec.shape[0], name)

    def close(self) -> None:
        self._files.close()


def split(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(block of 1,024 rows, place in it) of each row id."""
    blocks, inside = np.divmod(rows, ZARR_ROWS)
    return zip(blocks.tolist(), inside.tolist(), strict=True)
