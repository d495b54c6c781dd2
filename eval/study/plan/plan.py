"""`python -m eval study plan STUDY.yaml`: what a study would make, take over and cost, before it
starts. Nothing is run or written; where there are no columns yet, `data.expect` says what they will be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from shards.console import counted, duration_text, render, size_text
from train.plan import Efficiency, gpu_named

from ...errors import BadStudy, OutputEdited, StudyChanged
from ...images.flags import plain
from ..checks import check_reconstructions
from ..earlier import refuse_changed, take_over, taken_over
from ..encoders import check_decoders
from ..flags import generate_settings, scorer_settings
from ..graph import Kind, nodes_of
from ..reuse import Existing, read_record
from ..run.edited import refuse_edited
from ..run.ready import refuse_few
from ..study import Study
from .cost import PARTS, Assumptions, Costs, NodeCost
from .disk import Room, rooms

Json = dict[str, Any]
KIND, VERSION = "latentbank-study-plan", 1
KINDS: tuple[Kind, ...] = ("encode", "train", "generate", "score")
LARGEST = 3  # items that are named
PART_NAMES = {
    "columns": "columns of latents",
    "scored_checkpoints": "checkpoints that are scored, and stay in full",
    "other_checkpoints": "checkpoints to go on from (save_every, keep)",
    "ema_snapshots": "snapshots of averages (ema.power)",
    "pictures": "sets of pictures",
}


@dataclass(frozen=True)
class StudyPlan:
    study: Study
    assumptions: Assumptions
    costs: Sequence[NodeCost]  # of each node as if nothing existed
    existing: frozenset[str]  # ids
    taken_over: Mapping[str, Path]  # ids, and where what was made by hand lies
    pictures: int  # of a set
    notes: tuple[str, ...]

    def to_make(self, kind: Kind | None = None) -> list[NodeCost]:
        return [
            cost
            for cost in self.costs
            if cost.node.id not in self.existing and kind in (None, cost.node.kind)
        ]

    def gpu_hours(self, kind: Kind | None = None) -> float | None:
        """Returns the hours of what is to be made; None where those of a node are not known."""
        hours = [cost.gpu_hours for cost in self.to_make(kind)]
        return None if None in hours else sum(h for h in hours if h is not None)

    def money(self, kind: Kind | None = None) -> float | None:
        hours, price = self.gpu_hours(kind), self.assumptions.price
        return None if hours is None or price is None else hours * price

    @property
    def files(self) -> dict[str, Json]:
        """The bytes of each part of what is to be made, in all and of one file or folder."""
        files = [files for cost in self.to_make() for files in cost.files]
        return {
            part: {
                "bytes": sum(f.bytes for f in files if f.part == part),
                "each": max((f.each for f in files if f.part == part), default=0.0),
            }
            for part in PARTS
        }

    @property
    def rooms(self) -> list[Room]:
        return rooms(self.to_make())

    def largest(self, amount: Callable[[NodeCost], float | None]) -> list[tuple[str, int, float]]:
        """Returns the items that take the most: what, how many, and the amount of all of them."""
        groups: dict[str, list[float]] = {}
        for cost in self.to_make():
            if value := amount(cost):
                groups.setdefault(_group(cost), []).append(value)
        items = [(name, len(values), sum(values)) for name, values in groups.items()]
        return sorted(items, key=lambda item: item[2], reverse=True)[:LARGEST]


def _group(cost: NodeCost) -> str:
    """Returns the node's id without its seed and step."""
    return "/".join(
        part for part in cost.node.id.split("/") if not part.startswith(("seed", "step-"))
    )


def plan_study(
    study: Study, assumptions: Assumptions, existing: Iterable[str] = (),
    taken_over: Mapping[str, Path] | None = None, seconds: Mapping[str, float] | None = None,
) -> StudyPlan:  # fmt: skip
    """Returns the plan. `existing` are ids of nodes that need not run, `taken_over` those of them that
    were made by hand, `seconds` what nodes took that ran.
    """
    costs = Costs(study, assumptions, seconds)
    return StudyPlan(
        study, assumptions, costs.of(nodes_of(study)), frozenset(existing), taken_over or {}, costs.pictures,
        tuple(costs.notes()),
    )  # fmt: skip


def plan_existing(study: Study, assumptions: Assumptions) -> StudyPlan:
    """Returns the plan of what a study lacks, beside what exists and what was made by hand; BadStudy
    for flags that `eval generate` or `eval score` do not take, and for reconstructions that are absent, TooFewImages
    for fewer pictures than a scorer takes.
    """
    generate_settings(study)
    for scorer in study.scorers:
        scorer_settings(study, scorer)
    refuse_few(study)
    check_reconstructions(study)
    study = take_over(study)
    existing, nodes = Existing(study), nodes_of(study)
    records = {node.id: read_record(study, node.id) or {} for node in nodes}
    plan = plan_study(
        study,
        assumptions,
        [node.id for node in nodes if existing.done(node)],
        taken_over(study),
        {name: r["seconds"] for name, r in records.items() if r.get("exit_code") == 0},
    )
    try:
        refuse_edited(study)
        refuse_changed(study)
        if plan.to_make("generate"):
            check_decoders(study)
    except (BadStudy, OutputEdited, StudyChanged) as error:
        return replace(plan, notes=(f"`study run` will refuse: {error}", *plan.notes))
    return plan


# For a reader -------------------------------------------------------------------------------------


def as_text(plan: StudyPlan) -> str:
    """Returns the plan for a reader."""
    study, a = plan.study, plan.assumptions
    steps = ", ".join(f"{step:,}" for step in study.steps)
    entries = counted(len(study.entries), "entry", "entries")
    lines = [
        f"{study.path}: {entries} x {counted(len(study.seeds), 'seed')}, scored at step {steps}, "
        f"{counted(plan.pictures, 'picture')} a set ({study.config.benchmark or study.config.prompts}); "
        f"out: {study.out}",
        f"baseline {study.baseline}; against it {', '.join(study.entries[1:])}; primary score "
        f"{study.scorers[0].name}",
    ]  # fmt: skip
    lines += [
        f"chosen for each entry: {axis}, of {', '.join(map(plain, values))}"
        for axis, values in study.axes.items()
    ]
    lines += [f"taken over: {node} from {folder}" for node, folder in plan.taken_over.items()]
    return render(*lines, "", _table(plan), *_disk_table(plan), *_time_lines(plan), *(r.verdict() for r in plan.rooms),
                  *_largest_lines(plan), *_assumed_lines(a), *plan.notes)  # fmt: skip


def _table(plan: StudyPlan) -> Table:
    hours_of = "GPU hours" if plan.assumptions.gpu else "hours"
    heads = ["nodes", "exist", "taken over", "to make", hours_of]
    heads += ["money"] if plan.assumptions.price is not None else []
    table = Table("", *(Column(head, justify="right") for head in [*heads, "disk"]))
    rows: list[tuple[str, Kind | None]] = [(kind, kind) for kind in KINDS]
    for name, kind in [*rows, ("all", None)]:
        nodes = [cost.node.id for cost in plan.costs if kind in (None, cost.node.kind)]
        if not nodes:
            continue
        if kind is None:
            table.add_section()
        rest, hours, money = plan.to_make(kind), plan.gpu_hours(kind), plan.money(kind)
        by_hand = sum(node in plan.taken_over for node in nodes)
        figures = ["" if hours is None else _hours(hours)]
        if plan.assumptions.price is not None:
            figures.append("" if money is None else f"{money:,.0f}")
        table.add_row(
            name, f"{len(nodes):,}", f"{len(nodes) - len(rest) - by_hand:,}", f"{by_hand:,}", f"{len(rest):,}",
            *figures, size_text(sum(cost.bytes for cost in rest)),
        )  # fmt: skip
    return table


def _disk_table(plan: StudyPlan) -> Iterator[Table]:
    """Yields a line for each part of the disk that what is to be made takes."""
    table = Table("disk", *(Column(head, justify="right") for head in ("in all", "each at most")))
    for part, sizes in plan.files.items():
        if sizes["bytes"]:
            table.add_row(PART_NAMES[part], size_text(sizes["bytes"]), size_text(sizes["each"]))
    if table.row_count:
        yield table


def _time_lines(plan: StudyPlan) -> Iterator[str]:
    a = plan.assumptions
    if not plan.to_make():
        yield "all that the study asks for exists"
        return
    if (hours := plan.gpu_hours()) is None:
        unknown = dict.fromkeys(c.node.kind for c in plan.to_make() if c.gpu_hours is None)
        if a.gpu is None:
            yield f"time of {', '.join(unknown)} unknown: give --gpu or --peak-tflops"
        else:
            yield f"time of {', '.join(unknown)} unknown, as the rows are"
        return
    yield (
        f"time on {a.gpus} {a.gpu.name if a.gpu else 'devices'}, if all are always at work: "
        f"{duration_text(3600 * hours / a.gpus)}"
    )


def _largest_lines(plan: StudyPlan) -> Iterator[str]:
    hours = plan.largest(lambda cost: cost.gpu_hours)
    sizes = plan.largest(lambda cost: cost.bytes)
    if hours:
        items = [f"{name} {count} x {_hours(total / count)}" for name, count, total in hours]
        yield f"most hours: {'; '.join(items)}"
    if sizes:
        items = [f"{name} {count} x {size_text(total / count)}" for name, count, total in sizes]
        yield f"most disk: {'; '.join(items)}"


def _assumed_lines(a: Assumptions) -> list[str]:
    if a.gpu is None:
        return []
    e = a.efficiency
    return [
        f"assumed: {e.dit:.0%} of {a.gpu.peak / 1e12:,.3g} TFLOP/s in training and sampling, {e.vae:.0%} in the VAE's "
        "encoder, a fixed time a picture in scoring; what nodes of this study took comes first"
    ]  # fmt: skip


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:,.3g}"


# The command --------------------------------------------------------------------------------------


def as_record(plan: StudyPlan) -> Json:
    """Returns the plan as JSON; hours, money and bytes are of what is still to be made."""
    study, a = plan.study, plan.assumptions

    def of(kind: Kind | None) -> Json:
        nodes = [cost.node.id for cost in plan.costs if kind in (None, cost.node.kind)]
        return {
            "nodes": len(nodes),
            "existing": sum(node in plan.existing for node in nodes),
            "taken_over": sum(node in plan.taken_over for node in nodes),
            "to_make": len(plan.to_make(kind)),
            "gpu_hours": plan.gpu_hours(kind),
            "price": plan.money(kind),
            "bytes": sum(cost.bytes for cost in plan.to_make(kind)),
        }

    return {
        "format": KIND,
        "version": VERSION,
        "study": str(study.path),
        "out": str(study.out),
        "entries": list(study.entries),
        "seeds": list(study.seeds),
        "steps": list(study.steps),
        "pictures_a_set": plan.pictures,
        "all": of(None),
        **{kind: of(kind) for kind in KINDS},
        "nodes": [
            {
                "id": cost.node.id, "exists": cost.node.id in plan.existing, "gpu_hours": cost.gpu_hours,
                "measured": cost.measured, "bytes": cost.bytes,
                "files": {files.part: files.bytes for files in cost.files},
            }
            for cost in plan.costs
        ],
        "taken_over": {node: str(folder) for node, folder in plan.taken_over.items()},
        "files": plan.files,
        "disk": [asdict(room) | {"fits": room.fits} for room in plan.rooms],
        "setting": asdict(a),
        "notes": list(plan.notes),
    }  # fmt: skip


def run_plan(args: argparse.Namespace) -> bool:
    """Runs `python -m eval study plan`; returns whether what is to be made fits, as far as is known."""
    study = Study.open(args.study, args.out)
    config = study.config
    price = args.price_per_gpu_hour
    assumptions = Assumptions(
        gpus=args.gpus,
        gpu=gpu_named(args.gpu or config.gpu, args.peak_tflops),
        efficiency=Efficiency(dit=args.mfu, vae=args.vae_efficiency),
        price=config.price if price is None else price,
        samples=args.samples,
        tokens=args.tokens,
    )
    plan = plan_existing(study, assumptions)
    print(as_text(plan))
    if args.json:
        args.json.write_text(json.dumps(as_record(plan), indent=1) + "\n")
    return all(room.fits is not False for room in plan.rooms)
