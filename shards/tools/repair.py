"""Put damaged parts of a column aside, so that `encode run` makes just those again.

    <column>/quarantine/<utc time>/<name>      what was damaged, under the name it had

COMPLETE records that name a bad shard go first, so nobody opens the column as a whole any more;
then the bad objects; the commit last. Whoever still reads the shard in between gets an error that
names the object, never other data. Were the commit to go before the objects, a repair that is
killed in between would leave damaged objects that the next encode adopts as sound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

from ..column.commits import commit_name, failure_name, put_complete
from ..column.lease import Lease
from ..console import Bar
from ..errors import ShardsError, StoreError
from ..format.records import CompleteRecord
from ..store.base import Place
from ..store.open import open_store
from .describe import Description
from .faults import SMALL, Fault, damage_message_or_raise, objects_of
from .parallel import SILENT, Progress
from .verify import QUARANTINE, Examination, examine, require_column, snapshot_of

SHARD_FAULTS = ("commit", "object", "rows", "digest")
SHOWN = 16  # shards that a line names
BESIDE = {
    "column": (
        "it cannot be made from anything else. Restore column.json from a copy of the column, or "
        "delete it and run `python -m encode run` with the config that made the column: the same "
        "config writes the same record again, and `verify` then says whether the commits fit it"
    ),
    "source": (
        "it lies beside the column. Restore it, or delete it and run `python -m encode run` with "
        "the config that made it: the same tars give the same record"
    ),
    "index": "it lies beside the column and belongs to all columns of the source",
}


@dataclass(slots=True)
class RepairPlan:
    """What a repair does, in this order, and what it cannot do."""

    quarantine: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    rewrite: list[tuple[str, str, bytes]] = field(default_factory=list)  # (name, why, new bytes)
    beyond: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)  # that encode has to make again
    complete: bool = False  # whether a COMPLETE record is to be written again from the commits

    def __bool__(self) -> bool:
        return bool(self.quarantine or self.rewrite)


def plan_repair(examination: Examination) -> RepairPlan:
    """Returns what to do about the faults of a column; nothing is changed."""
    plan, faults, column = RepairPlan(), examination.faults, examination.column
    plan.beyond = [
        f"{fault}\n  cannot be repaired here: {BESIDE[fault.kind]}"
        for fault in faults
        if fault.kind in BESIDE
    ]
    if column is None:
        return plan
    store = column.store
    bad = sorted({f.shard for f in faults if f.kind in SHARD_FAULTS and f.shard is not None})
    named_shards = {f.shard for f in faults if f.kind == "complete" and f.shard is not None}
    plan.shards = sorted(named_shards.difference(column.commits).union(bad))
    _plan_complete(plan, column, faults)
    listing = {name for name, _ in store.list()}

    def put_aside(name: str, why: str) -> None:
        # an object that a listing does not show would be adopted by the next encode
        is_there = name in listing or store.size(name) is not None
        if is_there and name not in dict(plan.quarantine):
            plan.quarantine.append((name, why))

    for shard in bad:
        for name, why in _bad_objects(column, faults, shard):
            put_aside(name, why)
        put_aside(commit_name(shard), f"shard {shard} is damaged")
    for shard in plan.shards:  # it had failed before it was committed: encode would pass it over
        put_aside(failure_name(shard), f"shard {shard} is to be made again")
    for fault in faults:
        if (
            fault.shard is None
            and fault.kind in ("object", "failure", "statistics")
            and fault.object
        ):
            put_aside(fault.object, fault.message)
        elif fault.kind == "metadata" and fault.object:
            data = column.spec.zarr_json()[fault.object]
            plan.rewrite.append((fault.object, fault.message, data))
    return plan


def _plan_complete(plan: RepairPlan, column: Description, faults: list[Fault]) -> None:
    """Puts COMPLETE records aside that are damaged or name a bad shard; valid-row bits of the others
    are made again.
    """
    store, bad = column.store, set(plan.shards)
    damaged = {fault.object for fault in faults if fault.kind == "complete"}
    bits = {fault.object: fault.message for fault in faults if fault.kind == "valid"}
    has_sound = False
    for name in column.complete:
        valid = name.removesuffix(".json") + ".valid"
        try:
            record: CompleteRecord | None = store.record(name, CompleteRecord)
        except (OSError, ShardsError) as error:
            damage_message_or_raise(error)
            record = None
        names_bad = record is not None and any(
            content and shard in bad for shard, (_, content, _) in enumerate(record.shards)
        )
        if name in damaged or record is None or names_bad:
            why = "it names a damaged shard" if names_bad else "it is damaged"
            plan.quarantine.append((name, why))
            if store.size(valid) is not None:
                plan.quarantine.append((valid, f"of {name}"))
            continue
        has_sound = True
        if valid in bits:
            mask = snapshot_of(column, record).valid_mask.astype("<u4").tobytes()
            plan.rewrite.append((valid, bits[valid], mask))
    plan.complete = bool(column.complete) and not (has_sound or bad or column.missing)


def _bad_objects(column: Description, faults: list[Fault], shard: int) -> list[tuple[str, str]]:
    """Returns (name, why) of the objects of a bad shard that must go; the empty caption is not a
    shard's.
    """
    must, may = objects_of(column.spec, shard, column.spec.layout.shard_rows)
    names = sorted(name for name in must | may if not name.startswith("empty/"))
    if shard not in column.commits:
        return [(name, "no commit says what it should hold") for name in names]
    hurt = {
        fault.object: fault.message
        for fault in faults
        if fault.shard == shard and fault.kind == "object" and fault.object in names
    }
    if not hurt:  # each object is as it was committed, and yet they do not fit together
        return [(name, "the shard's objects do not fit together") for name in names]
    derived = {name for name in names if name.split("/")[0] in SMALL}
    if hurt.keys() - derived:  # new values may differ in a rounding, and so their checksums
        hurt = dict.fromkeys(derived, "derived from values that are damaged") | hurt
    return sorted((str(name), why) for name, why in hurt.items())


def repair(
    url: Place,
    yes: bool,
    processes: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> tuple[Examination, RepairPlan]:
    """Examines a column and, with `yes`, puts aside what is damaged, under the exclusive lease.

    Raises LeaseHeld if another command has the lease; nothing was changed then.
    """
    if not yes:
        examination = examine(url, processes, progress)
        return examination, plan_repair(examination)
    store = open_store(url)
    require_column(store)
    with Lease(store, "shards repair", force) as lease:
        examination = examine(store, processes, progress)
        if examination.faults and store.folder is None:
            examination = _second_look(examination, processes)
        plan = plan_repair(examination)
        carry_out(plan, examination, lease)
    return examination, plan


def _second_look(first: Examination, processes: int | None) -> Examination:
    """Returns what is found once more of the shards that have faults. Raises StoreError if it differs: what
    changes on its way over a network is sound where it is, and must stay.
    """
    again = examine(first.store, processes, shards={fault.shard for fault in first.faults})
    before, now = ({(f.kind, f.shard, f.object): f for f in e.faults} for e in (first, again))
    for key in before.keys() ^ now.keys():
        raise StoreError(
            f"{first.store.url}: only one of two looks found this: {(before | now)[key]}. The network, or a "
            "proxy in it, changes what the store answers. Nothing was put aside; run again"
        )
    return again


def carry_out(plan: RepairPlan, examination: Examination, lease: Lease) -> None:
    """Does what a plan says, in its order; killed at any point, it goes on when run again."""
    store, column = examination.store, examination.column
    place = QUARANTINE + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{lease.owner[:6]}"
    for name, _ in plan.quarantine:
        lease.check()
        store.move(name, f"{place}/{name}")
    for name, _, data in plan.rewrite:
        lease.check()
        store.replace(name, data)
    if plan.complete and column is not None:
        lease.check()
        shards, failed = column.spec.layout.shards, bool(column.failed)
        put_complete(store, column.digest, shards, allow_failed=failed)


def run_repair(args: argparse.Namespace) -> int:
    """`python -m shards repair`: 1 if something is left that it cannot repair, else 0."""
    url, yes = args.column, args.yes
    with Bar("verify", unit="bytes") as bar:
        examination, plan = repair(url, yes, args.processes, args.break_lease, bar)
    for line in plan.beyond:
        print(line)
    for name, why in plan.quarantine:
        print(f"{'moved to quarantine' if yes else 'would quarantine'}: {name} ({why})")
    for name, why, _ in plan.rewrite:
        print(f"{'rewritten' if yes else 'would rewrite'}: {name} ({why})")
    if plan.complete:
        print(f"{'written' if yes else 'would write'}: the COMPLETE record, from the commits")
    if not examination.faults:
        print(f"{url}: sound, nothing to repair")
    elif plan and not yes:
        print(f"{url}: nothing was changed; do it with `python -m shards repair {url} --yes`")
    elif plan.shards:
        rest = " and more" if len(plan.shards) > SHOWN else ""
        print(
            f"{url}: `python -m encode run` with the config of this column now makes shards "
            f"{plan.shards[:SHOWN]}{rest} again"
        )
    elif plan:  # the empty caption is written again by the next encode
        empty = any(name.startswith("empty/") for name, _ in plan.quarantine)
        print(f"{url}: repaired" + "; run `python -m encode run` once more" * empty)
    return 1 if plan.beyond else 0
