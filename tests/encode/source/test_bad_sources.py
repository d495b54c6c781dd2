"""Everything that may be wrong with a source, encoded for real: one outcome each, in every column."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

import configs
from encode.config import EncodeConfig
from encode.run import job
from encode.source import images
from encode.source.tars import make_source
from shards import Status, read_commit, read_index
from shards.column.commits import commit_name, failure_name
from shards.format.layout import FAILURE, VERSION
from shards.store.open import open_store
from shards.tools.verify import verify
from tests.encode.corpus import END, SOURCES, TARS, SourceCase, page, row_cases
from tests.encode.toy import picture, write_config

DOCS = Path(__file__).parents[3] / "docs/bad-sources.md"
CASES = row_cases()


def test_there_are_enough() -> None:
    assert len(CASES) + len(TARS) + len(SOURCES) >= 45
    names = [case.name for case in [*CASES, *TARS, *SOURCES]]
    assert len(names) == len(set(names))


def test_the_page_is_current() -> None:
    assert DOCS.read_text() == page(), "run: python -m tests.encode.corpus > docs/bad-sources.md"


def run(tmp_path: Path, models: Path, tars: dict[str, bytes]) -> tuple[int, dict[str, Any]]:
    """Exit code and report of encoding these tars into two columns."""
    for name, data in tars.items():
        (tmp_path / name).write_bytes(data)
    places = [str(tmp_path / name) for name in tars]
    path = write_config(tmp_path / "bad.yaml", tmp_path / "cache", places, models)
    code = job.run(configs.load(EncodeConfig, path, ["allow_failed=true"]))
    return code, json.loads((tmp_path / "cache/report.json").read_bytes())


def statuses(column: Path, shard: int, rows: int) -> list[Status]:
    """As zarr-python alone reads them."""
    group: Any = zarr.open(str(column), mode="r")
    codes = group["status"][shard * 1024 : (shard + 1) * 1024]
    assert (codes[rows:] == 255).all()
    return [Status(int(value)) for value in codes[:rows]]


def test_each_has_its_outcome(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows in one tar, and each bad tar beside it."""
    tars = {"rows.tar": b"".join(case.data for case in CASES) + END}
    tars |= {f"{i:02d}.tar": tar.data for i, tar in enumerate(TARS)}
    code, report = run(tmp_path, models, tars)
    out = "".join(capsys.readouterr())
    assert code == 3  # finished, but some shards failed
    vae, text = tmp_path / "cache/toy/vae", tmp_path / "cache/toy/text"

    wanted = [(case, row) for case in CASES for row in case.rows]
    codes = [statuses(column, 0, len(wanted)) for column in (vae, text)]
    for (case, (image, caption)), *got in zip(wanted, *codes, strict=True):
        assert got == [image, caption], case.name

    for number, tar in enumerate(TARS, 1):
        for column in (vae, text):
            assert (open_store(column).size(commit_name(number)) is None) == bool(tar.error)
            if tar.error:
                reason = open_store(column).unseal(failure_name(number), FAILURE, VERSION)
                assert reason["reason"].startswith("BadTar: "), tar.name
                assert tar.error in reason["reason"], tar.name
        if not tar.error:
            index = read_index(tmp_path / "cache/toy", number)
            assert len(index.rows) == tar.rows, tar.name
            assert tar.note in (index.note or ""), tar.name
            assert bool(index.note) == bool(tar.note), tar.name
            assert not tar.note or re.search(rf"toy/{number:05d}: .*{re.escape(tar.note)}", out)

    # every row of the input is counted once in each column, under the same number
    rows = [len(wanted), *(tar.rows for tar in TARS if not tar.error)]
    sound = [0, *(i for i, tar in enumerate(TARS, 1) if not tar.error)]
    for column in (vae, text):
        counts = report[str(column.resolve())]["counts"]
        assert sum(counts.values()) == report[str(column.resolve())]["rows"] == sum(rows)
        commits = [read_commit(open_store(column), shard) for shard in sound]
        assert [commit.rows for commit in commits] == rows
        indexes = [read_index(tmp_path / "cache/toy", shard).digest for shard in sound]
        assert [commit.index for commit in commits] == indexes
        assert verify(column) == []
    expected = Counter(image.name.lower() for _, (image, _) in wanted)
    assert expected.keys() >= {"ok", "truncated", "image_undecodable", "image_missing"}
    vae_counts = report[str(vae.resolve())]["counts"]
    assert all(vae_counts[name] == expected[name] for name in ("truncated", "image_undecodable"))


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_sources_that_are_none(tmp_path: Path, case: SourceCase) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "a.tar").touch()
    (tmp_path / "b/a.tar").touch()
    with pytest.raises(case.error, match=re.escape(case.message)) as caught:
        make_source("s", [tar.format(tmp_path) for tar in case.tars], 1024)
    assert caught.type.exit_code == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "size", [(48, 40), (40, 48), (3000, 7), (7, 3000), (5000, 1), (33, 32), (1, 1), (9, 1000)]
)
def test_a_long_picture_is_cropped_before_it_is_resized(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crop is that of the picture resized as a whole, within one level of 255."""
    picture_ = picture(3, *size)
    whole = images.transform(picture_, 32).astype(int)
    monkeypatch.setattr(images, "LARGE", 0)
    assert np.abs(images.transform(picture_, 32) - whole).max() <= 1
    assert images.transform(Image.new("RGB", size, (9, 8, 7)), 512).shape == (512, 512, 3)
