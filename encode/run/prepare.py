"""What a run has to do: identities checked, columns held and claimed, missing shards listed.

Nothing is encoded here, and nothing written before every identity has been looked at. Of each
column there is one listing of commits and one of failures, whatever the number of shards. What only
a loaded encoder can say is asked of a worker (`specs`), so that the driver holds no model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from shards import (
    CorruptColumn,
    FormatVersion,
    NotAColumn,
    Store,
    check_column,
    create_column,
    put_empty,
)
from shards.column import committed, index_name, member_read, read_failures
from shards.read import open_spec

from ..config import EncodeConfig
from ..models.encoder import Words
from ..plan.sample_source import SourceJob
from ..tasks import ShardTask, Target
from .local_worker import Executor
from .specs import column_specs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunPlan:
    """What a run has to do, once every identity has been checked."""

    jobs: list[SourceJob]
    # the row of the empty caption, by name of the column in the config
    empty: Mapping[str, Words]
    tasks: list[ShardTask] = field(default_factory=list)
    # all columns that the config names, by url
    columns: dict[str, Target] = field(default_factory=dict)
    # shards that failed in an earlier run, with the reason
    failed: list[tuple[ShardTask, str]] = field(default_factory=list)
    # urls of columns that lack other shards than those this run tries
    untried: set[str] = field(default_factory=set)

    def stores(self) -> list[Store]:
        """Returns every column, in an order that is the same for every run."""
        columns = (job.folder.child(name) for job in self.jobs for name in job.specs)
        return sorted(columns, key=lambda column: column.url)


def prepare(config: EncodeConfig, jobs: Sequence[SourceJob], executor: Executor) -> RunPlan:
    """Returns the plan of a run, once a worker has loaded the encoders and each column is compared
    with the one on disk. Writes nothing.
    """
    specs, empty, notes = executor.ask(partial(column_specs, config, jobs))
    for note in notes:
        log.warning(note)
    plan = RunPlan([replace(job, specs=specs[job.source.name]) for job in jobs], empty)
    for job in plan.jobs:
        for column, spec in job.specs.items():
            check_column(job.folder.child(column), spec)
    return plan


def claim_columns(plan: RunPlan, retry: bool) -> None:
    """Writes the records of source and columns, and lists the shards to encode: those that nobody
    has tried, or with `retry` those alone that have failed; and those whose index is lost.
    """
    for job in plan.jobs:
        job.source.put(job.folder)
        peers = columns_of(job.folder, job.source.fingerprint)
        targets = {}
        for name, spec in job.specs.items():
            column = job.folder.child(name)
            targets[name] = Target(column, create_column(column, spec), spec)
            plan.columns[column.url] = targets[name]
            if spec.empty_tokens is not None:
                put_empty(column, spec, plan.empty[name])
        _list_tasks(plan, job, targets, peers, retry)


def columns_of(folder: Store, fingerprint: str) -> dict[str, list[Target]]:
    """Returns the columns of a source on disk, by the suffix of the members that they read. A
    folder that holds no column, or one that cannot be read, is passed over.
    """
    columns: dict[str, list[Target]] = {}
    for name in folder.folders():
        store = folder.child(name)
        with suppress(NotAColumn, CorruptColumn, FormatVersion):
            spec, digest = open_spec(store)
            suffix = member_read(spec.identity)
            if suffix and spec.identity.get("source") == fingerprint:
                columns.setdefault(suffix, []).append(Target(store, digest, spec))
    return columns


def _list_tasks(
    plan: RunPlan, job: SourceJob, targets: Mapping[str, Target],
    peers: Mapping[str, Sequence[Target]], retry: bool,
) -> None:  # fmt: skip
    """Lists shards by the columns they lack; those that lack the same share one mapping. One that
    lacks its index alone, which was deleted or not copied, has a task without columns.
    """
    shards = range(len(job.tars))
    commits = {name: set(committed(t.store, len(shards))) for name, t in targets.items()}
    done = set[int]().union(*commits.values())
    indexes = {name for name, _ in job.folder.list("index")} if done else set[str]()
    failures = {name: read_failures(t.store) for name, t in targets.items()}
    shared: dict[tuple[str, ...], dict[str, Target]] = {}

    def task(shard: int, names: tuple[str, ...]) -> ShardTask:
        columns = shared.setdefault(names, {name: targets[name] for name in names})
        tar = job.tars[shard]
        assert tar is not None
        return ShardTask(
            job.source.name, job.source.fingerprint, job.folder, tar, job.size(shard), shard,
            job.source.shard_rows, columns, peers=peers, fetched_again=shard in job.sizes,
        )  # fmt: skip

    for shard in shards:
        absent = [name for name in targets if shard not in commits[name]]
        failed = tuple(name for name in absent if shard in failures[name])
        fresh = tuple(name for name in absent if shard not in failures[name])
        if fresh and retry:
            plan.untried |= {targets[name].store.url for name in fresh}
        if failed and not retry:
            plan.failed.append((task(shard, failed), failures[failed[0]][shard]))
        names = failed if retry else fresh
        if names or (shard in done and index_name(shard) not in indexes):
            plan.tasks.append(task(shard, names))
