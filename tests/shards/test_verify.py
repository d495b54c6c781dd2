"""Damage of every kind in every file is found and named."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shards import Column, CorruptColumn, IncompleteColumn, ShardsError, create_column
from shards.verify import logical_digest, verify

from .toy import (
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


def names(faults: list[str], name: str) -> bool:
    return any(name in fault for fault in faults)


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
        for more in (b"\0", b"\n", b" ", bytes(600)):
            path.write_bytes(data + more)
            assert names(verify(column), name), (name, more)


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
    others = {
        logical_digest(write_column(tmp_path / "e", moments_spec(1), (69,))),
        logical_digest(write_column(tmp_path / "f", moments_spec(1), (70,), shift=2**-10)),
        logical_digest(write_column(tmp_path / "g", moments_spec(1, weights="other"), (70,))),
        logical_digest(write_column(tmp_path / "h", moments_spec(1), (70,), index="other")),
    }
    assert len(others | {first}) == 5


def test_an_unfinished_column_is_sound_but_has_no_digest(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    write_shard(path, spec, create_column(path, spec), 1)
    assert verify(path) == []
    with pytest.raises(IncompleteColumn, match="no COMPLETE record"):
        logical_digest(path)
    assert Column.open(path, partial=True).generation.rows == (0, 40, 0)
