"""What a run will take before it starts: bytes, hours, money, and whether it pays.

    python -m encode plan configs/encode/blip3o.yaml
    python -m encode plan CONFIG --gpus 32 --price-per-gpu-hour 2.5 --price-per-tb-month 23
    python -m encode plan CONFIG --seconds 0 --json            # bytes only, for a script

The source's index is read where it exists; else a few tars are sampled, and totals have an
interval. Pictures that `run` would pack first are counted, and nothing of them is written. Encoders
are tried on real rows, on this machine's device: run it where the encoding will run. Exit code 2 if
the target has too little room.
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
from rich.table import Table

import configs
from shards import Layout
from shards.column import committed
from shards.console import (
    config_words,
    counted,
    not_negative,
    number,
    positive,
    render,
    say_next,
    size_text,
    without_nan,
)
from shards.format.atomic import Json

from ..config import EncodeConfig
from ..errors import EncodeError
from ..models import load_encoders
from ..models.encoder import CaptionEncoder, Encoder, ImageEncoder, layout_of
from ..pack.sources import with_packed
from ..source.index import index_heads
from ..source.members import passed_over
from .disk_space import DiskSpace, free_bytes, lengths_of
from .probe import Rate, decode_bound, hours, probe, spread
from .sample_source import Estimate, Survey, open_job
from .sizes import alternatives, column_bytes, shard_bytes
from .unpacked import UnpackedJob, unpacked

PROBE_CAPTIONS = 2_048  # that an encoder is tried on, at most
LEAST = 0.01  # hours, or a price, that a table shows as a number


@dataclass(slots=True)
class ColumnCost:
    """What one column of one source will take. Totals are of the whole column, missing or not."""

    source: str
    column: str
    kind: str
    # rows that will have values
    samples: Estimate
    bytes: Estimate
    # of the shards that are not committed yet
    missing_bytes: float
    committed: int
    shards: int
    mean_tokens: float | None = None
    p99_tokens: float | None = None
    rate: Rate | None = None
    gpu_hours: float | None = None
    # decoding threads a device, where it would wait
    threads_wanted: int | None = None
    break_even_steps: float | None = None
    # bytes of cheaper ways to store the same
    alternatives: dict[str, float] = field(default_factory=dict)
    # see `members.passed_over`; of the rows sampled
    passed_over: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceCost:
    """What a source holds, and how that is known. `index_bytes` is of <root>/<source>/index,
    `packing_bytes` of tars that do not exist yet.
    """

    source: str
    tars: int
    rows: Estimate
    index_bytes: Estimate
    index_missing_bytes: float
    packing_bytes: float
    notes: list[str]


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What the columns of a config will take; `bytes` is of everything, written or not."""

    sources: list[SourceCost]
    columns: list[ColumnCost]
    bytes: float
    space: DiskSpace
    # of one device, for all columns in one pass
    gpu_hours: float | None


def column_cost(
    name: str, encoder: Encoder, survey: Survey, rate: Rate | None, config: EncodeConfig
) -> ColumnCost:
    """Returns samples, tokens and bytes of one column."""
    job, suffix, shards = survey.job, survey.job.suffix(config, name), survey.shards
    layout = layout_of(encoder, shards, job.source.shard_rows)
    present = [sample.has(suffix) for sample in survey.samples]
    lengths, empty = [np.zeros(len(rows), np.int64) for rows in present], 0
    if isinstance(encoder, CaptionEncoder):
        lengths = lengths_of(encoder, suffix, layout.row_shape[0], survey.samples)
        empty = int(encoder.lengths([""])[0])

    def total(layout: Layout, ratio: float = 1.0) -> Estimate:
        pairs = zip(present, lengths, strict=True)
        sizes = [float(shard_bytes(layout, rows, tokens, ratio)) for rows, tokens in pairs]
        rows = int(survey.rows().value)
        sums = config.engine.statistics
        return survey.total(sizes).plus(column_bytes(layout, rows, empty, sums))

    size = total(layout, rate.ratio if rate else 1.0)
    commits = len(committed(job.folder.child(name), shards))
    cost = ColumnCost(
        job.source.name, name, layout.kind, survey.total([float(rows.sum()) for rows in present]),
        size, size.value * (shards - commits) / max(shards, 1), commits, shards, rate=rate,
        alternatives={key: total(cheap).value for key, cheap in alternatives(layout).items()},
        passed_over=passed_over(
            (row for sample in survey.samples for row in sample.rows), suffix, not layout.ragged
        ),
    )  # fmt: skip
    tokens = np.concatenate(lengths)[np.concatenate(present)]
    if layout.ragged and tokens.size:
        cost.mean_tokens, cost.p99_tokens = float(tokens.mean()), float(np.percentile(tokens, 99))
    return cost


# Hours and money ----------------------------------------------------------------------------------


def rows_for_probe(encoder: Encoder, survey: Survey, suffix: str) -> list[Any]:
    """Returns real pictures or captions of the sampled tars."""
    if isinstance(encoder, ImageEncoder):
        return [data for sample in survey.samples for data in sample.pictures.get(suffix, [])]
    texts = [text for sample in survey.samples for text in sample.captions.get(suffix, []) if text]
    return spread(texts, min(len(texts), PROBE_CAPTIONS))


def break_even(cost: ColumnCost, max_tokens: int, global_batch: int) -> float | None:
    """Returns the steps of a run after which encoding once was cheaper than encoding in every step.

    N / B steps for pictures; for text less, because online it is padded to the most tokens. None
    for ids: the model runs in every step all the same.
    """
    if cost.kind == "ids":
        return None
    share = 1.0 if cost.mean_tokens is None else cost.mean_tokens / max_tokens
    return cost.samples.value / global_batch * share


def pass_gpu_hours(costs: Sequence[ColumnCost], threads: int) -> float | None:
    """Returns the hours that one device takes for all columns in one pass: encoders take turns, and
    pictures are decoded once, meanwhile. None where an encoder was not tried.
    """
    encoding = 0.0
    decoding: dict[str, float] = {}
    for cost in costs:
        if cost.rate is None:
            return None
        encoding += cost.samples.value / cost.rate.rows_per_s / 3_600
        if cost.rate.decoded_per_s is not None:
            duration = cost.samples.value / cost.rate.decoded_per_s / threads / 3_600
            decoding[cost.source] = max(decoding.get(cost.source, 0.0), duration)
    return max(encoding, sum(decoding.values()))


def make_plan(config: EncodeConfig, args: argparse.Namespace) -> CostEstimate:
    """Returns the cost of every source and of every column of it; says on stderr what it does."""
    jobs = [
        unpacked(config, name) or open_job(config, name, index_alone=True)
        for name in config.sources
    ]
    encoders, threads = load_encoders(config.columns, config.engine), config.engine.threads
    surveys = []
    for job in jobs:
        captions, pictures = (
            {job.suffix(config, name) for name, e in encoders.items() if isinstance(e, kind)}
            for kind in (CaptionEncoder, ImageEncoder)
        )
        where = "pictures" if isinstance(job, UnpackedJob) else "tars"
        print(f"source {job.source.name}: looking into {where}", file=sys.stderr)
        surveys.append(Survey(job, args.shards_sampled, captions, pictures))
    costs = []
    rates: dict[str, Rate | None] = {}
    for survey in surveys:
        for name, encoder in encoders.items():
            layout = layout_of(encoder, survey.shards, config.shard_rows)
            if args.seconds and rates.get(name) is None:
                print(
                    f"column {name}: trying its encoder, at most {args.seconds:g} s",
                    file=sys.stderr,
                )
                rows = rows_for_probe(encoder, survey, survey.job.suffix(config, name))
                rates[name] = probe(encoder, layout, rows, config.engine, args.seconds)
            rate = rates.get(name)
            cost = column_cost(name, encoder, survey, rate, config)
            cost.break_even_steps = break_even(cost, layout.row_shape[0], args.global_batch)
            if rate is not None:
                cost.gpu_hours = hours(cost.samples.value, rate, 1, threads)
                cost.threads_wanted = decode_bound(rate, threads)
            costs.append(cost)
    sources = [source_cost(survey) for survey in surveys]
    missing_bytes = sum(cost.missing_bytes for cost in costs)
    missing_bytes += sum(s.index_missing_bytes + s.packing_bytes for s in sources)
    root = config.root_store
    return CostEstimate(
        sources, costs,
        sum(c.bytes.value for c in costs) + sum(s.index_bytes.value for s in sources),
        DiskSpace(root.url, missing_bytes, free_bytes(root)), pass_gpu_hours(costs, threads),
    )  # fmt: skip


def source_cost(survey: Survey) -> SourceCost:
    """Returns rows and index of a source, and what packing it will take."""
    job = survey.job
    index = survey.total([float(sample.index_bytes) for sample in survey.samples])
    share = len(index_heads(job.folder)) / max(survey.shards, 1)  # of tars that have an index
    missing_bytes = index.value * (1 - share)
    packing_bytes, notes = 0.0, survey.notes
    if isinstance(job, UnpackedJob):
        tars = survey.total([float(sample.tar_bytes) for sample in survey.samples]).value
        packing_bytes, notes = max(0.0, tars - job.packed_bytes()), [*notes, job.note(tars)]
    return SourceCost(
        job.source.name, survey.shards, survey.rows(), index, missing_bytes, packing_bytes, notes
    )  # fmt: skip


# The command --------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m encode plan`."""
    config_words(parser)
    parser.add_argument("--gpus", type=positive, default=1, help="devices like this one")
    parser.add_argument("--price-per-gpu-hour", type=number(), metavar="P", help="in any currency")
    parser.add_argument("--price-per-tb-month", type=number(), metavar="Q", help="of the target")
    parser.add_argument(
        "--seconds", type=number(), default=60, help="to try each encoder for, 0: not"
    )
    parser.add_argument(
        "--shards-sampled", type=not_negative, default=8, metavar="K",
        help="tars of each source to look into, 0: all",
    )  # fmt: skip
    parser.add_argument(
        "--global-batch", type=positive, default=1_024, metavar="B",
        help="of the run that encoding in every step is compared with",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_plan(args: argparse.Namespace) -> int:
    """`python -m encode plan`; 2 if the columns do not fit."""
    config = configs.load(EncodeConfig, args.config, args.overrides)
    if not config.sources or not config.columns:
        raise EncodeError(f"{args.config}: it names no source or no column, so there is no plan")
    config = with_packed(config, make=False)
    plan = make_plan(config, args)
    if args.json:
        print(json.dumps(without_nan(as_record(plan, args)), indent=1))
    else:
        print(as_text(plan, args))
        if plan.space.fits is not False:
            say_next("encode", "run", args.config, *args.overrides)
    return 2 if plan.space.fits is False else 0


def as_record(plan: CostEstimate, args: argparse.Namespace) -> Json:
    """Returns the plan as JSON."""
    return {
        "gpus": args.gpus,
        "global_batch": args.global_batch,
        "sources": [asdict(source) for source in plan.sources],
        "columns": [asdict(cost) | money(cost, args) for cost in plan.columns],
        "hours": None if plan.gpu_hours is None else plan.gpu_hours / args.gpus,
        "bytes": plan.bytes,
        "missing_bytes": plan.space.missing,
        "needed_bytes": plan.space.needed,
        "free_bytes": plan.space.free,
        "fits": plan.space.fits,
    }


def money(cost: ColumnCost, args: argparse.Namespace) -> Json:
    """Returns the hours on --gpus devices, their price, and that of keeping the column a month."""
    hours, hour, month = cost.gpu_hours, args.price_per_gpu_hour, args.price_per_tb_month
    return {
        "hours": None if hours is None else hours / args.gpus,
        "price_once": None if hours is None or hour is None else hours * hour,
        "price_a_month": None if month is None else cost.bytes.value / 1e12 * month,
    }


def as_text(plan: CostEstimate, args: argparse.Namespace) -> str:
    """Returns the plan for a reader: a table of columns, notes, total and verdict."""
    prices = {"price_once": "price", "price_a_month": "a month"}
    if args.price_per_gpu_hour is None:
        del prices["price_once"]
    if args.price_per_tb_month is None:
        del prices["price_a_month"]
    heads = [
        "column",
        "samples",
        "tokens: mean, p99",
        "bytes",
        f"hours on {counted(args.gpus, 'device')}",
    ]
    table = Table(*heads, *prices.values(), "pays after")
    for column in table.columns[1:]:
        column.justify = "right"

    def figure(value: float | None, form: str = "{:,.2f}") -> str:
        return "" if value is None else form.format(value)

    def least(value: float | None) -> str:
        return f"< {LEAST}" if value is not None and 0 < value < LEAST else figure(value)

    for cost in plan.columns:
        figures = money(cost, args)
        table.add_row(
            f"{cost.source}/{cost.column}", interval(cost.samples, count_text),
            figure(cost.mean_tokens, f"{{:.1f}}, {cost.p99_tokens or 0:.0f}"),
            interval(cost.bytes, size_text),
            *(least(figures[name]) for name in ("hours", *prices)),
            "" if cost.break_even_steps is None else counted(math.ceil(cost.break_even_steps), "step"),
        )  # fmt: skip
    lines = [
        f"{source.source}: {interval(source.rows, count_text)} {'row' if source.rows.value == 1 else 'rows'} "
        f"in {counted(source.tars, 'tar')}, "
        f"index {interval(source.index_bytes, size_text)}; {'; '.join(source.notes)}"
        for source in plan.sources
    ]
    lines += [line for cost in plan.columns for line in _hints(cost)]
    lines.append(
        f"pays after: steps of a run of global batch {args.global_batch:,} in which encoding in "
        "every step would have cost as much (text is padded there)"
    )
    total = f"total {size_text(plan.bytes)}, still to be written {size_text(plan.space.missing)}"
    if plan.gpu_hours is not None:
        devices = counted(args.gpus, "device")
        total += f"; all columns in one pass: {least(plan.gpu_hours / args.gpus)} h on {devices}"
        if args.price_per_gpu_hour is not None:
            total += f", price {least(plan.gpu_hours * args.price_per_gpu_hour)}"
    return render(table, *lines, total, plan.space.verdict())


def _hints(cost: ColumnCost) -> list[str]:
    """Returns what is worth knowing of a column beside its row of the table."""
    lines = []
    if cost.rate is not None:
        decoding = cost.rate.decoded_per_s
        thread = "" if decoding is None else f", a thread decodes {decoding:,.1f}/s"
        lines.append(f"{cost.rate.rows_per_s:,.1f} samples/s on this device{thread}")
    if cost.threads_wanted is not None:
        lines.append(
            f"decoding is the slower part; engine.threads={cost.threads_wanted} would keep the device "
            "busy"
        )
    if cost.passed_over:
        words = ", ".join(
            f"{suffix!r} of {counted(n, 'row')}" for suffix, n in cost.passed_over.items()
        )
        lines.append(
            f"without a member that the column reads, of the rows looked at; they have: {words}"
        )
    if cost.alternatives:
        words = ", ".join(f"{name} {size_text(n)}" for name, n in cost.alternatives.items())
        lines.append(f"the same stored otherwise: {words}")
    if cost.committed:
        lines.append(f"{cost.committed:,} of {counted(cost.shards, 'shard')} committed already")
    return [f"{cost.source}/{cost.column}: {line}" for line in lines]


def interval(estimate: Estimate, show: Callable[[float], str]) -> str:
    """Returns a total, with its 95 % interval where it is an estimate."""
    if estimate.exact:
        return show(estimate.value)
    if math.isnan(estimate.low):
        return f"~{show(estimate.value)}"
    return f"~{show(estimate.value)} ({show(estimate.low)} to {show(estimate.high)})"


def count_text(value: float) -> str:
    return f"{value / 1e6:,.2f} M" if value >= 1e7 else f"{value:,.0f}"
