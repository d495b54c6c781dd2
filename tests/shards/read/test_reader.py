"""Rows to buffers: any rows, any places, few open files, another process, a pinned generation."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import Column, CorruptColumn, IncompleteColumn, ShardWriter, create_column, put_complete
from shards.read import objects as handles
from tests.shards.toy import (
    ROWS,
    SHAPE,
    SPECS,
    STORED,
    WIDTH,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
    write_column,
    write_shard,
)

ALL = np.concatenate([row_ids(shard) for shard in range(3)])


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_rows_land_where_they_are_told_to(tmp_path: Path, stored: dict[str, Any]) -> None:
    column = Column.open(write_column(tmp_path / "c", tokens_spec(**stored)))
    rows = np.random.default_rng(0).permutation(ALL)[:300]
    size = column.row_bytes(rows)
    at = np.cumsum(size[::-1])[::-1] - size + 10  # the last row first, and room before all
    buffer = bytearray(b"\xaa" * (int(size.sum()) + 20))
    column.hint(rows)
    column.gather(rows, memoryview(buffer), at, check=True)
    assert buffer[:10] == buffer[-10:] == b"\xaa" * 10
    lengths = column.lengths(rows)
    for row, place, length in zip(rows.tolist(), at.tolist(), lengths.tolist(), strict=True):
        words = np.frombuffer(buffer, "<u2", length * WIDTH, place).reshape(-1, WIDTH)
        if column.status(np.array([row]))[0] == 0:
            np.testing.assert_array_equal(words, tokens_of(row))


def test_more_objects_than_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "OPEN_FILES", 1)
    monkeypatch.setattr(handles.resource, "getrlimit", lambda _: (1, 1))
    column = Column.open(write_column(tmp_path / "c", moments_spec()))
    rows = np.random.default_rng(1).permutation(ALL)
    read = column.read(rows, check=True)
    good = column.status(rows) < 2
    np.testing.assert_array_equal(read[good], moments_of(rows)[good])
    assert len(column._objects.handles) == 1


def test_many_columns_share_what_may_be_open(tmp_path: Path) -> None:
    """In a process that may open few files: 8 columns of 20 objects, and 40 files."""
    paths = [str(write_column(tmp_path / str(i), moments_spec(20), (3,) * 20)) for i in range(8)]
    script = """if True:
        import resource, sys
        import numpy as np
        from shards import Column
        columns = [Column.open(path) for path in sys.argv[1:]]
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        rows = 2048 * np.arange(20)
        for _ in range(3):
            for column in columns:
                assert (column.read(rows)[:, 0, 0, 0] == rows // 100).all()"""
    child = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert child.returncode == 0, child.stderr


def test_hints_of_no_rows(toy: Path) -> None:
    Column.open(toy / "vae").hint(np.zeros(0, np.int64))


def test_rows_of_another_type_are_refused(tmp_path: Path) -> None:
    spec = moments_spec(1)
    digest = create_column(tmp_path / "c", spec)
    with (
        ShardWriter(tmp_path / "c", spec, digest, 0, 2, "index") as writer,
        pytest.raises(ValueError, match="a row of float32, the column holds words of float16"),
    ):
        writer.put_block(np.ones((2, *SHAPE), np.float32), np.zeros(2, np.uint8))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", SPECS)
def test_values_of_rows_that_are_not_there(tmp_path: Path, kind: str, stored: str) -> None:
    """What follows a shard's rows in its object is padding and an index, no values."""
    column = Column.open(write_column(tmp_path / "c", SPECS[kind](**STORED[stored])))
    for row in (-1, ROWS[0], ROWS[0] + 1, 2048 + ROWS[1], 3 * 2048):
        with pytest.raises(IndexError, match="no such rows.* A row id is shard"):
            column.read(np.array([0, row]))


def test_rows_that_are_not_there(toy: Path) -> None:
    column = Column.open(toy / "vae")
    for row in (-1, ROWS[0], 2048 + ROWS[1], 3 * 2048, 10**12):
        with pytest.raises(IndexError, match="no such rows"):
            column.status(np.array([0, row]))
    with pytest.raises(IndexError, match="no such rows"):
        Column.open(toy / "text").read(np.array([ROWS[0]]))


ROWS_AS = {
    "a list": list,
    "a tensor": torch.from_numpy,
    "int32": lambda rows: rows.astype(np.int32),
    "uint64": lambda rows: rows.astype(np.uint64),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("given", ROWS_AS)
def test_rows_may_be_given_as(tmp_path: Path, kind: str, given: str) -> None:
    column = Column.open(write_column(tmp_path / "c", SPECS[kind]()))
    for rows in (ALL[::7], ALL[:0]):
        same = ROWS_AS[given](rows)
        for ask in (column.read, column.lengths, column.status, column.checksums, column.row_bytes):
            np.testing.assert_array_equal(ask(same), ask(rows))
        column.hint(same)
        buffer = bytearray(column.row_bytes(rows).sum())
        size = column.row_bytes(rows)
        column.gather(same, memoryview(buffer), np.cumsum(size) - size)
        assert buffer == column.read(rows).tobytes()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("rows", [5, [[0, 1]], [0.0, 1.0], [True, False], ["0"], None], ids=str)
def test_what_are_no_rows_is_refused(tmp_path: Path, kind: str, rows: Any) -> None:
    """A mask of bools would be the rows 0 and 1."""
    column = Column.open(write_column(tmp_path / "c", SPECS[kind]()))
    for ask in (column.read, column.lengths, column.status, column.hint, column.row_bytes):
        with pytest.raises(TypeError, match="rows: found .*, expected row ids, integers"):
            ask(rows)


def digest_of(column: Column) -> int:
    return int(column.read(ALL, check=True).view(np.uint16).astype(np.int64).sum())


def report(column: Column, pipe: Any) -> None:
    pipe.send(digest_of(column))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_column_in_use_goes_to_another_process(toy: Path, how: str) -> None:
    column = Column.open(toy / "text")
    expected = digest_of(column)  # files are open, tables are read
    context: Any = multiprocessing.get_context(how)
    receiver, sender = context.Pipe()
    child = context.Process(target=report, args=(column, sender))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == expected
    child.join(10)
    assert digest_of(column) == digest_of(pickle.loads(pickle.dumps(column))) == expected


def test_a_pin_opens_the_generation_that_was_seen(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in (0, 2):
        write_shard(path, spec, digest, shard)
    column = Column.open(path, partial=True)
    pin = json.loads(json.dumps(column.snapshot_id()))
    assert pin["shards"] == [[0, 1], [2, 1]]
    write_shard(path, spec, digest, 1)
    put_complete(path, digest, 3, allow_failed=False)
    again = Column.open(path, snapshot_id=pin)
    assert again.snapshot.digest == column.snapshot.digest
    np.testing.assert_array_equal(again.valid_mask(), column.valid_mask())
    newest = Column.open(path)
    assert newest.snapshot.rows == ROWS
    whole = newest.snapshot_id()
    assert whole["shards"] is None
    assert Column.open(path, snapshot_id=whole).snapshot.digest == newest.snapshot.digest
    (path / f"complete/{whole['generation']}.json").unlink()
    with pytest.raises(IncompleteColumn, match="the snapshot that this run has read is gone"):
        Column.open(path, snapshot_id=whole)
    with pytest.raises(IncompleteColumn, match="no longer hold what this run has read"):
        Column.open(path, snapshot_id={"generation": pin["generation"], "shards": [[0, 2]]})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lengths/c/0", lambda data: data[:4] + b"\xff\xff" + data[6:]),  # 65,535 tokens
        ("lengths/c/0", lambda data: data[:-1]),
        ("crc/c/0", lambda data: data + b"\0"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = write_column(tmp_path / "c", tokens_spec(1), (70,))
    (path / name).write_bytes(change((path / name).read_bytes()))
    with pytest.raises(CorruptColumn, match=name):
        Column.open(path).read(np.arange(70), check=True)


WRITE_LARGE = """
import sys, numpy as np
from shards import ColumnSpec, Layout, ShardWriter, create_column, put_empty
def grown():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) // 1024
path, backend = sys.argv[1:]
spec = ColumnSpec({}, Layout("tokens", (256, 2048), 1, 4096, backend=backend), empty_tokens=1)
digest = create_column(path, spec)
put_empty(path, spec, np.ones((1, 2048), np.uint16))
row = np.ones((32, 2048), np.uint16)  # 128 KB; the block is 128 MB on disk, and one row here
before = grown()
with ShardWriter(path, spec, digest, 0, 2048, "index") as writer:
    for _ in range(2):
        writer.put_block([row] * 1024, np.zeros(1024, np.uint8))
    writer.commit({})
print(grown() - before)
"""


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_writer_holds_no_copy_of_what_it_writes(tmp_path: Path, backend: str) -> None:
    """268 MB go to disk, in a process that grows by a small part of it."""
    child = subprocess.run(
        [sys.executable, "-c", WRITE_LARGE, str(tmp_path / "c"), backend],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) > 2**28
    assert int(child.stdout) < 40


def test_shape_of_what_is_read(toy: Path) -> None:
    column = Column.open(toy / "vae")
    assert column.read(ALL[:0]).shape == (0, *SHAPE)
    assert column.read(ALL[:5]).shape == (5, *SHAPE)
    assert column.name == "vae"


def test_a_column_that_was_closed_opens_again(toy: Path) -> None:
    script = (
        "import sys; import numpy as np; from shards import Column; column = Column.open(sys.argv[1]);"
        "before = column.read(np.arange(3)); column.close(); after = column.read(np.arange(3));"
        "assert (before == after).all()"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(toy / "text")], capture_output=True, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
