"""Remove what nothing needs any more: leavings of interrupted writers, and on request old
generations and quarantines.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from ..column.commits import commit_name
from ..column.lease import Lease
from ..console import counted
from ..errors import ShardsError
from ..format.layout import ColumnSpec
from ..store.base import Place, Store
from ..store.open import open_store
from .faults import objects_of
from .verify import QUARANTINE, examine, require_column

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DAY = SECONDS["d"]


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that may go. `shard` is set where it may go only while that shard has no commit."""

    name: str
    bytes: int
    why: str
    shard: int | None = None


def seconds_of(text: str) -> float:
    """Returns the seconds of a time such as `24h`, `30m`, `90s` or `7d`; raises ShardsError for
    another text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise ShardsError(f"{text!r}: a number and one of s, m, h, d expected, such as 24h")
    return float(match[1]) * SECONDS[match[2]]


def find_garbage(
    store: Store, seconds: float, generations: bool, quarantine: bool
) -> tuple[list[Garbage], list[str]]:
    """Returns what may go, and what is left alone with the reason."""
    examination = examine(store, deep=False)
    column = examination.column
    if column is None or any(fault.kind == "commit" for fault in examination.faults):
        return [], [f"{store.url}: records are damaged; `repair` comes first"]
    garbage = [
        Garbage(name, store.size(name) or 0, "left by a writer that was interrupted")
        for name in store.stale_temporaries(seconds)
    ]
    remaining: list[str] = []
    owners = _owners(column.spec) if examination.unfinished else {}
    for name, size in examination.unfinished:
        shard = owners.get(name)
        if shard is None:
            remaining.append(f"{name}: not an object of ours")
        elif shard in column.commits:
            garbage.append(Garbage(name, size, f"not in the commit of shard {shard}"))
        elif (store.age(name) or 0.0) < seconds:
            remaining.append(f"{name}: its shard is not committed, and it is too young")
        else:
            garbage.append(Garbage(name, size, f"shard {shard} was never committed", shard))
    if generations and (newest := column.snapshot):
        unfinished = dict(examination.unfinished)
        why = "superseded generation; a run that pins it can no longer resume"
        garbage += [
            Garbage(name, size, why)
            for name, size in store.list("complete")
            if not name.startswith(f"complete/{newest.digest}") and name not in unfinished
        ]
    if quarantine:
        garbage += [
            Garbage(name, size, "put aside by repair")
            for name, size in store.list(QUARANTINE.rstrip("/"))
        ]
    return garbage, remaining


def _owners(spec: ColumnSpec) -> dict[str, int]:
    """Returns the shard of each object that the layout has, by name."""
    owners: dict[str, int] = {}
    for shard in range(spec.layout.shards):
        must, may = objects_of(spec, shard, spec.layout.shard_rows)
        owners |= dict.fromkeys(must | may, shard)
    return owners


def collect(
    url: Place,
    yes: bool,
    seconds: float = DAY,
    generations: bool = False,
    quarantine: bool = False,
    force: bool = False,
) -> tuple[list[Garbage], list[str]]:
    """Finds garbage and, with `yes`, deletes it under the exclusive lease; raises LeaseHeld if
    another has it.
    """
    store = open_store(url)
    if not yes:
        return find_garbage(store, seconds, generations, quarantine)
    require_column(store)
    with Lease(store, "shards gc", force) as lease:
        garbage, remaining = find_garbage(store, seconds, generations, quarantine)
        deleted = []
        for item in garbage:
            lease.check()
            if why := _in_use(store, item, seconds):
                remaining.append(f"{item.name}: {why}")
                continue
            store.delete(item.name)
            deleted.append(item)
    return deleted, remaining


def _in_use(store: Store, item: Garbage, seconds: float) -> str:
    """Returns why an object of no commit must stay after all; empty if it may go. A writer that
    comes on such an object makes it young, and then commits it.
    """
    if item.shard is None:
        return ""
    if store.size(commit_name(item.shard)) is not None:
        return "its shard was committed meanwhile"
    return "a writer uses it" if (store.age(item.name) or 0.0) < seconds else ""


def run_gc(args: argparse.Namespace) -> int:
    """`python -m shards gc`."""
    seconds = seconds_of(args.older_than)
    garbage, remaining = collect(
        args.column, args.yes, seconds, args.generations, args.quarantine, args.break_lease
    )
    for line in remaining:
        print(f"left alone: {line}")
    for item in garbage:
        verb = "deleted" if args.yes else "would delete"
        print(f"{verb}: {item.name} ({item.bytes:,} bytes; {item.why})")
    total = sum(item.bytes for item in garbage)
    state = "deleted" if args.yes else "to be deleted" + "; do it with --yes" * bool(garbage)
    print(f"{args.column}: {counted(len(garbage), 'object')}, {counted(total, 'byte')} {state}")
    return 0
