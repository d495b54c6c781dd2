"""The pictures on a study's page: of which prompts, and what reconstructions lose."""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.images.checks import REMOVED, read_manifest, removed_record
from eval.prompts.prompts import Prompt, Prompts
from eval.study.report import pictures
from eval.study.report.page import report
from eval.study.study import Study
from tests.eval.browser import BROWSER, Page
from tests.eval.report.tab import Tab
from tests.eval.sets import make_items, make_score, make_set
from tests.eval.study import handmade
from tests.eval.study.handmade import PRIMARY, fill, open_study
from tests.eval.study.page.test_page import values_of

ROWS = Prompts("reconstruct-pets", tuple(Prompt(f"{i:08d}", f"pet{i}") for i in range(9)))


def reconstructed(folder: Path, seed: int) -> Path:
    """What `python -m eval reconstruct` leaves: row 7 is the worst of the first VAE, row 4 of the second."""
    for kind in ("original", "reconstruction"):
        make_set(folder / kind, {"vae": folder.name, "kind": kind}, ROWS, seed, side=32)
    values = np.full(9, 30.0) + np.arange(9)
    values[[7, 4][seed]] = 12.0 + seed
    make_score(folder / "reconstruction", "psnr", make_items(values, ROWS))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("pictures")
    folders = {name: str(reconstructed(folder / name, i)) for i, name in enumerate(("flux", "e2e"))}
    study = open_study(folder, panel={"reconstructions": folders})
    return fill(study, (0.0, 0.02))


@pytest.fixture(scope="module")
def html(study: Study) -> str:
    report(study, pictures=8)
    return (study.out / "report.html").read_text()


def test_the_prompts_that_the_primary_score_tells_apart_come_first(study: Study, html: str) -> None:
    shown = json.loads((study.out / "study.json").read_text())["shown"]
    gaps = values_of(study, "e2e").mean(0) - values_of(study, "flux").mean(0)
    sizes = [abs(gaps[int(prompt)]) for prompt in shown]
    assert sizes == sorted(sizes, reverse=True)
    assert len(shown) == 8
    # beside the sample, each entry's best prompts are there
    best = {f"{gaps.argmax():03d}", f"{gaps.argmin():03d}"}
    assert best <= set(shown)
    text = Page(html).text
    assert f"in which, in turn, each entry leads most by {PRIMARY}" in text
    assert "mean over 3 training seeds" in text
    assert "best for e2e first" in text


def test_the_worst_reconstructions_lie_beside_what_was_lost(html: str) -> None:
    alt = [a["alt"] or "" for a in Page(html).all("img")]
    rows = [text for text in alt if "pet" in text]
    assert rows[:5] == [
        "original: pet7",
        "flux: pet7",
        "what flux lost: pet7",
        "e2e: pet7",
        "what e2e lost: pet7",
    ]
    assert rows[5] == "original: pet4"
    assert len(rows) == 6 * 5
    assert "flux 12.0 dB" in Page(html).text


def test_reconstructions_that_cannot_be_shown_are_left_out(
    study: Study, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study.config.panel is not None
    folders: dict[str, Any] = {"flux": study.path.parent / "absent"}
    monkeypatch.setitem(study.config.panel.__dict__, "reconstructions", folders)
    with caplog.at_level(logging.WARNING):
        report(study, pictures=2)
    assert "panel.reconstructions: flux: " in caplog.text
    assert "What the VAEs lose" not in (study.out / "report.html").read_text()


def test_pictures_are_of_one_seed_and_none_may_be_wanted(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5), skip=[("e2e", 0)])
    data = report(study, pictures=3)
    assert (data["shown_seed"], len(data["shown"])) == (1, 3)
    data = report(study, pictures=0)
    assert data["shown"] == []
    assert "<img" not in (study.out / "report.html").read_text()


def test_a_page_without_its_other_pictures_is_the_same(tmp_path: Path) -> None:
    """As `study gc` leaves the sets: the sample is still one of all prompts."""
    study = fill(open_study(tmp_path), (0.0, 0.02))
    shown = report(study, pictures=8)["shown"]
    before = Page((study.out / "report.html").read_text())
    for entry in study.entries:
        for seed in study.seeds:
            folder = study.set_folder(entry, seed, 100)
            kept = [f"{prompt}.png" for prompt in shown]
            record = removed_record(read_manifest(folder / "manifest.json"), kept)
            (folder / REMOVED).write_bytes(record)
            for path in (folder / "images").iterdir():
                if path.name not in kept:
                    path.unlink()
    assert report(study, pictures=8)["shown"] == shown
    after = Page((study.out / "report.html").read_text())
    chosen = "in which, in turn, each entry leads most"
    sentences = [
        page.text.partition(chosen)[2].partition("Training")[0] for page in (before, after)
    ]
    assert sentences[0] == sentences[1] != ""
    assert after.all("img") == before.all("img")
    assert len(report(study, pictures=14)["shown"]) < 14
    text = Page((study.out / "report.html").read_text()).text
    assert re.search(r"The pictures of \d+ more prompts were removed", text)


def test_a_page_has_ten_megabytes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both galleries have a bound, and six entries in three seeds leave room for all the rest."""
    assert pictures.SAME_BYTES + pictures.LOST_BYTES <= 8_500_000
    names = [f"vae-{i}" for i in range(6)]
    panel = {
        "reconstructions": {
            name: str(reconstructed(tmp_path / name, i % 2)) for i, name in enumerate(names)
        }
    }
    entries = {name: name for name in names}
    study = open_study(tmp_path, entries=entries, baseline=names[0], panel=panel)
    sides: dict[str, Any] = {"side": 90}
    monkeypatch.setattr(handmade, "make_set", partial(make_set, **sides))
    monkeypatch.setattr(handmade, "VAES", "abcdef")
    fill(study, (0.0, 0.5, 0.1, 0.2, 0.3, 0.4))
    monkeypatch.setattr(pictures, "SAME_BYTES", 60_000)
    monkeypatch.setattr(pictures, "LOST_BYTES", 40_000)
    report(study, pictures=10**6)
    html = (study.out / "report.html").read_text()
    embedded = []
    for part in html.split('id="reconstructed"'):
        embedded.append(sum(map(len, re.findall(r'"(data:image[^"]*)"', part))))
    same, lost = embedded
    assert 20_000 < same < 60_000
    assert 13_000 < lost < 40_000
    assert len(html) - same - lost < 10_000_000 - 8_500_000


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False), (1920, True)])
def test_two_galleries_have_their_own_controls(
    html: str, tmp_path: Path, width: int, dark: bool
) -> None:
    view = (
        "[...document.querySelectorAll('.gallery')].map(gallery => gallery.dataset.view ?? 'side')"
    )
    with Tab(tmp_path, width=width, dark=dark) as tab:
        tab.open(html)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        tab.evaluate("document.querySelector('#reconstructed [type=radio]').focus()")
        tab.press("b")
        assert tab.evaluate(view) == ["side", "place"]
        tab.evaluate(
            "document.activeElement.blur(); document.querySelector('#same').scrollIntoView()"
        )
        tab.press("b")
        assert tab.evaluate(view) == ["place", "place"]
        tab.evaluate("scrollTo(0, 0)")
        tab.press("b")  # no gallery is in sight
        assert tab.evaluate(view) == ["place", "place"]
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.faults == []
