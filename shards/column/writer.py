"""Writes one shard of a column: values block by block, then lengths, status and crc, and the commit
last.

Nothing is ever replaced. Where an object exists already (a crash or a second writer was here) it
is adopted: it is read back, and everything later is derived from the values in it, so all
attempts end in the same commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptColumn, IncompleteColumn, SourceChanged
from ..format.atomic import Json
from ..format.int8 import dequantise_rows, to_floats
from ..format.layout import (
    COLUMN,
    HAS_VALUES,
    SCALE_BYTES,
    VERSION,
    ZARR_ROWS,
    ColumnSpec,
    Layout,
    Status,
    refuse_difference,
)
from ..format.records import ColumnRecord, CommitRecord, sealed
from ..store.base import Place, Store
from ..store.open import open_store
from .checksum import crc32c
from .commits import Commit, commit_name, read_commit
from .statistics import LATENTS, Sums, block_sums, latent_shape, put_statistics
from .values import (
    TarValues,
    Values,
    ZarrValues,
    finite_rows,
    put_object,
    read_object,
    sha256_of,
)
from .zarr_object import pack

# a change of a channel or token beyond this share of its L2 norm is no rounding: machines differ by
# a twentieth at most, see encode/models/rehearsal.py
OTHER = 0.5


def check_column(column: Place, spec: ColumnSpec) -> str | None:
    """Returns the digest of the column.json in a folder, None if there is none; writes nothing.

    Raises IdentityMismatch, naming every differing field, if it is of another column; NotARecord if
    no reader would take this one.
    """
    column = open_store(column)
    sealed(spec.record(), ColumnRecord, column.at("column.json"))
    if column.size("column.json") is None:
        return None
    record = column.unseal("column.json", COLUMN, VERSION)
    digest = record.pop("digest")
    refuse_difference(
        f"{column.at('column.json')}: the column that exists here",
        record,
        spec.record(),
        "Nothing was changed. Encode into another folder",
    )
    return str(digest)


def create_column(column: Place, spec: ColumnSpec) -> str:
    """Claims a folder for a column and returns the digest of column.json; see `check_column`."""
    column = open_store(column)
    name = "column.json"
    column.put_if_absent(name, sealed(spec.record(), ColumnRecord, column.at(name)))
    digest = check_column(column, spec)
    for name, data in spec.zarr_json().items():
        if not column.put_if_absent(name, data) and column.read(name) != data:
            raise CorruptColumn(f"{column.at(name)}: not the Zarr metadata that column.json names")
    return str(digest)


def put_empty(column: Place, spec: ColumnSpec, tokens: NDArray[Any]) -> None:
    """Stores the empty caption, (n, D) bfloat16 words or (n,) ids, beside a column of text."""
    array = spec.arrays()["empty"]
    if tokens.shape != array.shape:
        raise ValueError(f"empty caption of shape {tokens.shape}, the column says {array.shape}")
    with open_store(column).staged(f"empty/{array.key(0)}") as file:
        pack(file, array, [tokens])
        file.publish()


class ShardWriter:
    """Writes the rows of one shard in blocks of 1,024 (the last may be shorter), then commits.

    `rows` is how many the tar holds; `index` the digest of its index; `column_digest` that of
    column.json. Close it, or use it in `with`, where it may be left before the commit. With
    `statistics` the sums over rows of moments or latents are stored after the commit.
    """

    def __init__(
        self, column: Place, spec: ColumnSpec, column_digest: str, shard: int,
        rows: int, index: str, statistics: bool = False,
    ) -> None:  # fmt: skip
        self.store, self.spec, self.shard, self.rows = open_store(column), spec, shard, rows
        if not 0 <= rows <= spec.layout.shard_rows:
            raise ValueError(f"{rows} rows in a shard of at most {spec.layout.shard_rows}")
        self._column_digest, self._index = column_digest, index
        self._arrays = spec.arrays()
        self._objects: list[tuple[str, int, str]] = []
        self._blocks: list[str] = []
        self._input_status = np.full(rows, Status.ABSENT, np.uint8)
        self._status = self._input_status.copy()  # NON_FINITE by the values, too
        self._lengths = np.zeros(rows, np.uint16)
        self._crc = np.zeros(rows, np.uint32)
        self._next, self._committing = 0, False
        self._measures = statistics and spec.layout.kind in LATENTS
        self._start_sums()
        backend = TarValues if spec.layout.backend == "webdataset" else ZarrValues
        self._values: ZarrValues | TarValues = backend(self.store, spec.layout, shard)

    def put_block(self, values: Values, status: NDArray[np.uint8]) -> None:
        """Writes the next rows: (n, 2C, H, W) float16, or n arrays (tokens, D) of bfloat16 words.

        `status` says what became of each row in the input. A row without values is NaN (moments)
        or has no tokens; a row with a value that is not finite is stored as NaN and gets status
        NON_FINITE.
        """
        layout, start = self.spec.layout, self._next
        if start % ZARR_ROWS or len(values) != min(ZARR_ROWS, self.rows - start):
            raise ValueError(f"block of {len(values)} rows at row {start} of {self.rows}")
        for row in values:
            if (row.shape[1:] if layout.ragged else row.shape) != layout.unit_shape:
                raise ValueError(f"a row of shape {row.shape}, the column says {layout.row_shape}")
            if row.dtype != layout.dtype:
                raise ValueError(f"a row of {row.dtype}, the column holds words of {layout.dtype}")
        values = _blanked(layout, values, np.isin(status, HAS_VALUES))
        lengths = np.array([len(v) for v in values] if layout.ragged else [0] * len(values))
        if lengths.max(initial=0) > layout.row_shape[0] * layout.ragged:
            raise ValueError(f"{lengths.max()} tokens in a row of at most {layout.row_shape[0]}")
        self._input_status[start : start + len(values)] = status
        adopted = self._values.put(start, values, lengths, status)
        if adopted is not values and (rows := _of_another_input(layout, values, adopted)):
            raise CorruptColumn(
                f"{self.store.at(self._values.objects[-1][0])}: its rows "
                f"{[start + i for i in rows[:8]]} ({len(rows)} in all) were made of other captions "
                "or pictures, by an attempt that was cut off while the tar held those. It is of no "
                "commit: delete it and encode again"
            )
        self._derive(start, adopted, lengths)
        self._next += len(values)

    def _derive(self, start: int, values: Values, lengths: NDArray[Any]) -> None:
        """Derives status, crc and digest of a block from the values that the store has."""
        layout, at = self.spec.layout, slice(start, start + len(values))
        status = self._input_status[at]
        non_finite = np.isin(status, HAS_VALUES) & ~finite_rows(layout, values)
        self._status[at] = np.where(non_finite, Status.NON_FINITE, status)
        self._lengths[at] = lengths
        self._crc[at] = [crc32c(np.ascontiguousarray(row)) for row in values]
        self._blocks.append(
            block_digest(values, self._lengths[at] if layout.ragged else None, self._status[at])
        )

        if self._sums is not None:
            valid = np.flatnonzero(self._status[at] == Status.OK)
            rows = np.asarray(values)
            self._sums += block_sums(self.spec, len(valid), lambda part: rows[valid[part]])

    def _start_sums(self) -> None:
        self._sums = Sums.zero(latent_shape(self.spec.layout)) if self._measures else None

    def _adopt(self) -> None:
        """Derives all again from the tar that another writer published first."""
        self._values.close()
        self._values = TarValues(self.store, self.spec.layout, self.shard)
        self._blocks = []
        self._start_sums()
        for start in range(0, self.rows, ZARR_ROWS):
            at = slice(start, min(start + ZARR_ROWS, self.rows))
            lengths = self._lengths[at].astype(np.int64)
            self._derive(
                start, self._values.existing(start, lengths, self._input_status[at]), lengths
            )

    def commit(self, provenance: Json, members: Mapping[str, str] | None = None) -> Commit:
        """Writes what was derived of the rows and, last, the commit record; adopts a commit that
        exists. `members`: what was read of the tar, see `members`.
        """
        if self._next != self.rows:
            raise ValueError(f"commit after {self._next} of {self.rows} rows")
        self._committing = True
        if not self._values.finish():
            self._adopt()
        self._objects = list(self._values.objects)
        self.close()
        arrays: dict[str, NDArray[Any]] = {
            "lengths": self._lengths,
            "status": self._status,
            "crc": self._crc,
        }
        for name, data in arrays.items():
            if self.rows and name in self._arrays:
                self._put(name, data)
        if "empty" in self._arrays:
            path = f"empty/{self._arrays['empty'].key(0)}"
            self._objects.append((path, *sha256_of(self.store, path)))
        commit = Commit(
            self.shard, self.rows, runs(self._status), tuple(self._objects), tuple(self._blocks),
            self._index, self._column_digest, provenance, members or {},
        )  # fmt: skip
        name = commit_name(self.shard)
        self._check_objects()
        record = sealed(commit.record(), CommitRecord, self.store.at(name))
        self.store.put_if_absent(name, record)
        adopted = read_commit(self.store, self.shard)
        refuse_difference(
            f"{self.store.at(name)}: the commit of shard {self.shard}",
            adopted.content,
            commit.content,
            "Two writers disagree about one shard: run `python -m shards verify` on the column",
        )
        refuse_other_members(self.store, adopted, commit.members)
        if self._sums is not None:
            put_statistics(self.store, self._column_digest, self.shard, adopted.content, self._sums)
        return adopted

    def withdraw(self) -> None:
        """Deletes the values that this writer made, because its input turned out to be wrong. From
        `commit` on, or where another writer has committed them, they stay.
        """
        if not self._committing and self.store.size(commit_name(self.shard)) is None:
            self._values.withdraw()

    def _check_objects(self) -> None:
        """Raises IncompleteColumn unless every object exists that the commit is to name: one that is
        of no commit yet, and old, may have been taken by `gc`.
        """
        sizes = self.store.sizes([name for name, _, _ in self._objects])
        for (name, expected, _), size in zip(self._objects, sizes, strict=True):
            if size != expected:
                raise IncompleteColumn(
                    f"{self.store.at(name)}: {'no object' if size is None else f'{size} bytes'} "
                    f"where {expected} bytes were written or found before; shard {self.shard} was not "
                    "committed. Run encode again"
                )

    def _put(self, array: str, data: NDArray[Any]) -> None:
        """Writes a small array of the shard, or checks that the object of its name says the same."""
        spec = self._arrays[array]
        path = f"{array}/{spec.key(self.shard)}"
        new, size, digest = put_object(self.store, path, spec, [data])
        self._objects.append((path, size, digest))
        if not new and not np.array_equal(read_object(self.store, path, spec, len(data)), data):
            raise CorruptColumn(
                f"{self.store.at(path)}: the object does not fit the values that exist beside it. "
                "It is of no commit: delete it and encode again"
            )

    def close(self) -> None:
        """Drops what is not published yet."""
        self._values.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_other_members(column: Store, commit: Commit, members: Mapping[str, str]) -> None:
    """Raises SourceChanged if a commit of the same shard was made of other members of a suffix."""
    for suffix, digest in members.items():
        if commit.members.get(suffix, digest) != digest:
            raise SourceChanged(
                f"{column.at(commit_name(commit.shard))}: shard {commit.shard} of this column was made "
                f"of other {suffix} members than the tar holds now. Columns would no longer belong "
                "together: restore the tar, or make it a new source"
            )


def _of_another_input(layout: Layout, values: Values, adopted: Values) -> list[int]:
    """Returns the rows that differ by more than two machines do: no values in one of the two, other
    token ids, or a channel or token whose L2 norm changes by more than OTHER of itself.
    """
    same = finite_rows(layout, values) == finite_rows(layout, adopted)
    for i in np.flatnonzero(same & finite_rows(layout, values)).tolist():
        if layout.element == "int32":
            same[i] = np.array_equal(values[i], adopted[i])
        elif values[i].size:
            a, b = _vectors(layout, values[i]), _vectors(layout, adopted[i])
            norms = np.linalg.norm(a, axis=1)
            floor = max(float(np.median(norms)) / 8, 1e-30)  # of a channel that is almost zero
            change = np.linalg.norm(a - b, axis=1) / np.maximum(norms, floor)
            same[i] = change.max() <= OTHER
    return [int(i) for i in np.flatnonzero(~same)]


def _vectors(layout: Layout, row: NDArray[Any]) -> NDArray[np.float32]:
    """Returns the channels or tokens of a row as float32, (count, values)."""
    if layout.quantised and not layout.ragged:
        ones = np.ones(layout.channels, np.float32)  # those of both are in column.json
        row = dequantise_rows(row[None], layout, ones)[0]
        axis = 0 if layout.kind == "latents" else -1
        return np.moveaxis(row.astype(np.float32), axis, 0).reshape(layout.channels, -1)
    if layout.quantised:  # scales of channels are in column.json, and are those of both
        scale = np.ascontiguousarray(row[:, -SCALE_BYTES:]).view("<f4")
        return np.asarray(row[:, :-SCALE_BYTES] * scale, np.float32)
    values = to_floats(row) if layout.element == "bfloat16" else row
    return np.asarray(values, np.float32).reshape(len(row) if row.ndim > 1 else 1, -1)


def _blanked(layout: Layout, values: Values, has_values: NDArray[np.bool_]) -> Values:
    """Returns the rows, those without values blanked; a row with any non-finite value becomes NaN as
    a whole and keeps its length.
    """
    finite = finite_rows(layout, values)
    if layout.ragged:
        return [
            layout.blank(0) if not present
            else np.ascontiguousarray(row, layout.dtype) if good
            else layout.blank(len(row))
            for row, present, good in zip(values, has_values, finite, strict=True)
        ]  # fmt: skip
    dense = np.array(values, layout.dtype)
    dense[~(has_values & finite)] = layout.blank(1)[0]
    return dense


def block_digest(
    values: Values, lengths: NDArray[np.uint16] | None, status: NDArray[np.uint8]
) -> str:
    """Returns the logical digest of up to 1,024 rows: sha256 of values, lengths and statuses; the
    same for every backend and codec.
    """
    digest = hashlib.sha256()
    for row in values:
        digest.update(np.ascontiguousarray(row).data)
    if lengths is not None:
        digest.update(lengths.astype("<u2").data)
    digest.update(status.astype(np.uint8).data)
    return digest.hexdigest()


def runs(status: NDArray[np.uint8]) -> tuple[tuple[int, int, int], ...]:
    """Returns the runs of rows that are not ok: (first row, count, status)."""
    edges = np.flatnonzero(np.diff(status, prepend=np.uint8(0), append=np.uint8(0)))
    spans = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return tuple((a, b - a, int(status[a])) for a, b in spans if status[a] != Status.OK)
