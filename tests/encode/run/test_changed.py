"""Tars that change under an encode or between two, and columns of which a part is lost."""

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from encode.config import EncodeConfig
from encode.errors import BadTar, EncodeError, TarChanged
from encode.models import load_encoders
from encode.plan.sample_source import SourceJob
from encode.report.status import run_status, status
from encode.run import job
from encode.run import remote_decode as remote
from encode.run.encode_shard import encode_shard
from encode.run.prepare import claim_columns, columns_of
from encode.run.resources import WorkerResources
from encode.run.supervisor import is_final
from encode.source.decoding import Batch, View, load
from encode.source.members import read_captions
from encode.source.tars import read_exactly, scan_tar
from encode.tasks import ShardTask
from shards import (
    Column,
    IndexRow,
    Source,
    SourceChanged,
    SourceMismatch,
    open_join,
    open_store,
    put_index,
)
from shards.__main__ import main as shards_main
from shards.column.commits import read_commit
from shards.column.members import ABSENT, CAPTION_BYTES, UNREAD, member_of, members_digest
from shards.column.source import ShardIndex
from shards.store.object_store import RemoteStore
from shards.tools.convert import convert
from shards.tools.diff import diff, lines_of
from shards.tools.repair import repair
from shards.tools.verify import logical_digest, verify
from tests.encode import faults, light
from tests.encode.report.test_status import words_of
from tests.encode.toy import files_of, picture, sample, tar_bytes, write_source
from tests.encode.web import serving

Columns = dict[str, dict[str, Any]]


def bmp(number: int) -> bytes:
    """A picture whose file has the same size as any other one's."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "BMP")
    return buffer.getvalue()


def write_tar(path: Path, **orders: Sequence[int]) -> None:
    """Rows whose members are those of these numbers, by suffix; of one suffix all have one size."""
    words = [b"cat", b"dog", b"cow", b"hen"]
    members = []
    for row in range(3):
        for suffix, numbers in orders.items():
            data = bmp(numbers[row]) if suffix == "jpg" else words[numbers[row]]
            data = b'{"words": "%s"}' % data if suffix == "json" else data
            members.append((f"{row}.{suffix.replace('_', '.')}", data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


@pytest.fixture
def encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Encode columns of `tars/0.tar` and `tars/1.tar` into a root; each model is loaded once."""
    monkeypatch.setattr("encode.run.job.load_encoders", loaded)

    def run(columns: Columns, root: Any = None, **options: Any) -> int:
        return job.run(config_of(tmp_path, columns, root), job.Options(**options))

    return run


_encoders: dict[str, dict[str, Any]] = {}


def loaded(columns: Any, engine: Any) -> dict[str, Any]:
    key = repr((columns, engine))
    if key not in _encoders:
        _encoders[key] = load_encoders(columns, engine)
    return dict(_encoders[key])


def config_of(folder: Path, columns: Columns, root: Any = None) -> EncodeConfig:
    return EncodeConfig.model_validate({
        "root": str(root or folder / "cache"), "sources": {"s": f"{folder}/tars/{{0..1}}.tar"},
        "columns": columns, "shard_rows": 1024,
        "engine": {"executor": "inline", "batch": 2, "device": "cpu"},
    })  # fmt: skip


@pytest.fixture
def kinds(models: Path) -> dict[str, dict[str, Any]]:
    text = {"class": "GemmaModel", "path": str(models / "gemma")}
    vae = {"class": "AutoencoderKL", "path": str(models / "kl")}
    return {
        "ids": {"kind": "ids", "encoder": text, "max_tokens": 24},
        "tokens": {"kind": "tokens", "encoder": text, "max_tokens": 24},
        "moments": {"kind": "moments", "encoder": vae, "resolution": 32},
    }


# Between two columns ------------------------------------------------------------------------------

READS = [
    ("ids", {"caption": "caption"}), ("tokens", {"caption": "short.caption"}), ("ids", {"caption": "json:words"}),
    ("moments", {"image": "jpg"}), ("moments", {"image": "jpg", "backend": "webdataset"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "reads"), READS)
def test_members_that_were_exchanged_between_two_columns(
    tmp_path: Path, encode: Any, kinds: Any, kind: str, reads: dict[str, str]
) -> None:
    """Refused, without a trace that a later attempt would adopt."""
    suffix = member_of(reads.get("caption") or reads["image"]).replace(".", "_")
    orders = {"jpg": [0, 1, 2], suffix: [0, 1, 2]}
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", **orders)
    first, later = {"first": kinds[kind] | reads}, {"later": kinds[kind] | reads}
    assert encode(first) == 0
    assert encode(later, tmp_path / "right") == 0
    write_tar(tmp_path / "tars/1.tar", **orders | {suffix: [1, 2, 0]})
    assert encode(later) == 3
    column = tmp_path / "cache/s/later"
    reason = json.loads((column / "failures/00001.json").read_bytes())["reason"]
    assert reason.startswith("SourceChanged")
    assert "first/commits/00001.json" in reason
    assert Column.open(column, partial=True).snapshot.rows == (3, 0)
    write_tar(tmp_path / "tars/1.tar", **orders)
    assert encode(later, retry=True) == 0
    assert logical_digest(column) == logical_digest(tmp_path / "right/s/later")
    assert verify(column) == []


@pytest.mark.parametrize(("kind", "reads"), READS[:4])
def test_columns_of_other_members_are_told_apart(
    tmp_path: Path, encode: Any, kinds: Any, kind: str, reads: dict[str, str],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the join, `diff` and `verify --source`; columns of the same ones are not."""

    def shards(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["shards", *map(str, words)])
        capsys.readouterr()
        return shards_main(), capsys.readouterr().out

    suffix = member_of(reads.get("caption") or reads["image"]).replace(".", "_")
    orders = {"jpg": [0, 1, 2], "txt": [0, 1, 2], suffix: [0, 1, 2]}
    tars = tmp_path / "tars"
    for shard in range(2):
        write_tar(tars / f"{shard}.tar", **orders)
    fixed = {"vae": kinds["moments"] | {"image": "jpg"}, "text": kinds["ids"] | {"caption": "txt"}}
    named = {"a": kinds[kind] | reads}
    assert encode(named | fixed) == 0
    assert encode(named, tmp_path / "again") == 0
    write_tar(tars / "1.tar", **orders | {suffix: [1, 2, 0]})
    assert encode(named, tmp_path / "other") == 0
    vae, text, a, again, other = (
        tmp_path / name for name in ("cache/s/vae", "cache/s/text", "cache/s/a", "again/s/a", "other/s/a")
    )  # fmt: skip

    open_join(vae, text, [a, again]).close()
    for also in ([a, other], [other, a]):
        with pytest.raises(SourceMismatch, match=r"shards \[1\] .* made of other"):
            open_join(vae, text, also)
    assert not diff(a, again)
    difference = diff(a, other)
    assert difference.members == [1]
    assert "made of other captions or pictures" in "\n".join(lines_of(difference, "a", "other"))
    code, printed = shards("verify", other, "--source", tmp_path, "--source", tars)
    assert code == 0
    assert "2 of 2 shards compared with the tars\n" in printed  # there are no others
    code, printed = shards("verify", a, "--source", tars)
    assert code == 1
    assert "shard 1 was made of other" in printed
    assert "the tars do not match 1 shard." in printed
    assert "DAMAGED" not in printed  # `repair` would find nothing
    os.truncate(tars / "0.tar", 512)
    code, printed = shards("verify", other, "--source", tars, "--json")
    assert code == 1
    assert "found 512 bytes" in json.loads(printed)["message"]
    (tars / "0.tar").unlink()
    code, printed = shards("verify", a, "--source", tars)
    assert code == 1
    assert "0.tar: found no such file" in printed
    assert "1 of 2 shards compared with the tars; of 1 the tar is missing\n" in printed
    assert "the tars do not match 1 shard." in printed  # the other, whose tar is there
    assert "1 tar of its source not found. Name a further folder with --source" in printed
    assert "DAMAGED" not in printed
    code, printed = shards("verify", other, "--source", tmp_path, "--json")
    assert code == 1
    assert [json.loads(line)["kind"] for line in printed.splitlines()] == ["tar", "tar"]


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("ids", {"caption": "md"}),
        ("tokens", {"caption": "md"}),
        ("tokens", {"caption": "md", "element": "int8"}),
        ("moments", {"image": "jpg"}),
        ("moments", {"image": "jpg", "backend": "webdataset"}),
    ],
)
def test_values_that_a_killed_attempt_made_of_other_members(
    tmp_path: Path, encode: Any, kinds: Any, kind: str, reads: dict[str, str], capsys: Any
) -> None:
    """They are not adopted; those of the same members are."""
    orders = {"jpg": [0, 1, 2], "md": [0, 1, 2]}
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", **orders)
    assert encode({"a": kinds[kind] | reads}) == 0
    column = tmp_path / "cache/s/a"
    shutil.rmtree(column / "complete")  # as killed before it committed shard 0
    for path in [column / "commits/00000.json", *column.glob("[!ze]*/c/0")]:
        if path.is_file() and kind not in path.parts:
            path.unlink()
    killed = files_of(column)
    write_tar(tmp_path / "tars/0.tar", **orders | {"jpg": [1, 2, 0], "md": [1, 2, 0]})
    assert encode({"a": kinds[kind] | reads}) == 3
    assert "by an attempt that was cut off" in " ".join(capsys.readouterr().out.split())
    assert not (column / "commits/00000.json").exists()
    write_tar(tmp_path / "tars/0.tar", **orders)
    assert encode({"a": kinds[kind] | reads}, retry=True) == 0
    assert killed.items() <= files_of(column).items()


def plain_digest(data: bytes, rows: Sequence[IndexRow], captions: bool) -> str:
    """Of the members `x` of a tar, one by one."""
    parts = []
    for row in rows:
        if "x" not in row.members:
            parts.append(ABSENT)
            continue
        offset, size = row.members["x"]
        member = data[offset : offset + size]
        parts.append(
            UNREAD if captions and size > CAPTION_BYTES else hashlib.sha256(member).digest()
        )
    return hashlib.sha256(b"".join(parts)).hexdigest()


@given(
    sizes=st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=20),
    gaps=st.lists(st.integers(0, 30), min_size=20, max_size=20),
    captions=st.booleans(),
    bounds=st.tuples(st.integers(1, 64), st.integers(0, 20), st.integers(0, 40)),
    shuffled=st.randoms(),
)
def test_members_that_are_read_together_have_the_same_digest(
    sizes: list[int | None], gaps: list[int], captions: bool, bounds: tuple[int, int, int],
    shuffled: random.Random,
) -> None:  # fmt: skip
    data, rows = b"", []
    for size, gap in zip(sizes, gaps, strict=False):
        data += random.Random(len(data)).randbytes(gap)
        rows.append(IndexRow("k", {} if size is None else {"x": (len(data), size)}, {}))
        data += random.Random(len(data)).randbytes(size or 0)
    shuffled.shuffle(rows)  # in our tars they are in order
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        (Path(name) / "a.tar").write_bytes(data)
        for key, value in zip(("AT_ONCE", "GAP", "CAPTION_BYTES"), bounds, strict=True):
            patch.setattr(f"shards.column.members.{key}", value)
        patch.setattr(f"{__name__}.CAPTION_BYTES", bounds[2])
        store = open_store(name)
        tar = store.open("a.tar")
        digest = members_digest(store, tar, "a.tar", rows, "x", captions)
        store.close(tar)
        assert digest == plain_digest(data, rows, captions)


def test_a_tar_elsewhere_is_compared_in_large_reads() -> None:
    data = tar_bytes(member for number in range(50) for member in sample(number))
    with tempfile.NamedTemporaryFile() as file, serving() as web:
        file.write(data)
        file.flush()
        rows, _ = scan_tar(Path(file.name), 1024)
        web.files["/a.tar"] = data
        store = open_store(web.url)
        tar = store.open("a.tar", cached=False)
        members_digest(store, tar, "a.tar", rows, "jpg", False)
        store.close(tar)
        assert web.gets("a.tar") == 1


def test_captions_that_differ_in_spaces_alone(tmp_path: Path, encode: Any, kinds: Any) -> None:
    """The same tokens of other captions: `diff` says so, though the content is the same."""
    ids = {"a": kinds["ids"] | {"caption": "md"}}
    for root, text in (("one", b"cat "), ("two", b" cat")):
        for shard in range(2):
            path = tmp_path / f"tars/{shard}.tar"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tar_bytes([("0.jpg", bmp(0)), ("0.md", text)]))
        assert encode(ids, tmp_path / root) == 0
    a, b = tmp_path / "one/s/a", tmp_path / "two/s/a"
    assert logical_digest(a) == logical_digest(b)
    assert diff(a, b).members == [0, 1]


def test_columns_keep_what_they_were_made_of(tmp_path: Path, encode: Any, kinds: Any) -> None:
    """Through `convert`; a digest is of the members alone, whichever encoder read them."""
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", jpg=[0, 1, 2], txt=[0, 1, 2])
    columns = {name: kinds[name] for name in kinds} | {
        "large": kinds["moments"] | {"resolution": 48}
    }
    assert encode(columns) == 0
    cache = tmp_path / "cache/s"
    digests = {name: dict(read_commit(cache / name, 1).members) for name in columns}
    rows = [hashlib.sha256(bmp(n)).digest() for n in range(3)]
    assert digests["moments"] == {"jpg": hashlib.sha256(b"".join(rows)).hexdigest()}
    assert digests["large"] == digests["moments"]
    assert digests["ids"] == digests["tokens"]
    convert(cache / "moments", tmp_path / "tarred", "webdataset")
    assert read_commit(tmp_path / "tarred", 1).members == digests["moments"]


# While it is read ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthened(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(10_240))


def written_again(path: Path) -> None:
    """Other bytes of the same size, in place."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:512])
        file.write(bytes(len(data) - 1024))


Change = Callable[[Path], None]


@pytest.mark.parametrize("change", [cut, lengthened, written_again])
@pytest.mark.parametrize("moment", [0, 5, 60])
def test_a_tar_that_changes_while_it_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, moment: int
) -> None:
    """An error of the shard that leaves nothing behind; the whole tar then gives the right column."""
    monkeypatch.setattr("encode.run.job.load_encoders", light.load_encoders)
    light.write_source(tmp_path / "tars", 1, 1100)
    tar = tmp_path / "tars/0.tar"
    whole = tar.read_bytes()
    settings = faults.config_of(tmp_path, tmp_path / "cache", executor="inline", batch=16)
    vae = settings.columns["vae"].model_copy(update={"encoder": "0"})  # in no time
    settings = settings.model_copy(
        update={"sources": {"toy": str(tar)}, "shard_rows": 2048, "columns": {"vae": vae}}
    )

    def prepared(root: Path) -> tuple[ShardTask, dict[str, Any]]:
        config = settings.model_copy(update={"root": str(root)})
        plan = light.prepared(config)
        claim_columns(plan, False)
        return plan.tasks[0], light.load_encoders(config.columns, config.engine)

    task, encoders = prepared(tmp_path / "right")
    encode_shard(task, encoders, settings.engine, WorkerResources(1))
    expected = read_commit(tmp_path / "right/toy/vae", 0).content
    task, encoders = prepared(tmp_path / "cache")
    real, calls = encoders["vae"].rows, iter(range(1_000))

    def encode(images: Any) -> Any:
        if next(calls) == moment:
            change(tar)
        return real(images)

    monkeypatch.setattr(encoders["vae"], "rows", encode)
    with pytest.raises(BadTar):
        encode_shard(task, encoders, settings.engine, WorkerResources(1))
    column = tmp_path / "cache/toy/vae"
    assert not [path for path in column.rglob("c/**/*") if path.is_file()]
    with pytest.raises((BadTar, SourceChanged)):  # of another size, or other captions
        encode_shard(task, encoders, settings.engine, WorkerResources(1))
    tar.write_bytes(whole)
    encode_shard(task, encoders, settings.engine, WorkerResources(1))
    assert read_commit(column, 0).content == expected


def test_a_changed_tar_is_tried_again_and_a_wrong_one_is_not() -> None:
    assert not is_final(TarChanged("it was written to while it was read"))
    assert is_final(BadTar("found 5 bytes, the source was made of 6"))


@pytest.mark.parametrize("change", [cut, lengthened, written_again])
def test_a_tar_that_changes_while_another_node_decodes(tmp_path: Path, change: Change) -> None:
    tar = Path(write_source(tmp_path, 1, 40).replace("{0..0}", "0"))
    rows, note = scan_tar(tar, 1024)
    index = ShardIndex.decode(ShardIndex.encode("f", 0, rows, note), "index")
    store: Any = None
    task = ShardTask("toy", "f", store, str(tar), tar.stat().st_size, 0, 1024, {})
    config = faults.config_of(tmp_path, tmp_path, batch=8).engine
    batches = remote.decode_batches(task, index.digest, [View(16, "jpg")], config)
    next(batches)
    change(tar)
    with pytest.raises(BadTar):
        list(batches)
    with pytest.raises((BadTar, EncodeError)):
        list(remote.decode_batches(task, index.digest, [View(16, "jpg")], config))


def test_a_plan_passes_over_a_tar_that_changed(tmp_path: Path) -> None:
    tar = tmp_path / "0.tar"
    tar.write_bytes(tar_bytes(sample(1)))
    rows, note = scan_tar(tar, 1024)
    put_index(tmp_path, "f" * 64, 0, rows, note)
    source = Source("toy", (("0.tar", tar.stat().st_size),), 1024)
    job = SourceJob(source, [str(tar)], open_store(tmp_path), tmp_path)
    assert job.sample(0, {"txt"}, {"jpg"}).captions["txt"][0]
    tar.write_bytes(tar.read_bytes().replace(b"number 1", b"number 9"))
    with pytest.raises(TarChanged, match="txt of '0001'"):
        job.sample(0, {"txt"}, {"jpg"})
    cut(tar)
    with pytest.raises(BadTar, match="the source was made of"):
        job.sample(0, {"txt"}, {"jpg"})


# Reads --------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400), st.randoms())
def test_a_read_gives_what_was_asked_or_an_error(
    data: bytes, offset: int, size: int, chance: random.Random
) -> None:
    """Whatever part of it one call brings, as file systems of networks and FUSE do."""
    real = os.pread
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        patch.setattr(os, "pread", lambda fd, n, at: real(fd, chance.randint(min(n, 1), n), at))
        if offset + size <= len(data) or not size:
            assert read_exactly(file.fileno(), size, offset) == data[offset : offset + size]
        else:
            with pytest.raises(TarChanged, match=f"ends at byte {len(data)}"):
                read_exactly(file.fileno(), size, offset)


def test_short_reads_change_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither index, nor captions, nor pictures."""
    tar = Path(write_source(tmp_path, 1, 5).replace("{0..0}", "0"))
    rows, _ = scan_tar(tar, 1024)
    real = os.pread
    with tar.open("rb") as file:
        captions = read_captions(rows, file.fileno(), "txt")[0]
        batch, short = (Batch.empty((0, 5), [View(16, "jpg")]) for _ in range(2))
        load(rows, file.fileno(), batch, 0, 5)
        monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, -(-n // 2), at))
        assert scan_tar(tar, 1024)[0] == rows
        assert read_captions(rows, file.fileno(), "txt")[0] == captions
        load(rows, file.fileno(), short, 0, 5)
        for view, images in batch.images.items():
            assert np.array_equal(short.images[view], images)
        assert not short.status["jpg"].any()
        os.truncate(tar, 2049)  # inside the first caption, after it was listed
        with pytest.raises(TarChanged, match="ends at byte 2049"):
            read_captions(rows, file.fileno(), "txt")
        with pytest.raises(TarChanged, match="ends at byte 2049"):
            load(rows, file.fileno(), short, 0, 5)


# Objects that are lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_column_that_was_copied_in_part_is_not_complete(
    tmp_path: Path, encode: Any, kinds: Any, backend: str, complete: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whichever object is missing or short: `run` and `status` name the column and what to do."""
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", jpg=[0, 1, 2], txt=[0, 1, 2])
    columns = {name: kinds[name] | {"backend": backend} for name in ("tokens", "moments")}
    assert encode(columns) == 0
    cache = tmp_path / "cache/s"
    digests = [logical_digest(cache / name) for name in columns]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(tmp_path, columns).model_dump(by_alias=True)))
    assert run_status(words_of(config)) == 0
    objects = sorted(
        path for path in cache.glob("*/*/**/*") if path.is_file() and "c" in path.parts
    )
    objects += sorted(cache.glob("*/tar/*.tar"))
    # a run writes a missing one again
    objects = [path for path in objects if not (complete and "empty" in path.parts)]
    assert {path.relative_to(cache).parts[1] for path in objects} >= {"lengths", "status", "crc"}
    for path in objects:
        column, data = cache / path.relative_to(cache).parts[0], path.read_bytes()
        records = {record: record.read_bytes() for record in column.glob("complete/*")}
        for record in () if complete else records:
            record.unlink()
        if complete:
            path.unlink()
        else:
            os.truncate(path, len(data) - 1)
        capsys.readouterr()
        assert encode(columns) == 3, path
        printed = " ".join(capsys.readouterr().out.split())
        assert f"NOT complete, DAMAGED: {column}: 1 of" in printed
        assert str(path.relative_to(column)) in printed
        assert "`python -m shards repair`" in printed
        assert complete or not list(column.glob("complete/*.json"))
        assert run_status(words_of(config)) == 3
        assert f"DAMAGED s/{column.name}: 1 of" in " ".join(capsys.readouterr().out.split())
        path.write_bytes(data)
        for record, content in records.items():
            record.write_bytes(content)
    metadata = [path.relative_to(cache / "moments") for path in cache.glob("moments/**/zarr.json")]
    assert len(metadata) >= 3
    for name in ("commits/00001.json", "complete/*.valid", "column.json", *map(str, metadata)):
        (path,) = cache.glob(f"moments/{name}")
        data = path.read_bytes()
        path.unlink()
        capsys.readouterr()
        assert run_status(words_of(config)) == 3
        assert "DAMAGED s/moments: " in capsys.readouterr().out
        assert encode(columns) == 0  # a run makes both again
        assert run_status(words_of(config)) == 0
        assert path.read_bytes() == data or name.startswith("commits/")
    victim = next(path for path in objects if path.parts[-1] != "0" or backend == "webdataset")
    victim.unlink()
    column = cache / victim.relative_to(cache).parts[0]
    assert encode(columns) == 3
    repair(column, yes=True)
    assert encode(columns) == 0
    assert [logical_digest(cache / name) for name in columns] == digests


def test_objects_of_a_store_are_listed(
    url: str, tmp_path: Path, encode: Any, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not asked for one by one, where there are many; columns beside are found there too."""
    for shard in range(2):
        write_tar(tmp_path / f"tars/{shard}.tar", jpg=[0, 1, 2], txt=[0, 1, 2])
    columns = {"ids": kinds["ids"], "moments": kinds["moments"]}
    assert encode(columns, url) == 0
    monkeypatch.setattr("shards.store.object_store.LISTED", 3)
    source = open_store(url).child("s")
    assert source.folders() == ["ids", "index", "moments"]
    fingerprint = Column.open(source.child("ids")).spec.identity["source"]
    peers = columns_of(source, fingerprint)
    assert {suffix: [t.store.name for t in some] for suffix, some in peers.items()} == {
        "jpg": ["moments"], "txt": ["ids"],
    }  # fmt: skip
    store = source.child("moments")
    looked: list[str] = []
    real = RemoteStore.size
    monkeypatch.setattr(RemoteStore, "size", lambda s, name: looked.append(name) or real(s, name))
    for name in ("moments/c/1/0/0/0", "crc/c/0"):
        looked.clear()
        store.delete(name)
        assert encode(columns, url) == 3
        assert not [name for name in looked if "/c/" in name and not name.startswith("empty/")]
        lost = status(config_of(tmp_path, columns, url))["columns"]["s/moments"]["lost"]
        assert name in lost
