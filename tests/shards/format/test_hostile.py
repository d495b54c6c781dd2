"""Columns and sources that mean harm: an error that names the file, no code run, bounded memory."""

import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from shards import (
    Column,
    CorruptColumn,
    FormatVersion,
    Layout,
    NotAColumn,
    ShardsError,
    Source,
    create_column,
    open_source,
    put_index,
    read_commit,
    read_index,
    seal,
    sha256,
)
from shards.column.checksum import crc32c
from shards.column.writer import block_digest
from shards.errors import IncompleteColumn
from shards.format.layout import MAX_SHARDS
from shards.format.records import INDEX_ROW, SourceRecord, parse
from shards.tools.verify import verify
from tests.shards import hostile
from tests.shards.hostile import CANARY, Canary, bounded, closed, commit_name, complete_name, opened
from tests.shards.sweeps import expected, make
from tests.shards.toy import moments_spec, write_shard
from tests.soak.sweep import run, sample

GIB = 1 << 30
LAYOUT = TypeAdapter(Layout)


@pytest.fixture
def column(tmp_path: Path) -> Path:
    return make("tokens", tmp_path / "column", single=True)


@pytest.fixture(autouse=True)
def _no_code_is_run() -> Iterator[None]:
    yield
    assert not Path(CANARY).exists()


def everything(path: Path) -> None:
    """Open it either way and read all of it; the first error comes out."""
    hostile.use(path, partial=True)
    hostile.use(path, partial=False)
    assert verify(path) == []


def refused(path: Path, match: str | None = None, error: type[Exception] = ShardsError) -> str:
    """Reading it ends in an error that names the column, with bounded memory; `verify` names it too."""
    with bounded(), pytest.raises(error, match=match) as caught:
        everything(path)
    assert str(path) in str(caught.value)
    with bounded():
        try:
            faults = [str(fault) for fault in verify(path)]
        except (FormatVersion, NotAColumn) as unread:
            faults = [str(unread)]
    assert faults
    assert all(str(path) in str(fault) for fault in faults)
    return str(caught.value)


def test_a_sample_of_the_sweep() -> None:
    (sweep,) = hostile.SWEEPS
    outcome = run(sweep, sample(sweep, len(hostile.SHARES)))
    assert outcome.failures == []
    assert set(outcome.groups) == set(hostile.SHARES)
    assert len(set(outcome.inputs)) > 0.6 * len(outcome.inputs)


def test_inputs_are_the_same_for_the_same_number() -> None:
    assert hostile.draw("commits", 7) == hostile.draw("commits", 7)
    assert len({hostile.digest_of(hostile.draw("commits", n)[1]) for n in range(60)}) > 30


# ---- what is no record, or too much of one ------------------------------------------------------

RECORDS = ("column.json", "commits/00000.json", "COMPLETE", "valid bits", "failures/00000.json")
NPY = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 54


def place(column: Path, name: str) -> Path:
    """The file of a record; that of a failure is made."""
    complete = column / complete_name(expected("tokens", True))
    if name in ("COMPLETE", "valid bits"):
        return complete if name == "COMPLETE" else complete.with_suffix(".valid")
    if name.startswith("failures"):
        (column / "failures").mkdir()
    return column / name


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Canary()),
        NPY + pickle.dumps(np.array([Canary()], object)),
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[" + b"[]," * 50_000 + b"[]]",
        b'{"digest":' + b"9" * 5000 + b"}",
        b"PK\x03\x04" + bytes(1000),
    ],
    ids=["pickle", "object array", "deep list", "deep object", "many lists", "long number", "zip"],
)
def test_what_is_no_record(column: Path, name: str, data: bytes) -> None:
    place(column, name).write_bytes(data)
    if name.startswith("failures"):  # readers do not ask for failures, `verify` does
        assert str(column / name) in str(verify(column)[0])
    else:
        refused(column)


@pytest.mark.parametrize(
    "name", ["column.json", "commits/00000.json", "COMPLETE", "valid bits", "crc/c/0"]
)
@pytest.mark.parametrize("bytes_", [GIB, 1 << 40], ids=["1 GiB", "1 TiB"])
def test_giants(column: Path, name: str, bytes_: int) -> None:
    """Sparse files, so that they cost their maker nothing."""
    path = column / name if "/c/" in name else place(column, name)
    os.truncate(path, bytes_)
    assert str(path) in refused(column)


def test_a_giant_that_its_commit_bears_out(column: Path) -> None:
    """The record says 1 TiB as well; the layout says that it cannot be."""
    for name in ("crc/c/0", "tokens/c/0/0"):
        record = opened((column / "commits/00000.json").read_bytes())
        before = (column / name).read_bytes()
        os.truncate(column / name, 1 << 40)
        record["objects"] = [
            [path, 1 << 40 if path == name else size, digest]
            for path, size, digest in record["objects"]
        ]
        (column / "commits/00000.json").write_bytes(seal(record))
        with bounded(), pytest.raises(ShardsError, match=name):
            hostile.use(column, partial=True)
        with bounded():
            assert any(name in str(fault) for fault in verify(column))
        (column / name).write_bytes(before)


@pytest.mark.parametrize(
    "name", ["column.json", "commits/00000.json", "COMPLETE", "crc/c/0", "tokens/c/0/0"]
)
@pytest.mark.parametrize("what", ["pipe", "folder", "zeros", "loop", "nowhere"])
def test_what_is_no_file(column: Path, name: str, what: str) -> None:
    """Neither waits for a pipe that nobody writes, nor reads a device that never ends."""
    path = column / name if "/c/" in name else place(column, name)
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"zeros": "/dev/zero", "loop": path.name, "nowhere": "/nowhere"}[what])
    with bounded(), pytest.raises((ShardsError, OSError), match=str(column)):
        everything(column)


# ---- records whose digest fits ------------------------------------------------------------------

LAYOUTS: dict[str, Any] = {
    "shards of True": ("shards", True),
    "shards of 1.0": ("shards", 1.0),
    "shards of a text": ("shards", "1"),
    "negative shards": ("shards", -1),
    "2^62 shards": ("shards", 2**62),
    "one shard too many": ("shards", MAX_SHARDS + 1),
    "no shard_rows": ("shard_rows", 0),
    "2^62 shard_rows": ("shard_rows", 2**62),
    "shard_rows of no multiple": ("shard_rows", 1000),
    "negative shard_rows": ("shard_rows", -1024),
    "null row_shape": ("row_shape", None),
    "empty row_shape": ("row_shape", []),
    "zero in row_shape": ("row_shape", [0, 3]),
    "huge row_shape": ("row_shape", [65535, 2**31 - 1]),
    "row_shape over int64": ("row_shape", [2**31 - 1] * 8),
    "row_shape of floats": ("row_shape", [4.0, 3.0]),
    "row_shape of 2^64": ("row_shape", [4, 2**64]),
    "unknown kind": ("kind", "videos"),
    "kind of null": ("kind", None),
    "unknown codec": ("codec", "zip"),
    "unknown backend": ("backend", "../../x"),
    "unknown element": ("element", "object"),
    "element of another kind": ("element", "int32"),
    "int8 without scale": ("element", "int8"),
}


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a record and seal it anew."""
    record = opened(path.read_bytes())
    change(record)
    path.write_bytes(closed(record))


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(column: Path, case: str) -> None:
    field, value = LAYOUTS[case]
    edit(column / "column.json", lambda record: record["layout"].update({field: value}))
    assert "column.json" in refused(column, error=CorruptColumn)


def test_rows_larger_than_any_object(column: Path) -> None:
    """A layout of rows of 1 GiB whose records all fit: no memory is taken before the object is seen."""
    files = dict(expected("moments", True))
    record = opened(files["column.json"])
    record["layout"]["row_shape"] = [2, 2**14, 2**14]
    spec = moments_spec(1)
    layout = Layout("moments", (2, 2**14, 2**14), 1, spec.layout.shard_rows)
    record["norm"] = None
    metadata = replace(spec, layout=layout, norm=None).zarr_json()
    record["zarr"] = {name: sha256(data) for name, data in metadata.items()}
    files |= {**metadata, "column.json": seal(record)}
    hostile.reseal(files, random.Random(0))
    path = column.parent / "huge"
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    with bounded(), pytest.raises(ShardsError, match="moments/c/0"):
        hostile.use(path, partial=True)
    with bounded():
        assert any("moments/c/0" in str(fault) for fault in verify(path))


COMMITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another path": lambda r: r["objects"][0].__setitem__(0, "../../x"),
    "absolute path": lambda r: r["objects"][0].__setitem__(0, "/etc/passwd"),
    "path back down": lambda r: r["objects"][0].__setitem__(0, "crc/../../x/c/0"),
    "path with NUL": lambda r: r["objects"][0].__setitem__(0, "crc/c\0/0"),
    "hidden path": lambda r: r["objects"][0].__setitem__(0, "crc/c/.tmp-0"),
    "a path twice": lambda r: r["objects"].append(r["objects"][0]),
    "size of True": lambda r: r["objects"][0].__setitem__(1, True),
    "negative size": lambda r: r["objects"][0].__setitem__(1, -1),
    "digest that is none": lambda r: r["objects"][0].__setitem__(2, "x"),
    "2^62 rows": lambda r: r.update(rows=2**62),
    "more rows than blocks": lambda r: r.update(rows=5000),
    "rows of a float": lambda r: r.update(rows=70.0),
    "a run beyond the rows": lambda r: r.update(not_ok=[[0, 2**40, 2]]),
    "a run before the rows": lambda r: r.update(not_ok=[[-5, 3, 2]]),
    "runs over one another": lambda r: r.update(not_ok=[[0, 5, 2], [3, 1, 2]]),
    "an unknown status": lambda r: r.update(not_ok=[[0, 1, 77]]),
    "a status of ok": lambda r: r.update(not_ok=[[0, 1, 0]]),
    "runs of 2^64": lambda r: r.update(not_ok=[[2**64, 1, 2]]),
    "blocks of null": lambda r: r.update(blocks=None),
    "provenance of a list": lambda r: r.update(provenance=[]),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMITS)
def test_commits(column: Path, case: str) -> None:
    edit(column / "commits/00000.json", COMMITS[case])
    message = refused(column, error=CorruptColumn)
    assert "commits/00000.json" in message
    with pytest.raises(CorruptColumn, match="commits/00000.json"):
        read_commit(column, 0)


GENERATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "more shards": lambda r: r["shards"].append([0, None, None]),
    "no shards": lambda r: r.update(shards=[]),
    "2^62 rows": lambda r: r["shards"][0].__setitem__(0, 2**62),
    "rows without content": lambda r: r["shards"][0].__setitem__(1, None),
    "2^60 words": lambda r: r["valid"].update(words=2**60),
    "counts that do not add up": lambda r: r["counts"].update(ok=10**9),
    "counts below zero": lambda r: r["counts"].update(ok=-1),
    "a truncated run beyond": lambda r: r.update(truncated=[[0, 60, 20]]),
    "a truncated run nowhere": lambda r: r.update(truncated=[[7, 0, 1]]),
    "a failure that is none": lambda r: r.update(failed=[[0, "no tar"]]),
    "a failure of no shard": lambda r: r.update(failed=[[9, "no tar"]]),
    "a failure of null": lambda r: r.update(failed=[[0, None]]),
}


@pytest.mark.parametrize("case", GENERATIONS)
def test_generations(column: Path, case: str) -> None:
    edit(place(column, "COMPLETE"), GENERATIONS[case])
    with bounded(), pytest.raises(CorruptColumn, match=str(column)):
        Column.open(column)
    assert verify(column)


def test_valid_bits_that_lie(column: Path) -> None:
    """All rows are said to be valid, and every digest fits: only the commits know better."""
    complete = place(column, "COMPLETE")
    bits = b"\xff" * len(complete.with_suffix(".valid").read_bytes())
    edit(complete, lambda record: record["valid"].update(sha256=sha256(bits)))
    complete.with_suffix(".valid").write_bytes(bits)
    assert any("complete/" in str(fault) for fault in verify(column))


# ---- versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["column.json", "commits/00000.json", "COMPLETE"])
@pytest.mark.parametrize("version", [0, 2, 99, "1", None, 1.5])
def test_other_versions(column: Path, name: str, version: Any) -> None:
    """Older and newer ones are told from damage."""
    path = place(column, name)
    edit(path, lambda record: record.update(version=version))
    assert str(path) in refused(column, "this program reads", FormatVersion)


@pytest.mark.parametrize("version", [True, 1.0])
def test_versions_that_only_equal_ours(column: Path, version: Any) -> None:
    edit(column / "column.json", lambda record: record.update(version=version))
    refused(column)


@pytest.mark.parametrize("at", [(), ("layout",)])
def test_fields_of_a_newer_release(column: Path, at: tuple[str, ...]) -> None:
    def change(record: dict[str, Any]) -> None:
        for key in at:
            record = record[key]
        record["interleave"] = 4

    edit(column / "column.json", change)
    refused(column, "'interleave', which this program does not know", FormatVersion)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC1], ids=["inf", "-inf", "nan"])
def test_rows_that_are_not_finite(column: Path, word: int) -> None:
    """In a row that is said to be ok, with checksums, digests and records that all fit."""
    values = bytearray((column / "tokens/c/0/0").read_bytes())
    before = Column.open(column)
    ids = np.arange(70)
    lengths, status = before.lengths(ids).astype(np.uint16), before.status(ids)
    values[0:2] = int(word).to_bytes(2, "little")
    (column / "tokens/c/0/0").write_bytes(bytes(values))
    rows = np.split(np.frombuffer(values, "<u2")[: 3 * lengths.sum()].reshape(-1, 3),
                    np.cumsum(lengths, dtype=int)[:-1])  # fmt: skip
    crc = bytearray((column / "crc/c/0").read_bytes())
    crc[:4] = crc32c(np.ascontiguousarray(rows[0])).to_bytes(4, "little")
    (column / "crc/c/0").write_bytes(bytes(crc))
    files = {str(p.relative_to(column)): p.read_bytes() for p in column.rglob("*") if p.is_file()}
    record = opened(files["commits/00000.json"])
    record["blocks"] = [block_digest(rows, lengths, status)]
    parts = [record[key] for key in ("shard", "rows", "not_ok", "blocks", "index")]
    record["content"] = sha256(json.dumps(parts, separators=(",", ":")).encode() + b"\n")
    files["commits/00000.json"] = seal(record)
    hostile.reseal(files, random.Random(0))
    for name in ("commits/00000.json", complete_name(files)):
        (column / name).write_bytes(files[name])
    Column.open(column).read(ids, check=True)  # what it holds is what was recorded
    faults = [str(fault) for fault in verify(column)]
    assert any("rows [0] hold infinities or NaNs" in str(fault) for fault in faults)
    assert any("tokens/c/0/0" in str(fault) for fault in faults)


def test_object_arrays_in_a_tar(tmp_path: Path) -> None:
    """Members that unpickle: the writer that would adopt them refuses, and does not run them."""
    path = make("tokens tar", tmp_path / "column", single=True)
    tar = path / "tar/00000.tar"
    (path / "commits/00000.json").unlink()
    pickles = 0
    for number in range(40):
        data = hostile.hostile_tar(random.Random(number))
        pickles += b"'descr': '|O'" in data
        tar.write_bytes(data)
        with pytest.raises(CorruptColumn, match=str(tar)):
            make("tokens tar", path, single=True)
    assert pickles > 3


# ---- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../x.tar", "/etc/passwd", "a/b.tar", "..", ".", "", "a\0.tar", "a\\b.tar", "x" * 300, 7, None]
)  # fmt: skip
def test_names_of_tars_that_are_paths(tmp_path: Path, name: Any) -> None:
    tars = [[name, 100]]
    fingerprint = Source("toy", tuple(map(tuple, tars))).fingerprint
    Source("toy", (("0.tar", 100),)).put(tmp_path)
    edit(tmp_path / "source.json", lambda r: r.update(tars=tars, fingerprint=fingerprint))
    with pytest.raises(CorruptColumn, match=str(tmp_path / "source.json")):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("shard_rows", 2**62), ("shard_rows", True), ("fingerprint", "0" * 64), ("name", 7),
     ("tars", [["0.tar", -1]]), ("tars", [["0.tar"]]), ("tars", {"0.tar": 1}), ("tars", None)],
)  # fmt: skip
def test_sources(tmp_path: Path, field: str, value: Any) -> None:
    Source("toy", (("0.tar", 100),)).put(tmp_path)
    edit(tmp_path / "source.json", lambda record: record.update({field: value}))
    with pytest.raises(CorruptColumn, match=str(tmp_path / "source.json")):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        7, {}, ["a"], ["a", {}, {}, {}], [7, {}, {}], ["a", [], {}], ["a", {"jpg": [1]}, {}],
        ["a", {"jpg": [-1, 5]}, {}], ["a", {"jpg": [2**64, 5]}, {}], ["a", {"jpg": [1.5, 5]}, {}],
        ["a", {"jpg": [True, 5]}, {}], ["a", {}, {"txt": "x"}], ["a", {}, {"txt": None}],
        ["x" * 70_000, {}, {}], ["a", {str(i): [0, 1] for i in range(300)}, {}],
    ],
    ids=lambda line: str(line)[:30],
)  # fmt: skip
def test_lines_of_an_index(tmp_path: Path, line: Any) -> None:
    put_index(tmp_path, "s", 0, [], None)
    path = tmp_path / "index/00000.jsonl"
    head = json.loads(path.read_bytes())
    path.write_text(json.dumps({**head, "rows": 1}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(CorruptColumn, match=f"{path}: damaged index"):
        read_index(tmp_path, 0)
    with pytest.raises(CorruptColumn, match="file: damaged index"):
        parse(line, INDEX_ROW, "file", "index")


# ---- the parser itself --------------------------------------------------------------------------


def test_what_is_sound_passes_unchanged() -> None:
    for spec in (moments_spec(3), moments_spec(1, codec="blosc", backend="zarr")):
        layout = json.loads(json.dumps(spec.layout.record()))
        assert parse(layout, LAYOUT, "file") == spec.layout
    largest = {
        "kind": "moments",
        "row_shape": [8, 32, 32],
        "shards": MAX_SHARDS,
        "shard_rows": 65536,
    }
    assert parse(largest, LAYOUT, "file").shards == MAX_SHARDS
    source = {**Source("s", (("ü.tar", 2**40),)).record(), "digest": "0" * 64}
    assert parse(source, SourceRecord, "file").tars == [("ü.tar", 2**40)]


def test_messages_name_file_field_and_bounds() -> None:
    layout = {"kind": "moments", "row_shape": [4, True, 2], "shards": 1, "shard_rows": 1024}
    with pytest.raises(CorruptColumn) as caught:
        parse(layout, LAYOUT, "a/column.json")
    assert str(caught.value) == (
        "a/column.json: damaged record: row_shape[1]: found true, expected a whole "
        "number. Restore it, or delete it and encode again"
    )


def test_the_memory_guard_can_fail() -> None:
    with pytest.raises(AssertionError, match="MB of memory"), bounded(64 << 20):
        # Far past the bound: the system takes pages of libraries back where memory is short.
        np.ones(512 << 20, np.int8)


def test_a_column_of_no_finished_shard_is_no_damage(tmp_path: Path) -> None:
    spec = moments_spec(2)
    digest = create_column(tmp_path / "c", spec)
    write_shard(tmp_path / "c", spec, digest, 0, (3, 3))
    hostile.use(tmp_path / "c", partial=True)
    with pytest.raises(IncompleteColumn):
        hostile.use(tmp_path / "c", partial=False)
    assert commit_name(expected("moments", True)) == "commits/00000.json"
