"""Real columns, damaged in several ways, are repaired and encoded again to what they were."""

import shutil
import sys
from pathlib import Path

import pytest

import configs
from encode.__main__ import main
from encode.config import EncodeConfig
from encode.errors import EncodeError
from encode.run.job import Options, run
from encode.source.tars import scan_tar
from eval.errors import MissingPictures
from eval.images.originals import Originals
from shards import Column, IdentityMismatch, exits, open_source, put_index
from shards.tools.convert import convert
from shards.tools.repair import repair
from shards.tools.verify import check_source, examine, logical_digest, verify
from tests.encode.toy import files_of, write_config, write_source
from tests.forks import fork, wait


def encode(config: Path, output: Path) -> str:
    def work() -> None:
        sys.argv = ["encode", "run", str(config)]
        exits.run(main)

    assert wait(fork(work, output)) == 0, output.read_text()
    return output.read_text()


def test_repaired_and_encoded_again(tmp_path: Path, models: Path) -> None:
    tars = write_source(tmp_path / "tars", 3, 5)
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    encode(config, tmp_path / "output")
    columns = [tmp_path / "cache/toy" / name for name in ("vae", "text")]
    whole = [files_of(path) for path in columns]
    digests = [logical_digest(path) for path in columns]
    vae, text = columns
    changed = bytearray(whole[0]["moments/c/1/0/0/0"])
    changed[1000] ^= 1
    (vae / "moments/c/1/0/0/0").write_bytes(changed)
    (vae / "commits/00002.json").write_bytes(whole[0]["commits/00002.json"][:-9])
    (text / "lengths/c/0").unlink()
    (text / "empty/c/0/0").write_bytes(b"")
    (tmp_path / "cache/toy/index/00001.jsonl").write_bytes(b"{}\n")
    assert [f.shard for f in verify(vae) if f.kind in ("rows", "commit", "index")] == [2, 1, 1]
    for path in columns:
        record, plan = repair(path, yes=True)
        assert [line for line in plan.beyond if "00001.jsonl" in line]
    (tmp_path / "cache/toy/index/00001.jsonl").unlink()  # as it says
    assert [examine(path).column.missing for path in columns] == [[1, 2], [0]]
    printed = encode(config, tmp_path / "output")
    assert "complete, 15 rows" in printed
    for path, before, digest in zip(columns, whole, digests, strict=True):
        assert verify(path) == []
        assert logical_digest(path) == digest
        after = files_of(path)
        same = [name for name in before if not name.startswith("commits/")]
        assert all(after[name] == before[name] for name in same)


def test_an_index_that_was_deleted_is_written_again(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_source(tmp_path / "tars", 2, 5)
    path = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    config = configs.load(EncodeConfig, path)
    assert run(config) == 0
    source = tmp_path / "cache/toy"
    whole = files_of(source)
    indexes = [source / "index/00000.jsonl", source / "index/00001.jsonl"]
    for index in indexes:
        index.unlink()
    assert run(config) == 0
    assert "complete, 10 rows: 10 ok" in capsys.readouterr().out
    assert files_of(source) == whole
    for index in indexes:
        index.unlink()
    tar = tmp_path / "tars/1.tar"
    tar.write_bytes(tar.read_bytes().replace(b"of a toy source", b"of another one."))
    with pytest.raises(EncodeError, match="the source index says nothing of it"):
        run(config)
    assert "00001.jsonl: the index is lost, and" in " ".join(capsys.readouterr().err.split())
    assert files_of(source) == {n: d for n, d in whole.items() if n != "index/00001.jsonl"}


def test_a_tar_that_failed_is_fetched_again_with_another_size(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = write_source(tmp_path / "tars", 2, 5)
    first, second = (tmp_path / f"tars/{i}.tar" for i in range(2))
    sound = second.read_bytes()
    second.write_bytes(b"<html>Too many requests</html>")
    path = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    config = configs.load(EncodeConfig, path)
    assert run(config) == 3
    first.write_bytes(first.read_bytes() + bytes(512))
    with pytest.raises(IdentityMismatch):  # of this one there are columns
        run(config, Options(retry=True))
    first.write_bytes(first.read_bytes()[:-512])
    second.write_bytes(sound)
    folder, rows = tmp_path / "cache/toy", scan_tar(second, 1024)[0]
    put_index(folder, open_source(folder).fingerprint, 1, rows[:3], "cut off")  # as it was copied
    assert run(config, Options(retry=True)) == 0
    assert "complete, 10 rows: 10 ok" in capsys.readouterr().out
    assert run(config) == 0
    vae, text = (tmp_path / "cache/toy" / name for name in ("vae", "text"))
    digest = logical_digest(vae)
    shutil.rmtree(vae)
    assert run(config) == 0
    assert logical_digest(vae) == digest
    converted = convert(vae, vae.with_name("smaller"), codec="blosc").path
    assert run(config) == 0
    for column in (vae, text, converted):
        examination = examine(column)
        assert check_source(examination, [tmp_path / "tars"]) == 2
        assert examination.faults == []
    for damage in (lambda file: file.write_bytes(b"{}"), Path.unlink):
        damage(text / "commits/00001.json")
        repair(text, yes=True)
        assert run(config) == 0  # makes it again, though it had failed once
        assert verify(text) == []
    originals = Originals(Column.open(vae), tmp_path / "tars")
    assert originals.caption(1024, "txt") == "picture number 100 of a toy source"
    second.write_bytes(sound + bytes(512))
    with pytest.raises(IdentityMismatch):
        run(config)
    with pytest.raises(MissingPictures, match=f"expected one of {len(sound):,} bytes"):
        Originals(Column.open(vae), tmp_path / "tars").check_tar(1)


@pytest.mark.parametrize("left_out", ["sources.toy", "columns.vae"])
def test_a_config_of_nothing_is_refused(left_out: str, tmp_path: Path, models: Path) -> None:
    tars = write_source(tmp_path / "tars", 1, 1)
    path = write_config(tmp_path / "toy.yaml", tmp_path / "cache", tars, models)
    words = [f"{left_out}=null", "columns.text=null"]
    with pytest.raises(EncodeError, match="found . sources? and . columns? in the config"):
        run(configs.load(EncodeConfig, path, words))
