"""Which columns may be read together: what differs is refused, with the fields, shards or rows named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_rows
from ..column.mask import Mask
from ..column.members import member_read
from ..errors import BadRows, IdentityMismatch, SourceMismatch
from ..format.atomic import Json
from ..format.identity import without_figures
from ..format.layout import BLOCK, ColumnSpec, Status, differences
from .column import Column
from .objects import Ints

Bad = Literal["skip", "error"]  # what becomes of rows that are not ok in some column
SHOWN = 8  # rows or shards that an error lists
REMAKE = "Name the mask of this source, or make one: `python -m shards mask COLUMN --keys FILE --out MASK`"


def check_kind(column: Column, *kinds: str) -> None:
    """Raises IdentityMismatch unless a column is of one of the kinds."""
    if column.layout.kind not in kinds:
        raise IdentityMismatch(
            f"{column.path}: found a column of {column.layout.kind}, expected one of "
            f"{' or '.join(kinds)}"
        )


def check_same_source(a: Column, b: Column) -> None:
    """Raises SourceMismatch unless both columns were made from the same rows."""
    expected, source = a.spec.identity["source"], b.spec.identity["source"]
    if source != expected:
        raise SourceMismatch(
            f"{b.path}: made from source {source}, but {a.path} from {expected}. Columns join by "
            "row number: use columns of one source, or encode the missing one"
        )
    if a.layout.shard_rows != b.layout.shard_rows:  # row 1 of tar 1 has another id in each
        raise SourceMismatch(
            f"{b.path}: {b.layout.shard_rows} rows a shard, but {a.path} has {a.layout.shard_rows}. "
            "Encode both with the same shard_rows"
        )
    pairs = zip(a.snapshot.index, b.snapshot.index, strict=True)
    if wrong := [s for s, (x, y) in enumerate(pairs) if x and y and x != y]:
        raise SourceMismatch(
            f"{b.path} and {a.path}: shards {wrong[:SHOWN]} were read from tars that held different "
            "rows. Encode one of the two columns again"
        )


def check_same_members(columns: Sequence[Column]) -> None:
    """Raises SourceMismatch if columns that read the same suffix, of captions or of pictures, were
    made of different ones. Commits are read of such columns alone; those of older releases say
    nothing.
    """
    by_suffix: dict[str, dict[str, Column]] = defaultdict(dict)
    for column in columns:
        if suffix := member_read(column.spec.identity):
            by_suffix[suffix][column.path] = column
    for suffix, readers in by_suffix.items():
        first: dict[int, tuple[str, Column]] = {}
        for column in readers.values() if len(readers) > 1 else ():
            wrong: dict[str, list[int]] = defaultdict(list)
            for shard, digest in column.members(suffix).items():
                expected, other = first.setdefault(shard, (digest, column))
                if digest != expected:
                    wrong[other.path].append(shard)
            for path, shards in wrong.items():
                raise SourceMismatch(
                    f"{column.path} and {path}: shards {shards[:SHOWN]} ({len(shards)} in all) were "
                    f"made of other {suffix} members: the tars were changed in place between the "
                    "two. Encode one of the two columns again from the tars that are right"
                )


def encoding(column: Column) -> Json:
    """Returns how a column was made, whatever the source and whichever caption of it was read."""
    identity = {k: v for k, v in without_figures(column.spec.identity).items() if k != "source"}
    if column.layout.ragged and isinstance(identity.get("preprocess"), dict):
        identity["preprocess"] = {k: v for k, v in identity["preprocess"].items() if k != "caption"}
    shape = list(column.layout.row_shape)
    return {
        "kind": column.layout.kind,
        "identity": identity,
        "norm": column.spec.record()["norm"],
        "row_shape": shape[1:] if column.layout.ragged else shape,
    } | ({} if column.layout.ragged else {"element": column.layout.element})


def check_same_encoding(a: Column, b: Column) -> None:
    """Raises IdentityMismatch unless one batch may have rows of both."""
    lines = differences(encoding(b), encoding(a))
    if not lines and a.layout.ragged and a is not b and not np.array_equal(a.empty(), b.empty()):
        lines = ["the tokens of the empty caption differ"]
    if lines:
        head = (
            f"{b.path} cannot be read together with {a.path}: it was made otherwise (found there, "
            "expected as here):"
        )
        raise IdentityMismatch(
            "\n  ".join([head, *lines, "Use columns of one encoder and preprocessing"])
        )


def check_mask(mask: Mask, column: Column) -> None:
    """Raises SourceMismatch unless a mask is of the rows of a column, BadMask where it names none of
    them.
    """
    check_mask_source(mask, column.path, column.spec)
    snapshot = column.snapshot
    pairs = zip(mask.index, snapshot.index, strict=True)
    if wrong := [s for s, (x, y) in enumerate(pairs) if x and y and x != y]:
        raise SourceMismatch(
            f"{mask.path}: made for tars that held other rows in shards {wrong[:SHOWN]} "
            f"({len(wrong)} in all) than those that {column.path} was read from. {REMAKE}"
        )


def check_mask_source(mask: Mask, path: str, spec: ColumnSpec) -> None:
    """Raises SourceMismatch unless a mask is of the source of a column."""
    layout, source = spec.layout, spec.identity.get("source")
    found = mask.source, len(mask.rows), mask.shard_rows
    if found != (expected := (source, layout.shards, layout.shard_rows)):
        raise SourceMismatch(
            f"{mask.path}: a mask of source {found[0]} ({found[1]} tars of up to {found[2]} rows), but "
            f"{path} is of {expected[0]} ({expected[1]} tars of up to {expected[2]} rows). {REMAKE}"
        )


def check_bad(bad: str) -> None:
    """Raises BadRows for a word that is not one of `Bad`."""
    if bad not in get_args(Bad):
        raise BadRows(
            f"bad: found {bad!r}, expected skip, which leaves rows out that are not ok in every column, "
            "or error, which refuses them"
        )


def refuse_bad_rows(
    columns: Sequence[Column], truncated: bool, masked: NDArray[np.uint32] | None = None
) -> None:
    """Raises BadRows if a row that some column has is not valid in all of them, of those in `masked`
    where it is given. Shards that a partly
    encoded column has not come to yet do not count.
    """
    layout = columns[0].layout
    rows = np.max([column.snapshot.rows for column in columns], axis=0)
    for column in columns:
        failed = {shard for shard, _ in column.snapshot.failed}
        for shard, content in enumerate(column.snapshot.content):
            if content is None and shard not in failed:
                rows[shard] = 0
    expected = np.concatenate(
        [np.zeros(0, np.uint32), *(_mask(layout.shard_rows, n) for n in rows)]
    )
    if masked is not None:
        expected &= masked
    lines, examples = [], list[tuple[int, str]]()
    for column in columns:
        ids = valid_rows(expected & ~column.valid_mask(truncated))
        for status, of_status in _by_status(column, ids):
            lines.append(f"{column.path}: {len(of_status)} rows are {status}")
            examples += [(int(row), f"{status} in {column.name}") for row in of_status[:SHOWN]]
        if nothing := [s for s, _ in column.snapshot.failed if not rows[s]]:
            lines.append(f"{column.path}: shards {nothing[:SHOWN]} failed ({len(nothing)} in all)")
    if lines:
        first = [
            "row {1} of shard {0}: {2}".format(*divmod(row, layout.shard_rows), why)
            for row, why in sorted(examples)[:SHOWN]
        ]
        head = "found rows that are not ok in every column, expected none (bad: error):"
        end = "Say bad: skip to leave such rows out, or encode those shards again"
        raise BadRows("\n  ".join([head, *lines, "The first are", *first, end]))


def _mask(size: int, count: int) -> NDArray[np.uint32]:
    """Returns a mask of `size` bits, the first `count` of them set."""
    mask = np.zeros(size // BLOCK, np.uint32)
    mask[: count // BLOCK] = 2**BLOCK - 1
    mask[count // BLOCK : -(-count // BLOCK)] = (1 << count % BLOCK) - 1
    return mask


def _by_status(column: Column, ids: Ints) -> Iterator[tuple[str, Ints]]:
    """Yields (name of a status, the row ids that have it) of rows that are not admitted."""
    committed = np.array(column.snapshot.rows, np.int64)[ids // column.layout.shard_rows] > 0
    status = np.full(ids.size, Status.SHARD_FAILED, np.uint8)
    status[committed] = column.status(ids[committed])
    for value in np.unique(status):
        yield Status(int(value)).name.lower(), ids[status == value]
