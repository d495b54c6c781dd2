"""`encode run`: what is asked for, minus what is committed, handed to workers until every shard is
accounted for.

There is no state but what stands in the columns: a second run does nothing, an interrupted one
goes on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import (
    ColumnSpec,
    Generation,
    IncompleteColumn,
    Layout,
    Norm,
    ShardsError,
    Source,
    Store,
    canonical_json,
    check_column,
    create_column,
    open_store,
    put_complete,
    put_empty,
    read_commit,
    seal,
)
from shards.commits import FAILURE, commit_name, committed, failure_name
from shards.errors import StoreError
from shards.quantise import calibrate
from shards.schema import COLUMN, VERSION
from shards.storage import Json

from .config import EncodeConfig, MomentsColumn, TokensColumn
from .engine import Encoder, ShardTask, Target, bf16_words, read_captions
from .errors import BadTar, EncodeError, NoWorkers
from .images import DECODER
from .progress import Progress
from .scheduler import Scheduler
from .source import make_source, scan_tar
from .text import TextEncoder
from .workers import (
    Died,
    Done,
    Executor,
    Failed,
    InlineExecutor,
    RayExecutor,
    load_encoder,
    pick_device,
)

log = logging.getLogger(__name__)
FINISHED, QUARANTINED, DRAINED = 0, 3, 130
CALIBRATION_ROWS = 256  # captions that the channel scales of an int8 column are measured on
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do, once every identity has been checked."""

    tasks: list[ShardTask]
    columns: dict[str, Target]  # all that are asked for, by url
    weights: dict[str, str]  # digest by name of the column in the config
    encoders: dict[str, Encoder]


def prepare(config: EncodeConfig) -> Plan:
    """Load the encoders, claim every column, list the shards that are missing. Fails before
    anything is encoded.
    """
    made = {
        name: make_source(name, tars, config.shard_rows) for name, tars in config.sources.items()
    }
    encoders = {
        name: load_encoder(column, pick_device(config.engine.device))
        for name, column in config.columns.items()
    }
    root = root_of(config)
    plan = Plan([], {}, {n: e.model.weights for n, e in encoders.items()}, encoders)
    wanted = {
        name: {
            n: column_spec(e, source.fingerprint, tars, config, root.child(name).child(n))
            for n, e in encoders.items()
        }
        for name, (source, tars) in made.items()
    }
    for name, specs in wanted.items():  # look at all that stands before the first file is written
        made[name][0].check(root.child(name))
        for column, spec in specs.items():
            check_column(root.child(name).child(column), spec)
    for name, specs in wanted.items():
        _claim(plan, name, *made[name], specs, config)
    return plan


def root_of(config: EncodeConfig) -> Store:
    """Where the columns go, by an absolute name: workers run elsewhere."""
    root = open_store(config.root)
    return root if root.folder is None else open_store(root.folder.resolve())


def _claim(
    plan: Plan, name: str, source: Source, tars: list[Path], specs: dict[str, ColumnSpec],
    config: EncodeConfig,
) -> None:  # fmt: skip
    """Write what says that a source's columns are these, and add their missing shards to the plan."""
    folder = root_of(config).child(name)
    source.put(folder)
    targets = {
        n: Target(folder.child(n), create_column(folder.child(n), spec), spec)
        for n, spec in specs.items()
    }
    for n, target in targets.items():
        if target.spec.empty_tokens is not None:
            empty = plan.encoders[n].model.encode([""])[0]
            put_empty(target.store, target.spec, bf16_words(empty))
        plan.columns[target.store.url] = target
    done = {n: set(committed(t.store, len(tars))) for n, t in targets.items()}
    for number, tar in enumerate(tars):
        missing = {n: t for n, t in targets.items() if number not in done[n]}
        if missing:
            plan.tasks.append(
                ShardTask(name, source.fingerprint, folder, tar, number, config.shard_rows, missing)
            )


def column_spec(
    encoder: Encoder, fingerprint: str, tars: Sequence[Path], config: EncodeConfig, column_at: Store
) -> ColumnSpec:
    """Identity, layout and norm of the column that an encoder makes of a source."""
    column, model, shards = encoder.config, encoder.model, len(tars)
    stored: dict[str, Any] = {"codec": column.codec, "backend": column.backend}
    shared = {"encoder": model.model.identity(model.weights), "source": fingerprint}
    if isinstance(column, MomentsColumn):
        how = {
            "image": column.image, "resolution": column.resolution, "decoder": DECODER,
            "resize": "bilinear, short side", "crop": "centre",
        }  # fmt: skip
        identity: Json = {"kind": "moments", "preprocess": how, "dtype": "float16", **shared}
        shape = model.moments_shape(column.resolution)
        norm: Norm = model.norm
        return ColumnSpec(
            identity, Layout("moments", shape, shards, config.shard_rows, **stored), norm
        )
    how = column.model_dump(include={"caption", "template", "max_tokens", "hidden_state"})
    how["tokenizer"] = model.tokenizer
    identity = {"kind": "tokens", "preprocess": how, "dtype": column.element, **shared}
    shape = column.max_tokens, model.width
    layout = Layout("tokens", shape, shards, config.shard_rows, column.element, **stored)
    scales = quantisation(column, model, tars[0], config, column_at) if layout.quantised else None
    return ColumnSpec(
        identity, layout, empty_tokens=len(model.tokenize([""])[0]), quantisation=scales
    )


def quantisation(
    how: TokensColumn, model: TextEncoder, tar: Path, config: EncodeConfig, column: Store
) -> Json:
    """The channel scales of an int8 column: those that stand, else from captions of the first tar."""
    if column.size("column.json") is not None:
        standing = column.unseal("column.json", COLUMN, VERSION).get("quantisation")
        if standing is not None:
            return dict(standing)
    rows, _ = scan_tar(tar, config.shard_rows)
    with tar.open("rb") as file:
        captions, _ = read_captions(rows[:CALIBRATION_ROWS], file.fileno(), how.caption)
    there = [caption for caption in captions if caption]
    if not there:
        raise EncodeError(
            f"{tar}: its first {CALIBRATION_ROWS} rows hold no caption, so the scales of an int8 "
            "column cannot be measured. Put another tar first, or store bfloat16"
        )
    states = [bf16_words(state) for state in model.encode(there, config.engine.tokens)]
    return calibrate(np.concatenate(states), len(there))


def run(config: EncodeConfig) -> int:
    """Encode what is missing and complete the columns; returns the exit code."""
    try:
        return _run(config)
    except OSError as error:
        if getattr(type(error), "exit_code", None) is not None:
            raise
        raise EncodeError(
            f"cannot go on: {error}. Make room, or give the rights, then run again"
        ) from error


def _run(config: EncodeConfig) -> int:
    plan = prepare(config)
    if not plan.tasks:
        print("every shard is committed already")
        return finish(plan, config, [])
    scheduler: Scheduler[int] = Scheduler(range(len(plan.tasks)))
    executor, workers = start_executor(plan, config)
    names = {task.name: i for i, task in enumerate(plan.tasks)}
    try:
        with draining(scheduler), Progress(len(plan.tasks)) as bar:
            drive(scheduler, executor, workers, plan.tasks, names, bar)
    except KeyboardInterrupt:
        print("stopped; what was in flight is not committed, run the same command again to go on")
        return DRAINED
    finally:
        executor.stop()
    failed = [(plan.tasks[i], reason) for i, reason in scheduler.given_up.items()]
    if scheduler.draining:
        print("drained: what was in flight is committed; run the same command again to go on")
        return DRAINED
    return finish(plan, config, failed)


def start_executor(plan: Plan, config: EncodeConfig) -> tuple[Executor, range]:
    """The executor that the config names and the workers it is to have."""
    if config.engine.executor == "inline":
        return InlineExecutor(plan.encoders, config.engine), range(1)
    executor = RayExecutor(config.columns, plan.weights, config.engine)
    plan.encoders.clear()  # the workers hold their own
    return executor, range(min(config.engine.workers or executor.slots(), len(plan.tasks)))


def drive(
    scheduler: Scheduler[int], executor: Executor, workers: range, tasks: list[ShardTask],
    names: dict[str, int], bar: Progress,
) -> None:  # fmt: skip
    """Hand out tasks and take back events until nothing is left."""
    for worker in workers:
        executor.start(worker)
    while not scheduler.finished:
        if scheduler.stranded(workers):
            raise NoWorkers(
                "every worker died again and again; the last reason is in the log above"
            )
        for worker in workers:
            while executor.ready(worker) and (task := scheduler.next_for(worker)) is not None:
                executor.submit(worker, tasks[task])
        for event in executor.events(timeout=1.0):
            if isinstance(event, Done):
                scheduler.done(event.worker, names[event.task.name])
                bar.shard_done(event.task.name, event.result)
            elif isinstance(event, Failed):
                final = failure_is_final(event.error)
                bar.note(f"{event.task.name}: {type(event.error).__name__}: {event.error}")
                reason = f"{type(event.error).__name__}: {event.error}"
                scheduler.failed(event.worker, names[event.task.name], reason, final)
            elif isinstance(event, Died):
                bar.note(f"worker {event.worker} died: {event.reason}")
                scheduler.died(event.worker, event.reason)
                if event.worker not in scheduler.abandoned:
                    executor.start(event.worker)
        bar.rows(executor.rows())


def failure_is_final(error: Exception) -> bool:
    """Whether a shard's error would only come again; raises those that would hit every shard. A
    network may come back, and what `gc` took is made anew.
    """
    if isinstance(error, OSError) and error.errno in FATAL:
        raise EncodeError(
            f"cannot go on: {error}. Make room or give the rights, then run again"
        ) from error
    passing = isinstance(error, (StoreError, IncompleteColumn))
    return isinstance(error, (BadTar, ShardsError)) and not passing


def finish(plan: Plan, config: EncodeConfig, failed: list[tuple[ShardTask, str]]) -> int:
    """Record failures, write COMPLETE records and the report."""
    for task, reason in failed:
        for target in task.targets.values():
            record = {"format": FAILURE, "version": VERSION, "shard": task.number, "reason": reason}
            if target.store.size(commit_name(task.number)) is None:
                target.store.replace(failure_name(task.number), seal(record))
    root = root_of(config)
    report = standing_report(root)
    for path, target in sorted(plan.columns.items()):
        missing = [t for t, _ in failed if path in [x.store.url for x in t.targets.values()]]
        if missing and not config.allow_failed:
            print(f"{path}: NOT complete, {len(missing)} shards failed")
            continue
        generation = put_complete(
            target.store, target.digest, target.spec.layout.shards, config.allow_failed
        )
        report[path] = column_report(target.store, generation)
        counts = ", ".join(f"{n:,} {name}" for name, n in generation.counts.items())
        print(f"{path}: complete, {sum(generation.rows):,} rows: {counts}")
    root.replace("report.json", canonical_json(report))
    for task, reason in failed:
        print(f"FAILED {task.name} ({task.tar}): {reason}")
    return QUARANTINED if failed else FINISHED


def standing_report(root: Store) -> Json:
    """What earlier runs reported of columns that this one does not touch; empty if nothing readable stands."""
    try:
        found = json.loads(root.read("report.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def column_report(column: Store, generation: Generation) -> Json:
    """Rows by status, bytes, and the seconds each stage took, added up over the commits."""
    seconds: dict[str, float] = {}
    size = 0
    for shard, content in enumerate(generation.content):
        if content is None:
            continue
        commit = read_commit(column, shard)
        size += sum(bytes_ for _, bytes_, _ in commit.objects)
        for stage, value in commit.provenance.get("seconds", {}).items():
            seconds[stage] = round(seconds.get(stage, 0.0) + value, 3)
    return {
        "rows": sum(generation.rows), "counts": generation.counts, "bytes": size,
        "seconds": seconds, "complete": generation.digest,
    }  # fmt: skip


@contextmanager
def draining(scheduler: Scheduler[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets shards in flight finish; a second one ends the run at
    once.
    """

    def handle(number: int, _: object) -> None:
        if scheduler.draining:
            raise KeyboardInterrupt
        scheduler.draining = True
        name = signal.Signals(number).name
        # Not print: it fails if the signal came in the middle of another print.
        os.write(sys.stderr.fileno(), f"\n{name}: finishing what is in flight\n".encode())

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
