"""`encode run`: the columns of a config, minus what is committed, handed to workers until every
shard is accounted for.

There is no state but the columns themselves: a second run does nothing, an interrupted one goes on.
Each column is held by a lease while a run works on it, for economy and so that `repair` and `gc`
keep away; that the columns come out right rests on commits alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from shards import ObjectsMissing, Store, put_complete
from shards.column import Lease, commit_name, failure_name
from shards.console import counted, render, say_next
from shards.exits import remedy
from shards.format import FAILURE, VERSION, FailureRecord, sealed
from shards.format.atomic import Json
from shards.signals import Stopped, stoppable

from ..config import EncodeConfig
from ..errors import EncodeError
from ..models import load_encoders
from ..pack.sources import with_packed
from ..plan.disk_space import refuse_if_full, required_bytes
from ..plan.sample_source import open_job
from ..report.report import next_words, write_report
from ..tasks import ShardTask
from .local_worker import Executor, InlineExecutor
from .prepare import RunPlan, claim_columns, prepare
from .progress import Progress
from .ray_start import decided
from .scheduler import Scheduler
from .signals import draining
from .supervisor import Supervisor

FINISHED, QUARANTINED = 0, 3
COMMAND = "encode run"
REASON = 4_000  # characters of a failure's reason that are recorded, half of each end


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line adds to the config."""

    retry: bool = False  # only shards that have failed
    ignore_space: bool = False
    break_lease: bool = False


def run(config: EncodeConfig, options: Options = Options()) -> int:
    """Encodes what is missing and completes the columns. Returns the exit code."""
    return stoppable(lambda: _run(config, options))  # `draining` while shards are in flight


def _run(config: EncodeConfig, options: Options) -> int:
    if not config.sources or not config.columns:
        raise EncodeError(
            f"found {counted(len(config.sources), 'source')} and {counted(len(config.columns), 'column')} in "
            "the config, expected one of each at least. Name what is to be encoded"
        )
    try:
        # what is wrong with a source is said before any model is loaded
        config = with_packed(config, make=True)
        jobs = [open_job(config, name) for name in config.sources]
        config = decided(config, jobs, options.retry)
        executor = start_executor(config)
        try:
            plan = prepare(config, jobs, executor)
            if not options.ignore_space:
                need = partial(required_bytes, config, options.retry, plan.jobs)
                refuse_if_full(config.root_store, lambda: executor.ask(need))
            with held(plan.stores(), config.engine.cooperate, options.break_lease) as leases:
                return _encode(plan, config, options, executor, leases)
        finally:
            executor.stop()
    except OSError as error:
        if getattr(type(error), "exit_code", None) is not None:
            raise
        raise EncodeError(f"cannot go on: {error}. {remedy(error)}") from error


@contextmanager
def held(columns: Sequence[Store], cooperate: bool, force: bool) -> Iterator[list[Lease]]:
    """Holds every column; raises LeaseHeld, naming the holder, if another run, repair or gc has
    one.

    With `cooperate` nothing is held: runs share the work and do some of it twice, and `repair` and
    `gc --yes` are not to be started meanwhile, for they do not see the runs.
    """
    with ExitStack() as stack:
        leases = [Lease(column, COMMAND, force) for column in columns if not cooperate]
        yield [stack.enter_context(lease) for lease in leases]


def _encode(
    plan: RunPlan, config: EncodeConfig, options: Options, executor: Executor,
    leases: Sequence[Lease],
) -> int:  # fmt: skip
    claim_columns(plan, options.retry)
    if plan.failed:
        several = len(plan.failed) > 1
        print(
            render(
                f"{counted(len(plan.failed), 'shard')} failed in an earlier run; `python -m encode "
                f"retry-failed CONFIG` tries {'them' if several else 'it'} again"
            )
        )
    if not plan.tasks:
        print("no shard has failed" if options.retry else "every shard is committed already")
        return finish(plan, config, plan.failed, None)
    if config.engine.cooperate:
        random.shuffle(plan.tasks)  # so that runs seldom do the same shard at the same time
    scheduler: Scheduler[int] = Scheduler(range(len(plan.tasks)))
    root = config.root_store
    try:
        with Progress(root, plan.tasks) as progress:
            supervisor = Supervisor(
                scheduler, executor, config.engine, plan.tasks, progress, leases
            )
            with draining(scheduler.drain, executor.abort) as signals:
                try:
                    supervisor.work()
                finally:
                    executor.stop()
    finally:
        failures = [(plan.tasks[key], reason) for key, reason in scheduler.given_up.items()]
        record_failures(failures)
    if supervisor.taken_away is not None:
        raise supervisor.taken_away
    if signals:
        print("what was finished is committed")
        raise Stopped(signals[0])
    return finish(plan, config, [*plan.failed, *failures], progress.record(final=True))


def start_executor(config: EncodeConfig) -> Executor:
    """Returns the executor of a config that is `decided`: inline with the encoders loaded, on Ray
    the workers load them.
    """
    if config.engine.executor == "ray":
        from .ray_workers import RayExecutor

        return RayExecutor(config.columns, None, config.engine)
    return InlineExecutor(load_encoders(config.columns, config.engine), config.engine)


def record_failures(failures: Sequence[tuple[ShardTask, str]]) -> None:
    """Writes beside each column why a shard could not be committed; of a long reason both ends."""
    for task, text in failures:
        half = REASON // 2
        reason = text if len(text) <= REASON else f"{text[:half]} ... {text[-half:]}"
        record = {"format": FAILURE, "version": VERSION, "shard": task.number, "reason": reason}
        for store in (target.store for target in task.targets.values()):
            if store.size(commit_name(task.number)) is None:
                name = failure_name(task.number)
                store.replace(name, sealed(record, FailureRecord, store.at(name)))


def finish(
    plan: RunPlan, config: EncodeConfig, failures: Sequence[tuple[ShardTask, str]], run: Json | None
) -> int:
    """Writes COMPLETE records, of columns whose objects are all there, and the report. Returns the
    exit code.
    """
    damaged: dict[str, str] = {}
    incomplete = {t.store.url for task, _ in failures for t in task.targets.values()}
    for url, target in sorted(plan.columns.items()):
        if url not in plan.untried and (url not in incomplete or config.allow_failed):
            shards = target.spec.layout.shards
            try:
                put_complete(target.store, target.digest, shards, config.allow_failed)
            except ObjectsMissing as error:
                damaged[url] = str(error)
    report = write_report(config.root_store, plan.columns, failures, run, config, damaged)
    print(report.text)
    if failures or damaged or report.useless:
        return QUARANTINED
    if words := next_words(config):
        say_next(*words)
    return FINISHED
