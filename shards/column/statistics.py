"""Sums over the rows of a column of latents, and the norms that are measured of them.

    <column>/statistics/<s>         of shard s: a sealed JSON line, then three fp64 arrays (C, H, W):
                                    sums of the values, of their squares and of the posterior's variances
    <column>/norms/<digest>         a sealed JSON line: method, rows, COMPLETE record; then two fp64 arrays,
                                    (C) or (C, H, W): shift and scale

Neither is named by column.json, commits or COMPLETE records: these stay what they are. Rows are added
in their order, so the numbers are the same in whatever order shards were committed or measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BadStatistics, CorruptColumn, ShardsError
from ..format.atomic import Json, sha256, unseal_bytes
from ..format.int8 import read_rows
from ..format.layout import NORM, STATISTICS, VERSION, ColumnSpec, Layout
from ..format.norm import Norm
from ..format.records import NormRecord, StatisticsRecord, parse, sealed
from ..store.base import Store

Floats = NDArray[np.float64]
T = TypeVar("T", StatisticsRecord, NormRecord)
Method = Literal["measured", "measured-per-place"]
LATENTS = ("moments", "latents")  # kinds of columns that are normalised
RECORD_BYTES = 390  # of what the sums of a shard say of themselves
OBJECT = re.compile(r"norms/[0-9a-f]{64}")  # a norm
GROUP = 32  # rows in memory as fp64 at once
DIGITS = 7  # of shift and scale, significant ones
# rows below which a deviation is too uncertain: of one place alone by 1 / sqrt(2 rows), 2 % of 1,024
LEAST: dict[Method, int] = {"measured": 64, "measured-per-place": 1_024}


@dataclass
class Sums:
    """Sums over rows of latents: of the values, their squares and the posterior's variances, each
    (C, H, W).
    """

    rows: int
    values: Floats
    squares: Floats
    variances: Floats

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> Sums:
        return cls(0, *np.zeros((3, *shape)))

    def add(self, stored: NDArray[np.float16], moments: bool) -> None:
        """Adds rows as they are stored, (B, 2C, H, W) mean | logvar or (B, C, H, W) latents."""
        channels = stored.shape[1] // 2 if moments else stored.shape[1]
        mean = stored[:, :channels].astype(np.float64)
        if moments:
            logvar = np.ascontiguousarray(stored[:, channels:])
            self.variances += _variances()[logvar.view(np.uint16)].sum(0)
        self.values += mean.sum(0)
        self.squares += np.square(mean, out=mean).sum(0)
        self.rows += len(stored)

    def __iadd__(self, other: Sums) -> Sums:
        self.rows += other.rows
        self.values += other.values
        self.squares += other.squares
        self.variances += other.variances
        return self

    def moments(self, per_place: bool) -> tuple[Floats, Floats]:
        """Returns mean and variance of the latents that are drawn, (C, 1, 1) or (C, H, W):
        var(mean) + mean(exp(logvar)), by the law of total variance.
        """
        parts = [self.values, self.squares, self.variances]
        if not per_place:
            parts = [part.mean((1, 2), keepdims=True) for part in parts]
        mean, square, variance = (part / max(self.rows, 1) for part in parts)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by name
            return mean, np.maximum(square - mean**2, 0) + variance


@cache
def _variances() -> Floats:
    """Returns exp(clamp(logvar, -30, 20)) of each float16, by its bits: a third of the time of `exp`."""
    with np.errstate(invalid="ignore"):
        logvar = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
        variances: Floats = np.exp(logvar.clip(-30.0, 20.0))
    return variances


def block_sums(spec: ColumnSpec, rows: int, read: Callable[[slice], NDArray[Any]]) -> Sums:
    """Returns the sums over the valid rows of one block of 1,024, of which there are `rows`; `read`
    returns some of them as they are stored. BadStatistics for a value that is not finite.
    """
    sums = Sums.zero(latent_shape(spec.layout))
    for start in range(0, rows, GROUP):
        values = read_rows(spec, read(slice(start, start + GROUP)))
        if not np.isfinite(values).all():
            raise BadStatistics(
                "found values that are not finite in rows that are said to be valid"
            )
        sums.add(values, spec.layout.kind == "moments")
    return sums


def latent_shape(layout: Layout) -> tuple[int, ...]:
    """Returns (C, H, W) of a latent; BadStatistics for a column of something else."""
    if layout.kind not in LATENTS:
        raise BadStatistics(
            f"found a column of {layout.kind}, expected one of moments or latents: no other is normalised"
        )
    channels, height, width = layout.row_shape
    return channels // 2 if layout.kind == "moments" else channels, height, width


def norm_of(sums: Sums, method: Method, path: str) -> Norm:
    """Returns the norm that gives latents the mean 0 and the deviation 1; BadStatistics of too few rows,
    of values that are not finite, or of a channel or place without deviation.
    """
    if sums.rows < LEAST[method]:
        raise BadStatistics(
            f"{path}: found {sums.rows} valid rows, expected at least {LEAST[method]} for {method}. "
            "Train with data.norm=config, the norm of the encoder, or encode more rows"
        )
    mean, variance = sums.moments(method == "measured-per-place")
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise BadStatistics(
            f"{path}: found sums that are not finite, expected finite values in all valid rows. Run "
            f"`python -m shards verify {path}`"
        )
    # what rounding leaves of a constant is no deviation
    flat = variance <= 1e-12 * np.maximum(mean**2, 1e-12)
    if flat.any():
        places = [tuple(map(int, place)) for place in np.argwhere(flat)[:4]]
        raise BadStatistics(
            f"{path}: found {int(flat.sum())} of {flat.size} deviations that are 0, the first at (channel, row, "
            f"column) {places}, expected all above 0. Train with data.norm=config, the norm of the encoder"
        )
    shift, scale = rounded(mean), rounded(1 / np.sqrt(variance))
    if method == "measured":
        return Norm(tuple(shift.ravel().tolist()), tuple(scale.ravel().tolist()))
    return Norm(tuple(shift.tolist()), tuple(scale.tolist()))


def rounded(values: Floats) -> Floats:
    """Returns the values at 7 significant digits."""
    texts = [f"{value:.{DIGITS - 1}e}" for value in values.ravel().tolist()]
    return np.array([float(text) for text in texts]).reshape(values.shape)


# Of a shard ---------------------------------------------------------------------------------------


def statistics_name(shard: int) -> str:
    return f"statistics/{shard:05d}"


def put_statistics(column: Store, digest: str, shard: int, content: str, sums: Sums) -> None:
    """Stores the sums of a shard, in place of those of other rows; `content` is that of its commit."""
    name = statistics_name(shard)
    arrays = np.stack([sums.values, sums.squares, sums.variances]).astype("<f8").tobytes()
    record = {
        "format": STATISTICS, "version": VERSION, "column": digest, "shard": shard, "content": content,
        "rows": sums.rows, "shape": list(sums.values.shape), "sums": sha256(arrays),
    }  # fmt: skip
    data = sealed(record, StatisticsRecord, column.at(name)) + arrays
    if not column.put_if_absent(name, data) and column.read(name) != data:
        column.replace(name, data)


def read_statistics(column: Store, digest: str, shard: int) -> tuple[str, Sums] | None:
    """Returns the sums of a shard, and the content of the rows that were added; None where there are
    none, CorruptColumn where they are damaged.
    """
    name = statistics_name(shard)
    path = column.at(name)
    if column.size(name) is None:
        return None
    record, data = _parts(column, name, StatisticsRecord)
    if record.column != digest or record.shard != shard:
        raise CorruptColumn(f"{path}: the sums of another column or shard")
    if sha256(data) != record.sums or len(data) != 24 * int(np.prod(record.shape)):
        raise CorruptColumn(f"{path}: its sums are damaged or cut off. Delete it and measure again")
    arrays = np.frombuffer(data, "<f8").astype(np.float64).reshape(3, *record.shape)
    return record.content, Sums(record.rows, *arrays)


def _parts(column: Store, name: str, model: type[T]) -> tuple[T, bytes]:
    """Returns the record in an object's first line, and the bytes of the arrays after it."""
    line, _, data = column.read(name).partition(b"\n")
    path = column.at(name)
    return parse(unseal_bytes(line + b"\n", path, model.KIND, VERSION), model, path), data


def statistics_bytes(layout: Layout) -> int:
    """Returns the bytes of the sums of all shards of a column, within a few; 0 of what has none."""
    if layout.kind not in LATENTS:
        return 0
    return layout.shards * (RECORD_BYTES + 24 * int(np.prod(latent_shape(layout))))


# Of a column --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MeasuredNorm:
    """A norm and what it was measured of; `digest` names it."""

    method: Method
    norm: Norm
    rows: int
    complete: str
    digest: str

    def record(self) -> Json:
        """Returns what a run's identity says of it, beside its numbers."""
        return {
            "method": self.method,
            "digest": self.digest,
            "rows": self.rows,
            "complete": self.complete,
        }

    @classmethod
    def of_identity(cls, latents: Json) -> MeasuredNorm | None:
        """Returns the norm that a run's identity says of its latent column; None where it says none."""
        about = latents.get("measured")
        if about is None:
            return None
        norm = Norm(latents["norm"]["shift"], latents["norm"]["scale"])
        return cls(about["method"], norm, about["rows"], about["complete"], about["digest"])


def put_norm(
    column: Store, digest: str, complete: str, method: Method, rows: int, norm: Norm
) -> MeasuredNorm:
    """Stores a norm by its digest; the same numbers are the same object."""
    arrays = np.array([norm.shift, norm.scale], "<f8")
    record = {
        "format": NORM, "version": VERSION, "column": digest, "complete": complete, "method": method,
        "rows": rows, "shape": list(arrays.shape[1:]), "arrays": sha256(arrays.tobytes()),
    }  # fmt: skip
    line = sealed(record, NormRecord, column.at("norms"))
    name = norm_name(unseal_bytes(line, column.at("norms"), NORM, VERSION)["digest"])
    column.put_if_absent(name, line + arrays.tobytes())
    return read_norm(column, digest, name)


def norm_name(digest: str) -> str:
    return f"norms/{digest}"


def norm_names(column: Store) -> list[str]:
    """Returns the names of the norms that were measured."""
    return sorted(name for name, _ in column.list("norms") if OBJECT.fullmatch(name))


def read_norm(column: Store, digest: str, name: str) -> MeasuredNorm:
    """Returns a norm by the name of its object; CorruptColumn where it is damaged or of another column."""
    path = column.at(name)
    record, data = _parts(column, name, NormRecord)
    if record.column != digest or name != norm_name(record.digest):
        raise CorruptColumn(f"{path}: a norm of another column, or under another's name")
    if sha256(data) != record.arrays or len(data) != 16 * math.prod(record.shape):
        raise CorruptColumn(
            f"{path}: its arrays are damaged or cut off. Delete it and measure again"
        )
    shift, scale = np.frombuffer(data, "<f8").reshape(2, *record.shape).tolist()
    try:
        norm = Norm(shift, scale)
    except ValueError as error:
        raise CorruptColumn(f"{path}: {error}") from None
    return MeasuredNorm(record.method, norm, record.rows, record.complete, record.digest)


def find_norm(column: Store, digest: str, complete: str, named: str) -> MeasuredNorm:
    """Returns the norm that `named` asks for: by its digest, or by a method and this COMPLETE record;
    BadStatistics where the column has none.
    """
    norms = [read_norm(column, digest, name) for name in norm_names(column)]
    for norm in norms:
        if norm.digest == named or (norm.method == named and norm.complete == complete):
            return norm
    others = ", ".join(f"{norm.digest} ({norm.method})" for norm in norms)
    others = f", only {others}" if others else ", and no other"
    option = " --per-place" if named == "measured-per-place" else ""
    raise BadStatistics(
        f"{column.url}: found no norm {named} of its rows as they are now{others}. Measure it by "
        f"`python -m shards norm {column.url}{option}`"
    )


def damaged_statistics(column: Store, digest: str, shards: int) -> list[tuple[str, str]]:
    """Returns (name, message) of each damaged object of these two folders."""
    faults = []
    expected = {statistics_name(shard): shard for shard in range(shards)}
    for name, _ in column.list("statistics"):
        if name in expected:
            try:
                read_statistics(column, digest, expected[name])
            except ShardsError as error:
                faults.append((name, str(error)))
    for name in norm_names(column):
        try:
            read_norm(column, digest, name)
        except ShardsError as error:
            faults.append((name, str(error)))
    return faults
