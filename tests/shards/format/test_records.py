"""Records that were edited, damaged or written by another version end in named errors."""

import base64
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import (
    Column,
    ColumnSpec,
    CorruptColumn,
    FormatVersion,
    IncompleteColumn,
    IndexRow,
    Layout,
    Norm,
    NotAColumn,
    ShardsError,
    ShardWriter,
    Source,
    SourceChanged,
    atomic_write,
    create_column,
    open_source,
    open_store,
    put_complete,
    put_if_absent,
    put_index,
    read_commit,
    read_index,
    seal,
    unseal,
)
from shards.column.commits import failure_name, valid_mask_of, valid_rows
from shards.errors import NotARecord, Unreadable
from shards.format.layout import FAILURE, VERSION
from shards.read.column import open_spec
from tests.shards.toy import moments_spec, small_moments, write_shard

RECORDS = ("column.json", "commits/00000.json", "complete")


def record_path(column: Path, name: str) -> Path:
    return next((column / name).glob("*.json")) if name == "complete" else column / name


def read(column: Path) -> None:
    Column.open(column)
    read_commit(column, 0)


@pytest.fixture
def column(tmp_path: Path) -> Path:
    return small_moments(tmp_path / "column")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", CorruptColumn),
        (b"\0" * 100, CorruptColumn),
        (b"\xff\xfe{}", CorruptColumn),
        (b"[]", CorruptColumn),
        (b"7", CorruptColumn),
        (b'"x"', CorruptColumn),
        (b"{}", CorruptColumn),
        (b"[" * 100_000, CorruptColumn),
        (b'{"a":' * 100_000, CorruptColumn),
        (b"<html><body>404 Not Found</body></html>", CorruptColumn),
        (b'{"format":"other","version":1,"digest":"0"}\n', FormatVersion),
    ],
)
def test_what_is_no_record(column: Path, name: str, data: bytes, error: type[Exception]) -> None:
    path = record_path(column, name)
    path.write_bytes(data)
    with pytest.raises(error, match=str(path)):
        read(column)


def edited(path: Path, change: Callable[[dict[str, Any]], Any], sealed: bool) -> None:
    record = json.loads(path.read_bytes())
    digest = record.pop("digest")
    change(record)
    path.write_bytes(seal(record) if sealed else json.dumps({**record, "digest": digest}).encode())


@pytest.mark.parametrize("name", RECORDS)
def test_edited_by_hand(column: Path, name: str) -> None:
    path = record_path(column, name)
    edited(path, lambda r: r.update(provenance="me"), sealed=False)
    with pytest.raises(CorruptColumn, match="edited or damaged"):
        read(column)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"\\ud800"', "1e999"])
def test_values_that_have_no_canonical_form(column: Path, value: str) -> None:
    path = column / "column.json"
    path.write_text(path.read_text().replace('"empty_tokens":null', f'"empty_tokens":{value}'))
    with pytest.raises(CorruptColumn, match=str(path)):
        read(column)


@pytest.mark.parametrize("name", RECORDS)
def test_of_a_newer_version(column: Path, name: str) -> None:
    path = record_path(column, name)
    edited(path, lambda r: r.update(version=2), sealed=True)
    with pytest.raises(FormatVersion, match="version 2, this program reads .* version 1"):
        read(column)


@pytest.mark.parametrize("name", RECORDS)
def test_a_field_is_missing(column: Path, name: str) -> None:
    path = record_path(column, name)
    whole = path.read_bytes()
    fields = json.loads(whole).keys() - {"digest", "counts", "zarr"}  # those two are for people
    for field in fields:
        edited(path, lambda r, field=field: r.pop(field), sealed=True)  # type: ignore[misc]
        with pytest.raises(CorruptColumn, match=str(path)):
            read(column)
        path.write_bytes(whole)


def test_a_commit_of_another_shard_or_column(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in (0, 1):
        write_shard(path, spec, digest, shard)
    (path / "commits/00002.json").write_bytes((path / "commits/00001.json").read_bytes())
    with pytest.raises(CorruptColumn, match="record of another shard"):
        read_commit(path, 2)
    other = small_moments(tmp_path / "other")
    (path / "commits/00002.json").unlink()
    (path / "commits/00000.json").write_bytes((other / "commits/00000.json").read_bytes())
    with pytest.raises(CorruptColumn, match="belongs to another column.json"):
        Column.open(path, partial=True)


def test_no_such_column(tmp_path: Path) -> None:
    with pytest.raises(NotAColumn, match="no such folder"):
        Column.open(tmp_path / "nothing")
    with pytest.raises(NotAColumn, match="column.json: no such file"):
        Column.open(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotAColumn, match="file: is a file. Expected the folder of a column"):
        Column.open(tmp_path / "file")


def fail(column: Path, shard: int, reason: str) -> None:
    record = {"format": FAILURE, "version": VERSION, "shard": shard, "reason": reason}
    atomic_write(column / failure_name(shard), seal(record))


def test_complete_only_when_every_shard_is_accounted_for(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in (0, 2):
        write_shard(path, spec, digest, shard)
    with pytest.raises(IncompleteColumn, match=r"1 of 3 shards .* .shard 1: not encoded yet"):
        put_complete(path, digest, 3, allow_failed=True)
    fail(path, 1, "no tar")
    with pytest.raises(IncompleteColumn, match="shard 1: no tar"):
        put_complete(path, digest, 3, allow_failed=False)
    first = put_complete(path, digest, 3, allow_failed=True)
    assert first.failed == ((1, "no tar"),)
    assert put_complete(path, digest, 3, allow_failed=True).digest == first.digest
    # It failed again, for another reason: a second record of the same shards must not lock readers out.
    fail(path, 1, "still no tar")
    put_complete(path, digest, 3, allow_failed=True)
    assert Column.open(path).snapshot.rows == (1100, 0, 1024)
    write_shard(path, spec, digest, 1)
    assert put_complete(path, digest, 3, allow_failed=False).failed == ()
    assert Column.open(path).snapshot.rows == (1100, 40, 1024)  # the newest of the three


def test_two_complete_records_that_contradict_each_other(column: Path) -> None:
    path = record_path(column, "complete")
    record = json.loads(path.read_bytes())
    record.pop("digest")
    record["shards"][0][1] = "0" * 64
    (column / "complete/x.json").write_bytes(seal(record))
    (column / "complete/x.valid").write_bytes(path.with_suffix(".valid").read_bytes())
    with pytest.raises(CorruptColumn, match="all claim to be the newest"):
        Column.open(column)


def test_valid_bits_and_back() -> None:
    import numpy as np

    chance = np.random.default_rng(0)
    for rows in (0, 1, 31, 32, 33, 1000):
        status = chance.choice(np.array([0, 1, 2, 255], np.uint8), rows)
        words = valid_mask_of(status, (0, 1))
        assert words.size == -(-rows // 32)
        assert valid_rows(words).tolist() == [i for i, s in enumerate(status) if s <= 1]
    status = np.zeros(40, np.uint8)
    status[33] = 2
    assert valid_mask_of(status, (0,)).tolist() == [0xFFFFFFFF, 0b11111101]


def test_objects_are_never_replaced(tmp_path: Path) -> None:
    assert put_if_absent(tmp_path / "a/b", b"1")
    assert not put_if_absent(tmp_path / "a/b", b"2")
    assert (tmp_path / "a/b").read_bytes() == b"1"
    atomic_write(tmp_path / "a/b", b"3")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/absent")):
        with pytest.raises(Unreadable, match="found a pipe or a device"):
            atomic_write(special, b"4")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "r").write_bytes(seal({"format": "k", "version": 1, "x": "é"}))
    assert unseal(tmp_path / "r", "k", 1)["x"] == "é"


# ---- sources ----------------------------------------------------------------------------------

ROWS = [
    IndexRow("a", {"jpg": (512, 10), "txt": (1536, 3)}, {"txt": "0" * 64}),
    IndexRow("b\n\u2028é", {"jpg": (2560, 9)}, {}),
]


def test_source_and_index_round_trip(tmp_path: Path) -> None:
    source = Source("toy", (("0.tar", 100), ("1.tar", 90)))
    source.put(tmp_path)
    source.put(tmp_path)
    assert open_source(tmp_path) == source
    put = put_index(tmp_path, source.fingerprint, 1, ROWS, "cut off")
    assert (
        read_index(tmp_path, 1)
        == put
        == put_index(tmp_path, source.fingerprint, 1, ROWS, "cut off")
    )
    assert read_index(tmp_path, 1).rows == ROWS


def test_fingerprint_is_of_names_sizes_and_order() -> None:
    tars = (("0.tar", 100), ("1.tar", 90))
    prints = {
        Source("toy", tars).fingerprint,
        Source("toy", tars[::-1]).fingerprint,
        Source("toy", (("0.tar", 101), tars[1])).fingerprint,
        Source("toy", (("2.tar", 100), tars[1])).fingerprint,
        Source("toy", tars[:1]).fingerprint,
    }
    assert len(prints) == 5
    assert Source("other name", tars).fingerprint in prints


def test_another_source_under_the_name(tmp_path: Path) -> None:
    Source("toy", (("0.tar", 100),)).put(tmp_path)
    with pytest.raises(
        ShardsError, match=r"tars: found \[\['0.tar', 100\]\], expected \[\['0.tar', 99"
    ):
        Source("toy", (("0.tar", 99),)).put(tmp_path)


def test_a_tar_that_changed_since_it_was_read(tmp_path: Path) -> None:
    put_index(tmp_path, "s", 0, ROWS, None)
    for rows, note in ((ROWS[:1], None), (ROWS[:1], "cut off"), (ROWS[::-1], None)):
        with pytest.raises(SourceChanged, match="held 2 rows when it was first read"):
            put_index(tmp_path, "s", 0, rows, note)
    assert read_index(tmp_path, 0).rows == ROWS


def test_an_index_without_a_note_is_the_same_reading(tmp_path: Path) -> None:
    """An older program noted less; a note that was there may not become another one."""
    first = put_index(tmp_path, "s", 0, ROWS, None)
    assert put_index(tmp_path, "s", 0, ROWS, "more after the end") == first
    put_index(tmp_path, "s", 1, ROWS, "cut off")
    for note in (None, "more after the end"):
        with pytest.raises(SourceChanged):
            put_index(tmp_path, "s", 1, ROWS, note)


def test_a_damaged_index(tmp_path: Path) -> None:
    with pytest.raises(NotAColumn, match="not been read yet"):
        read_index(tmp_path, 0)
    put_index(tmp_path, "s", 0, ROWS, None)
    path = tmp_path / "index/00000.jsonl"
    data = path.read_bytes()
    head, line, _ = data.splitlines(keepends=True)
    for bad in (
        b"",
        b"[" * 100_000,
        b"null\n",
        head,
        head + line,
        data + b"[]\n",
        data[:-9],
        head + b"7\n",
    ):
        path.write_bytes(bad)
        with pytest.raises(CorruptColumn, match="damaged index"):
            read_index(tmp_path, 0)
    path.write_bytes(data.replace(b'"version":1', b'"version":2'))
    with pytest.raises(FormatVersion, match="version 2"):
        read_index(tmp_path, 0)


# What a writer accepts is what a reader takes --------------------------------------------------------

NUMBERS = st.lists(
    st.floats(width=64) | st.sampled_from([0.0, -0.0, 1e-46, 1e-30, 1e30, 1.0001e30]),
    min_size=0, max_size=4,
)  # fmt: skip


def create(folder: Path, make: Callable[[], ColumnSpec]) -> ColumnSpec | None:
    """The column that is created, or None where it is refused; then nothing is there."""
    try:
        spec = make()
        create_column(folder, spec)
    except ValueError:  # of `ColumnSpec` itself, or NotARecord
        assert not folder.exists()
        return None
    return spec


@given(NUMBERS, NUMBERS)
def test_a_norm_is_refused_or_read_back(shift: list[float], scale: list[float]) -> None:
    with tempfile.TemporaryDirectory() as place:
        column = Path(place, "c")
        spec = create(
            column, lambda: replace(moments_spec(), norm=Norm(tuple(shift), tuple(scale)))
        )
        sound = all(abs(v) <= 1e30 for v in [*shift, *scale]) and 0 not in np.float32(scale)
        assert (spec is not None) == (sound and {len(shift), len(scale)} <= {1, 2})
        if spec is not None:
            assert open_spec(open_store(column))[0] == spec


def test_integers_in_a_norm_stay_integers(tmp_path: Path) -> None:
    """So that the digest of a column that another program wrote is the same however it is computed."""
    spec = replace(moments_spec(), norm=Norm((0,), (1, 2)))
    create_column(tmp_path / "c", spec)
    read, _ = open_spec(open_store(tmp_path / "c"))
    assert seal(read.record()) == (tmp_path / "c/column.json").read_bytes()


def test_a_norm_of_each_place_is_read_back(tmp_path: Path) -> None:
    """Its record is an object of shape and base64 of little endian float32, whatever wrote it."""
    shift = np.random.default_rng(0).normal(size=(2, 2, 2)).astype(np.float32)
    spec = replace(moments_spec(), norm=Norm(shift, np.full((1, 2, 1), 0.1)))
    assert spec.layout.row_shape == (4, 2, 2)
    create_column(tmp_path / "c", spec)
    assert open_spec(open_store(tmp_path / "c"))[0] == spec
    record = json.loads((tmp_path / "c/column.json").read_bytes())["norm"]
    assert record["shift"]["shape"] == [2, 2, 2]
    assert base64.b64decode(record["shift"]["float32"]) == shift.astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (
            np.zeros((3, 2, 2)),
            r"norm.shift: found an array of \(3, 2, 2\), expected .* \(2, 2, 2\)",
        ),
        (np.zeros((3, 2)), r"norm.shift: found an array of \(1, 3, 2\)"),
        ([[[0.0], [1.0]], [[0.0]]], "norm.shift: found lists of different lengths"),
        (np.full((2, 2, 2), np.nan), "norm.shift: found .*nan.*, expected finite numbers"),
        ([[[[0.0]]]], "expected a number"),
        ({"shape": [2, 4, 4], "float32": "AAAA"}, "found 3 bytes of the shape"),
        ({"shape": [2, 4], "float32": "AAAA"}, "shape: .*expected three integers"),
        ({"float32": "AAAA"}, "an object of shape and float32"),
        ({"shape": [1, 1, 1], "float32": "?"}, "base64|padding|Only"),
    ],
)
def test_a_norm_that_fits_no_latent(shift: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(moments_spec(), norm=Norm(shift, (1.0,)))


@given(NUMBERS, st.integers(-1, 9) | st.none())
def test_scales_of_int8_are_refused_or_read_back(channel: list[float], empty: int | None) -> None:
    layout = Layout("tokens", (8, 2), 1, 1024, "int8")
    how = {"scheme": "x", "channel": channel, "relative_error": 0.0, "rows": 1}
    with tempfile.TemporaryDirectory() as place:
        column = Path(place, "c")
        spec = create(column, lambda: ColumnSpec({}, layout, None, empty, how))
        if spec is not None:
            assert open_spec(open_store(column))[0] == spec


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.just("x" * 300))
def test_a_source_is_refused_or_read_back(name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, source = Path(place, "s"), Source("s", ((name, 7),))
        try:
            source.check(folder)
            source.put(folder)
        except NotARecord:
            assert not folder.exists()
        else:
            assert open_source(folder) == source


def test_other_records_that_no_reader_takes(tmp_path: Path) -> None:
    column = tmp_path / "c"
    spec = moments_spec()
    digest = create_column(column, spec)
    writer = ShardWriter(column, spec, digest, 0, 1, "i" * 257)
    values = np.zeros((1, *spec.layout.row_shape), np.float16)
    writer.put_block(values, np.zeros(1, np.uint8))
    with pytest.raises(NotARecord, match="commits/00000.json: nothing was written: index: found"):
        writer.commit({})
    assert not (column / "commits").exists()
    with pytest.raises(NotARecord, match=r"column.json: nothing was written: found \d+ bytes"):
        create_column(tmp_path / "d", replace(spec, identity={"note": "x" * (1 << 22)}))
    assert not (tmp_path / "d").exists()
