"""Put damaged parts of a column aside, so that `encode run` makes just those again.

    <column>/quarantine/<utc time>/<name>      what was damaged, under the name it had

COMPLETE generations that name a bad shard go first, so nobody opens the column as a whole any more;
then the bad objects; the commit last. Whoever still reads the shard in between gets an error that
names the object, never other data. Were the commit to go before the objects, a repair that is
killed in between would leave damaged objects that the next encode adopts as sound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..column.commits import commit_name, put_complete
from ..column.lease import Lease
from ..console import Bar
from ..errors import ShardsError
from ..format.atomic import Json
from ..format.layout import COMPLETE, VERSION, ColumnSpec
from ..format.records import CompleteRecord, parse
from ..store.base import Place, Store
from ..store.open import open_store
from .parallel import Report, silent
from .scan import SMALL, damage_message_or_raise, objects_of
from .verify import QUARANTINE, Examination, check_stands, examine, snapshot_of

SHARD_FAULTS = ("commit", "object", "rows", "digest")
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
class Plan:
    """What a repair does, in this order, and what it cannot do."""

    quarantine: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    rewrite: list[tuple[str, str, bytes]] = field(default_factory=list)  # (name, why, new bytes)
    beyond: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)  # that encode has to make again
    complete: bool = False  # whether a COMPLETE record is to be written again from the commits

    def __bool__(self) -> bool:
        return bool(self.quarantine or self.rewrite)


def plan_repair(found: Examination) -> Plan:
    """What to do about the faults of a column; nothing is changed."""
    plan, store, spec = Plan(), found.store, found.spec
    for fault in found.faults:
        if fault.kind in BESIDE:
            plan.beyond.append(f"{fault}\n  cannot be repaired here: {BESIDE[fault.kind]}")
    if spec is None:
        return plan
    bad = sorted({f.shard for f in found.faults if f.kind in SHARD_FAULTS and f.shard is not None})
    plan.shards = sorted({*bad, *_named_but_absent(found)})
    _generations(plan, found, set(plan.shards))
    listed = {name for name, _ in store.list()}

    def stands(name: str) -> bool:
        """Were an object passed over that a listing does not show, an encode would adopt it."""
        return name in listed or store.size(name) is not None

    for shard in bad:
        for name, why in _objects(found, spec, shard):
            if stands(name):
                plan.quarantine.append((name, why))
        if stands(commit_name(shard)):
            plan.quarantine.append((commit_name(shard), f"shard {shard} is damaged"))
    for fault in found.faults:
        if fault.shard is None and fault.kind in ("object", "failure") and fault.object:
            if stands(fault.object):
                plan.quarantine.append((fault.object, fault.message))
        elif fault.kind == "metadata" and fault.object:
            data = spec.zarr_json()[fault.object]
            plan.rewrite.append((fault.object, fault.message, data))
    return plan


def _named_but_absent(found: Examination) -> list[int]:
    """Shards that a COMPLETE record names and that have no commit."""
    shards = [f.shard for f in found.faults if f.kind == "complete" and f.shard is not None]
    return [shard for shard in shards if shard not in found.commits]


def _generations(plan: Plan, found: Examination, bad: set[int]) -> None:
    """COMPLETE records that are damaged or name a bad shard go; bits of the others are made again."""
    store = found.store
    wrong = {f.object for f in found.faults if f.kind == "complete"}
    bits = {f.object: f for f in found.faults if f.kind == "valid"}
    kept = False
    for name in found.generations:
        valid = name.removesuffix(".json") + ".valid"
        record = _record(store, name)
        names_bad = record is not None and any(
            content and shard in bad for shard, (_, content, _) in enumerate(record["shards"])
        )
        if name in wrong or record is None or names_bad:
            why = "it names a damaged shard" if names_bad else "it is damaged"
            plan.quarantine.append((name, why))
            if store.size(valid) is not None:
                plan.quarantine.append((valid, f"of {name}"))
            continue
        kept = True
        if valid in bits:
            words = snapshot_of(found, record).valid_mask.astype("<u4").tobytes()
            plan.rewrite.append((valid, bits[valid].message, words))
    plan.complete = found.complete and not kept and not bad and not found.missing


def _record(store: Store, name: str) -> Json | None:
    """A COMPLETE record that can be read."""
    try:
        record: Json = store.unseal(name, COMPLETE, VERSION)
        parse(record, CompleteRecord, store.at(name))
        return record
    except (OSError, ShardsError) as error:
        damage_message_or_raise(error)
        return None


def _objects(found: Examination, spec: ColumnSpec, shard: int) -> list[tuple[str, str]]:
    """The objects of a bad shard that must go, with the reason; the empty caption is not a
    shard's.
    """
    must, may = objects_of(spec, shard, spec.layout.shard_rows)
    own = sorted(name for name in must | may if not name.startswith("empty/"))
    faults = [f for f in found.faults if f.shard == shard]
    hurt = {f.object: f.message for f in faults if f.kind == "object" and f.object in own}
    if shard not in found.commits:
        return [(name, "no commit says what it should hold") for name in own]
    derived = [name for name in own if name.split("/")[0] in SMALL]
    if not hurt:  # each object is as it was committed, and yet they do not fit together
        return [(name, "the shard's objects do not fit together") for name in own]
    if hurt.keys() - set(derived):  # new values may differ in a rounding, and so their checksums
        hurt |= {
            name: "derived from values that are damaged" for name in derived if name not in hurt
        }
    return sorted(hurt.items())


def repair(
    url: Place,
    yes: bool,
    processes: int | None = None,
    force: bool = False,
    begin: Callable[[int], None] = silent,
    report: Report = silent,
) -> tuple[Examination, Plan]:
    """Examine a column and, with `yes`, put aside what is damaged, under the exclusive lease.

    LeaseHeld if another command has the lease; nothing was changed then.
    """
    if not yes:
        found = examine(url, processes, begin, report)
        return found, plan_repair(found)
    store = open_store(url)
    check_stands(store)
    with Lease(store, "shards repair", force) as lease:
        found = examine(store, processes, begin, report)
        plan = plan_repair(found)
        carry_out(plan, found, lease)
    return found, plan


def carry_out(plan: Plan, found: Examination, lease: Lease) -> None:
    """Do what a plan says, in its order; killed at any point, it goes on when run again."""
    store = found.store
    place = QUARANTINE + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + f"-{lease.owner[:6]}"
    for name, _ in plan.quarantine:
        lease.check()
        store.move(name, f"{place}/{name}")
    for name, _, data in plan.rewrite:
        lease.check()
        store.replace(name, data)
    if plan.complete and found.spec is not None:
        lease.check()
        put_complete(store, found.digest, found.spec.layout.shards, allow_failed=bool(found.failed))


def run_repair(url: str, yes: bool, processes: int | None, force: bool) -> int:
    """`python -m shards repair`: 1 if something is left that it cannot repair, else 0."""
    with Bar("verify", None, "bytes") as shown:
        found, plan = repair(url, yes, processes, force, shown.begin, shown.advance)
    for line in plan.beyond:
        print(line)
    for name, why in plan.quarantine:
        print(f"{'moved to quarantine' if yes else 'would quarantine'}: {name} ({why})")
    for name, why, _ in plan.rewrite:
        print(f"{'rewritten' if yes else 'would rewrite'}: {name} ({why})")
    if plan.complete:
        print(f"{'written' if yes else 'would write'}: the COMPLETE record, from the commits")
    if not found.faults:
        print(f"{url}: sound, nothing to repair")
    elif plan and not yes:
        print(f"{url}: nothing was changed; do it with `python -m shards repair {url} --yes`")
    elif plan.shards:
        print(
            f"{url}: `python -m encode run` with the config of this column now makes shards "
            f"{plan.shards[:16]}{' and more' if len(plan.shards) > 16 else ''} again"
        )
    elif plan:
        print(
            f"{url}: repaired" + ("; run `python -m encode run` once more" if _lost(plan) else "")
        )
    return 1 if plan.beyond else 0


def _lost(plan: Plan) -> bool:
    """Whether something was put aside that the next encode writes again."""
    return any(name.startswith("empty/") for name, _ in plan.quarantine)
