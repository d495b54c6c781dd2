"""Columns of very many small objects: what a second pass over them asks a store for, with few files that a
process may open.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards import Batch, ColumnSpec, ShardWriter, Stream, create_column, open_join, put_empty
from shards.column.commits import Commit, Snapshot, commit_name, read_commit
from shards.format.atomic import seal
from tests.bench.reading.remote.server import BUCKET, Store
from tests.shards.objects import point_to
from tests.shards.toy import (
    EMPTY,
    SHARD_ROWS,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
)

ROWS = 2  # of a shard
BATCH = 64  # a divisor of the rows of both cases
DIFFERENT = 16  # shards; the others hold what one of these does

READER = """
import sys
from tests.shards.store.test_many import read
read(sys.argv[1], int(sys.argv[2]))
"""


def read(place: str, limit: int) -> None:
    """Goes over a join twice, in a process that may open so many files; says when it has opened it and
    after each pass, and waits for a line before it goes on.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    start = time.perf_counter()

    def say() -> None:
        print(time.perf_counter() - start, flush=True)
        sys.stdin.readline()

    with closing(open_join(f"{place}/latents", f"{place}/text")) as join:
        order = join.order()
        say()
        with Stream(join, order, position=0, global_batch=BATCH) as stream:
            for _ in range(2):
                rows = [checked(batch) for batch in islice(stream, order.epoch_samples // BATCH)]
                assert len(np.unique(np.concatenate(rows))) == order.epoch_samples
                say()


def checked(batch: Batch) -> NDArray[np.int64]:
    """The row ids of a batch whose values are those that were written."""
    rows = batch.rows.numpy()
    shard, row = np.divmod(rows, SHARD_ROWS)
    pattern = shard % DIFFERENT * SHARD_ROWS + row
    assert np.array_equal(batch.moments.numpy(), moments_of(pattern))
    tokens = np.concatenate([tokens_of(int(i)) for i in pattern])
    assert np.array_equal(batch.tokens.view(torch.uint16).numpy(), tokens)
    return rows


def write_many(folder: Path, spec: ColumnSpec) -> None:
    """A column all of whose shards have commits and objects of their own; the bytes of an object are
    links to those of one of the first shards.
    """
    digest = create_column(folder, spec)
    arrays = spec.arrays()
    if spec.layout.ragged:
        put_empty(folder, spec, EMPTY)
    for shard in range(DIFFERENT):
        with ShardWriter(folder, spec, digest, shard, ROWS, f"index {shard}") as writer:
            ids = row_ids(shard, (ROWS,) * DIFFERENT)
            values = [tokens_of(int(i)) for i in ids] if spec.layout.ragged else moments_of(ids)
            writer.put_block(values, np.zeros(ROWS, np.uint8))
            writer.commit({})
    commits = [read_commit(folder, shard) for shard in range(DIFFERENT)]

    def named(path: str, shard: int) -> str:
        """The object of a shard in place of the same one of one of the first shards."""
        array = path.partition("/")[0]
        if array == "empty":
            return path
        per_shard = spec.layout.blocks_per_shard if array == spec.layout.kind else 1
        return f"{array}/{arrays[array].key(shard * per_shard)}"

    for shard in range(DIFFERENT, spec.layout.shards):
        pattern = commits[shard % DIFFERENT]
        objects = []
        for path, size, sha256 in pattern.objects:
            objects.append((named(path, shard), size, sha256))
            if not (target := folder / objects[-1][0]).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(folder / path)
        commits.append(replace(pattern, shard=shard, objects=tuple(objects)))
        (folder / commit_name(shard)).write_bytes(seal(commits[-1].record()))
    put_snapshot(folder, digest, commits)


def put_snapshot(folder: Path, digest: str, commits: list[Commit]) -> None:
    """As `put_complete` would, which reads all commits again."""
    snapshot = Snapshot.of(digest, len(commits), commits, {})
    (folder / "complete").mkdir()
    base = folder / "complete" / snapshot.digest
    base.with_suffix(".valid").write_bytes(snapshot.mask_bytes())
    base.with_suffix(".json").write_bytes(seal(snapshot.record(digest)))


@pytest.mark.parametrize(
    ("shards", "limit"),
    [(608, 256), pytest.param(26_400, 1_024, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])],
)
def test_a_second_pass_over_very_many_objects_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, limit: int
) -> None:
    """26,400 shards of two columns have 52,800 objects of values, as 27 million rows do."""
    bucket = tmp_path / "bucket" / BUCKET
    for name, spec in (("latents", moments_spec(shards)), ("text", tokens_spec(shards))):
        write_many(bucket / name, spec)
    monkeypatch.setenv("LATENTBANK_CACHE", str(tmp_path / "cache"))
    with Store(tmp_path) as store:
        point_to(monkeypatch, store.port)
        with subprocess.Popen(
            [sys.executable, "-c", READER, f"s3://{BUCKET}", str(limit)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as reader:  # fmt: skip
            assert reader.stdin is not None
            assert reader.stdout is not None
            counts = []
            for step in ("opening", "first pass", "second pass"):
                seconds = float(reader.stdout.readline())
                requests, fetched = store.count()
                counts.append(requests)
                print(f"{step}: by {seconds:.1f} s, {requests:,} requests, {fetched:,} B")
                print(file=reader.stdin, flush=True)
        assert reader.returncode == 0
    opening, first, second = counts
    assert opening < 20
    # a commit, checksums and the values of each shard of each column, and lengths
    assert 7 * shards <= first < 7.1 * shards
    assert second == 0
