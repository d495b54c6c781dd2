"""Remove what nothing needs any more: leavings of interrupted writers, and on request old
generations and quarantines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..column.commits import commit_name, read_complete
from ..column.lease import Lease
from ..errors import ShardsError
from ..format.layout import ColumnSpec
from ..store.base import Place, Store
from ..store.open import open_store
from .verify import QUARANTINE, Examination, check_stands, examine

HOURS = 24.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Garbage:
    """An object that may go. `shard` is set where it may go only while that shard has no commit."""

    name: str
    bytes: int
    why: str
    shard: int | None = None


def seconds_of(text: str) -> float:
    """A time such as `24h`, `30m`, `90s` or `7d`; ValueError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise ValueError(f"{text!r}: a number and one of s, m, h, d expected, such as 24h")
    return float(found[1]) * UNITS[found[2]]


def find_garbage(
    found: Examination, seconds: float, generations: bool, quarantine: bool
) -> tuple[list[Garbage], list[str]]:
    """What may go, and what is left alone with the reason."""
    store, spec = found.store, found.spec
    if spec is None or any(fault.kind in ("commit", "column") for fault in found.faults):
        return [], [f"{store.url}: records are damaged; `repair` comes first"]
    garbage = [
        Garbage(name, store.size(name) or 0, "left by a writer that was interrupted")
        for name in store.stale_temporaries(seconds)
    ]
    kept: list[str] = []
    for name, size in found.unfinished:
        shard = shard_of(spec, name)
        if shard is None:
            kept.append(f"{name}: not an object of ours")
        elif shard in found.commits:
            garbage.append(Garbage(name, size, f"not in the commit of shard {shard}"))
        elif (store.age(name) or 0.0) < seconds:
            kept.append(f"{name}: its shard is not committed, and it is too young")
        else:
            garbage.append(Garbage(name, size, f"shard {shard} was never committed", shard))
    if generations and found.complete:
        newest = f"complete/{read_complete(store, found.digest).digest}"
        for name, size in store.list("complete"):
            if not name.startswith(newest) and name not in dict(found.unfinished):
                why = "superseded generation; a run that pins it can no longer resume"
                garbage.append(Garbage(name, size, why))
    if quarantine:
        garbage += [
            Garbage(name, size, "put aside by repair")
            for name, size in store.list(QUARANTINE.rstrip("/"))
        ]
    return garbage, kept


def shard_of(spec: ColumnSpec, name: str) -> int | None:
    """The shard that an object belongs to by its name; None if the layout has no such object."""
    layout, arrays = spec.layout, spec.arrays()
    if layout.backend == "webdataset" and (found := re.fullmatch(r"tar/(\d{5,})\.tar", name)):
        return int(found[1]) if int(found[1]) < layout.shards else None
    array, _, key = name.partition("/")
    if array not in arrays or array == "empty" or not (found := re.match(r"c/(\d+)", key)):
        return None
    number = int(found[1])
    if key != arrays[array].key(number):
        return None
    shard = number // layout.blocks_per_shard if array == layout.kind else number
    return shard if shard < layout.shards else None


def collect(
    url: Place,
    yes: bool,
    seconds: float = HOURS * 3600,
    generations: bool = False,
    quarantine: bool = False,
    force: bool = False,
) -> tuple[list[Garbage], list[str]]:
    """Find garbage and, with `yes`, delete it under the exclusive lease; LeaseHeld if another has
    it.
    """
    store = open_store(url)
    if not yes:
        return find_garbage(_records(store), seconds, generations, quarantine)
    check_stands(store)
    with Lease(store, "shards gc", force) as lease:
        garbage, kept = find_garbage(_records(store), seconds, generations, quarantine)
        deleted = []
        for item in garbage:
            lease.check()
            if why := _taken(store, item, seconds):
                kept.append(f"{item.name}: {why}")
                continue
            store.delete(item.name)
            deleted.append(item)
    return deleted, kept


def _taken(store: Store, item: Garbage, seconds: float) -> str:
    """Why an object of no commit must stay after all; empty if it may go. A writer that comes on
    such an object makes it young, and then commits it.
    """
    if item.shard is None:
        return ""
    if store.size(commit_name(item.shard)) is not None:
        return "its shard was committed meanwhile"
    if (store.age(item.name) or 0.0) < seconds:
        return "a writer uses it"
    return ""


def _records(store: Store) -> Examination:
    return examine(store, deep=False)


def run_gc(
    url: str, yes: bool, older_than: str, generations: bool, quarantine: bool, force: bool
) -> int:
    """`python -m shards gc`."""
    try:
        seconds = seconds_of(older_than)
    except ValueError as error:
        raise ShardsError(str(error)) from None
    garbage, kept = collect(url, yes, seconds, generations, quarantine, force)
    for line in kept:
        print(f"left alone: {line}")
    for item in garbage:
        print(
            f"{'deleted' if yes else 'would delete'}: {item.name} ({item.bytes:,} bytes; {item.why})"
        )
    total = sum(item.bytes for item in garbage)
    done = "deleted" if yes else "to be deleted; do it with --yes" if garbage else "to be deleted"
    print(f"{url}: {len(garbage)} objects, {total:,} bytes {done}")
    return 0
