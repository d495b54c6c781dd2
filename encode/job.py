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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shards import (
    ColumnSpec,
    Generation,
    Layout,
    Norm,
    ShardsError,
    Source,
    atomic_write,
    canonical_json,
    check_column,
    create_column,
    put_complete,
    put_empty,
    read_commit,
    seal,
)
from shards.commits import FAILURE, commit_path, failure_path
from shards.schema import VERSION
from shards.storage import Json

from .config import EncodeConfig, MomentsColumn
from .engine import Encoder, ShardTask, Target, bf16_words
from .errors import BadTar, EncodeError, NoWorkers
from .images import DECODER
from .progress import Progress
from .scheduler import Scheduler
from .source import make_source
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
FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do, once every identity has been checked."""

    tasks: list[ShardTask]
    columns: dict[Path, Target]  # all that are asked for, by path
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
    plan = Plan([], {}, {n: e.model.weights for n, e in encoders.items()}, encoders)
    wanted = {
        name: {
            n: column_spec(e, source.fingerprint, len(tars), config) for n, e in encoders.items()
        }
        for name, (source, tars) in made.items()
    }
    for name, specs in wanted.items():  # look at all that stands before the first file is written
        made[name][0].check(config.root / name)
        for column, spec in specs.items():
            check_column(config.root / name / column, spec)
    for name, specs in wanted.items():
        _claim(plan, name, *made[name], specs, config)
    return plan


def _claim(
    plan: Plan, name: str, source: Source, tars: list[Path], specs: dict[str, ColumnSpec],
    config: EncodeConfig,
) -> None:  # fmt: skip
    """Write what says that a source's columns are these, and add their missing shards to the plan."""
    folder = (config.root / name).resolve()
    source.put(folder)
    targets = {
        n: Target(folder / n, create_column(folder / n, spec), spec) for n, spec in specs.items()
    }
    for n, target in targets.items():
        if target.spec.empty_tokens is not None:
            empty = plan.encoders[n].model.encode([""])[0]
            put_empty(target.path, target.spec, bf16_words(empty))
        plan.columns[target.path] = target
    for number, tar in enumerate(tars):
        missing = {n: t for n, t in targets.items() if not commit_path(t.path, number).exists()}
        if missing:
            plan.tasks.append(
                ShardTask(name, source.fingerprint, folder, tar, number, config.shard_rows, missing)
            )


def column_spec(
    encoder: Encoder, fingerprint: str, shards: int, config: EncodeConfig
) -> ColumnSpec:
    """Identity, layout and norm of the column that an encoder makes of a source."""
    column, model = encoder.config, encoder.model
    shared = {"encoder": model.model.identity(model.weights), "source": fingerprint}
    if isinstance(column, MomentsColumn):
        how = {
            "image": column.image, "resolution": column.resolution, "decoder": DECODER,
            "resize": "bilinear, short side", "crop": "centre",
        }  # fmt: skip
        identity: Json = {"kind": "moments", "preprocess": how, "dtype": "float16", **shared}
        shape = model.moments_shape(column.resolution)
        norm: Norm = model.norm
        return ColumnSpec(identity, Layout("moments", shape, shards, config.shard_rows), norm)
    how = column.model_dump(include={"caption", "template", "max_tokens", "hidden_state"})
    how["tokenizer"] = model.tokenizer
    identity = {"kind": "tokens", "preprocess": how, "dtype": "bfloat16", **shared}
    layout = Layout("tokens", (column.max_tokens, model.width), shards, config.shard_rows)
    return ColumnSpec(identity, layout, empty_tokens=len(model.tokenize([""])[0]))


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
    """Whether a shard's error would only come again; raises those that would hit every shard."""
    if isinstance(error, OSError) and error.errno in FATAL:
        raise EncodeError(
            f"cannot go on: {error}. Make room or give the rights, then run again"
        ) from error
    return isinstance(error, (BadTar, ShardsError))


def finish(plan: Plan, config: EncodeConfig, failed: list[tuple[ShardTask, str]]) -> int:
    """Record failures, write COMPLETE records and the report."""
    for task, reason in failed:
        for target in task.targets.values():
            record = {"format": FAILURE, "version": VERSION, "shard": task.number, "reason": reason}
            path = failure_path(target.path, task.number)
            if not commit_path(target.path, task.number).exists():
                atomic_write(path, seal(record))
    report = standing_report(config.root / "report.json")
    for path, target in sorted(plan.columns.items()):
        missing = [t for t, _ in failed if target.path in [x.path for x in t.targets.values()]]
        if missing and not config.allow_failed:
            print(f"{path}: NOT complete, {len(missing)} shards failed")
            continue
        generation = put_complete(
            path, target.digest, target.spec.layout.shards, config.allow_failed
        )
        report[str(path)] = column_report(path, generation)
        counts = ", ".join(f"{n:,} {name}" for name, n in generation.counts.items())
        print(f"{path}: complete, {sum(generation.rows):,} rows: {counts}")
    atomic_write(config.root / "report.json", canonical_json(report))
    for task, reason in failed:
        print(f"FAILED {task.name} ({task.tar}): {reason}")
    return QUARANTINED if failed else FINISHED


def standing_report(path: Path) -> Json:
    """What earlier runs reported of columns that this one does not touch; empty if nothing readable stands."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def column_report(path: Path, generation: Generation) -> Json:
    """Rows by status, bytes, and the seconds each stage took, added up over the commits."""
    seconds: dict[str, float] = {}
    size = 0
    for shard, content in enumerate(generation.content):
        if content is None:
            continue
        commit = read_commit(path, shard)
        size += sum(bytes_ for _, bytes_, _ in commit.objects)
        for stage, value in commit.provenance["seconds"].items():
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
