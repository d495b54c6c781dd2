"""Columns are copied, staged and converted whole, or an error says what is wrong with which object."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import (
    Column,
    ColumnSpec,
    CorruptColumn,
    IdentityMismatch,
    IncompleteColumn,
    Layout,
    ShardsError,
    ShardWriter,
    Status,
    canonical_json,
    create_column,
    put_complete,
    put_empty,
    read_commit,
    seal,
    sha256,
)
from shards.column.source import ShardIndex, Source
from shards.errors import ConversionFailed, NoRoom
from shards.format.int8 import quantise, to_floats
from shards.store.local import LocalStore
from shards.tools import copy as copying
from shards.tools.convert import convert
from shards.tools.copy import copy, stage
from shards.tools.verify import logical_digest, verify
from tests.shards.toy import (
    EMPTY,
    SHARD_ROWS,
    SPECS,
    TOKENS,
    WIDTH,
    Counted,
    files_of,
    image_status,
    moments_of,
    moments_spec,
    row_ids,
    small_moments,
    tokens_spec,
    write_column,
    write_shard,
)

ROOT = Path(__file__).parents[3]
KINDS = pytest.mark.parametrize("kind", SPECS)
WAYS: list[dict[str, Any]] = [
    {"backend": "webdataset"}, {"codec": "blosc"}, {}
]  # fmt: skip


def in_child(work: Any) -> int:
    """Run in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(path: Path) -> list[str]:
    return [read_commit(path, shard).content for shard in range(3)]


# Convert ------------------------------------------------------------------------------------------


@KINDS
def test_either_way_and_back(tmp_path: Path, kind: str) -> None:
    first = write_column(tmp_path / "0", SPECS[kind]())
    path = first
    for number, way in enumerate(WAYS, 1):
        column = convert(path, tmp_path / str(number), **way)
        path = tmp_path / str(number)
        assert (column.layout.backend, column.layout.codec) == (
            way.get("backend", "zarr"), way.get("codec"),
        )  # fmt: skip
        assert verify(path) == []
        assert logical_digest(path) == logical_digest(first)
        assert contents(path) == contents(first)
        assert column.snapshot.index == Column.open(first).snapshot.index
    back = {n: d for n, d in files_of(path).items() if not n.startswith("commits/")}
    assert back.items() <= files_of(first).items()  # the very objects, and COMPLETE


@pytest.mark.parametrize("way", [{"backend": "webdataset"}, {"codec": "blosc"}])
def test_killed_at_any_publish_it_goes_on(tmp_path: Path, way: dict[str, Any]) -> None:
    source = write_column(tmp_path / "a", moments_spec())
    sound = files_of(convert(source, tmp_path / "b", **way).store.folder or tmp_path)
    deaths = 0
    for publish in range(0, 100, 5):
        path = tmp_path / f"c{publish}"

        def work(publish: int = publish, path: Path = path) -> None:
            link, calls = os.link, iter(range(1000))

            def fatal(*names: Any) -> None:
                if next(calls) == publish:
                    os.kill(os.getpid(), signal.SIGKILL)
                link(*names)

            os.link = fatal  # type: ignore[assignment]  # of this child alone
            convert(source, path, **way)

        if in_child(work) == 0:
            break
        deaths += 1
        finished = {n for n in files_of(path) if n.startswith("commits/")}
        with pytest.raises(ShardsError):
            Column.open(path)
        times = {n: (path / n).stat().st_mtime_ns for n in finished}
        convert(source, path, **way)
        assert files_of(path) == sound
        assert times == {n: (path / n).stat().st_mtime_ns for n in finished}, "not made again"
    assert deaths > 2


def test_rows_that_are_not_finite_and_shards_that_failed(tmp_path: Path) -> None:
    """A row of NaN keeps its length and status; a failed shard stays failed, with its reason."""
    spec, path = tokens_spec(2), tmp_path / "a"
    digest = create_column(path, spec)
    put_empty(path, spec, EMPTY)
    rows = [np.full((n, WIDTH), 0x3F80, np.uint16) for n in (1, 2, 3, 4)]
    rows[2][1, 1] = 0x7F80  # infinity
    with ShardWriter(path, spec, digest, 0, 4, "index") as writer:
        writer.put_block(rows, np.array([0, Status.CAPTION_MISSING, 0, 1], np.uint8))
        writer.commit({})
    record = {"format": "latentbank-failure", "version": 1, "shard": 1, "reason": "BadTar: cut"}
    LocalStore(path).replace("failures/00001.json", seal(record))
    with pytest.raises(IncompleteColumn):
        convert(path, tmp_path / "early")
    put_complete(path, digest, 2, allow_failed=True)
    for number, way in enumerate(WAYS):
        column = convert(path, tmp_path / f"b{number}", **way)
        assert column.status(np.arange(4)).tolist() == [0, 4, 6, 1]
        assert column.lengths(np.arange(4)).tolist() == [1, 0, 3, 4]
        assert column.snapshot.failed == ((1, "BadTar"),)
        assert (tmp_path / f"b{number}/failures/00001.json").exists()
        assert logical_digest(tmp_path / f"b{number}") == logical_digest(path)
        assert verify(tmp_path / f"b{number}") == []


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, TOKENS), min_size=1, max_size=70),
    statuses=st.lists(st.sampled_from([0, 0, 0, 1, 4, 5]), min_size=70, max_size=70),
    bad=st.sets(st.integers(0, 69), max_size=5),
    ways=st.permutations(WAYS),
)
def test_any_rows_survive_any_way(
    tmp_path: Path,
    lengths: list[int],
    statuses: list[int],
    bad: set[int],
    ways: list[dict[str, Any]],
) -> None:
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    spec, chance = tokens_spec(1), np.random.default_rng(len(lengths))
    digest = create_column(folder / "0", spec)
    put_empty(folder / "0", spec, EMPTY)
    rows = [chance.integers(0, 0x7F80, (n, WIDTH)).astype(np.uint16) for n in lengths]
    for row in bad & set(range(len(rows))):
        rows[row][:1] = 0x7F80
    with ShardWriter(folder / "0", spec, digest, 0, len(rows), "index") as writer:
        writer.put_block(rows, np.array(statuses[: len(rows)], np.uint8))
        writer.commit({})
    put_complete(folder / "0", digest, 1, allow_failed=False)
    for number, way in enumerate(ways):
        convert(folder / str(number), folder / str(number + 1), **way)
        assert verify(folder / str(number + 1)) == []
    assert logical_digest(folder / "3") == logical_digest(folder / "0")


def normal_tokens(path: Path, outliers: bool = False) -> Path:
    """A column of 100 captions of normal numbers, some channels much larger than others; or with a
    few that are much larger than the rest of their token.
    """
    spec = ColumnSpec(
        {"kind": "tokens", "encoder": {"weights": "text"}, "source": "s", "dtype": "bfloat16"},
        Layout("tokens", (8, 64), 1, SHARD_ROWS), empty_tokens=1,
    )  # fmt: skip
    digest = create_column(path, spec)
    put_empty(path, spec, np.zeros((1, 64), np.uint16))
    chance = np.random.default_rng(0)
    scale = np.geomspace(0.01, 100, 64)
    draw = partial(chance.standard_t, 2) if outliers else chance.normal
    rows = [
        ((draw(size=(1 + i % 8, 64)) * scale).astype(np.float32).view(np.uint32) >> 16)
        .astype(np.uint16)
        for i in range(100)
    ]  # fmt: skip
    with ShardWriter(path, spec, digest, 0, 100, "index") as writer:
        writer.put_block(rows, np.zeros(100, np.uint8))
        writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    return path


def test_int8(tmp_path: Path) -> None:
    source = normal_tokens(tmp_path / "a")
    column = convert(source, tmp_path / "b", element="int8")
    assert verify(tmp_path / "b") == []
    record = column.spec.quantisation
    assert record
    assert record["rows"] == 100
    assert column.spec.identity == {**Column.open(source).spec.identity, "dtype": "int8"}
    rows = np.arange(100)
    words = Column.open(source).read(rows)
    channel = np.array(record["channel"], np.float32)
    np.testing.assert_array_equal(column.read(rows), quantise(words, channel))
    exact, rounded = to_floats(words), to_floats(column.decoded(column.read(rows)))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(record["relative_error"], rel=1e-3)
    assert column.snapshot.index == Column.open(source).snapshot.index
    second_copy = convert(source, tmp_path / "b", element="int8")  # nothing left to do
    assert second_copy.digest == column.digest
    tar = convert(tmp_path / "b", tmp_path / "c", backend="webdataset")
    assert logical_digest(tmp_path / "c") == logical_digest(tmp_path / "b")
    assert tar.layout.element == "int8"
    stranger = {**record, "channel": [2 * scale for scale in record["channel"]]}
    layout = replace(column.spec.layout, backend="webdataset")
    create_column(tmp_path / "d", replace(column.spec, layout=layout, quantisation=stranger))
    with pytest.raises(IdentityMismatch, match="quantisation.channel"):  # not for words of these
        convert(tmp_path / "b", tmp_path / "d", backend="webdataset", element="int8")
    moments = write_column(tmp_path / "m", moments_spec())
    with pytest.raises(ShardsError, match="cannot be converted"):
        convert(moments, tmp_path / "n", element="int8")
    assert not (tmp_path / "n").exists()
    huge = write_column(tmp_path / "h", tokens_spec())  # up to 3e38
    with pytest.raises(ShardsError, match="too large for int8"):
        convert(huge, tmp_path / "n", element="int8")
    with pytest.raises(ShardsError, match="no codec"):
        convert(source, tmp_path / "n", backend="webdataset", codec="blosc")


def test_a_damaged_source_is_not_converted(tmp_path: Path) -> None:
    source = write_column(tmp_path / "a", moments_spec())
    data = bytearray((source / "moments/c/4/0/0/0").read_bytes())
    data[100] ^= 1
    (source / "moments/c/4/0/0/0").write_bytes(data)
    with pytest.raises(CorruptColumn, match="row 3 of shard 2"):
        convert(source, tmp_path / "b", backend="webdataset")
    with pytest.raises(ShardsError, match="no COMPLETE"):
        Column.open(tmp_path / "b")


def test_a_target_that_held_other_values_is_refused(tmp_path: Path) -> None:
    source = write_column(tmp_path / "a", moments_spec())
    spec = moments_spec(backend="webdataset")
    write_shard(tmp_path / "b", spec, create_column(tmp_path / "b", spec), 1, shift=0.5)
    with pytest.raises(ConversionFailed, match=r"commits/00001.json: shard 1 has the digest"):
        convert(source, tmp_path / "b", backend="webdataset")
    stranger = write_column(tmp_path / "c", moments_spec(weights="other", backend="webdataset"))
    before = files_of(stranger)
    with pytest.raises(IdentityMismatch, match="weights"):
        convert(source, stranger, backend="webdataset")
    assert files_of(stranger) == before


def test_from_a_path_that_is_no_text(tmp_path: Path) -> None:
    source = small_moments(tmp_path / os.fsdecode(b"\xff"))
    convert(source, tmp_path / "b", backend="webdataset")
    assert read_commit(tmp_path / "b", 0).provenance == {"converted": rf"{tmp_path}/\xff"}
    assert logical_digest(tmp_path / "b") == logical_digest(source)


def test_by_several_processes(tmp_path: Path) -> None:
    source = write_column(tmp_path / "a", tokens_spec())
    progress = Counted()
    convert(source, tmp_path / "b", backend="webdataset", processes=2, progress=progress)
    assert logical_digest(tmp_path / "b") == logical_digest(source)
    column = Column.open(source)
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    assert sum(progress.counts) == progress.total == column.row_bytes(ids).sum()


# Copy ---------------------------------------------------------------------------------------------


@KINDS
def test_a_copy_is_the_same_files(tmp_path: Path, kind: str) -> None:
    source = write_column(tmp_path / "a", SPECS[kind](backend="webdataset"))
    progress = Counted()
    manifest = copy(source, tmp_path / "b", progress=progress)
    assert files_of(tmp_path / "b") == files_of(source)
    assert sum(progress.counts) == progress.total == manifest.bytes
    os.truncate(source / "tar/00000.tar", 5)  # looked at no more: its shard is committed there
    before = {n: (tmp_path / "b" / n).stat().st_mtime_ns for n in files_of(tmp_path / "b")}
    copy(source, tmp_path / "b")
    assert before == {n: (tmp_path / "b" / n).stat().st_mtime_ns for n in before}


def test_an_unfinished_column_is_copied_as_far_as_it_is(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "a"
    digest = create_column(path, spec)
    write_shard(path, spec, digest, 1)
    shutil.copytree(path / "moments/c/2", path / "moments/c/0")  # of no commit
    copy(path, tmp_path / "b")
    assert not (tmp_path / "b/moments/c/0").exists()
    assert Column.open(tmp_path / "b", partial=True).snapshot.rows == (0, 40, 0)
    shutil.rmtree(path / "moments/c/0")
    for shard in (0, 2):
        write_shard(path, spec, digest, shard)
    put_complete(path, digest, 3, allow_failed=False)
    copy(path, tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(path)


def test_damage_is_never_copied(tmp_path: Path) -> None:
    source = write_column(tmp_path / "a", moments_spec())
    data = (source / "moments/c/0/0/0/0").read_bytes()
    for defects in (
        data[:-7],
        data + b"\0",
        data[:100] + bytes([data[100] ^ 1]) + data[101:],
        None,
    ):
        (source / "moments/c/0/0/0/0").unlink(missing_ok=True)
        if defects is not None:
            (source / "moments/c/0/0/0/0").write_bytes(defects)
        with pytest.raises(CorruptColumn, match="moments/c/0/0/0/0"):
            copy(source, tmp_path / "b", threads=1)
        assert not (tmp_path / "b/moments/c/0/0/0/0").exists()
        assert not (tmp_path / "b/commits/00000.json").exists()
        assert not (tmp_path / "b/complete").exists()
    (source / "moments/c/0/0/0/0").write_bytes(data)
    copy(source, tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(source)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_stop_or_an_error_waits_for_no_more_than_the_objects_in_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Not for whole shards, which may hold gigabytes: of two threads, each ends one object."""
    source, whole, names = write_column(tmp_path / "a", moments_spec()), copying._copy_object, []
    stopped = threading.Event()  # from then on no thread begins with another object

    def copy_object(source: Any, target: Any, name: str, *rest: Any) -> None:
        if name.startswith("empty/"):
            return
        names.append(name)
        if len(names) == 1:
            raise error
        assert stopped.wait(60)
        whole(source, target, name, *rest)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait)

    monkeypatch.setattr(copying, "ThreadPoolExecutor", Pool)

    monkeypatch.setattr(copying, "_copy_object", copy_object)
    assert sum(len(path.parts) > 2 for path in source.rglob("c/**/*") if path.is_file()) > 6
    with pytest.raises(error):
        copy(source, tmp_path / "b", threads=2)
    assert len(names) <= 4
    assert not list((tmp_path / "b").glob("commits/*"))
    monkeypatch.undo()
    copy(source, tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(source)


def test_what_stands_is_kept_or_refused_never_replaced(tmp_path: Path) -> None:
    source, target = write_column(tmp_path / "a", moments_spec()), tmp_path / "b"
    name = "moments/c/0/0/0/0"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_bytes(bytes(len((source / name).read_bytes())))
    with pytest.raises(CorruptColumn, match="bytes that are not those"):
        copy(source, target)
    assert set((target / name).read_bytes()) == {0}
    shutil.copy(source / name, target / name)
    os.utime(target / name, (0, 0))
    before = (target / name).stat()
    copy(source, target)
    assert (target / name).stat().st_ino == before.st_ino
    assert (target / name).stat().st_mtime > 0  # it was old, and `gc` would have taken it
    stranger = write_column(tmp_path / "c", moments_spec(weights="other"))
    with pytest.raises(IdentityMismatch, match=r"column.json: another record"):
        copy(source, stranger)
    moved = write_column(tmp_path / "d", moments_spec(), shift=0.5)
    before = files_of(moved)
    with pytest.raises(IdentityMismatch, match="another shard 0"):
        copy(source, moved)
    assert files_of(moved) == before


def test_with_its_source(tmp_path: Path) -> None:
    source = Source("toy", (("0.tar", 10),), SHARD_ROWS)
    source.put(tmp_path / "root/toy")
    data = ShardIndex.encode(source.fingerprint, 0, [], None)
    LocalStore(tmp_path / "root/toy").put_if_absent("index/00000.jsonl", data)
    spec = moments_spec(1, source=source.fingerprint)
    path = tmp_path / "root/toy/vae"
    digest = create_column(path, spec)
    with ShardWriter(path, spec, digest, 0, 0, sha256(data)) as writer:
        writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    assert verify(path) == []
    copy(path, tmp_path / "else/toy/vae", with_source=True)
    assert files_of(tmp_path / "else") == files_of(tmp_path / "root")
    (tmp_path / "root/toy/index/00000.jsonl").write_bytes(data + b"\n")
    faults = verify(path)
    assert [(f.kind, f.shard) for f in faults] == [("index", 0)]
    with pytest.raises(CorruptColumn, match="index/00000.jsonl"):
        copy(path, tmp_path / "third/toy/vae", with_source=True)
    (tmp_path / "root/toy/source.json").write_bytes(canonical_json({}))
    assert [f.kind for f in verify(path)] == ["source"]


def test_records_that_are_wrong_are_not_copied(tmp_path: Path) -> None:
    source = write_column(tmp_path / "a", moments_spec())
    digest = Column.open(source).snapshot.digest
    for number, (name, change) in enumerate(
        {
            f"complete/{digest}.valid": lambda data: bytes(len(data)),
            f"complete/{digest}.json": lambda data: data[:50],
            "moments/zarr.json": lambda data: data[:20],
            "commits/00001.json": lambda data: None,  # the COMPLETE record is then wrong
            "failures/00001.json": lambda data: b"{}",
        }.items()
    ):
        path = shutil.copytree(source, tmp_path / f"c{number}")
        sound = (path / name).read_bytes() if (path / name).exists() else b""
        (path / name).unlink(missing_ok=True)
        if (data := change(sound)) is not None:
            LocalStore(path).replace(name, data)
        defects = name if data is not None else f"complete/{digest}.json: it names shard 1"
        with pytest.raises(CorruptColumn, match=defects):
            copy(path, tmp_path / "b")
        assert not (tmp_path / "b").exists()


def test_a_copy_knows_a_shard_that_was_made_again(tmp_path: Path) -> None:
    """By the same content in the same objects; host and time of the commit may differ."""
    spec, path = moments_spec(1), tmp_path / "a"
    write_column(path, spec, (70,))
    copy(path, tmp_path / "b")
    before = files_of(tmp_path / "b")
    (path / "commits/00000.json").unlink()
    with ShardWriter(path, spec, Column.open(path).digest, 0, 70, "index 0") as writer:
        ids = row_ids(0, (70,))
        writer.put_block(moments_of(ids), image_status(ids))
        writer.commit({"host": "another"})
    assert files_of(path) != before
    copy(path, tmp_path / "b")
    assert files_of(tmp_path / "b") == before
    assert verify(tmp_path / "b") == []


# Stage --------------------------------------------------------------------------------------------


def test_of_ranks_that_start_at_once_one_copies(toy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nvme"
    code = (
        "import sys; from pathlib import Path; from shards.tools.copy import stage\n"
        "from shards.store.local import LocalStore; made, old = [], LocalStore.staged\n"
        "LocalStore.staged = lambda self, name: (made.append(name), old(self, name))[1]\n"
        "print(*stage(sys.argv[2:], Path(sys.argv[1]))); print(len(made))"
    )
    words = [sys.executable, "-c", code, str(folder), str(toy / "vae"), str(toy / "text")]
    ranks = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [rank.communicate(timeout=240)[0].splitlines() for rank in ranks]
    places = [folder / toy.name / name for name in ("vae", "text")]
    assert [output[0] for output in outputs] == [" ".join(map(str, places))] * 4
    counts = sorted(int(output[1]) for output in outputs)
    assert counts[:3] == [0, 0, 0]
    assert counts[3] > 10
    for place, name in zip(places, ("vae", "text"), strict=True):
        assert files_of(place) == files_of(toy / name)


def test_without_room_nothing_is_written(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(NoRoom, match="and 10,000 are free") as caught:
        stage([toy / "vae", toy / "text"], tmp_path / "nvme")
    assert caught.value.exit_code == 2
    assert list(files_of(tmp_path / "nvme")) == [".stage-lock"]


def test_two_columns_of_one_name_are_refused(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "vae", tmp_path / "x" / toy.name / "vae")
    with pytest.raises(IdentityMismatch, match="same name"):
        stage([toy / "vae", tmp_path / "x" / toy.name / "vae"], tmp_path / "nvme")
