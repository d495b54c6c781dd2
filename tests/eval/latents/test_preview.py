"""Rows of a column on a page: the right pictures beside each other, and what is missing said."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode.config import EncodeConfig
from encode.errors import ModelNotUsable
from encode.run.job import run as encode
from eval.commands import main
from eval.errors import BadRequest, MissingPictures
from eval.latents.preview import rows_named
from shards import Column
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.report.tab import Tab
from tests.eval.test_reconstruct import BROKEN, write_tar

SHOWN = [0, 1, 3, 4, 1024, 1025]  # two tars of five and two pictures; row 2 is broken


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, vae_folder: Path) -> Path:
    """Source `pair` of two tars and a third that is none; its columns `tiny` and `other`."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "tars").mkdir()
    write_tar(folder / "tars" / "0.tar", range(5))
    write_tar(folder / "tars" / "1.tar", range(5, 7))
    (folder / "tars" / "2.tar").write_bytes(b"no tar at all")
    column = {
        "kind": "moments",
        "encoder": {"class": "AutoencoderKL", "path": str(vae_folder)},
        "resolution": 32,
    }
    config = EncodeConfig.model_validate(
        {
            "root": str(folder),
            "sources": {"pair": [str(folder / "tars" / f"{i}.tar") for i in range(3)]},
            "columns": {"tiny": column},
            "shard_rows": 1024,
            "allow_failed": True,
            "engine": {"executor": "inline", "device": "cpu"},
        }
    )
    encode(config)
    return folder


def preview(cache: Path, out: Path, *flags: object) -> str:
    """Returns the page that the command writes."""
    words = ["preview", cache / "pair" / "tiny", "--out", out, "--device", "cpu", *flags]
    assert not main([str(word) for word in words])
    return out.read_text()


def pictures(page: str) -> dict[str, np.ndarray]:
    """The pictures of a page by their text."""
    return {
        str(a["alt"]): np.array(
            Image.open(io.BytesIO(base64.b64decode(str(a["src"]).partition(",")[2])))
        )
        for a in Page(page).all("img")
    }


def test_rows_are_beside_their_sources_with_key_and_caption(cache: Path, tmp_path: Path) -> None:
    page = preview(cache, tmp_path / "p.html", "--tars", cache / "tars")
    assert [name for name in Page(page).ids if name.startswith("row-")] == [
        f"row-{row}" for row in SHOWN
    ]
    images = pictures(page)
    for row, number in zip(SHOWN, (0, 1, 3, 4, 5, 6), strict=True):
        source = images[f"source: row {row}"]
        assert abs(int(source[..., 2].mean()) - 40 * number) < 6  # the right picture
        assert images[f"decoded: row {row}"].shape == source.shape == (32, 32, 3)
    text = Page(page).text
    assert "row 1025, sample/6, ok" in text
    assert text.count("a cat") == len(SHOWN)
    assert "No token lengths: name a column of captions by --text." in text


def test_neighbours_are_those_of_a_plain_loop(cache: Path, tmp_path: Path) -> None:
    page = preview(cache, tmp_path / "p.html", "--rows", "3")
    column = Column.open(cache / "pair" / "tiny")
    means = column.read(np.array(SHOWN)).astype(np.float64)
    means = means[:, : means.shape[1] // 2]
    norm = column.spec.norm
    assert norm is not None
    shift, scale = norm.arrays
    vectors = ((means - shift) * scale).reshape(len(SHOWN), -1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[SHOWN.index(3)]
    expected = [SHOWN[i] for i in np.argsort(-cosines) if SHOWN[i] != 3][:3]
    neighbours = re.findall(r"row (\d+), (-?\d\.\d\d)", Page(page).text)
    assert [int(row) for row, _ in neighbours] == expected
    for row, cosine in neighbours:
        assert float(cosine) == pytest.approx(cosines[SHOWN.index(int(row))], abs=0.006)


def test_what_was_left_out_and_why(cache: Path, tmp_path: Path) -> None:
    page = preview(
        cache, tmp_path / "p.html", "--status", "image_undecodable", "--tars", cache / "tars"
    )
    text = Page(page).text
    assert f"row {BROKEN}, sample/{BROKEN}, image_undecodable" in text
    assert "the picture's file cannot be decoded" in text
    assert pictures(page) == {}


@pytest.mark.parametrize("flags", [("--status", "shard_failed"), ("--rows", "2048,0")])
@pytest.mark.parametrize("tars", [False, True])
def test_a_shard_that_was_not_encoded_has_its_reason(
    cache: Path, tmp_path: Path, flags: tuple[str, str], tars: bool
) -> None:
    """It has no index of its own, and its tar may be gone."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).symlink_to(cache / "tars" / name)
    page = preview(cache, tmp_path / "p.html", *flags, *(("--tars", tmp_path) if tars else ()))
    assert "row 2048, shard_failed" in " ".join(Page(page).text.split())
    assert "not a tar" in page  # the reason of the shard's record
    assert ("source: row 0" in pictures(page)) == (tars and flags[0] == "--rows")


def test_a_status_that_no_row_has_is_said(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preview", cache / "pair" / "tiny", "--status", "non_finite", "--out"]
    assert not main([str(word) for word in [*words, tmp_path / "p.html"]])
    assert "no row has the status non_finite" in capsys.readouterr().out
    assert not (tmp_path / "p.html").exists()


def test_without_weights_and_tars_the_rest_is_shown(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "column"
    shutil.copytree(cache, path)
    column = path / "pair" / "tiny" / "column.json"
    folder = re.search(r'"path":"([^"]+)"', column.read_text())
    assert folder is not None
    hidden = Path(folder[1])
    hidden.rename(hidden.with_name("hidden"))
    try:
        page = preview(path, tmp_path / "p.html")
        words = ["preview", path / "pair" / "tiny", "--vae", hidden, "--out", tmp_path / "q.html"]
        with pytest.raises(ModelNotUsable):  # what was named must be there
            main([str(word) for word in words])
    finally:
        hidden.with_name("hidden").rename(hidden)
    text = Page(page).text
    assert "No decoded pictures:" in text
    assert "--vae" in text
    assert "name the folder of the source's tars by --tars" in text
    assert "row 1025, sample/6, ok" in text
    assert pictures(page) == {}


def test_a_damaged_row_is_said_in_its_cell(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "copy")
    column = Column.open(tmp_path / "copy" / "pair" / "tiny")
    file = tmp_path / "copy" / "pair" / "tiny" / "moments" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    size = int(column.row_bytes(np.array([0]))[0])
    data[size + 4] ^= 0xFF  # of row 1
    file.write_bytes(data)
    page = Page(preview(tmp_path / "copy", tmp_path / "p.html", "--tars", cache / "tars"))
    assert page.text.count("does not fit its checksum") == 1
    names = {a["alt"] for a in page.all("img")}
    assert "decoded: row 1" not in names
    assert {"source: row 1", "decoded: row 0"} <= names
    assert "1 row of them cannot be read" in page.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0,5"], "has no row 5; shard 0 has rows 0 to 4"),
        (["--rows", "3072"], "has no row 3072; shard 2 has no rows"),
        (["--rows", "1,0-3"], "row 1 is named twice"),
        (["--rows", "3-1"], "from the lower to the higher"),
        (["--rows", "9" * 15], "has no row"),
        (["--rows", "a"], "expected row ids and ranges"),
        (["--rows", "1", "--status", "ok"], "both --rows and --status"),
        (["--count", "100000"], "at most 1,000"),
    ],
)
def test_rows_that_cannot_be_shown(
    cache: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(BadRequest, match=message):
        preview(cache, tmp_path / "p.html", *flags)
    assert list(tmp_path.iterdir()) == []


def test_other_bad_input(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRequest, match="in a folder that exists"):
        preview(cache, tmp_path / "none" / "p.html")
    with pytest.raises(MissingPictures, match=r"0\.tar: no such file"):
        preview(cache, tmp_path / "p.html", "--tars", tmp_path)
    with pytest.raises(SystemExit) as stop:
        preview(cache, tmp_path / "p.html", "--status", "image_undecodabel")
    assert stop.value.code == 2
    assert "did you mean image_undecodable?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ranges_keep_their_order() -> None:
    assert rows_named("7,0-2, 5") == [7, 0, 1, 2, 5]


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 390)])
def test_the_page_in_a_browser(cache: Path, tmp_path: Path, dark: bool, width: int) -> None:
    page = preview(cache, tmp_path / "p.html", "--tars", cache / "tars")
    # the probe of a page measures its table, which a page of pictures does not have
    page = page.replace("</body>", '<div class="wide"><table></table></div></body>')
    seen = in_browser(page, tmp_path, dark=dark, width=width)
    assert seen["faults"] == []
    assert seen["shown"] == len(Page(page).all("img")) == len(SHOWN) * 5
    assert seen["wide"] <= width


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_row_is_seen_large_beside_its_source(cache: Path, tmp_path: Path) -> None:
    """There are no controls: a decoded picture may be alone in its row."""
    html = preview(cache, tmp_path / "p.html", "--tars", cache / "tars")
    seen = "[...document.querySelectorAll('dialog figcaption')].map(caption => caption.textContent)"
    with Tab(tmp_path) as tab:
        tab.open(html)
        tab.evaluate("document.querySelectorAll('.row button')[1].click()")
        assert tab.evaluate(seen) == ["source", "decoded"]
        tab.press("ArrowDown", "ArrowLeft", "b")
        assert tab.evaluate(seen) == ["source", "decoded"]
        assert tab.evaluate("document.querySelector('dialog .current img').alt") == "source: row 1"
        assert tab.evaluate("document.querySelectorAll('dialog button:not([hidden])').length") == 1
        assert tab.faults == []
