"""Columns of an earlier release, whole and half encoded, open, go on and join new ones; see `golden`."""

import json
import tarfile
from pathlib import Path

import pytest

from encode.config import EncodeConfig
from encode.run.job import run
from shards import Column, open_join
from shards.tools.verify import examine, logical_digest
from tests.encode.golden import ARCHIVE, COLUMNS, HALF, TEXT, VAE, config_of


@pytest.fixture
def columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the columns, in the unpacked archive, which is the current folder."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache/toy"


def test_whole_columns_open_and_half_ones_go_on(columns: Path) -> None:
    digests = json.loads(Path("digests.json").read_text())
    assert digests.keys() == COLUMNS.keys()
    for name in COLUMNS.keys() - set(HALF):
        assert logical_digest(columns / name) == digests[name]
    assert all(Column.open(columns / name, partial=True).snapshot.rows == (3, 0) for name in HALF)
    before = {path: path.read_bytes() for path in columns.glob("*/commits/*")}
    assert run(EncodeConfig.model_validate(config_of(COLUMNS))) == 0
    assert {name: logical_digest(columns / name) for name in COLUMNS} == digests
    assert all(path.read_bytes() == data for path, data in before.items())
    assert not [fault for name in COLUMNS for fault in examine(columns / name).faults]


def test_new_columns_join_old_ones(columns: Path) -> None:
    new = {
        "new-text": {"kind": "tokens", "encoder": TEXT, "max_tokens": 8},
        "new-vae": {"kind": "moments", "encoder": VAE, "resolution": 32},
        "new-other": {"kind": "ids", "encoder": TEXT, "max_tokens": 8, "caption": "caption"},
    }
    assert run(EncodeConfig.model_validate(config_of(new))) == 0
    for latents, text in (("vae", "new-text"), ("new-vae", "text")):
        assert open_join(columns / latents, columns / text).valid_rows.tolist() == [
            0,
            2,
            1024,
            1025,
        ]
    assert (
        len(open_join(columns / "vae", columns / "new-other", [columns / "other"]).valid_rows) == 5
    )
