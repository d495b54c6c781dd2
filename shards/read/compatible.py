"""Which columns may be read together: what differs is refused, with the fields, shards or rows named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_rows
from ..column.members import member_read
from ..errors import BadRows, IdentityMismatch, SourceMismatch
from ..format.atomic import Json
from ..format.identity import preprocess_of
from ..format.layout import BLOCK, Status, differences
from .column import Column

Ints = NDArray[np.int64]
SHOWN = 8  # rows or shards that an error lists


def check_kind(column: Column, *kinds: str) -> None:
    if column.layout.kind not in kinds:
        raise IdentityMismatch(
            f"{column.path}: found a column of {column.layout.kind}, expected one of "
            f"{' or '.join(kinds)}"
        )


def check_same_source(a: Column, b: Column) -> None:
    """Raise SourceMismatch unless both columns were made from the same rows."""
    found, expected = b.spec.identity["source"], a.spec.identity["source"]
    if found != expected:
        raise SourceMismatch(
            f"{b.path}: made from source {found}, but {a.path} from {expected}. Columns join by "
            "row number: "
            "use columns of one source, or encode the missing one"
        )
    if a.layout.shard_rows != b.layout.shard_rows:  # row 1 of tar 1 has another id in each
        raise SourceMismatch(
            f"{b.path}: {b.layout.shard_rows} rows a shard, but {a.path} has {a.layout.shard_rows}. "
            "Encode both with the same shard_rows"
        )
    pairs = zip(a.snapshot.index, b.snapshot.index, strict=True)
    wrong = [s for s, (x, y) in enumerate(pairs) if x and y and x != y]
    if wrong:
        raise SourceMismatch(
            f"{b.path} and {a.path}: shards {wrong[:8]} were read from tars that held different "
            "rows. "
            "Encode one of the two columns again"
        )


def check_same_members(columns: Sequence[Column]) -> None:
    """Raise SourceMismatch if columns that read the same suffix, of captions or of pictures, were
    made of other ones. Commits are read of such columns alone; those of older releases say nothing.
    """
    by_suffix: dict[str, dict[str, Column]] = defaultdict(dict)
    for column in columns:
        if suffix := member_read(column.spec.identity):
            by_suffix[suffix][column.path] = column
    for suffix, some in by_suffix.items():
        first: dict[int, tuple[str, Column]] = {}
        for column in some.values() if len(some) > 1 else ():
            wrong: dict[str, list[int]] = defaultdict(list)
            for shard, digest in column.members(suffix).items():
                expected, other = first.setdefault(shard, (digest, column))
                if digest != expected:
                    wrong[other.path].append(shard)
            for other_path, shards in wrong.items():
                raise SourceMismatch(
                    f"{column.path} and {other_path}: shards {shards[:8]} ({len(shards)} in all) were "
                    f"made of other {suffix} members: the tars were changed in place between the "
                    "two. Encode one of the two columns again from the tars that are right"
                )


def encoding(column: Column) -> Json:
    """How a column was made, whatever the source and whichever caption of it was read."""
    identity = {k: v for k, v in column.spec.identity.items() if k != "source"}
    if column.layout.ragged and (preprocess := preprocess_of(identity)) is not None:
        identity["preprocess"] = {k: v for k, v in preprocess.items() if k != "caption"}
    shape = list(column.layout.row_shape)
    return {
        "kind": column.layout.kind,
        "identity": identity,
        "norm": column.spec.record()["norm"],
        "row_shape": shape[1:] if column.layout.ragged else shape,
    } | ({} if column.layout.ragged else {"element": column.layout.element})


def check_same_encoding(a: Column, b: Column) -> None:
    """Raise IdentityMismatch unless rows of both may stand in one batch."""
    lines = differences(encoding(b), encoding(a))
    text = a.layout.ragged and a is not b
    if text and not lines and not np.array_equal(a.empty(), b.empty()):
        lines = ["the tokens of the empty caption differ"]
    if lines:
        raise IdentityMismatch(
            "\n  ".join(
                [
                    f"{b.path} cannot be read together with {a.path}: it was made otherwise "
                    "(found there, expected as here):",
                    *lines,
                    "Use columns of one encoder and preprocessing",
                ]
            )
        )


def refuse_bad_rows(columns: Sequence[Column], truncated: bool) -> None:
    """Raise BadRows if a row that some column knows is not valid in all of them.

    Shards that a partly encoded column has not come to yet are not meant.
    """
    layout = columns[0].layout
    known = np.max([column.snapshot.rows for column in columns], axis=0)
    for column in columns:
        failed = {shard for shard, _ in column.snapshot.failed}
        content = column.snapshot.content
        known[[s for s, c in enumerate(content) if c is None and s not in failed]] = 0
    present = np.concatenate(
        [np.zeros(0, np.uint32), *(_first_bits(rows, layout.shard_rows) for rows in known.tolist())]
    )
    lines, examples = [], list[tuple[int, str]]()
    for column in columns:
        ids = valid_rows(present & ~column.valid_mask(truncated))
        for status, rows in _by_status(column, ids):
            lines.append(f"{column.path}: {len(rows)} rows are {status}")
            examples += [(int(row), f"{status} in {column.name}") for row in rows[:SHOWN]]
        nothing = [s for s, _ in column.snapshot.failed if not known[s]]
        if nothing:
            lines.append(f"{column.path}: shards {nothing[:SHOWN]} failed ({len(nothing)} in all)")
    if not lines:
        return
    first = [
        "row {1} of shard {0}: {2}".format(*divmod(row, layout.shard_rows), why)
        for row, why in sorted(examples)[:SHOWN]
    ]
    raise BadRows(
        "\n  ".join(
            [
                "found rows that are not ok in every column, expected none (bad: error):",
                *lines,
                "The first are",
                *first,
                "Say bad: skip to leave such rows out, or encode those shards again",
            ]
        )
    )


def _first_bits(count: int, of: int) -> NDArray[np.uint32]:
    """A mask of `of` bits, the first `count` of them set."""
    mask = np.zeros(of // BLOCK, np.uint32)
    mask[: count // BLOCK] = 2**BLOCK - 1
    mask[count // BLOCK : -(-count // BLOCK)] = (1 << count % BLOCK) - 1
    return mask


def _by_status(column: Column, ids: Ints) -> Iterator[tuple[str, Ints]]:
    """(name of a status, the row ids that have it) of rows that are not admitted."""
    committed = np.array(column.snapshot.rows, np.int64) > 0
    status = np.full(ids.size, Status.SHARD_FAILED, np.uint8)
    there = committed[ids // column.layout.shard_rows]
    status[there] = column.status(ids[there])
    for value in np.unique(status):
        yield Status(int(value)).name.lower(), ids[status == value]
