"""A mask of rows from a list of keys, row ids or bits: what a run is to train on, of what is encoded."""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..column.commits import valid_mask_of
from ..column.mask import Mask, all_rows
from ..column.source import open_source, read_index
from ..console import Bar, counted, say_next
from ..errors import BadMask, IncompleteColumn, NotAColumn, SourceMismatch
from ..format.atomic import Json, open_file, parse_json, sha256_file
from ..read.column import Column
from ..store.base import Place
from .parallel import SILENT, Progress

SHOWN = 5  # keys that a message lists
FORMS = (
    "a text of one key a line (or the tar's name, a tab and the key), a .csv with a column `key`, a "
    ".jsonl of objects with a field `key`, or a .npy of bools by row id or of row ids"
)
Bounds = Sequence[tuple[str, float, float]]  # field, least and most


@dataclass(slots=True)
class Keys:
    """Keys of rows, those of any tar under None; how often each was found is counted while looking."""

    by_tar: dict[str | None, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    listed: int = 0  # entries of the file
    below: int = 0  # of them outside the bounds

    def matches(self, tar: str | None, keys: Iterable[str]) -> NDArray[np.bool_]:
        """Returns which of a tar's keys are wanted, (rows,)."""
        groups = [self.by_tar[name] for name in dict.fromkeys((tar, None)) if name in self.by_tar]
        found = []
        for key in keys:
            hits = [group for group in groups if key in group]
            for group in hits:
                group[key] += 1
            found.append(bool(hits))
        return np.array(found, bool)

    def with_count(self, wanted: range) -> Iterator[str]:
        """Yields the keys that were found so often."""
        for tar, group in self.by_tar.items():
            for key, count in group.items():
                if count in wanted:
                    yield key if tar is None else f"{tar}\t{key}"


def make_mask(
    column: Place,
    keys: Path,
    *,
    drop: bool = False,
    bounds: Bounds = (),
    progress: Progress = SILENT,
) -> tuple[Mask, Json]:
    """Returns the mask of a column's source that a file describes, and what it was made of, for people.

    `drop`: the file names the rows that are left out. `bounds`: of entries of a .csv or .jsonl, only
    those within them count. Raises BadMask, naming the line, key or shape.
    """
    opened = _opened(column)
    snapshot = opened.snapshot
    if keys.suffix.lower() == ".npy":
        if bounds:
            raise BadMask(
                f"{keys}: bounds are of fields of a .csv or .jsonl, which a .npy has none of"
            )
        words, made = _from_array(keys, opened, drop)
    else:
        words, made = _from_keys(read_keys(keys, bounds), keys, opened, drop, progress)
    made = {"file": keys.name, "sha256": sha256_file(keys), **made}
    made |= {"dropped": True} if drop else {}
    if bounds:
        made["bounds"] = [[n, *(x if math.isfinite(x) else None for x in xs)] for n, *xs in bounds]
    mask = Mask(
        "", str(opened.spec.identity.get("source")), opened.layout.shard_rows, snapshot.rows,
        snapshot.index, words, made,
    )  # fmt: skip
    if not mask.kept:
        raise BadMask(f"{keys}: none of the {sum(snapshot.rows):,} rows of {opened.path} is kept")
    return mask, made


def _opened(column: Place) -> Column:
    """Opens a column, an unfinished one as far as it is."""
    try:
        return Column.open(column)
    except IncompleteColumn:
        return Column.open(column, partial=True)


def _from_array(file: Path, column: Column, drop: bool) -> tuple[NDArray[np.uint32], Json]:
    """Returns the words of a mask from bools by row id, or from row ids."""
    rows, shard_rows = column.snapshot.rows, column.layout.shard_rows
    count = len(rows) * shard_rows
    try:
        with open(open_file(file), "rb") as opened:
            array = np.load(opened, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadMask(f"{file}: no .npy that can be read ({error})") from None
    if array.ndim != 1 or (array.dtype != bool and array.dtype.kind not in "iu"):
        raise BadMask(
            f"{file}: found {array.dtype} of shape {array.shape}, expected bools ({count},), one for each "
            f"row id (shard * {shard_rows} + row), or integers (n,), the row ids themselves"
        )
    if array.dtype == bool:
        if len(array) != count:
            raise BadMask(
                f"{file}: found {len(array):,} bools, expected {count:,}, one for each row id: "
                f"{len(rows)} tars x {shard_rows:,} (row id = shard * {shard_rows} + row)"
            )
        array = np.flatnonzero(array)
    ids = np.unique(array[(array >= 0) & (array < count)].astype(np.int64))
    shard, row = np.divmod(ids, shard_rows)
    present = row < np.array(rows, np.int64)[shard]
    ids = ids[present]
    unknown = len(np.unique(array)) - len(ids)
    if len(array) and not len(ids):
        raise BadMask(
            f"{file}: none of its {len(array):,} row ids is one of {column.path}, whose rows are "
            f"numbered shard * {shard_rows} + row"
        )
    bits = np.zeros(count, bool)
    bits[ids] = True
    parts = [bits[s * shard_rows :][:n] for s, n in enumerate(rows)]
    return _words(parts, drop), {"rows": len(ids), "unknown": int(unknown)}


def _from_keys(
    keys: Keys, file: Path, column: Column, drop: bool, progress: Progress
) -> tuple[NDArray[np.uint32], Json]:
    """Returns the words of a mask from keys, by the indexes that lie beside the column."""
    snapshot, source = column.snapshot, column.store.parent
    tars: Sequence[str | None] = [None] * len(snapshot.rows)
    if keys.by_tar.keys() - {None}:
        tars = [name for name, _ in open_source(source).tars]
        if unknown := sorted(
            {str(t) for t in keys.by_tar if t is not None} - {str(t) for t in tars}
        ):
            raise BadMask(
                f"{file}: found the tars {', '.join(unknown[:SHOWN])} ({len(unknown)} in all), which "
                f"{source.at('source.json')} does not list"
            )
    progress.begin(sum(snapshot.rows))
    parts = []
    for shard, count in enumerate(snapshot.rows):
        if not count:
            continue
        try:
            index = read_index(source, shard)
        except NotAColumn as error:
            raise BadMask(
                f"{error}. Keys are looked up there: name a column that lies beside its source.json and "
                "index (`shards copy --with-source` brings both), or give row ids as .npy"
            ) from None
        if index.digest != snapshot.index[shard] or len(index.rows) != count:
            raise SourceMismatch(
                f"{source.url}: the index of shard {shard} is not the one that {column.path} was made "
                "with. Restore it from where the column was encoded"
            )
        parts.append(keys.matches(tars[shard], (row.key for row in index.rows)))
        progress.advance(count)
    if several := list(islice(keys.with_count(range(2, 2**62)), SHOWN)):
        raise BadMask(
            f"{file}: {', '.join(map(repr, several))} (the first) name several rows each. Say of which tar "
            "(its name and a tab before the key, or a field `tar`), or give row ids as .npy"
        )
    unknown = list(keys.with_count(range(1)))
    wanted = sum(map(len, keys.by_tar.values()))
    if len(unknown) == wanted:
        raise BadMask(
            f"{file}: none of its {wanted:,} keys is a key of {column.path}: {', '.join(unknown[:SHOWN])}. "
            "A key is the name of a member of the tar without what follows its first dot"
        )
    made = {"rows": wanted - len(unknown), "unknown": len(unknown), "examples": unknown[:SHOWN]}
    return _words(parts, drop), made | ({"outside": keys.below} if keys.below else {})


def _words(parts: Sequence[NDArray[np.bool_]], drop: bool) -> NDArray[np.uint32]:
    """Returns the words of the rows of each tar that are named, or with `drop` of the others."""
    named = [valid_mask_of(part.astype(np.uint8), (1,)) for part in parts]
    words = np.concatenate([np.zeros(0, np.uint32), *named])
    return all_rows([len(part) for part in parts]) & ~words if drop else words


# Files of keys -----------------------------------------------------------------------------------


def read_keys(file: Path, bounds: Bounds = ()) -> Keys:
    """Returns the keys in a file, by its suffix; BadMask, naming the line, where it holds none."""
    keys, suffix = Keys(), file.suffix.lower()
    readers = {".csv": _csv_entries, ".jsonl": _json_entries}
    if bounds and suffix not in readers:
        raise BadMask(f"{file}: bounds are of fields of a .csv or .jsonl; expected one of these")
    try:
        with open(open_file(file), encoding="utf-8-sig", newline="") as lines:
            for number, entry in readers.get(suffix, _text_entries)(lines, file):
                keys.listed += 1
                key, tar = entry.get("key"), entry.get("tar") or None
                if not isinstance(key, str) or not key or not isinstance(tar, str | None):
                    raise BadMask(f"{file}: line {number}: found no key, expected {FORMS}")
                if _within(entry, bounds, f"{file}: line {number}"):
                    keys.by_tar[tar][key] = 0
                else:
                    keys.below += 1
    except FileNotFoundError:
        raise BadMask(f"{file}: no such file, expected {FORMS}") from None
    except UnicodeDecodeError as error:
        raise BadMask(f"{file}: not a text in UTF-8 ({error}), expected {FORMS}") from None
    except csv.Error as error:
        raise BadMask(f"{file}: no .csv that can be read ({error})") from None
    if not any(keys.by_tar.values()):
        raise BadMask(
            f"{file}: found no key"
            + (
                f", all {keys.below:,} are outside the bounds"
                if keys.below
                else f", expected {FORMS}"
            )
        )
    return keys


Entries = Iterator[tuple[int, dict[str, Any]]]


def _text_entries(lines: Iterable[str], file: Path) -> Entries:
    for number, line in enumerate(lines, 1):
        if text := line.rstrip("\r\n"):
            tar, tab, key = text.rpartition("\t")
            yield number, {"key": key, "tar": tar} if tab else {"key": text}


def _csv_entries(lines: Iterable[str], file: Path) -> Entries:
    reader = csv.DictReader(lines)
    if "key" not in (reader.fieldnames or ()):
        raise BadMask(
            f"{file}: found the columns {', '.join(map(str, reader.fieldnames or ())) or 'none'}, expected "
            "one called `key` among them"
        )
    yield from ((reader.line_num, entry) for entry in reader)


def _json_entries(lines: Iterable[str], file: Path) -> Entries:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise BadMask(f"{file}: line {number}: no JSON ({error})") from None
        yield number, entry if isinstance(entry, dict) else {"key": entry}


def _within(entry: dict[str, Any], bounds: Bounds, name: str) -> bool:
    """Returns whether the numbers of an entry lie within the bounds."""
    within = True
    for field_name, least, most in bounds:
        try:
            value = float(entry[field_name])
        except (KeyError, TypeError, ValueError):
            raise BadMask(
                f"{name}: found {entry.get(field_name)!r} for {field_name!r}, expected a number"
            ) from None
        within &= least <= value <= most
    return within


def run_mask(args: argparse.Namespace) -> int:
    """`python -m shards mask`."""
    bounds = [(name, value, math.inf) for name, value in args.at_least]
    bounds += [(name, -math.inf, value) for name, value in args.at_most]
    with Bar("mask", unit="rows") as bar:
        mask, made = make_mask(args.column, args.keys, drop=args.drop, bounds=bounds, progress=bar)
    mask.put(args.out)
    total = sum(mask.rows)
    print(f"{args.out}: {mask.kept:,} of {total:,} rows are kept ({100 * mask.kept / total:.1f} %)")
    if made["unknown"]:
        examples = ", ".join(made.get("examples", []))
        print(f"{made['unknown']:,} of the keys name no row" + (examples and f": {examples}"))
    if unread := sum(1 for index in mask.index if index is None):
        tars = counted(len(mask.rows), "tar")
        print(f"not encoded: {unread} of {tars}, of which no row is kept")
    say_next("train", "plan", "CONFIG", f"data.mask={args.out}")
    return 0
