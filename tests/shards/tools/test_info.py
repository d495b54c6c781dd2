"""What `info` says of a column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import ColumnSpec, Layout, Norm, ShardWriter, create_column, put_complete
from shards.__main__ import main, parser
from shards.errors import Unreadable
from shards.tools.convert import convert
from shards.tools.info import _lengths, as_page, as_text, information, run_info
from tests.commands.lines import next_lines
from tests.eval.browser import BROWSER, Page, in_browser
from tests.shards.tools.test_transfer import normal_tokens
from tests.shards.toy import NORM, moments_spec, write_column


def test_moments(toy: Path) -> None:
    info = information(toy / "vae")
    assert (info["rows"], info["shards"], info["committed"]) == (2164, 3, 3)
    assert sum(info["statuses"].values()) == 2164
    files = (toy / "vae").rglob("c/**/*")
    assert info["bytes"] == sum(path.stat().st_size for path in files if path.is_file())
    assert info["norm"] == {"shift": list(NORM.shift), "scale": list(NORM.scale)}
    assert (info["element"], info["backend"], info["codec"]) == ("float16", "zarr", None)
    json.dumps(info, allow_nan=False)
    assert "norm_source" not in info  # of columns from before commits said it
    assert info["warnings"] == [
        "the VAE's shift and scale do not normalise these latents",
        "the VAE's shift and scale do not normalise channels [0, 1]",
    ]


def normal_latents(
    path: Path, norm: Norm, shift: Any, scale: Any, kind: str = "moments", rows: int = 300
) -> Path:
    """A column of latents that just this shift and scale would normalise, with another norm."""
    shape = (4 if kind == "moments" else 2, 8, 8)
    spec = ColumnSpec({"kind": kind, "source": "s"}, Layout(kind, shape, 1, 1024), norm)
    digest = create_column(path, spec)
    mean = np.random.default_rng(0).normal(size=(rows, 2, 8, 8)) / scale[:, None, None]
    values = mean + shift[:, None, None]
    if kind == "moments":
        values = np.concatenate([values, np.full_like(mean, -20)], 1)
    with ShardWriter(path, spec, digest, 0, rows, "index") as writer:
        writer.put_block(values.astype(np.float16), np.zeros(rows, np.uint8))
        writer.commit({"norm_source": "registry: a paper"})
    put_complete(path, digest, 1, allow_failed=False)
    return path


@pytest.mark.parametrize("kind", ["moments", "latents"])
def test_latents_that_their_norm_normalises(tmp_path: Path, kind: str) -> None:
    shift, scale = np.array([3.0, -1.0]), np.array([0.5, 4.0])
    normal_latents(tmp_path / "c", Norm(tuple(shift), tuple(scale)), shift, scale, kind)
    info = information(tmp_path / "c")
    assert info["warnings"] == []
    latents = info["latents"]
    np.testing.assert_allclose(latents["mean"], shift, atol=0.1)
    np.testing.assert_allclose(latents["normalised"]["channel_std"], 1, atol=0.02)
    np.testing.assert_allclose(latents["normalised"]["channel_mean"], 0, atol=0.02)
    assert info["norm_source"] == ["registry: a paper"]
    text = as_text(information(tmp_path / "c"))
    assert "norm        registry: a paper\n" in text
    assert "WARNING" not in text
    assert "latents     mean 3.0" in text


def test_latents_that_a_norm_of_each_place_normalises(tmp_path: Path) -> None:
    """Places of deviation 1 and 3: over a channel they would not have deviation 1."""
    places = np.where(np.arange(8) % 2, 3.0, 1.0) * np.ones((2, 8, 8))
    spec = ColumnSpec(
        {"kind": "latents", "source": "s"},
        Layout("latents", (2, 8, 8), 1, 1024),
        Norm(5 * places, 1 / places),
    )
    digest = create_column(tmp_path / "c", spec)
    values = np.random.default_rng(0).normal(size=(300, 2, 8, 8)) * places + 5 * places
    with ShardWriter(tmp_path / "c", spec, digest, 0, 300, "index") as writer:
        writer.put_block(values.astype(np.float16), np.zeros(300, np.uint8))
        writer.commit({})
    put_complete(tmp_path / "c", digest, 1, allow_failed=False)
    info = information(tmp_path / "c")
    assert info["warnings"] == []
    np.testing.assert_allclose(info["latents"]["normalised"]["channel_std"], 1, atol=0.02)
    np.testing.assert_allclose(info["latents"]["normalised"]["channel_mean"], 0, atol=0.02)


def test_channels_in_another_order_are_told(tmp_path: Path) -> None:
    shift, scale = np.array([1.0, -1.0]), np.array([1.0, 1.0])
    path = normal_latents(tmp_path / "c", Norm((-1.0, 1.0), (1.0, 1.0)), shift, scale)
    info = information(path)
    assert abs(info["latents"]["normalised"]["mean"]) < 0.02  # as a whole it looks right
    assert info["warnings"] == ["the VAE's shift and scale do not normalise channels [0, 1]"]


def test_what_to_do_about_latents_that_are_not_normalised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is printed for a reader, and is no part of the JSON; it is none against what int8 loses."""
    one = np.array([1.0, 1.0])
    path = normal_latents(
        tmp_path / "far", Norm((-1.0, 1.0), (1.0, 1.0)), np.array([1.0, -1.0]), one
    )
    fitting = normal_latents(tmp_path / "near", Norm((0.0, 0.0), (1.0, 1.0)), 0 * one, one)
    near = normal_latents(
        tmp_path / "latents", Norm((0.0, 0.0), (1.0, 1.0)), 0 * one, one, "latents"
    )
    convert(near, tmp_path / "int8", element="int8")
    monkeypatch.setattr("shards.format.int8.WARN_ROWS_ABOVE", 0.001)
    assert len(information(tmp_path / "int8")["warnings"]) == 1
    lines = {}
    for words in ([path], [path, "--json"], [fitting], [tmp_path / "int8"]):
        monkeypatch.setattr("sys.argv", ["shards", "info", *map(str, words)])
        assert main() == 0
        lines[str(words)] = next_lines(capsys.readouterr().out)
    (first,), *others = lines.values()
    assert first.startswith(f"next: python -m shards norm {path} ")
    assert others == [[], [], []]


@pytest.mark.parametrize("rows", [63, 64])
def test_a_norm_is_advised_only_where_rows_are_enough_to_measure_it(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_for_all, of_each = Norm((0.0,), (1.0,)), np.array([1.0, 4.0])
    path = normal_latents(tmp_path / "c", one_for_all, np.zeros(2), of_each, "latents", rows)
    monkeypatch.setattr("sys.argv", ["shards", "info", str(path)])
    assert main() == 0
    out = capsys.readouterr().out
    few = "They can be measured from 64 valid rows on, found 63"
    assert "normalised channels have deviations from 0.2" in out
    assert (few in out, f"shards norm {path}" in out) == (rows == 63, rows == 64)
    assert len(next_lines(out)) == (rows == 64)
    monkeypatch.setattr("sys.argv", ["shards", "norm", str(path)])
    assert main() == (0 if rows == 64 else 2)


def test_bars_of_lengths_do_not_overlap(tmp_path: Path) -> None:
    """100 captions of 1, 2, ... 8 tokens in turn: a bar each; then of 1 to 9 and of one length alone."""
    lines = as_text(information(normal_tokens(tmp_path / "a"))).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("tokens "))
    assert lines[start] == "tokens      mean 4.4, 99 % at most 8, most 8"
    bars = [(line.split()[0], line.split()[-1]) for line in lines[start + 1 :]]
    assert bars == [(f"{n}-{n}", "13" if n <= 4 else "12") for n in range(1, 9)]
    wide = _lengths(np.array([1, 2, 3, 9]), 16)["histogram"]
    assert wide == {"edges": [1, 3, 5, 7, 9, 11], "counts": [2, 1, 0, 0, 1]}
    assert _lengths(np.array([5, 5]), 16)["histogram"] == {"edges": [5, 6], "counts": [2]}


def test_lengths_and_quantisation(toy: Path, tmp_path: Path) -> None:
    info = information(toy / "text")["lengths"]
    assert (info["max"], info["limit"]) == (4, 4)
    assert sum(info["histogram"]["counts"]) == info["rows"] == 2048  # of 2,123 valid ones
    normal_tokens(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", element="int8")
    scales = information(tmp_path / "b")
    assert scales["quantisation"].keys() == {"scheme", "relative_error", "rows"}
    assert scales["warnings"] == []
    assert "quantised   int8" in as_text(information(tmp_path / "b"))
    normal_tokens(tmp_path / "c", outliers=True)
    convert(tmp_path / "c", tmp_path / "d", element="int8")
    assert "% of these tokens" in information(tmp_path / "d")["warnings"][0]
    assert "WARNING     int8 loses" in as_text(information(tmp_path / "d"))


def test_other_storage_and_unfinished(tmp_path: Path) -> None:
    write_column(tmp_path / "a", moments_spec(), (1100, 40, 1024))
    convert(tmp_path / "a", tmp_path / "b", codec="blosc")
    assert "float16, zarr, blosc" in as_text(information(tmp_path / "b"))
    create_column(tmp_path / "c", moments_spec())
    assert "NOT complete" in as_text(information(tmp_path / "c"))


def test_as_a_page(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["info", str(toy / "vae"), "--html", str(tmp_path / "info.html")])
    assert run_info(args) == 0
    assert "2,164" in capsys.readouterr().out
    page = Page((tmp_path / "info.html").read_text())
    for text in ("2,164", "not normalise channels [0, 1]", "Normalised latents by channel"):
        assert text in page.text
    assert len(page.all("polyline")) == 4  # mean and deviation, stored and normalised
    assert "Rows by number of tokens" in as_page(information(toy / "text"))
    args.html = tmp_path / "none" / "info.html"
    args.column = tmp_path / "no-column"  # the page's place is looked at first
    with pytest.raises(Unreadable, match="in a folder that exists"):
        run_info(args)


def test_names_in_a_page_are_text(toy: Path) -> None:
    info = information(toy / "vae") | {"norm_source": ["<script>alert(1)</script>"]}
    assert "<script>alert" not in as_page(info)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 390)])
def test_the_page_in_a_browser(toy: Path, tmp_path: Path, dark: bool, width: int) -> None:
    view = in_browser(as_page(information(toy / "vae")), tmp_path, dark=dark, width=width)
    assert view["faults"] == []
    assert view["wide"] <= width
