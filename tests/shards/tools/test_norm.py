"""Norms that are measured over the rows of a column."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from shards import IncompleteColumn, Norm, ShardWriter, Status, create_column, put_complete
from shards.column.commits import commit_name
from shards.column.statistics import Sums, norm_of, read_norm, rounded
from shards.errors import BadStatistics, CorruptColumn
from shards.format.int8 import calibrate_rows, stored_rows
from shards.format.layout import ColumnSpec, Layout
from shards.read.column import Column
from shards.tools.copy import copy
from shards.tools.gc import collect
from shards.tools.info import information
from shards.tools.norm import NormTask, measure, measure_shard
from shards.tools.repair import repair
from shards.tools.verify import logical_digest, verify
from tests.shards.killer import Act, trace
from tests.shards.tools.test_commands import command
from tests.shards.toy import (
    NORM,
    ROWS,
    Counted,
    files_of,
    image_status,
    moments_of,
    moments_spec,
    row_ids,
    tokens_spec,
    write_column,
    write_shard,
)

ONE = Norm((0.0,), (1.0,))


def expected(per_place: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Shift, scale and rows by numpy over all valid rows at once."""
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    rows = moments_of(ids[image_status(ids) == Status.OK]).astype(np.float64)
    mean, logvar = rows[:, :2], rows[:, 2:]
    axes = (0,) if per_place else (0, 2, 3)
    variance = mean.var(axes) + np.exp(logvar).mean(axes)
    return mean.mean(axes), 1 / np.sqrt(variance), len(rows)


@pytest.mark.parametrize("storage", [{}, {"codec": "blosc"}, {"backend": "webdataset"}])
@pytest.mark.parametrize("per_place", [False, True])
def test_a_measured_norm_is_numpys(
    tmp_path: Path, per_place: bool, storage: dict[str, str]
) -> None:
    column = write_column(tmp_path / "c", moments_spec(**storage))
    files = {path: path.read_bytes() for path in column.rglob("*") if path.is_file()}
    digest = logical_digest(column)
    measured = measure(column, "measured-per-place" if per_place else "measured")
    shift, scale, rows = expected(per_place)
    assert measured.rows == rows
    for array, value in zip(measured.norm.arrays, (shift, scale), strict=True):
        assert array.shape == ((2, 2, 2) if per_place else (2, 1, 1))
        np.testing.assert_allclose(array.reshape(value.shape), value, rtol=1e-6)
    # nothing that exists was changed
    assert {path: path.read_bytes() for path in files} == files
    assert logical_digest(column) == digest
    assert verify(column) == []


def norm_files(column: Path) -> dict[str, bytes]:
    files = files_of(column)
    return {name: files[name] for name in files if name.startswith(("statistics/", "norms/"))}


def test_order_of_commits_and_a_stop_do_not_matter(tmp_path: Path) -> None:
    """Bit for bit: commits in reverse, and a measurement that ended after one shard."""
    first = write_column(tmp_path / "a", moments_spec())
    second = tmp_path / "b"
    digest = create_column(second, moments_spec())
    for shard in (2, 1, 0):
        write_shard(second, moments_spec(), digest, shard)
    put_complete(second, digest, 3, allow_failed=False)
    opened = Column.open(second)
    measure_shard(NormTask(opened, 1), lambda _: None)
    assert [path.name for path in (second / "statistics").iterdir()] == ["00001"]
    assert measure(first) == measure(second)
    assert norm_files(first) == norm_files(second)
    assert measure(first, processes=2) == measure(first)
    assert len(norm_files(first)) == 4


@pytest.mark.parametrize("storage", [{}, {"codec": "blosc"}, {"backend": "webdataset"}])
def test_sums_made_while_encoding_are_those_of_the_command(
    tmp_path: Path, storage: dict[str, str]
) -> None:
    """Bit for bit; the column is byte for byte the one without them, and nothing is read again."""
    spec = moments_spec(**storage)
    plain = write_column(tmp_path / "plain", spec)
    with_sums = write_column(tmp_path / "sums", spec, statistics=True)
    sums = norm_files(with_sums)
    assert sorted(sums) == ["statistics/00000", "statistics/00001", "statistics/00002"]
    assert {n: d for n, d in files_of(with_sums).items() if n not in sums} == files_of(plain)
    by_command, shown = measure(plain), Counted()
    assert measure(with_sums, progress=shown) == by_command
    assert shown.total == 0
    assert norm_files(with_sums) == norm_files(plain)


def test_sums_of_int8_are_of_the_values_as_they_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, (100, 2, 3, 3)).astype(np.float16)
    layout = Layout("latents", (2, 3, 3), 1, 1024, element="int8")
    spec = ColumnSpec(
        {"kind": "latents", "source": "s"},
        layout,
        NORM,
        quantisation=calibrate_rows(values, layout),
    )
    for name, statistics in (("plain", False), ("sums", True)):
        digest = create_column(tmp_path / name, spec)
        with ShardWriter(tmp_path / name, spec, digest, 0, 100, "index", statistics) as writer:
            writer.put_block(stored_rows(spec, values), np.zeros(100, np.uint8))
            writer.commit({})
        put_complete(tmp_path / name, digest, 1, allow_failed=False)
    measured = measure(tmp_path / "sums")
    assert measure(tmp_path / "plain") == measured
    assert norm_files(tmp_path / "plain") == norm_files(tmp_path / "sums")
    column = Column.open(tmp_path / "sums")
    rows = column.decoded(column.read(np.arange(100))).astype(np.float64)
    np.testing.assert_allclose(measured.norm.shift, rows.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(measured.norm.scale, 1 / rows.std((0, 2, 3)), rtol=1e-6)


SMALL = (70, 3)  # rows of its shards


def encoded(column: Path, order: Sequence[int] = (0, 1)) -> None:
    """Writes what a column of two small shards lacks, with its sums."""
    spec = moments_spec(2)
    digest = create_column(column, spec)
    for shard in order:
        if not (column / commit_name(shard)).exists():
            write_shard(column, spec, digest, shard, SMALL, statistics=True)
    put_complete(column, digest, 2, allow_failed=False)


def test_a_kill_at_any_moment_changes_no_norm(tmp_path: Path) -> None:
    """Before every system call that writes sums or a norm, or puts them in place, while encoding and
    while measuring. What exists is then whole, and the norm is that of a column whose shards were
    committed in the other order.
    """
    encoded(tmp_path / "reverse", (1, 0))
    expected = measure(tmp_path / "reverse")
    files = norm_files(tmp_path / "reverse")
    encoded(tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/statistics")

    def begin(folder: Path, copied: bool) -> Path:
        if copied:
            shutil.copytree(tmp_path / "bare", folder / "c")
        return folder / "c"

    works: list[tuple[bool, Callable[[Path], object]]] = [
        (False, encoded), (True, lambda path: measure(path, processes=1))
    ]  # fmt: skip
    for copied, work in works:
        whole = tmp_path / f"whole-{copied}"
        whole.mkdir()
        path = begin(whole, copied)
        calls = trace(lambda work=work, path=path: work(path), whole).calls
        names = ("open", "openat", "write", "link", "linkat", "rename", "unlink")
        numbers = [
            call.number for call in calls
            if call.name in names and any(p.startswith(("c/statistics/", "c/norms/")) for p in call.paths)
        ]  # fmt: skip
        assert len(numbers) > 5
        for at in numbers:
            folder = tmp_path / f"{copied}-{at}"
            folder.mkdir()
            path = begin(folder, copied)
            run = trace(lambda work=work, path=path: work(path), folder, Act("kill before", at))
            assert run.killed, run
            assert norm_files(path).items() <= files.items()
            encoded(path)
            assert measure(path, processes=1) == expected
            assert norm_files(path) == files
            shutil.rmtree(folder)


def test_sums_of_a_shard_are_not_made_twice_and_follow_its_content(tmp_path: Path) -> None:
    column = write_column(tmp_path / "c", moments_spec())
    before = measure(column)
    sums = column / "statistics/00001"
    sums.write_bytes(sums.read_bytes()[:-1])
    (fault,) = verify(column)
    assert (fault.kind, fault.object) == ("statistics", "statistics/00001")
    assert measure(column) == before
    assert verify(column) == []
    other = write_column(tmp_path / "o", moments_spec(), shift=2.0)
    for name, data in norm_files(column).items():  # of the same column.json, and other rows
        if name.startswith("statistics"):
            (other / name).parent.mkdir(exist_ok=True)
            (other / name).write_bytes(data)
    assert measure(other).norm != before.norm


def test_the_tools_know_norms(tmp_path: Path) -> None:
    column = write_column(tmp_path / "c", moments_spec())
    norm = measure(column)
    files = norm_files(column)
    copy(column, tmp_path / "copy")
    assert norm_files(tmp_path / "copy") == files
    garbage, remaining = collect(column, yes=True, seconds=0, generations=True)
    assert (garbage, remaining) == ([], [])
    assert norm_files(column) == files
    record = column / f"norms/{norm.digest}"
    record.write_bytes(record.read_bytes().replace(b'"rows":', b'"rows": '))
    (fault,) = verify(column)
    assert fault.object == f"norms/{norm.digest}"
    _, plan = repair(column, yes=True)
    assert plan.beyond == []
    assert verify(column) == []
    assert measure(column) == norm
    assert norm_files(column) == files


@pytest.mark.parametrize("per_place", [False, True])
def test_a_norm_is_a_record_and_its_arrays(tmp_path: Path, per_place: bool) -> None:
    """Readable without this code; what is cut off or changed is no norm."""
    column = write_column(tmp_path / "c", moments_spec())
    norm = measure(column, "measured-per-place" if per_place else "measured")
    path = column / "norms" / norm.digest
    line, _, data = path.read_bytes().partition(b"\n")
    record = json.loads(line)
    assert record["shape"] == ([2, 2, 2] if per_place else [2])
    arrays = np.frombuffer(data, "<f8").reshape(2, *record["shape"])
    for array, value in zip(arrays, expected(per_place)[:2], strict=True):
        np.testing.assert_allclose(array, value, rtol=1e-6)
    store = Column.open(column).store
    for damaged in (data[:-8], data[:-8] + np.float64(2.0).tobytes(), b""):
        path.write_bytes(line + b"\n" + damaged)
        with pytest.raises(CorruptColumn, match="damaged or cut off"):
            read_norm(store, record["column"], f"norms/{norm.digest}")
    path.rename(path.with_name("0" * 64))
    with pytest.raises(CorruptColumn, match="under another's name"):
        read_norm(store, record["column"], f"norms/{'0' * 64}")


def column_of(path: Path, values: np.ndarray, norm: Norm = NORM) -> Path:
    """A column of latents with these values."""
    layout = Layout("latents", values.shape[1:], 1, 1024)
    spec = ColumnSpec({"kind": "latents", "source": "s"}, layout, norm)
    digest = create_column(path, spec)
    with ShardWriter(path, spec, digest, 0, len(values), "index") as writer:
        writer.put_block(values, np.zeros(len(values), np.uint8))
        writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    return path


def test_info_warns_of_channels_of_other_deviations(tmp_path: Path) -> None:
    """Where one number normalises all of them, as the demo's."""
    values = np.random.default_rng(0).normal(size=(256, 2, 3, 3)).astype(np.float16)
    assert not information(column_of(tmp_path / "even", values, ONE))["warnings"]
    values *= np.array([0.52, 1.3], np.float16)[:, None, None]
    (warning,) = information(column_of(tmp_path / "odd", values, ONE))["warnings"]
    assert "deviations from 0.52 to 1.3" in warning
    assert "python -m shards norm" in warning


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    """A named error, and no norm is written."""
    values = np.random.default_rng(0).normal(size=(64, 2, 3, 3)).astype(np.float16)
    few = column_of(tmp_path / "few", values[:63])
    with pytest.raises(BadStatistics, match=r"found 63 valid rows, expected at least 64"):
        measure(few)
    enough = column_of(tmp_path / "enough", values)
    assert measure(enough).rows == 64
    with pytest.raises(BadStatistics, match=r"expected at least 1024 for measured-per-place"):
        measure(enough, "measured-per-place")
    values[:, 1] = 0.75
    flat = column_of(tmp_path / "flat", values)
    with pytest.raises(BadStatistics, match=r"1 of 2 deviations that are 0.*\(1, 0, 0\)"):
        measure(flat)
    for column in (few, flat):
        assert not list(column.glob("norms/*"))
    text = write_column(tmp_path / "text", tokens_spec())
    with pytest.raises(BadStatistics, match="found a column of tokens"):
        measure(text)
    sums = Sums(100, *np.full((3, 2, 1, 1), np.inf))
    with pytest.raises(BadStatistics, match="not finite"):
        norm_of(sums, "measured", "c")
    unfinished = tmp_path / "unfinished"
    create_column(unfinished, moments_spec())
    with pytest.raises(IncompleteColumn):
        measure(unfinished)


def test_seven_digits() -> None:
    values = np.array([[1 / 3, -1234567.89], [0.0, 1e-30 / 7]])
    assert rounded(values).tolist() == [[0.3333333, -1234568.0], [0.0, 1.428571e-31]]


def test_the_command(tmp_path: Path) -> None:
    column = write_column(tmp_path / "c", moments_spec())
    done = command("norm", column)
    assert done.returncode == 0, done.stderr
    _, _, rows = expected(False)
    assert f"measured over {rows:,} rows" in done.stdout
    assert measure(column).digest in done.stdout
    by_place = command("norm", column, "--per-place")
    assert measure(column, "measured-per-place").digest in by_place.stdout
    text = write_column(tmp_path / "text", tokens_spec())
    refused = command("norm", text)
    assert refused.returncode == 2
    assert "BadStatistics" in refused.stderr
    assert sum(ROWS) > rows
