"""The panel of columns on disk: the rows that are read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards import Column, IndexRow, Norm, Source, SourceMismatch, put_index
from shards.errors import BadStatistics, CorruptColumn, IdentityMismatch
from shards.probe import ColumnRows, caption_groups, common_rows, evenly, panel, pooled_text
from shards.tools.copy import copy
from tests.shards.probe.known import SIGMAS, ArrayRows, white
from tests.shards.toy import (
    NORM,
    caption_status,
    ids_spec,
    image_status,
    length_of,
    moments_of,
    moments_spec,
    row_ids,
    small_moments,
    tokens_of,
    tokens_spec,
    write_column,
)


def test_rows_are_normalised_as_a_step_draws_them(tmp_path: Path) -> None:
    column = Column.open(write_column(tmp_path / "vae", moments_spec()))
    rows = evenly(common_rows([column]), 50)
    parts = list(ColumnRows(column, rows).parts())
    mean = np.concatenate([part.mean for part in parts])
    stored = moments_of(rows).astype(np.float64)
    shift, scale = (np.array(v)[:, None, None] for v in (NORM.shift, NORM.scale))
    np.testing.assert_allclose(mean, (stored[:, :2] - shift) * scale, rtol=1e-6)
    variance = np.concatenate([part.variance for part in parts if part.variance is not None])
    np.testing.assert_allclose(variance, np.exp(stored[:, 2:]) * scale**2, rtol=1e-6)
    other = Norm((1.0,), (0.5,))
    mean = np.concatenate([part.mean for part in ColumnRows(column, rows, other).parts()])
    np.testing.assert_allclose(mean, (stored[:, :2] - 1) / 2, rtol=1e-6)


def test_the_rows_are_those_that_all_columns_have(tmp_path: Path) -> None:
    vae = Column.open(write_column(tmp_path / "vae", moments_spec()))
    text = Column.open(write_column(tmp_path / "text", tokens_spec()))
    rows = common_rows([vae, text])
    ids = np.concatenate([row_ids(shard) for shard in range(3)])
    assert rows.tolist() == ids[(image_status(ids) == 0) & (caption_status(ids) == 0)].tolist()
    assert evenly(rows, 3).tolist() == [rows[0], rows[(len(rows) - 1) // 2], rows[-1]]
    assert evenly(rows, 10**6).tolist() == rows.tolist()
    other = Column.open(write_column(tmp_path / "other", tokens_spec(source="another")))
    with pytest.raises(SourceMismatch, match="another"):
        common_rows([vae, other])


def test_rows_of_a_bucket_are_those_of_a_folder(url: str, tmp_path: Path) -> None:
    paths = [
        write_column(tmp_path / "vae", moments_spec()),
        write_column(tmp_path / "text", tokens_spec()),
    ]
    copies = [f"{url}/{path.name}" for path in paths]
    for path, remote in zip(paths, copies, strict=True):
        copy(path, remote)
    results = []
    for places in (paths, copies):
        vae, text = (Column.open(place) for place in places)
        rows = evenly(common_rows([vae, text]), 70)
        means = np.concatenate([part.mean for part in ColumnRows(vae, rows).parts()])
        results.append((means, pooled_text(text, rows)))
    for folder, bucket in zip(*results, strict=True):
        np.testing.assert_array_equal(folder, bucket)


def test_captions_are_means_over_their_tokens(tmp_path: Path) -> None:
    text = Column.open(write_column(tmp_path / "text", tokens_spec()))
    rows = evenly(common_rows([text]), 40)
    pooled = pooled_text(text, rows)
    for row, mean in zip(rows.tolist(), pooled, strict=True):
        tokens = (tokens_of(row).astype(np.uint32) << 16).view(np.float32)
        assert len(tokens) == length_of(row)
        np.testing.assert_allclose(mean, tokens.astype(np.float64).mean(0), rtol=1e-5)
    ids = Column.open(write_column(tmp_path / "ids", ids_spec()))
    with pytest.raises(IdentityMismatch, match="column of ids"):
        pooled_text(ids, rows)


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = small_moments(tmp_path / "vae")
    column = Column.open(path)
    rows = common_rows([column])
    (file,) = [p for p in (path / "moments").rglob("*") if p.is_file() and p.name != "zarr.json"]
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptColumn, match="checksum"):
        list(ColumnRows(Column.open(path), rows).parts())


def test_what_no_figure_can_be_made_of_is_refused() -> None:
    schedules = {"fixed": SIGMAS}
    with pytest.raises(BadStatistics, match="found 40 rows, expected at least 64"):
        panel(ArrayRows(white(40, (3, 4, 4))), schedules)
    with pytest.raises(BadStatistics, match="found 300 rows, expected at least 512"):
        panel(ArrayRows(white(300, (256, 1, 2))), schedules)
    latents = white(70, (3, 4, 4))
    latents[:, 1] = 0.25
    with pytest.raises(BadStatistics, match=r"found 1 of 3 channels constant .* \[1\]"):
        panel(ArrayRows(latents), schedules, advance=lambda count: pytest.fail("spectra were made"))
    latents[:, 1] = white(1, (4, 4))  # differs between places, and not between rows
    with pytest.raises(BadStatistics, match=r"found 1 of 3 channels constant .* \[1\]"):
        panel(ArrayRows(latents), schedules)
    latents[0, 1, 2, 3] += 0.01
    assert panel(ArrayRows(latents), schedules).rows == 70


def test_a_panel_has_a_cell_for_each_figure() -> None:
    latents = white(70, (3, 4, 4))
    record = panel(
        ArrayRows(latents), {"fixed": SIGMAS, "training": [0.5]}, no_text="a column of ids"
    ).record()
    assert record["rows"] == 70
    assert record["shape"] == [3, 4, 4]
    cell = record["linear_reference_given_text"]
    assert cell == {"value": None, "low": None, "high": None, "why": "a column of ids"}
    for name in ("linear_reference", "linear_reference_training", "viv", "lds", "effective_rank"):
        assert record[name]["low"] <= record[name]["value"] <= record[name]["high"]
    levels = record["linear_reference_by_sigma"]
    assert [level["sigma"] for level in levels] == SIGMAS
    mean = np.mean([level["value"] for level in levels])
    assert record["linear_reference"]["value"] == pytest.approx(mean)


def test_a_grid_of_one_place_has_no_figures_of_structure_in_space() -> None:
    record = panel(ArrayRows(white(70, (3, 1, 1))), {"fixed": SIGMAS}).record()
    for name in ("lds", "high_frequency_share"):
        assert record[name]["value"] is None
        assert "a grid of 1 x 1 has" in record[name]["why"]
    assert record["linear_reference"]["value"] > 0


def test_groups_are_equal_captions_or_parts_of_keys(tmp_path: Path) -> None:
    source = Source("toy", (("0.tar", 1),), 2048)
    spec = moments_spec(1, source.fingerprint)
    text_spec = tokens_spec(1, source.fingerprint)
    vae = Column.open(write_column(tmp_path / "vae", spec, (70,)))
    text = Column.open(write_column(tmp_path / "text", text_spec, (70,)))
    rows = common_rows([vae, text])
    assert caption_groups(vae, rows, text)[0] is None  # no index yet
    digests = [f"{i % 10:064x}" for i in range(70)]
    entries = [
        IndexRow(f"{'abc'[i % 3]}-{i}", {"txt": (0, 1)}, {"txt": digests[i]}) for i in range(70)
    ]
    put_index(tmp_path, source.fingerprint, 0, entries, None)
    groups, what = caption_groups(vae, rows, text)
    assert what == "equal captions"
    assert groups is not None
    assert [a == groups[0] for a in groups] == [row % 10 == rows[0] % 10 for row in rows]
    groups, _ = caption_groups(vae, rows, text, "^[a-z]")
    assert groups is not None
    assert groups.tolist() == [row % 3 for row in rows.tolist()]
    with pytest.raises(
        BadStatistics, match=r"found '\(', expected a regular expression: missing \)"
    ):
        caption_groups(vae, rows, text, "(")
    with pytest.raises(BadStatistics, match="found nothing of '\\^x' in the key 'a-0'"):
        caption_groups(vae, rows, text, "^x")


def test_captions_that_differ_make_no_groups(tmp_path: Path) -> None:
    source = Source("toy", (("0.tar", 1),), 2048)
    vae = Column.open(write_column(tmp_path / "vae", moments_spec(1, source.fingerprint), (70,)))
    text = Column.open(write_column(tmp_path / "t", tokens_spec(1, source.fingerprint), (70,)))
    entries = [IndexRow(f"{i}", {"txt": (0, 1)}, {"txt": f"{i:064x}"}) for i in range(70)]
    put_index(tmp_path, source.fingerprint, 0, entries, None)
    groups, why = caption_groups(vae, common_rows([vae, text]), text)
    assert groups is None
    assert "share a caption" in why
