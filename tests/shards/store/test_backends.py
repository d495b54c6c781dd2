"""Backends and codecs change how a column is stored and nothing else; other libraries read every one."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
import zarr

from shards import Column, CorruptColumn, ShardWriter, Status, create_column, put_empty, read_commit
from shards.tools.verify import logical_digest, verify
from tests.shards.toy import (
    EMPTY,
    SHARD_ROWS,
    SPECS,
    STORED,
    files_of,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
    write_column,
    write_shard,
)

KINDS = pytest.mark.parametrize("kind", SPECS)
OTHERS = pytest.mark.parametrize("stored", ["blosc", "webdataset"])


@KINDS
@OTHERS
def test_the_same_rows_and_digests(tmp_path: Path, kind: str, stored: str) -> None:
    plain = write_column(tmp_path / "zarr", SPECS[kind]())
    other = write_column(tmp_path / stored, SPECS[kind](**STORED[stored]))
    assert verify(other) == []
    assert logical_digest(other) == logical_digest(plain)
    for shard in range(3):
        assert read_commit(other, shard).content == read_commit(plain, shard).content
    a, b = Column.open(plain), Column.open(other)
    rows = np.concatenate([row_ids(shard) for shard in range(3)])
    rows = np.random.default_rng(0).permutation(rows)
    for rows_ in (rows, rows[:1], rows[:0]):
        np.testing.assert_array_equal(
            a.read(rows_, check=True).view(np.uint16), b.read(rows_, check=True).view(np.uint16)
        )
    np.testing.assert_array_equal(a.valid_mask(), b.valid_mask())
    b.hint(rows)


def test_zarr_reads_what_blosc_packed(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec(codec="blosc"))
    group = zarr.open_group(path, mode="r")
    ids = row_ids(0)
    present = ids[Column.open(path).status(ids) <= Status.TRUNCATED]
    np.testing.assert_array_equal(group["moments"][:1100][present], moments_of(present))
    assert group["moments"].metadata.codecs[0].codecs[1].cname.value == "lz4"
    text = write_column(tmp_path / "t", tokens_spec(codec="blosc"))
    tokens = zarr.open_group(text, mode="r")["tokens"]
    np.testing.assert_array_equal(tokens[:1], tokens_of(0))


@KINDS
def test_webdataset_reads_the_tars(tmp_path: Path, kind: str) -> None:
    path = write_column(tmp_path / "c", SPECS[kind](backend="webdataset"))
    urls = [str(path / f"tar/{shard:05d}.tar") for shard in range(3)]
    for shard, url in enumerate(urls):
        samples = webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode()
        members = {int(sample["__key__"]): sample["npy"] for sample in samples}
        ids = row_ids(shard)
        status = Column.open(path).status(ids)
        assert sorted(members) == (np.flatnonzero(status <= Status.TRUNCATED)).tolist()
        for place, values in members.items():
            row = shard * SHARD_ROWS + place
            expected = moments_of(np.array([row]))[0] if kind == "moments" else tokens_of(row)
            np.testing.assert_array_equal(values, expected)


@KINDS
def test_a_tar_that_stands_is_adopted(tmp_path: Path, kind: str) -> None:
    """The crash came between the tar and its commit; what comes later fits the values that stand."""
    spec = SPECS[kind](1, backend="webdataset")
    path = write_column(tmp_path / "c", spec, (1100,))
    whole = files_of(path)
    for name in whole:
        if name.split("/")[0] in ("commits", "complete", "status", "crc", "lengths"):
            (path / name).unlink()
    write_column(path, spec, (1100,), shift=2**-10 if kind == "moments" else 0.0)
    assert files_of(path) == whole


def test_a_tar_published_meanwhile_is_adopted(tmp_path: Path) -> None:
    spec, path = moments_spec(1, backend="webdataset"), tmp_path / "c"
    digest = create_column(path, spec)
    values = moments_of(np.arange(40))
    status = np.zeros(40, np.uint8)
    values[7, 0, 0, 0] = np.nan  # this writer lost a row that the other one got
    with ShardWriter(path, spec, digest, 0, 40, "index 0") as slow:
        slow.put_block(values, status)
        with ShardWriter(path, spec, digest, 0, 40, "index 0") as fast:
            fast.put_block(moments_of(np.arange(40)), status)
            expected = fast.commit({})
        assert slow.commit({}).content == expected.content
    assert verify(path) == []
    np.testing.assert_array_equal(
        Column.open(path, partial=True).read(np.arange(40), check=True), moments_of(np.arange(40))
    )
    assert not list(path.rglob(".tmp-*"))


def test_rows_without_values_have_no_member(tmp_path: Path) -> None:
    """They read as blank, with the length that was given, as from Zarr objects."""
    columns = []
    for name, options in STORED.items():
        spec, path = tokens_spec(1, **options), tmp_path / name
        digest = create_column(path, spec)
        put_empty(path, spec, EMPTY)
        captions = [tokens_of(row) for row in range(4)]
        captions[2][1, 1] = 0x7F80  # infinity: NON_FINITE, three tokens of NaN
        with ShardWriter(path, spec, digest, 0, 4, "index") as writer:
            writer.put_block(captions, np.array([0, Status.CAPTION_MISSING, 0, 1], np.uint8))
            writer.commit({})
        assert verify(path) == []
        columns.append(Column.open(path, partial=True))
    rows = np.array([3, 2, 1, 0])
    for column in columns:
        assert column.status(rows).tolist() == [1, 6, 4, 0]
        assert column.lengths(rows).tolist() == [4, 3, 0, 1]
        np.testing.assert_array_equal(column.read(rows, check=True), columns[0].read(rows))


@OTHERS
def test_damage_is_found_when_read(tmp_path: Path, stored: str) -> None:
    spec = moments_spec(1, **STORED[stored])
    path = write_column(tmp_path / "c", spec, (70,))
    (name,) = (n for n in files_of(path) if n.startswith(("moments/c", "tar/")))
    data = bytearray((path / name).read_bytes())
    for place in (60, len(data) // 3, len(data) // 2):
        hurt = data.copy()
        hurt[place] ^= 0x10
        (path / name).write_bytes(hurt)
        assert any(name in str(fault) or "rows" in str(fault) for fault in verify(path)), place
    (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptColumn, match=name):
        Column.open(path).read(np.arange(70), check=True)


def test_a_foreign_tar_is_refused(tmp_path: Path) -> None:
    spec, path = moments_spec(1, backend="webdataset"), tmp_path / "c"
    digest = create_column(path, spec)
    (path / "tar").mkdir()
    for content in (b"", b"x" * 4096, bytes(10240)):
        (path / "tar/00000.tar").write_bytes(content)
        with pytest.raises(CorruptColumn, match="cut off|no member"):
            write_shard(path, spec, digest, 0, (40,))
