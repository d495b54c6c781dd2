"""`python -m eval probe`: its table, its JSON and its page; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval import commands
from eval.errors import BadRequest
from eval.probe import as_text, probe
from eval.report.panel import FIGURES, page
from shards import (
    ColumnSpec,
    IdentityMismatch,
    Layout,
    Norm,
    ShardWriter,
    SourceMismatch,
    create_column,
    put_complete,
    put_empty,
)
from shards.errors import BadStatistics
from tests.eval.browser import BROWSER, Page, in_browser

ROWS = 96
SHAPE = (3, 4, 4)


def write(path: Path, kind: str, rows: list[np.ndarray] | np.ndarray, source: str = "s") -> Path:
    """A column of one shard."""
    ragged = kind in ("tokens", "ids")
    shape = {"tokens": (4, 5), "ids": (4,)}.get(kind) or np.shape(rows)[1:]
    norm = None if ragged or kind == "features" else Norm((0.0,), (1.0,))
    spec = ColumnSpec(
        {"kind": kind, "source": source, "encoder": {"weights": path.name}},
        Layout(kind, shape, 1, 1024), norm, **({"empty_tokens": 1} if ragged else {}),
    )  # fmt: skip
    digest = create_column(path, spec)
    if ragged:
        put_empty(path, spec, rows[0][:1])
    writer = ShardWriter(path, spec, digest, 0, len(rows), "index")
    writer.put_block(
        rows if ragged else np.asarray(rows, np.float16), np.zeros(len(rows), np.uint8)
    )
    writer.commit({})
    put_complete(path, digest, 1, allow_failed=False)
    return path


def latents(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, *SHAPE)).cumsum(2)


@pytest.fixture
def columns(tmp_path: Path) -> list[str]:
    """Two latent columns, of which the second has a posterior, and their text."""
    chance = np.random.default_rng(9)
    moments = np.concatenate([latents(2), chance.standard_normal((ROWS, *SHAPE)) - 3], 1)
    words = [chance.integers(0x3F00, 0x4000, (i % 4 + 1, 5)).astype(np.uint16) for i in range(ROWS)]
    return [
        str(write(tmp_path / "first", "latents", latents(1))),
        str(write(tmp_path / "second", "moments", moments)),
        str(write(tmp_path / "text", "tokens", words)),
    ]


def test_a_page_a_table_and_a_record(
    columns: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *latent, text = columns
    words = [
        "probe",
        *latent,
        "--text",
        text,
        "--json",
        f"{tmp_path}/p.json",
        "--out",
        f"{tmp_path}/p.html",
    ]
    assert commands.main(words) is None
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "p.json").read_bytes())
    assert [c["name"] for c in record["columns"]] == ["first", "second"]
    for column in record["columns"]:
        assert column["rows"] == ROWS
        for name in set(FIGURES) - {"neighbours_same_group", "posterior_share"}:
            assert column[name]["low"] < column[name]["value"] < column[name]["high"], name
        assert column["neighbours_same_group"]["value"] is None
        assert len(column["linear_reference_by_sigma"]) == 8
        assert column["linear_reference_training"]["value"] > 0
    first, second = (column["posterior_share"]["value"] for column in record["columns"])
    assert first == 0
    assert 0 < second < 0.2
    for text in (printed, Page((tmp_path / "p.html").read_text()).text):
        assert all(about.title in text for about in FIGURES.values())
        assert "no index of the source" in text
        assert "floor" not in text.lower()
        assert "predicts" not in text.lower()


def test_rows_are_read_evenly(columns: list[str]) -> None:
    record = probe(columns[:1], rows=70)
    assert record["columns"][0]["rows"] == 70
    assert record["columns"][0]["text_r2"]["why"].startswith("no text column")


def test_a_row_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    rows = latents(5)
    rows[7, 1, 2, 3] = np.nan
    record = probe([str(write(tmp_path / "nan", "latents", rows))])["columns"][0]
    other = probe([str(write(tmp_path / "without", "latents", np.delete(rows, 7, 0)))])["columns"][
        0
    ]
    assert record["rows"] == ROWS - 1
    assert record["linear_reference"] == pytest.approx(other["linear_reference"])


def test_ids_leave_a_cell_that_says_why(columns: list[str], tmp_path: Path) -> None:
    ids = write(
        tmp_path / "ids", "ids", [np.arange(i % 4 + 1, dtype=np.int32) for i in range(ROWS)]
    )
    record = probe(columns[:1], str(ids))
    for name in ("linear_reference_given_text", "text_r2"):
        assert record["columns"][0][name]["value"] is None
        assert "column of ids" in record["columns"][0][name]["why"]
    assert "column of ids" in as_text(record)
    assert "column of ids" in Page(page(record)).text


def test_what_cannot_be_compared_is_refused(columns: list[str], tmp_path: Path) -> None:
    other = write(tmp_path / "other", "latents", latents(3), source="another")
    with pytest.raises(SourceMismatch, match="another"):
        probe([str(other)], columns[2])
    features = write(tmp_path / "features", "features", latents(3))
    with pytest.raises(IdentityMismatch, match="found a column of features"):
        probe([str(features)])
    with pytest.raises(IdentityMismatch, match="found a column of latents"):
        probe(columns[:1], columns[0])
    with pytest.raises(BadStatistics, match=r"first: found 20 rows, expected at least 64"):
        probe(columns[:1], rows=20)
    infinite = [np.full((2, 5), 0x7F80, np.uint16)] * ROWS  # in bfloat16: no row is valid
    with pytest.raises(BadStatistics, match=r"first: found 0 rows, expected at least 64"):
        probe(columns[:1], str(write(tmp_path / "infinite", "tokens", infinite)))
    with pytest.raises(BadRequest, match="at most 8,192"):
        probe(columns[:1], rows=10_000)
    constant = latents(4)
    constant[:, 2] = 0.5
    path = write(tmp_path / "constant", "latents", constant)
    with pytest.raises(BadStatistics, match=r"constant: found 1 of 3 channels constant"):
        probe([str(path)])


def test_a_folder_that_does_not_exist_is_refused_before_the_rows_are_read(
    columns: list[str], tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="no folder to write to"):
        commands.main(["probe", columns[0], "--json", f"{tmp_path}/absent/p.json"])
    same = ["--json", f"{tmp_path}/p", "--out", f"{tmp_path}/../{tmp_path.name}/p"]
    with pytest.raises(BadRequest, match="one file for --json and --out"):
        commands.main(["probe", columns[0], *same])
    assert not (tmp_path / "p").exists()


def test_rows_that_cannot_be_kept_together_are_refused(columns: list[str]) -> None:
    with pytest.raises(BadRequest, match="first: --together 'a' needs .* no index of the source"):
        probe(columns[:1], columns[2], together="a")


@pytest.mark.skipif(not BROWSER, reason="no Chromium")
@pytest.mark.parametrize(
    ("dark", "width"), [(False, 1200), (True, 1200), (False, 390), (True, 390)]
)
def test_in_a_browser(columns: list[str], tmp_path: Path, dark: bool, width: int) -> None:
    html = page(probe(columns[:2], columns[2]))
    (tmp_path / "browser").mkdir()
    view = in_browser(html, tmp_path / "browser", dark=dark, width=width)
    assert view["faults"] == []
    assert view["wide"] <= width
    assert view["colour"] == ("#5aa9e0" if dark else "#2a7fb8")
