"""Sources of a config that are no tars: packed once into the root, and encoded from there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import configs
from encode.config import EncodeConfig
from encode.errors import NotASource
from encode.pack import pack as packing
from encode.pack.kinds import Options, Rows
from encode.pack.pack import pack, source_lines
from encode.pack.sources import with_packed
from encode.plan.sample_source import open_job
from encode.run.job import run
from encode.source.tars import make_source
from shards import Column, Status
from tests.encode.pack.test_pack import CAPTION, COUNT, SOURCES, beside
from tests.encode.toy import write_config


def settings(folder: Path, models: Path, source: object, **more: object) -> EncodeConfig:
    """A config of one source and a column of moments and one of tokens."""
    path = write_config(folder / "config.yaml", folder / "cache", str(source), models)
    return configs.load(EncodeConfig, path, [f"{key}={value}" for key, value in more.items()])


def test_a_folder_of_pictures_is_packed_once(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = beside("txt", CAPTION)(tmp_path / "photos")
    config = settings(tmp_path, models, source)
    assert with_packed(config, make=False) == config
    assert not (tmp_path / "cache").exists()
    early = settings(tmp_path, models, source, root=tmp_path / "early")
    pack(source, tmp_path / "early/packed/toy")  # by hand, where run looks for it
    assert len(open_job(with_packed(early, make=False), "toy").source.tars) == 1
    assert run(config) == 0
    packed = tmp_path / "cache/packed/toy"
    text = " ".join(capsys.readouterr().out.split())
    assert f"source 'toy': {source} is packed into {packed}, 1 tar" in text
    column = Column.open(tmp_path / "cache/toy/text")
    assert column.status(np.arange(COUNT)).tolist() == [Status.OK] * COUNT
    # the same source as one that was packed by hand
    by_hand = settings(tmp_path, models, pack(source, tmp_path / "hand").tars[0])
    fingerprint = open_job(by_hand, "toy").source.fingerprint
    for make in (True, False):
        assert open_job(with_packed(config, make), "toy").source.fingerprint == fingerprint
    assert "already packed into" in " ".join(capsys.readouterr().out.split())
    other = settings(tmp_path, models, beside("txt", CAPTION)(tmp_path / "other"))
    with_packed(other, make=False)
    text = " ".join(capsys.readouterr().err.split())
    assert f"{packed} was packed from {source}. `python -m encode run" in text
    moved = shutil.move(source, tmp_path / "elsewhere")
    assert run(config) == 0  # its tars are all that is needed
    (Path(moved) / "a/000.txt").write_text("another caption")
    shutil.move(moved, source)
    capsys.readouterr()
    with_packed(config, make=False)
    text = " ".join(capsys.readouterr().err.split())
    assert f"{source} holds other files or dates than were packed into {packed}" in text
    with pytest.raises(
        NotASource, match="packed from something else .*name the tars as the source"
    ):
        run(config)
    assert run(settings(tmp_path, models, f"{packed}/*.tar")) == 0  # what the message advises


def test_a_root_with_braces_in_its_name(tmp_path: Path, models: Path) -> None:
    source = beside("txt", CAPTION)(tmp_path / "photos")
    config = settings(tmp_path, models, source, root=f'"{tmp_path}/{{a,b}}"')
    tars = open_job(with_packed(config, make=True), "toy").tars
    assert tars == [f"{tmp_path}/{{a,b}}/packed/toy/00000.tar"]
    assert open_job(with_packed(config, make=False), "toy").tars == tars
    lines = source_lines(pack(source, tmp_path / '{c,d} "e"', Options(rows=3)))
    (places,) = yaml.safe_load(lines)["sources"].values()
    assert len(make_source("s", places, 1024)[1]) == 3


def test_two_runs_look_at_what_is_packed_at_once(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, models, beside("txt", CAPTION)(tmp_path / "photos"))
    tars = with_packed(config, make=True).sources
    listed = packing.open_rows

    def meanwhile(*words: Any) -> Rows:
        monkeypatch.setattr(packing, "open_rows", listed)
        assert with_packed(config, make=True).sources == tars
        return listed(*words)

    monkeypatch.setattr(packing, "open_rows", meanwhile)
    assert with_packed(config, make=True).sources == tars
    assert sorted(p.name for p in (tmp_path / "cache/packed/toy").iterdir()) == [
        "00000.tar", "pack.json"
    ]  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_each_kind_of_source_is_walked_to_columns(
    name: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no word on kind, suffixes or names: a row of each picture, in every column."""
    source = SOURCES[name][1](tmp_path / "source")
    code = run(settings(tmp_path, models, source))
    assert code == 0, capsys.readouterr().out
    vae, text = (Column.open(tmp_path / f"cache/toy/{c}") for c in ("vae", "text"))
    rows = np.arange(COUNT)
    for column in (vae, text):
        assert column.status(rows).tolist() == [Status.OK] * COUNT
    assert vae.identity.picture.image == "jpg|jpeg|png"
    lengths = [len(CAPTION(i).encode()) + 1 for i in range(COUNT)]  # <bos>, and bytes
    assert text.lengths(rows).tolist() == [min(length, 24) for length in lengths]
    assert len(np.unique(vae.read(rows), axis=0)) == COUNT
    assert "WARNING" not in capsys.readouterr().out


def test_what_cannot_be_packed_for_you_is_refused(tmp_path: Path, models: Path) -> None:
    source = beside("txt", CAPTION)(tmp_path / "photos")
    (tmp_path / "0.tar").write_bytes(bytes(1024))
    config = settings(tmp_path, models, source)
    both = config.model_copy(update={"sources": {"toy": [str(tmp_path / "0.tar"), str(source)]}})
    with pytest.raises(NotASource, match="is no tar, and not all of the source"):
        with_packed(both, make=True)
    remote = config.model_copy(update={"root": "s3://bucket/cache"})
    with pytest.raises(NotASource, match=r"cannot be packed into s3://bucket/cache. Pack it into"):
        with_packed(remote, make=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotASource, match="no picture to pack"):
        with_packed(settings(tmp_path, models, tmp_path / "empty"), make=True)
    assert not (tmp_path / "cache").exists()
    tars = settings(tmp_path, models, tmp_path)  # a folder with tars is a source as it is
    assert with_packed(tars, make=True) == tars
