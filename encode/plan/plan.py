"""What a run will take before it starts: bytes, hours, money, and whether it pays.

    python -m encode plan configs/encode/blip3o.yaml
    python -m encode plan CONFIG --gpus 32 --price-per-gpu-hour 2.5 --price-per-tb-month 23
    python -m encode plan CONFIG --seconds 0 --json            # bytes only, for a script

The source's index is read where it stands; else a few tars are looked into, and totals have an
interval. Encoders are tried on real rows, on this machine's device: run it where the encoding will
run. Exit code 2 if the target has too little room.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

import configs
from shards import Layout, Store, open_store
from shards.column.commits import committed
from shards.console import not_negative, number, positive, render, size_text, without_nan
from shards.format.atomic import Json
from shards.places import local_path

from ..config import EncodeConfig
from ..errors import EncodeError
from ..models import load_encoders
from ..models.encoder import CaptionEncoder, Encoder, ImageEncoder, layout_of
from ..source.members import passed_over
from .disk_space import MARGIN, free_bytes, lengths_of
from .probe import Rate, decode_bound, hours, probe, spread
from .sizes import alternatives, column_bytes, shard_bytes
from .survey import Estimate, Survey, find, look_into, refuse_unmatched


@dataclass(slots=True)
class ColumnPlan:
    """What one column of one source will take. Totals are of the whole column, missing or not."""

    source: str
    column: str
    kind: str
    samples: Estimate  # rows that will have values
    bytes: Estimate
    missing_bytes: float  # of the shards that are not committed yet
    committed: int
    shards: int
    mean_tokens: float | None = None
    p99_tokens: float | None = None
    rate: Rate | None = None
    gpu_hours: float | None = None
    threads_wanted: int | None = None  # decoding threads a device, where it would wait
    break_even_steps: float | None = None
    alternatives: dict[str, float] = field(default_factory=dict)  # bytes by name
    passed_over: dict[str, int] = field(default_factory=dict)  # see `members`; of the rows seen


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What a source holds, and how that is known."""

    source: str
    tars: int
    rows: Estimate
    index_bytes: Estimate  # of <root>/<source>/index
    index_missing_bytes: float
    notes: list[str]


# Bytes --------------------------------------------------------------------------------------------


def bytes_of(
    layout: Layout, survey: Survey, there: Sequence[NDArray[np.bool_]],
    lengths: Sequence[NDArray[np.int64]], ratio: float = 1.0, empty: int = 0,
) -> Estimate:  # fmt: skip
    """Bytes of a whole column, from what was found in the tars looked into."""
    pairs = zip(there, lengths, strict=True)
    each = [float(shard_bytes(layout, t, n, ratio)) for t, n in pairs]
    return survey.total(each).plus(column_bytes(layout, int(survey.rows().value), empty))


def plan_column(
    name: str, encoder: Encoder, survey: Survey, folder: Store, rate: Rate | None
) -> ColumnPlan:
    """Samples, tokens and bytes of one column."""
    suffix, shards = encoder.config.suffix, survey.shards
    layout = layout_of(encoder, shards, survey.source.shard_rows)
    there = [look.has(suffix) for look in survey.looks]
    lengths = [np.zeros(len(t), np.int64) for t in there]
    empty = 0
    if isinstance(encoder, CaptionEncoder):
        lengths = lengths_of(encoder, suffix, layout.row_shape[0], survey.looks)
        empty = int(encoder.lengths([""])[0])
    ratio = rate.ratio if rate is not None else 1.0
    total = bytes_of(layout, survey, there, lengths, ratio, empty)
    done = len(committed(folder.child(name), shards))
    plan = ColumnPlan(
        survey.source.name, name, layout.kind,
        survey.total([float(t.sum()) for t in there]), total,
        total.value * (shards - done) / max(shards, 1), done, shards, rate=rate,
    )  # fmt: skip
    rows = (row for look in survey.looks for row in look.rows)
    plan.passed_over = passed_over(rows, suffix, not layout.ragged)
    if layout.ragged:
        held = np.concatenate(lengths)[np.concatenate(there)]
        if held.size:
            plan.mean_tokens = float(held.mean())
            plan.p99_tokens = float(np.percentile(held, 99))
    for other, cheaper in alternatives(layout).items():
        plan.alternatives[other] = bytes_of(cheaper, survey, there, lengths, 1.0, empty).value
    return plan


# Hours and money ----------------------------------------------------------------------------------


def rows_for_probe(encoder: Encoder, survey: Survey) -> list[Any]:
    """Real pictures or captions of the tars looked into."""
    suffix = encoder.config.suffix
    if isinstance(encoder, ImageEncoder):
        return [data for look in survey.looks for data in look.pictures.get(suffix, [])]
    texts = [t for look in survey.looks for t in look.captions.get(suffix, []) if t]
    return spread(texts, min(len(texts), 2_048)) if texts else []


def break_even(plan: ColumnPlan, most: int, global_batch: int) -> float | None:
    """Steps of a run after which encoding once was cheaper than encoding in every step.

    N / B steps for pictures; for text less, because online it is padded to the most tokens. None
    for ids: the model runs in every step all the same.
    """
    if plan.kind == "ids":
        return None
    share = 1.0 if plan.mean_tokens is None else plan.mean_tokens / most
    return plan.samples.value / global_batch * share


def pass_gpu_hours(plans: Sequence[ColumnPlan], threads: int) -> float | None:
    """Hours that one device takes for all columns in one pass: encoders take turns, and pictures are
    decoded once, meanwhile. None where an encoder was not tried.
    """
    encoding = 0.0
    decoding: dict[str, float] = {}
    for plan in plans:
        if plan.rate is None:
            return None
        encoding += plan.samples.value / plan.rate.rows_per_s / 3_600
        if plan.rate.decoded_per_s is not None:
            spent = plan.samples.value / plan.rate.decoded_per_s / threads / 3_600
            decoding[plan.source] = max(decoding.get(plan.source, 0.0), spent)
    return max(encoding, sum(decoding.values()))


def make_plan(
    config: EncodeConfig, args: argparse.Namespace, say: Callable[[str], None] = lambda line: None
) -> tuple[list[SourcePlan], list[ColumnPlan]]:
    """The plan of every source, and of every column of it."""
    root = open_store(config.root)
    surveys: dict[str, Survey] = {}
    for name, tars in config.sources.items():
        folder = root.child(name)
        found = find(name, tars, config.shard_rows, folder)
        refuse_unmatched(
            config.columns, found.source, found.tars, folder, config.engine.scratch_folder
        )
        surveys[name] = found
    encoders = load_encoders(config.columns, config.engine)
    captions = {e.suffix for e in encoders.values() if isinstance(e, CaptionEncoder)}
    pictures = {e.view.suffix for e in encoders.values() if isinstance(e, ImageEncoder)}
    for name, survey in surveys.items():
        say(f"source {name}: looking into tars")
        count = args.shards_sampled or survey.shards
        look_into(survey, root.child(name), count, captions, pictures, config.engine.scratch_folder)
    plans = []
    rates: dict[str, Rate | None] = {}
    for name, survey in surveys.items():
        for column, encoder in encoders.items():
            layout = layout_of(encoder, survey.shards, config.shard_rows)
            if args.seconds and rates.get(column) is None:
                say(f"column {column}: trying its encoder for up to {args.seconds:.0f} s")
                rows = rows_for_probe(encoder, survey)
                rates[column] = probe(encoder, layout, rows, config.engine, args.seconds)
            rate = rates.get(column)
            plan = plan_column(column, encoder, survey, root.child(name), rate)
            plan.break_even_steps = break_even(plan, layout.row_shape[0], args.global_batch)
            if rate is not None:
                plan.gpu_hours = hours(plan.samples.value, rate, 1, config.engine.threads)
                plan.threads_wanted = decode_bound(rate, config.engine.threads)
            plans.append(plan)
    return [plan_source(survey) for survey in surveys.values()], plans


def plan_source(survey: Survey) -> SourcePlan:
    """Rows and index of a source."""
    index = survey.total([float(look.index_bytes) for look in survey.looks])
    missing = index.value * (1 - len(survey.known) / max(survey.shards, 1))
    return SourcePlan(
        survey.source.name, survey.shards, survey.rows(), index, missing, survey.notes
    )  # fmt: skip


# The command --------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m encode plan`."""
    parser.add_argument("config", type=local_path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument(
        "--gpus", type=positive, default=1, help="devices like this one (%(default)s)"
    )
    parser.add_argument("--price-per-gpu-hour", type=number(), metavar="P", help="in any currency")
    parser.add_argument("--price-per-tb-month", type=number(), metavar="Q", help="of the target")
    parser.add_argument(
        "--seconds", type=number(), default=60, help="to try each encoder for, 0: not (%(default)s)"
    )
    parser.add_argument(
        "--shards-sampled", type=not_negative, default=8, metavar="K",
        help="tars of each source to look into, 0: all (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--global-batch", type=positive, default=1_024, metavar="B",
        help="of the run that encoding in every step is compared with (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True, slots=True)
class Room:
    """What is there and what is needed at the target, and the hours of one pass."""

    root: str
    total: float  # bytes of everything, written or not
    missing: float  # bytes still to be written
    free: int | None
    gpu_hours: float | None = None

    @property
    def needed(self) -> float:
        return self.missing * MARGIN

    @property
    def fits(self) -> bool | None:
        """None where nobody knows."""
        return None if self.free is None else self.free >= self.needed


def run_plan(args: argparse.Namespace) -> int:
    """`python -m encode plan`; 2 if the columns do not fit."""
    config = configs.load(EncodeConfig, args.config, args.overrides)
    if not config.sources or not config.columns:
        raise EncodeError(f"{args.config}: it names no source or no column, so there is no plan")
    sources, plans = make_plan(config, args, lambda line: print(line, file=sys.stderr))
    root = open_store(config.root)
    room = Room(
        root.url,
        sum(p.bytes.value for p in plans) + sum(s.index_bytes.value for s in sources),
        sum(p.missing_bytes for p in plans) + sum(s.index_missing_bytes for s in sources),
        free_bytes(root),
        pass_gpu_hours(plans, config.engine.threads),
    )
    if args.json:
        print(json.dumps(without_nan(as_record(sources, plans, args, room)), indent=1))
    else:
        print(as_text(sources, plans, args, room))
    return 2 if room.fits is False else 0


def as_record(
    sources: Sequence[SourcePlan], plans: Sequence[ColumnPlan], args: argparse.Namespace, room: Room
) -> Json:
    """The plan as JSON."""
    return {
        "gpus": args.gpus,
        "global_batch": args.global_batch,
        "sources": [asdict(source) for source in sources],
        "columns": [asdict(plan) | money(plan, args) for plan in plans],
        "hours": None if room.gpu_hours is None else room.gpu_hours / args.gpus,
        "bytes": room.total,
        "missing_bytes": room.missing,
        "needed_bytes": room.needed,
        "free_bytes": room.free,
        "fits": room.fits,
    }


def money(plan: ColumnPlan, args: argparse.Namespace) -> Json:
    """Hours on the GPUs asked for, their price, and that of keeping the column a month."""
    found: Json = {"hours": None, "price_once": None, "price_a_month": None}
    if plan.gpu_hours is not None:
        found["hours"] = plan.gpu_hours / args.gpus
        if args.price_per_gpu_hour is not None:
            found["price_once"] = plan.gpu_hours * args.price_per_gpu_hour
    if args.price_per_tb_month is not None:
        found["price_a_month"] = plan.bytes.value / 1e12 * args.price_per_tb_month
    return found


def as_text(
    sources: Sequence[SourcePlan], plans: Sequence[ColumnPlan], args: argparse.Namespace, room: Room
) -> str:
    """The plan for a reader: a table of columns, notes, total and verdict."""
    priced = [name for name in PRICES if getattr(args, PRICES[name][0]) is not None]
    heads = ["column", "samples", "tokens: mean, p99", "bytes", f"hours on {args.gpus}"]
    table = Table(*heads, *(PRICES[name][1] for name in priced), "pays after")
    for shown in table.columns[1:]:
        shown.justify = "right"
    for plan in plans:
        cost = money(plan, args)
        tokens = (
            "" if plan.mean_tokens is None else f"{plan.mean_tokens:.1f}, {plan.p99_tokens:.0f}"
        )
        table.add_row(
            f"{plan.source}/{plan.column}", interval(plan.samples, count_text), tokens,
            interval(plan.bytes, size_text), "" if cost["hours"] is None else f"{cost['hours']:,.2f}",
            *("" if cost[name] is None else f"{cost[name]:,.2f}" for name in priced),
            "" if plan.break_even_steps is None else f"{plan.break_even_steps:,.0f} steps",
        )  # fmt: skip
    lines = [
        f"{source.source}: {interval(source.rows, count_text)} rows in {source.tars:,} tars, index "
        f"{interval(source.index_bytes, size_text)}; {'; '.join(source.notes)}"
        for source in sources
    ]
    lines += [line for plan in plans for line in _hints(plan)]
    lines.append(
        f"pays after: steps of a run of global batch {args.global_batch:,} in which encoding in "
        "every step would have cost as much (text is padded there)"
    )
    total = f"total {size_text(room.total)}, still to be written {size_text(room.missing)}"
    if room.gpu_hours is not None:
        total += f"; all columns in one pass: {room.gpu_hours / args.gpus:,.2f} h on {args.gpus}"
        if args.price_per_gpu_hour is not None:
            total += f", price {room.gpu_hours * args.price_per_gpu_hour:,.2f}"
    lines.append(total)
    return render(table, *lines, verdict(room))


# what a price is called in the JSON: (option, head of its column in the table)
PRICES = {
    "price_once": ("price_per_gpu_hour", "price"),
    "price_a_month": ("price_per_tb_month", "a month"),
}


def _hints(plan: ColumnPlan) -> list[str]:
    """What is worth knowing of a column beside its row."""
    name, lines = f"{plan.source}/{plan.column}", []
    if plan.rate is not None:
        decoding = plan.rate.decoded_per_s
        each = "" if decoding is None else f", a thread decodes {decoding:,.1f}/s"
        lines.append(f"{name}: {plan.rate.rows_per_s:,.1f} samples/s on this device{each}")
    if plan.threads_wanted is not None:
        lines.append(
            f"{name}: decoding is the slower part; engine.threads={plan.threads_wanted} would keep "
            "the device busy"
        )
    if plan.passed_over:
        words = ", ".join(
            f"{suffix!r} of {count:,} rows" for suffix, count in plan.passed_over.items()
        )
        lines.append(f"{name}: reads one suffix only; passed over, of the rows looked at: {words}")
    if plan.alternatives:
        words = ", ".join(f"{n} {size_text(b)}" for n, b in plan.alternatives.items())
        lines.append(f"{name}: the same captions stored otherwise: {words}")
    if plan.committed:
        lines.append(f"{name}: {plan.committed:,} of {plan.shards:,} shards are committed already")
    return lines


def verdict(room: Room) -> str:
    if room.free is None:
        return f"{room.root}: free space unknown (an object store does not say)"
    there = f"{room.root}: {size_text(room.free)} free, {size_text(room.needed)} needed"
    return f"{there}: it fits" if room.fits else f"{there}: it does NOT fit, `run` will refuse"


def interval(estimate: Estimate, show: Callable[[float], str]) -> str:
    """A total, with its 95 % interval where it is an estimate."""
    if estimate.exact:
        return show(estimate.value)
    if math.isnan(estimate.low):
        return f"~{show(estimate.value)}"
    return f"~{show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)})"


def count_text(value: float) -> str:
    return f"{value / 1e6:,.2f} M" if value >= 1e7 else f"{value:,.0f}"
