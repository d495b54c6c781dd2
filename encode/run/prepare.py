"""What a run has to do: identities checked, columns held and claimed, missing shards listed.

Nothing is encoded here, and nothing written before every identity has been looked at. Of each column
there is one listing of commits and one of failures, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shards import ColumnSpec, Source, Store, check_column, create_column, open_store, put_empty
from shards.column.commits import committed, read_failures
from shards.column.members import member_read
from shards.errors import CorruptColumn, FormatVersion, NotAColumn
from shards.format.atomic import Json
from shards.read.column import open_spec

from ..config import EncodeConfig
from ..errors import BadTar, EncodeError
from ..models import load_encoders
from ..models.encoder import (
    CALIBRATION_ROWS,
    CaptionEncoder,
    Encoder,
    column_spec,
    measured_scales,
    standing_scales,
)
from ..plan.disk_space import scratch_of
from ..plan.survey import refuse_unmatched
from ..source.fetch import fetched
from ..source.members import read_captions
from ..source.tars import Tar, make_source, scan_tar
from .tasks import ShardTask, Target

TRIES = 8  # tars that are looked at for captions to measure on


@dataclass(frozen=True, slots=True)
class Claim:
    """A source and the columns that are asked for of it."""

    name: str
    source: Source
    tars: Sequence[str]
    folder: Store
    specs: Mapping[str, ColumnSpec]  # by name in the config

    def columns(self) -> list[Store]:
        return [self.folder.child(name) for name in self.specs]


@dataclass(slots=True)
class Plan:
    """What a run has to do, once every identity has been checked."""

    claims: list[Claim]
    encoders: dict[str, Encoder]
    weights: dict[str, str]  # digest by name of the column in the config
    tasks: list[ShardTask] = field(default_factory=list)
    columns: dict[str, Target] = field(default_factory=dict)  # all that are asked for, by url
    failed: list[tuple[ShardTask, str]] = field(default_factory=list)  # in an earlier run
    untried: set[str] = field(default_factory=set)  # columns that lack others than are asked for

    def stores(self) -> list[Store]:
        """Every column, in an order that is the same for every run."""
        return sorted((c for claim in self.claims for c in claim.columns()), key=lambda c: c.url)


def root_of(config: EncodeConfig) -> Store:
    """Where the columns go, by an absolute name: workers run elsewhere."""
    root = open_store(config.root)
    return root if root.folder is None else open_store(root.folder.resolve())


def prepare(config: EncodeConfig) -> Plan:
    """Load the encoders and compare with what stands. Writes nothing."""
    made = {
        name: make_source(name, tars, config.shard_rows) for name, tars in config.sources.items()
    }
    root, claims = root_of(config), list[Claim]()
    for name, (source, tars) in made.items():
        source.check(root.child(name))  # an index of other tars says nothing of these
        refuse_unmatched(config.columns, source, tars, root.child(name), scratch_of(config))
    encoders = load_encoders(config.columns, config.engine)
    for name, (source, tars) in made.items():
        folder = root.child(name)
        specs = {
            column: column_spec(
                encoder, source.fingerprint, len(tars), config.shard_rows,
                scales(encoder, folder.child(column), source, tars, config),
            )
            for column, encoder in encoders.items()
        }  # fmt: skip
        claims.append(Claim(name, source, tars, folder, specs))
    for claim in claims:
        for column, spec in claim.specs.items():
            check_column(claim.folder.child(column), spec)
    return Plan(claims, encoders, {name: e.weights for name, e in encoders.items()})


def scales(
    encoder: Encoder, column: Store, source: Source, tars: Sequence[str], config: EncodeConfig
) -> Callable[[], Json]:
    """The channel scales of an int8 column: those that stand, else from captions of the first tar
    that is one and has some.
    """

    def captions_of(shard: int) -> list[str | None]:
        assert isinstance(encoder, CaptionEncoder)
        size = source.tars[shard][1]
        with fetched(tars[shard], scratch_of(config), size) as path, path.open("rb") as file:
            Tar(file, size)
            rows, _ = scan_tar(file, config.shard_rows)
            captions, _ = read_captions(rows[:CALIBRATION_ROWS], file.fileno(), encoder.suffix)
        return captions

    def measure() -> Json:
        assert isinstance(encoder, CaptionEncoder)
        standing = standing_scales(column)
        if standing is not None:
            return standing
        for shard in range(min(TRIES, len(tars))):
            try:
                captions = captions_of(shard)
            except BadTar:
                continue  # it is reported when its turn comes
            if any(captions):
                return measured_scales(encoder, captions, config.engine.tokens)
        raise EncodeError(
            f"{tars[0]}: neither it nor the tars after it ({min(TRIES, len(tars))} were looked at) hold "
            f"a caption ({encoder.suffix}) in their first {CALIBRATION_ROWS} rows, so the scales of an "
            "int8 column cannot be measured. Put another tar first, or store bfloat16"
        )

    return measure


def claim_columns(plan: Plan, config: EncodeConfig, retry: bool) -> None:
    """Write what says that the columns are these, and list what they lack: shards that nobody has
    tried, or with `retry` those alone that have failed.
    """
    for claim in plan.claims:
        claim.source.put(claim.folder)
        peers = columns_of(claim.folder, claim.source.fingerprint)
        targets = {}
        for name, spec in claim.specs.items():
            column = claim.folder.child(name)
            targets[name] = Target(column, create_column(column, spec), spec)
            plan.columns[column.url] = targets[name]
            if spec.empty_tokens is not None:
                encoder = plan.encoders[name]
                assert isinstance(encoder, CaptionEncoder)
                (words,) = encoder.rows([""], config.engine.tokens)
                put_empty(column, spec, words)
        _list_tasks(plan, claim, targets, peers, retry)


def columns_of(folder: Store, fingerprint: str) -> dict[str, list[Target]]:
    """The columns of a source that stand, by the suffix of the members that they read. A folder
    that holds no column, or one that cannot be read, is passed over.
    """
    found: dict[str, list[Target]] = {}
    for name in folder.folders():
        store = folder.child(name)
        with suppress(NotAColumn, CorruptColumn, FormatVersion):
            spec, digest = open_spec(store)
            suffix = member_read(spec.identity)
            if suffix and spec.identity.get("source") == fingerprint:
                found.setdefault(suffix, []).append(Target(store, digest, spec))
    return found


def _list_tasks(
    plan: Plan, claim: Claim, targets: Mapping[str, Target], peers: Mapping[str, Sequence[Target]],
    retry: bool,
) -> None:  # fmt: skip
    """Shards by what they lack; those that lack the same share one mapping."""
    shards = len(claim.tars)
    done = {n: set(committed(t.store, shards)) for n, t in targets.items()}
    failures = {
        n: {s: why for s, why in read_failures(t.store).items() if s not in done[n]}
        for n, t in targets.items()
    }
    shared: dict[tuple[str, ...], dict[str, Target]] = {}

    def task(shard: int, names: tuple[str, ...]) -> ShardTask:
        lacking = shared.setdefault(names, {n: targets[n] for n in names})
        size = claim.source.tars[shard][1]
        return ShardTask(
            claim.name, claim.source.fingerprint, claim.folder, claim.tars[shard], size, shard,
            claim.source.shard_rows, lacking, peers=peers,
        )  # fmt: skip

    for shard in range(shards):
        missing = [n for n in targets if shard not in done[n]]
        failed = tuple(n for n in missing if shard in failures[n])
        fresh = tuple(n for n in missing if shard not in failures[n])
        if fresh and retry:
            plan.untried |= {targets[n].store.url for n in fresh}
        if failed and not retry:
            plan.failed.append((task(shard, failed), failures[failed[0]][shard]))
        if wanted := failed if retry else fresh:
            plan.tasks.append(task(shard, wanted))
