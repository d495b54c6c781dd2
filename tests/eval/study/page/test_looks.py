"""A study's page with all its sections in Chromium: from phone to wide screen, light, dark and on paper."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.study.report.analysis import analyse
from eval.study.report.page import render, report
from eval.study.report.pictures import pictures_of
from shards import charts
from tests.eval.browser import BROWSER, Page
from tests.eval.report.tab import Tab
from tests.eval.study.handmade import fill, open_study
from tests.eval.study.page.test_pictures import reconstructed
from tests.eval.study.page.test_settled import SCALES, axis

pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium")
SECTIONS = {
    "verdict", "differences", "values", "settled", "steps", "pictures", "lost", "before", "cost", "differ", "losses",
    "how", "export",
}  # fmt: skip
PAPER = 717  # pixels between the margins of A4
CONTROLS = "nav, fieldset, select, input, dialog, button.save, [data-copy], .screen"
COLOUR = "getComputedStyle(document.documentElement).getPropertyValue('--c0').trim()"


def seen(selector: str, yes: bool = True) -> str:
    """An expression: how many elements are shown, or are not."""
    return f"[...document.querySelectorAll('{selector}')].filter(e => e.checkVisibility() === {json.dumps(yes)}).length"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a study of two scored steps, with what another study chose for each entry."""
    folder = tmp_path_factory.mktemp("looks")
    names = {"flux": "flux", "flux-trained-end-to-end-with-a-longer-name-than-most": "flux-e2e"}
    panel = {
        "reconstructions": {
            name: str(reconstructed(folder / name, i)) for i, name in enumerate(names)
        }
    }
    study = open_study(folder, entries=names, checkpoints=[20, 50, 100], panel=panel)
    fill(study, (1.0, 2.0))
    data: dict[str, Any] = report(study, pictures=8)
    chosen = [axis("guidance_scale", SCALES, [1.0, 2.0, 3.0], 2, "largest")]
    data["settled"] = [
        {"entry": name, "scorer": "any", "better": "higher", "prompts": 15, "axes": chosen}
        for name in study.entries
    ]
    data["whole"] = {key: data[key] for key in ("prompts", "scores", "comparisons")}
    loss = charts.curves("Training loss", [("flux", [(1.0, 1.0), (100.0, 0.5)])])
    page = render(data, pictures_of(study, analyse(study), 8), [loss])
    assert {ident for ident in Page(page).ids if ident in SECTIONS} == SECTIONS
    return page.replace('loading="lazy"', "")  # so that pictures are there when the page is loaded


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_on_a_screen(html: str, tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing is asked for, no script fails, nothing is wider than the window, all is shown."""
    with Tab(tmp_path, width=width, dark=dark) as tab:
        tab.open(html)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate(COLOUR) == ("#5aa9e0" if dark else "#2a7fb8")
        assert tab.evaluate(seen("main h2")) == len(SECTIONS)
        assert tab.evaluate(seen("main h2", False)) == 0
        assert tab.evaluate(seen("nav a")) == len(SECTIONS)
        assert tab.evaluate(seen(".gallery .controls")) == 2
        pictures = "[...document.images].filter(image => image.naturalWidth > 0).length"
        assert tab.evaluate(pictures) == html.count("<img") == 8 * 2 + 6 * 5
        assert tab.faults == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_paper(html: str, tmp_path: Path, dark: bool) -> None:
    """Light whatever the reader prefers, without controls, all that is folded open, no table cut off."""
    with Tab(tmp_path, width=PAPER, dark=dark) as tab:
        tab.open(html)
        assert tab.evaluate(seen(CONTROLS)) > 0
        assert tab.evaluate(seen("details > :not(summary)")) == 0
        tab.media("print", dark)
        assert tab.evaluate(COLOUR) == "#2a7fb8"
        assert tab.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
        assert tab.evaluate(seen(CONTROLS)) == 0
        assert tab.evaluate(seen("details > :not(summary)")) >= 3
        assert tab.evaluate(seen("details > :not(summary)", False)) == 0
        assert tab.evaluate(seen("main h2")) == len(SECTIONS)
        assert tab.evaluate("document.documentElement.scrollWidth") == PAPER
        cut = "[...document.querySelectorAll('.wide, pre')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert tab.evaluate(cut) == 0
        lines = "getComputedStyle(document.querySelector('#latex')).whiteSpace"
        assert tab.evaluate(lines) == "pre-wrap"
        titles = tab.evaluate("[...document.querySelectorAll('main h2')].map(e => e.textContent)")
        printed = tab.paper()
        assert tab.faults == []
    assert printed.startswith(b"%PDF")
    outline = re.findall(rb"/Title \(([^)]*)\)", printed)  # of the headings that are on a sheet
    assert {title.encode() for title in titles} <= set(outline)
    assert 3 <= len(re.findall(rb"/Type /Page\b", printed)) <= 12
