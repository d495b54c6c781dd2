"""`plan` of sources that `run` would pack first: what it says once they are packed, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from encode.pack.pack import pack
from tests.encode.pack.test_pack import COUNT, SOURCES, write
from tests.encode.plan.test_plan import options, planned, run_plan
from tests.encode.tiny_models import Models
from tests.encode.toy import jpeg, write_config

CAPTIONS = 2_300  # in three tars


def planned_and_packed(
    capsys: pytest.CaptureFixture[str], config: Path, source: Path, *words: object
) -> tuple[Any, Any]:
    """The plan of a source as it is, and that of the tars that are then packed from it."""
    before = planned(capsys, config, *words)
    assert not (config.parent / "cache").exists()
    pack(source, config.parent / "cache/packed/toy")
    capsys.readouterr()
    return before, planned(capsys, config, *words)


def without_tars(record: Any) -> Any:
    """A plan without what says of the tars that they do not exist yet."""
    changing = ("free_bytes", "missing_bytes", "needed_bytes", "sources")
    return {key: value for key, value in record.items() if key not in changing}


@pytest.mark.parametrize("name", SOURCES)
def test_each_kind_of_source_is_planned_as_it_will_be_packed(
    name: str, tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCES[name][1](tmp_path / "source")
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", str(source), models)
    before, after = planned_and_packed(capsys, config, source, "--seconds", 0)
    assert without_tars(before) == without_tars(after)
    (toy,), (packed,) = before["sources"], after["sources"]
    assert toy["rows"] == {"value": COUNT, "low": COUNT, "high": COUNT}
    assert (toy["tars"], toy["index_bytes"]) == (1, packed["index_bytes"])
    size = (tmp_path / "cache/packed/toy/00000.tar").stat().st_size
    assert toy["packing_bytes"] == size == before["missing_bytes"] - after["missing_bytes"]
    assert [column["samples"]["value"] for column in before["columns"]] == [COUNT] * 2


def test_some_of_many_pictures_are_looked_at(
    tmp_path: Path,
    models: Models,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, scratch = jpeg(0), tmp_path / "scratch"
    (tmp_path / "photos").mkdir()
    for i in range(CAPTIONS):
        (tmp_path / f"photos/{i}.jpg").write_bytes(data)
        (tmp_path / f"photos/{i}.txt").write_text(f"number {i} " + "cat" * (i % 7))
    config = write_config(
        tmp_path / "toy.yaml", tmp_path / "cache", str(tmp_path / "photos"), models
    )
    scratch.mkdir()
    words = (f"engine.scratch={scratch}", "--seconds", 0, "--shards-sampled", 2)
    before, after = planned_and_packed(capsys, config, tmp_path / "photos", *words)
    (toy,) = before["sources"]
    assert (toy["rows"]["value"], toy["tars"]) == (CAPTIONS, 3)  # exact, of the listing
    for new, old in zip(before["columns"], after["columns"], strict=True):
        assert new["bytes"]["value"] == pytest.approx(old["bytes"]["value"], rel=0.02)
    tars = sum(path.stat().st_size for path in (tmp_path / "cache/packed/toy").glob("*.tar"))
    assert toy["packing_bytes"] == pytest.approx(tars, rel=0.02)
    assert not list(scratch.iterdir())


def test_a_folder_is_planned_on_screen(
    tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoders are tried on its pictures; what is not packed is counted, and no object is written."""
    photos = tmp_path / "photos"
    for i in range(20):
        write(photos / f"{i}.jpg", jpeg(i))
        write(photos / f"{i}.txt", f"picture {i}")
    write(photos / "0.png", b"another picture of the key")
    write(photos / "lone.txt", "no picture")
    before = sorted(photos.iterdir())
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", str(photos), models)
    here = set(os.listdir(tmp_path))
    assert run_plan(options(config, "--seconds", 0.5)) == 0
    text, log = capsys.readouterr()
    text = " ".join(text.split())
    assert "toy: 20 rows in 1 tar" in text
    assert f"`run` packs {photos} into {tmp_path / 'cache/packed/toy'} first" in text
    assert "1 more picture of a key" in text
    assert "1 caption without a picture" in text
    assert text.count("samples/s on this device") == 2
    assert "looking into pictures" in log
    assert (sorted(photos.iterdir()), set(os.listdir(tmp_path))) == (before, here)


def test_an_interrupted_packing_is_not_counted_twice(
    tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SOURCES["text files"][1](tmp_path / "source")
    config = write_config(tmp_path / "toy.yaml", tmp_path / "cache", str(source), models)
    pack(source, tmp_path / "cache/packed/toy")
    (tmp_path / "cache/packed/toy/pack.json").unlink()  # as if it was stopped behind the last tar
    capsys.readouterr()
    record = planned(capsys, config, "--seconds", 0)
    assert record["sources"][0]["packing_bytes"] == 0
