"""Damage of every kind in every file is found and named."""

from __future__ import annotations

import errno
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import (
    Column,
    ColumnSpec,
    CorruptColumn,
    IncompleteColumn,
    Layout,
    ShardsError,
    ShardWriter,
    create_column,
    put_complete,
)
from shards.store.local import LocalStore
from shards.tools.faults import Fault
from shards.tools.verify import deep_digest, examine, logical_digest, verify
from tests.shards.toy import (
    STORED,
    Counted,
    files_of,
    moments_spec,
    small_moments,
    small_tokens,
    tokens_spec,
    write_column,
    write_shard,
)

MAKE: dict[str, Callable[[Path], Path]] = {"moments": small_moments, "tokens": small_tokens}


@pytest.fixture(params=["moments", "tokens"])
def column(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = MAKE[request.param](tmp_path / "column")
    assert verify(path) == []
    return path


def damaged(column: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(name, path, sound bytes) of each file in turn; put back afterwards."""
    for name, data in files_of(column).items():
        yield name, column / name, data
        (column / name).write_bytes(data)
    assert verify(column) == []


def names(faults: list[Fault], name: str) -> bool:
    return any(name in str(fault) for fault in faults)


def test_a_changed_byte_anywhere(column: Path) -> None:
    chance = random.Random(0)
    for name, path, data in damaged(column):
        places = {0, len(data) - 1, *(chance.randrange(len(data)) for _ in range(8))}
        for place in places:
            bit = 1 << chance.randrange(8)
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            assert names(verify(column), name), (name, place, bit)


def test_bytes_cut_off_or_added_anywhere(column: Path) -> None:
    chance = random.Random(1)
    for name, path, data in damaged(column):
        for size in {0, 1, len(data) // 2, len(data) - 1, chance.randrange(len(data))}:
            path.write_bytes(data[:size])
            assert names(verify(column), name), (name, size)
        for appended in (b"\0", b"\n", b" ", bytes(600)):
            path.write_bytes(data + appended)
            assert names(verify(column), name), (name, appended)


def test_a_missing_file(column: Path) -> None:
    for name, path, _ in damaged(column):
        path.unlink()
        if name.startswith("complete/") and name.endswith(".json"):
            assert verify(column) == []  # what is there is sound; no reader takes it for complete
            with pytest.raises(ShardsError, match="no COMPLETE record"):
                Column.open(column)
        elif name.startswith("commits/"):
            assert names(verify(column), "shard 0 is not committed")
        else:
            assert names(verify(column), name), name


class Fleeting(LocalStore):
    """A folder of which some files are gone once they have been listed."""

    def _files(self, *path_parts: Any) -> Iterator[Any]:
        for name, entry in super()._files(*path_parts):
            if name in ("lease.json", ".tmp-0"):
                (self.folder / name).unlink()
            yield name, entry


def test_names_that_lead_to_nothing(tmp_path: Path) -> None:
    """Of files that vanish while they are looked at, and of links."""
    path = small_moments(tmp_path / "c")
    sound = sorted(files_of(path))
    (path / "nowhere").symlink_to("/nonexistent/x")
    (path / "itself").symlink_to("itself")
    (path / "lease.json").write_bytes(b"{}")
    (path / ".tmp-0").write_bytes(b"half")
    store = Fleeting(path)
    assert store.stale_temporaries(0) == []
    assert [name for name, _ in store.list()] == sound
    (path / "lease.json").write_bytes(b"{}")
    examination = examine(store)
    assert (examination.faults, examination.unfinished) == ([], [])


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec())
    hurt = ["moments/c/0/0/0/0", "moments/c/4/0/0/0", "crc/c/2"]
    for name in hurt:
        data = bytearray((path / name).read_bytes())
        data[40] ^= 1
        (path / name).write_bytes(data)
    (path / "commits/00001.json").write_bytes(b"{}")
    faults = verify(path)
    for name in (*hurt, "commits/00001.json"):
        assert names(faults, name), name
    assert names(faults, "shard 0, rows [1] do not fit their checksums")  # 32 bytes a row
    assert names(faults, "shard 2, rows [1, 10] do not fit their checksums")  # 4 bytes a checksum
    assert names(faults, "shard 0, rows 0..1023 do not fit the logical digest")
    places = {(f.kind, f.shard, f.rows, f.object) for f in faults if f.kind in ("rows", "commit")}
    assert places == {
        ("commit", 1, (), "commits/00001.json"),
        ("rows", 0, (1,), hurt[0]),
        ("rows", 2, (1, 10), hurt[1]),
    }


def test_reading_with_checks_names_shard_and_row(tmp_path: Path) -> None:
    path = small_moments(tmp_path / "c")
    data = bytearray((path / "moments/c/0/0/0/0").read_bytes())
    data[32 * 50 + 3] ^= 0x10
    (path / "moments/c/0/0/0/0").write_bytes(data)
    Column.open(path).read(np.array([49, 51]), check=True)
    with pytest.raises(CorruptColumn, match=r"row 50 of shard 0 \(row id 50\)"):
        Column.open(path).read(np.array([49, 50]), check=True)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    """The same for another host and other writers; another for any other value, status or identity."""
    a = write_column(tmp_path / "a", tokens_spec())
    b = tmp_path / "b"
    shutil.copytree(a, b)
    (b / "commits/00002.json").unlink()
    shutil.rmtree(b / "tokens/c/4")
    shutil.rmtree(b / "complete")
    write_column(b, tokens_spec())  # goes on where `b` was left
    assert logical_digest(a) == logical_digest(b)
    first = logical_digest(write_column(tmp_path / "c", moments_spec(1), (70,)))
    assert first == logical_digest(write_column(tmp_path / "d", moments_spec(1), (70,)))
    other_digests = {
        logical_digest(write_column(tmp_path / "e", moments_spec(1), (69,))),
        logical_digest(write_column(tmp_path / "f", moments_spec(1), (70,), shift=2**-10)),
        logical_digest(write_column(tmp_path / "g", moments_spec(1, weights="other"), (70,))),
        logical_digest(write_column(tmp_path / "h", moments_spec(1), (70,), index="other")),
    }
    assert len(other_digests | {first}) == 5


def test_an_unfinished_column_is_sound_but_has_no_digest(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    write_shard(path, spec, create_column(path, spec), 1)
    assert verify(path) == []
    with pytest.raises(IncompleteColumn, match="no COMPLETE record"):
        logical_digest(path)
    assert Column.open(path, partial=True).snapshot.rows == (0, 40, 0)


def reads_of(path: Path, work: Callable[[], object]) -> dict[str, int]:
    """Bytes that are read of each object while `work` runs."""
    counts: dict[str, int] = {}
    names: dict[int, str] = {}
    preadv, opened = LocalStore.preadv, LocalStore.open

    def counted(handle: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(handle, buffers, offset)
        counts[names[handle]] = counts.get(names[handle], 0) + count
        return count

    def named(self: LocalStore, name: str, cached: bool = True) -> int:
        handle: int = opened(self, name, cached)
        names[handle] = name
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "preadv", staticmethod(counted))
        patch.setattr(LocalStore, "open", named)
        work()
    return counts


@pytest.mark.parametrize("storage", STORED.values(), ids=STORED)
@pytest.mark.parametrize("spec", [moments_spec, tokens_spec])
def test_every_byte_is_read_once(
    tmp_path: Path, spec: Callable[..., ColumnSpec], storage: dict[str, str]
) -> None:
    path = write_column(tmp_path / "c", spec(**storage))
    sizes = {
        name: len(data) for name, data in files_of(path).items() if "/c/" in name or "tar" in name
    }
    progress = Counted()
    assert reads_of(path, lambda: verify(path, progress)) == sizes
    assert sum(progress.counts) == sum(size for name, size in sizes.items() if "empty" not in name)


@pytest.mark.parametrize(
    "storage",
    [
        pytest.param(how, id=name, marks=[] if name == "zarr" else pytest.mark.slow)
        for name, how in STORED.items()
    ],
)
def test_by_all_cores_it_finds_the_same(tmp_path: Path, storage: dict[str, str]) -> None:
    path = write_column(tmp_path / "c", tokens_spec(**storage))
    assert verify(path, processes=2) == []
    for name in [n for n in files_of(path) if n.startswith(("tokens/c", "tar/", "lengths/c/1"))]:
        data = bytearray((path / name).read_bytes())
        data[700 % len(data)] ^= 1
        (path / name).write_bytes(data)
    progress = Counted()
    faults = verify(path, progress, processes=3)
    assert faults == verify(path)
    assert {f.shard for f in faults} == {0, 1, 2}
    assert sum(progress.counts) > 0


def test_damaged_lengths_do_not_accuse_sound_rows(tmp_path: Path) -> None:
    for number, storage in enumerate(STORED.values()):
        path = write_column(tmp_path / str(number), tokens_spec(**storage))
        data = bytearray((path / "lengths/c/0").read_bytes())
        data[8] ^= 3
        (path / "lengths/c/0").write_bytes(data)
        assert [(f.kind, f.shard, f.object) for f in verify(path)] == [("object", 0, "lengths/c/0")]
        data = bytearray((path / "status/c/1").read_bytes())
        data[8] ^= 3
        (path / "status/c/1").write_bytes(data)
        assert [f.object for f in verify(path)] == ["lengths/c/0", "status/c/1"]


@pytest.mark.parametrize("storage", STORED.values(), ids=STORED)
def test_rows_of_a_cut_object_are_named(tmp_path: Path, storage: dict[str, str]) -> None:
    path = write_column(tmp_path / "c", moments_spec(**storage))
    name = "tar/00000.tar" if "backend" in storage else "moments/c/0/0/0/0"
    size = (path / name).stat().st_size
    with (path / name).open("r+b") as file:
        file.truncate(size // 2)
    rows = [row for f in verify(path) if f.kind == "rows" for row in f.rows]
    if storage == {"codec": "blosc"}:  # its index is lost with its end
        assert rows == list(range(1024))
    else:
        rows_with_values = np.flatnonzero(Column.open(path).status(np.arange(1100)) != 2)
        if not storage:  # the index behind the rows takes a part too, and blank rows have room
            rows_with_values = np.arange(1024)
        cut = 0.5 * size / (len(rows_with_values) * (32 if not storage else 1024))
        assert rows == rows_with_values[-len(rows) :].tolist()
        assert len(rows) == pytest.approx(len(rows_with_values) * (1 - cut), abs=3)
    with (path / name).open("wb"):
        pass
    (path / name).unlink()
    (path / name).mkdir()
    assert names(verify(path), "it is no file")


@pytest.mark.parametrize("storage", STORED.values(), ids=STORED)
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: dict[str, str]
) -> None:
    """An error of the disk is a fault of the object; what can be read is checked all the same."""
    path = write_column(tmp_path / "c", moments_spec(**storage))
    bad, preadv = 12_000, LocalStore.preadv
    bad_object = "tar/00000.tar" if "backend" in storage else "moments/c/0/0/0/0"
    opened, handles = LocalStore.open, set()

    def remember(self: LocalStore, name: str, cached: bool = True) -> int:
        handle: int = opened(self, name, cached)
        if name == bad_object:
            handles.add(handle)
        else:
            handles.discard(handle)
        return handle

    def fail(handle: int, buffers: list[memoryview], offset: int) -> int:
        if handle in handles:
            if offset >= bad:
                raise OSError(errno.EIO, "Input/output error")
            buffers = [buffers[0][: bad - offset]]
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(LocalStore, "open", remember)
    monkeypatch.setattr(LocalStore, "preadv", staticmethod(fail))
    faults = verify(path)
    (fault,) = (f for f in faults if f.kind == "object")
    assert fault.object == bad_object
    assert "cannot be read at byte 12000 ([Errno 5]" in str(fault)
    rows = [row for f in faults if f.kind == "rows" for row in f.rows]
    if not storage:
        assert rows == list(range(12_000 // 32, 1024))
    assert {f.shard for f in faults} == {0}


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("name", ["open", "preadv", "read"])
def test_errors_that_say_nothing_of_an_object_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    path = small_tokens(tmp_path / "c")
    calls = itertools.count()

    def fail(*words: Any, **how: Any) -> Any:
        if next(calls) >= 3:
            raise OSError(number, "not now")
        return work(*words, **how)

    work = getattr(LocalStore, name)
    monkeypatch.setattr(LocalStore, name, staticmethod(fail) if name == "preadv" else fail)
    with pytest.raises(OSError, match="not now"):
        verify(path)


def test_what_belongs_to_no_commit_is_listed_not_damage(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    write_shard(path, spec, digest, 1)
    write_shard(path, spec, digest, 2)
    (path / "commits/00002.json").unlink()
    examination = examine(path)
    assert examination.faults == []
    assert examination.column.missing == [0, 2]
    assert {name for name, _ in examination.unfinished} == {
        "moments/c/4/0/0/0",
        "status/c/2",
        "crc/c/2",
    }
    sentences = " ".join(examination.sentences())
    assert "unfinished, 2 of 3 shards not committed (shards [0, 2])" in sentences
    assert "3 objects" in sentences
    assert "of no commit yet" in sentences


def test_a_deep_digest_is_the_digest_or_says_where_not(tmp_path: Path) -> None:
    for number, storage in enumerate(STORED.values()):
        path = write_column(tmp_path / str(number), tokens_spec(**storage))
        digest, faults = deep_digest(path)
        assert (digest, faults) == (logical_digest(path), [])
        name = next(n for n in files_of(path) if n.startswith(("tokens/c/4", "tar/00002")))
        data = bytearray((path / name).read_bytes())
        data[645] ^= 1
        (path / name).write_bytes(data)
        digest, faults = deep_digest(path)
        assert digest != logical_digest(path)
        assert {f.shard for f in faults} == {2}


def test_faults_as_json(tmp_path: Path) -> None:
    path = small_moments(tmp_path / "c")
    data = bytearray((path / "moments/c/0/0/0/0").read_bytes())
    for row in (3, 4, 5, 9):
        data[32 * row] ^= 1
    (path / "moments/c/0/0/0/0").write_bytes(data)
    records = [json.loads(json.dumps(f.record(str(path)))) for f in verify(path)]
    assert [r["kind"] for r in records] == ["object", "rows", "digest"]
    assert records[1]["rows"] == [[3, 3], [9, 1]]
    assert all(r["column"] == str(path) and r["shard"] == 0 for r in records)
    assert all(r["object"] == "moments/c/0/0/0/0" for r in records)
    assert "rows [3..5, 9] do not fit" in records[1]["message"]


def test_memory_is_bounded_by_a_piece_of_an_object(tmp_path: Path) -> None:
    """An object of 200 MB is checked in far less."""
    layout = Layout("features", (256 * 1024,), 1, 1024)
    spec = ColumnSpec({"kind": "features", "source": "s"}, layout)
    digest = create_column(tmp_path / "c", spec)
    with ShardWriter(tmp_path / "c", spec, digest, 0, 400, "index") as writer:
        writer.put_block(np.zeros((400, 256 * 1024), np.float16), np.zeros(400, np.uint8))
        writer.commit({})
    put_complete(tmp_path / "c", digest, 1, allow_failed=False)
    code = (
        "import resource, sys; from shards.tools.verify import verify\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert verify(sys.argv[1]) == []\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) < 60_000
