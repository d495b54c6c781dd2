"""The commit protocol under real deaths and real races."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import (
    Column,
    IdentityMismatch,
    ShardWriter,
    SourceChanged,
    Status,
    create_column,
    put_complete,
    put_empty,
    read_commit,
)
from shards.column.commits import Commit
from shards.tools.verify import logical_digest, verify
from tests.shards.toy import (
    EMPTY,
    SHAPE,
    SPECS,
    files_of,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
    write_column,
    write_shard,
)

ROWS = (1030,)  # two blocks


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(9)  # `work` raised: never back into pytest
    return os.waitpid(pid, 0)[1]


def write_and_die(path: Path, kind: str, publish: int, after: bool) -> Callable[[], None]:
    """Write the column, but be killed before or after the `publish`-th name appears."""

    def work() -> None:
        link, count = os.link, itertools.count()

        def fatal(*args: Any) -> None:
            here = next(count) == publish
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            link(*args)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        os.link = fatal  # type: ignore[assignment]  # of this child alone
        write_column(path, SPECS[kind](1), ROWS)
        os._exit(0)

    return work


@pytest.mark.parametrize("kind", ["moments", pytest.param("tokens", marks=pytest.mark.slow)])
def test_killed_at_every_publish_then_run_again(tmp_path: Path, kind: str) -> None:
    expected = files_of(write_column(tmp_path / "whole", SPECS[kind](1), ROWS))
    deaths = 0
    for k in itertools.count():  # (itertools.product would first collect the endless count)
        publish, after = k // 2, bool(k % 2)
        path = tmp_path / f"{publish}-{after}"
        status = in_child(write_and_die(path, kind, publish, after))
        if os.waitstatus_to_exitcode(status) == 0:
            break  # there were fewer publishes than that
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
        objects = files_of(path)
        assert objects.items() <= expected.items()  # whole objects only, the right ones
        write_column(path, SPECS[kind](1), ROWS)
        assert files_of(path) == expected
    assert verify(tmp_path / "whole") == []
    # column.json, zarr.json of group and arrays, objects, commit, valid bits, COMPLETE
    assert deaths == 2 * len(expected)


def race(path: Path, shift: float, barrier: Barrier) -> None:
    spec = moments_spec(1)
    digest = create_column(path, spec)
    barrier.wait()
    write_shard(path, spec, digest, 0, ROWS, shift=shift)


def test_two_writers_of_one_shard_converge(tmp_path: Path) -> None:
    """Their values differ by a rounding, as on two kinds of GPU: one of the two stands, with one commit."""
    fork = multiprocessing.get_context("fork")
    spec = moments_spec(1)
    for attempt in range(5):
        path, barrier = tmp_path / str(attempt), fork.Barrier(2)
        writers = [fork.Process(target=race, args=(path, s, barrier)) for s in (0.0, 2**-10)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(30)
        assert [writer.exitcode for writer in writers] == [0, 0]
        put_complete(path, create_column(path, spec), 1, allow_failed=False)
        assert verify(path) == []
        assert not list(path.rglob(".tmp-*"))
        ids = row_ids(0, ROWS)
        moments = Column.open(path).read(ids)
        present = ~np.isnan(moments[:, 0, 0, 0])
        np.testing.assert_array_equal(moments[present, :2], moments_of(ids)[present, :2])
        offset = moments[:, 2] - moments_of(ids)[:, 2]
        for block in (slice(0, 1024), slice(1024, None)):  # each is of one writer
            assert len(np.unique(offset[block][present[block]])) == 1


def test_a_later_writer_adopts_values_and_commit(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec(1), ROWS)
    before, digest = files_of(path), logical_digest(path)
    write_column(path, moments_spec(1), ROWS, shift=2**-10)
    assert files_of(path) == before
    assert logical_digest(path) == digest


def test_rows_that_are_not_finite_become_nan_as_a_whole(tmp_path: Path) -> None:
    spec, path = moments_spec(1), tmp_path / "c"
    digest = create_column(path, spec)
    values = moments_of(np.arange(6)).astype(np.float32)
    values[1, 0, 0, 0], values[2, 3, 1, 1], values[3, 0, 0, 0] = np.inf, np.nan, 7e4  # over 65,504
    with np.errstate(over="ignore"):
        values = values.astype(np.float16)
    status = np.array([0, 0, 1, 0, Status.IMAGE_MISSING, 1], np.uint8)
    writer = ShardWriter(path, spec, digest, 0, 6, "index")
    writer.put_block(values, status)
    writer.commit({})
    column = Column.open(path, partial=True)
    assert column.status(np.arange(6)).tolist() == [0, 6, 6, 6, 3, 1]
    read = column.read(np.arange(6), check=True)
    np.testing.assert_array_equal(np.isnan(read).all((1, 2, 3)), [0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(read[[0, 5]], values[[0, 5]])
    assert column.valid_mask().tolist()[0] == 0b000001
    assert column.valid_mask(truncated=True).tolist()[0] == 0b100001


def test_captions_that_are_not_finite_keep_their_length(tmp_path: Path) -> None:
    spec, path = tokens_spec(1), tmp_path / "c"
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY)
    captions = [tokens_of(row) for row in range(4)]  # 1, 2, 3, 4 tokens
    captions[2][1, 1] = 0x7F80  # infinity
    writer = ShardWriter(path, spec, digest, 0, 4, "index")
    writer.put_block(captions, np.array([0, Status.CAPTION_MISSING, 0, 0], np.uint8))
    writer.commit({})
    column = Column.open(path, partial=True)
    assert column.status(np.arange(4)).tolist() == [0, 4, 6, 0]
    assert column.lengths(np.arange(4)).tolist() == [1, 0, 3, 4]
    assert (column.read(np.array([2])) == 0x7FC0).all()
    np.testing.assert_array_equal(
        column.read(np.array([3, 1, 0])), np.vstack([captions[3], captions[0]])
    )


def test_a_shard_without_one_caption(tmp_path: Path) -> None:
    """No token, so no tokens object."""
    spec, path = tokens_spec(1), tmp_path / "c"
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY)
    writer = ShardWriter(path, spec, digest, 0, 2, "index")
    writer.put_block([tokens_of(0)] * 2, np.full(2, Status.CAPTION_MISSING, np.uint8))
    writer.commit({})
    assert not (path / "tokens/c").exists()
    assert verify(path) == []
    assert Column.open(path, partial=True).read(np.arange(2), check=True).shape == (0, 3)


@pytest.mark.parametrize(
    ("rows", "block", "message"),
    [(1030, 1000, "block of 1000"), (1030, 1030, "block of 1030"), (10, 11, "block of 11"), (10, 9, "block of 9")],
)  # fmt: skip
def test_blocks_of_a_wrong_size(tmp_path: Path, rows: int, block: int, message: str) -> None:
    spec = moments_spec(1)
    writer = ShardWriter(tmp_path, spec, create_column(tmp_path, spec), 0, rows, "index")
    with pytest.raises(ValueError, match=message):
        writer.put_block(moments_of(np.arange(block)), np.zeros(block, np.uint8))
    with pytest.raises(ValueError, match="commit after 0 of"):
        writer.commit({})
    assert not (tmp_path / "moments/c").exists()


def test_values_of_a_wrong_shape(tmp_path: Path) -> None:
    spec = moments_spec(1)
    writer = ShardWriter(tmp_path, spec, create_column(tmp_path, spec), 0, 3, "index")
    with pytest.raises(ValueError, match="shape"):
        writer.put_block(np.zeros((3, *SHAPE[:2], 3), np.float16), np.zeros(3, np.uint8))
    spec, path = tokens_spec(1), tmp_path / "text"
    writer = ShardWriter(path, spec, create_column(path, spec), 0, 1, "index")
    with pytest.raises(ValueError, match="shape"):
        writer.put_block([np.zeros((2, 4), np.uint16)], np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="5 tokens in a row of at most 4"):
        writer.put_block([np.zeros((5, 3), np.uint16)], np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="empty caption"):
        put_empty(path, spec, np.zeros((2, 3), np.uint16))


def test_another_column_into_the_folder(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec(1), ROWS)
    before = files_of(path)
    with pytest.raises(IdentityMismatch) as caught:
        create_column(path, moments_spec(2, "other source", "other vae"))
    for line in (
        "identity.encoder.weights: found 'vae', expected 'other vae'",
        "identity.source: found 'fingerprint of toy', expected 'other source'",
        "layout.shards: found 1, expected 2",
        "Nothing was changed",
    ):
        assert line in str(caught.value)
    assert files_of(path) == before
    assert not list(path.rglob(".tmp-*"))


def test_a_commit_of_other_content_is_not_adopted(tmp_path: Path) -> None:
    """Two readings of the tar (another index digest) must not pass for one."""
    spec = moments_spec(1)
    path = write_column(tmp_path / "c", spec, ROWS)
    with pytest.raises(IdentityMismatch, match="Two writers disagree"):
        write_shard(path, spec, create_column(path, spec), 0, ROWS, index="another index")
    assert read_commit(path, 0).index == "index 0"
    assert verify(path) == []


def test_what_an_attempt_wrote_is_withdrawn_unless_it_is_committed(tmp_path: Path) -> None:
    """Its own objects alone: not those that it found, nor those that another writer has committed."""
    spec = moments_spec(1)
    digest = create_column(tmp_path, spec)
    ids = row_ids(0, ROWS)

    def put(writer: ShardWriter, *blocks: slice) -> None:
        for block in blocks:
            writer.put_block(moments_of(ids[block]), np.zeros(len(ids[block]), np.uint8))

    def values() -> list[str]:
        return sorted(name for name in files_of(tmp_path) if name.startswith("moments/c/"))

    def writer() -> ShardWriter:
        return ShardWriter(tmp_path, spec, digest, 0, ROWS[0], "index")

    first, second = slice(0, 1024), slice(1024, None)
    withdrawn = writer()
    put(withdrawn, first)
    (name,) = values()
    failed = writer()
    put(failed, first, second)
    assert len(values()) == 2
    failed.withdraw()
    assert values() == [name]
    slow, quick = writer(), writer()
    put(slow, first, second)
    put(quick, first, second)
    quick.commit({})
    slow.withdraw()
    quick.withdraw()
    assert len(values()) == 2
    put_complete(tmp_path, digest, 1, allow_failed=False)
    assert verify(tmp_path) == []


def test_a_commit_of_other_members_is_not_adopted(tmp_path: Path) -> None:
    spec = moments_spec(1)
    digest = create_column(tmp_path, spec)
    ids = row_ids(0, (40,))

    def commit(members: dict[str, str] | None) -> Commit:
        with ShardWriter(tmp_path, spec, digest, 0, 40, "index") as writer:
            writer.put_block(moments_of(ids), np.zeros(40, np.uint8))
            return writer.commit({}, members)

    a, b = ({"jpg": digit * 64} for digit in "12")
    assert commit(a).members == a
    assert commit(None).members == a  # of an older program, which does not know
    assert commit({"png": "3" * 64}).members == a
    with pytest.raises(SourceChanged, match="other jpg members"):
        commit(b)
    put_complete(tmp_path, digest, 1, allow_failed=False)
    assert Column.open(tmp_path).members("jpg") == {0: "1" * 64}
    assert Column.open(tmp_path).members("png") == {}
