"""Pictures and captions of a source are those that its columns were made of, or an error."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from eval.errors import MissingPictures
from eval.images.originals import Originals
from shards import Column
from tests.encode.golden import ARCHIVE


def test_tars_that_changed_since_the_column_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    tars, vae = tmp_path / "tars", Column.open(tmp_path / "cache/toy/vae")
    how, text = vae.identity.picture, "txt"
    originals = Originals(vae, tars)
    whole, crop = (tars / "0.tar").read_bytes(), originals.crop(0, how)
    assert originals.caption(0, text) == "words 0 of 0"

    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real(fd, -(-size // 2), at))
    assert originals.caption(0, text) == "words 0 of 0"
    assert (originals.crop(0, how) == crop).all()
    with (tars / "0.tar").open("r+b") as file:  # in place: the open file sees it
        file.seek(whole.index(b"words 0 of 0"))
        file.write(b"lines")
    with pytest.raises(MissingPictures, match="txt of 00 is not what the source was made of"):
        originals.caption(0, text)
    os.truncate(tars / "0.tar", 600)
    with pytest.raises(MissingPictures, match="jpg of 00 is not what the source was made of"):
        originals.crop(0, how)
    with pytest.raises(MissingPictures, match="found 600 bytes"):
        Originals(vae, tars).crop(0, how)
