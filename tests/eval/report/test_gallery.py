"""Pictures side by side: which prompts, in which order, within how many bytes; and the controls of a
gallery under real keys and fingers.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.images.imageset import ImageSetReader, ImageSetWriter
from eval.prompts.prompts import Prompt, Prompts
from eval.report.compare import Entry
from eval.report.entries import open_one
from eval.report.gallery import Gallery, gallery
from eval.report.orders import PromptScores, distance, prompt_scores
from eval.report.page import template
from shards import charts
from tests.eval.browser import BROWSER
from tests.eval.report.tab import Tab
from tests.eval.sets import PROMPTS, make_items, make_score, make_set

Sets = Sequence[tuple[str, ImageSetReader]]
N = len(PROMPTS.items)


def sets_of(folder: Path, names: Sequence[str], prompts: Prompts = PROMPTS, side: int = 24) -> Sets:
    return [
        (name, ImageSetReader.open(make_set(folder / name, prompts=prompts, seed=i, side=side)))
        for i, name in enumerate(names)
    ]


def scores_of(values: Mapping[str, Sequence[float]], higher: bool = True) -> PromptScores:
    by_entry = {
        name: {prompt.id: value for prompt, value in zip(PROMPTS.items, numbers, strict=True)}
        for name, numbers in values.items()
    }
    return PromptScores("acc", higher, (0, 1), by_entry)


def ids(shown: Gallery) -> list[int]:
    return [int(record["id"]) for record in shown.pictures]


def in_order(shown: Gallery, order: int) -> list[int]:
    return [int(r["id"]) for r in sorted(shown.pictures, key=lambda r: r["ranks"][order])]


def html_of(shown: Gallery) -> str:
    folder = Path("eval/report")
    macros: Any = template(folder / "gallery.html.j2").module
    return charts.document("A gallery", macros.show(shown, "some"))


def test_those_that_differ_most_come_first_beside_a_fair_sample(tmp_path: Path) -> None:
    a, b = np.zeros(N), np.zeros(N)
    b[[5, 11, 17]] = 3, 1, 2  # b leads
    a[[7, 23]] = 2.5, 0.5
    shown = gallery(
        sets_of(tmp_path, "ab"), 8, scores=scores_of({"a": a.tolist(), "b": b.tolist()})
    )
    sample = [int(record["id"]) for record in shown.pictures if record["sample"]]
    assert len(sample) == 4
    leading = [i for i in ids(shown) if i not in sample]
    # in turn the prompt in which a leads most, and b does, of those that are not in the sample
    assert {5, 7, 17, 23} - set(sample) <= set(leading)
    assert ids(shown)[:3] == [5, 7, 17]
    assert shown.orders == [
        "most different acc first",
        "best for a first",
        "best for b first",
        "as in the list of prompts",
    ]
    assert in_order(shown, 1)[:2] == [7, 23]
    assert in_order(shown, 2)[:2] == [5, 17]
    assert in_order(shown, 3) == sorted(ids(shown))
    first = shown.pictures[0]["pictures"]
    assert [picture["note"] for picture in first] == ["0", "3"]
    assert "mean over 2 training seeds" in shown.chosen
    page = html_of(shown)
    assert page.count('<span class="badge">sample</span>') == 4


def test_lower_may_be_better_and_three_entries_lead_in_turn(tmp_path: Path) -> None:
    values = {name: np.full(N, 1.0) for name in "abc"}
    for i, name in enumerate("abc"):
        values[name][[20 + i, 25 + i]] = 0.5, 0.2
    scores = scores_of({name: v.tolist() for name, v in values.items()}, higher=False)
    assert [p.id for p in scores.leading(PROMPTS.items, 4)] == ["025", "026", "027", "020"]
    assert scores.lead("a", "025") == pytest.approx(0.8)
    assert scores.lead("b", "025") == pytest.approx(-0.8)
    assert scores.difference("025") == pytest.approx(0.8)


def test_all_prompts_are_no_sample(tmp_path: Path) -> None:
    flat = scores_of({"a": [0.0] * N, "b": [1.0] * N})
    shown = gallery(sets_of(tmp_path, "ab"), 99, scores=flat)
    assert len(shown.pictures) == N
    assert not any(record["sample"] for record in shown.pictures)
    assert "all that every set has" in shown.chosen


def test_scores_of_prompts_are_means_over_shared_seeds(tmp_path: Path) -> None:
    """Of three seeds two are shared; a prompt that an item is missing of has no value."""
    entries = []
    for i, name in enumerate(("a", "b")):
        members: dict[int | None, Any] = {}
        for seed in range(3 - i):
            folder = make_set(tmp_path / f"{name}{seed}", {"weights": f"{i}{seed}" * 32})
            items = make_items([10.0 * i + seed + p / 100 for p in range(N)])
            make_score(folder, "acc", items[: N - seed * i], unit=100.0)
            members[seed] = open_one(folder)
        entries.append(Entry(name, members))
    scores = prompt_scores(entries, "acc")
    assert scores is not None
    assert (scores.seeds, scores.higher) == ((0, 1), True)
    assert scores.by_entry["a"]["004"] == pytest.approx(100 * (0.5 + 0.04))
    assert scores.by_entry["b"]["004"] == pytest.approx(100 * (10.5 + 0.04))
    assert {*scores.by_entry["a"]} == {*scores.by_entry["b"]} == {f"{p:03d}" for p in range(N - 1)}
    assert prompt_scores(entries[:1], "acc") is None
    (tmp_path / "b1/scores/acc.items.jsonl").unlink()
    left = prompt_scores(entries, "acc")
    assert left is not None
    assert left.seeds == (0,)
    assert left.by_entry["b"]["004"] == pytest.approx(100 * (10 + 0.04))
    (tmp_path / "a0/scores/acc.items.jsonl").unlink()
    assert prompt_scores(entries, "acc") is None


def test_without_scores_the_most_different_pictures_come_first(tmp_path: Path) -> None:
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((16, 16, 3), 40, np.uint8)
    assert distance([black, grey]) == 40
    assert distance([black, grey, grey + np.uint8(30)]) == 70
    assert distance([grey]) == 0
    shown = gallery(sets_of(tmp_path, "ab"), 6, by_difference=True)
    files = [[tmp_path / name / f"images/{i:03d}.png" for name in "ab"] for i in ids(shown)]
    pairs = [distance([np.asarray(Image.open(path)) for path in pair]) for pair in files]
    assert pairs == sorted(pairs, reverse=True)
    assert shown.orders == ["most different pixels first", "as in the list of prompts"]
    assert "pixels" in shown.chosen
    plain = gallery(sets_of(tmp_path, "ab"), 6)
    assert ids(plain) == sorted(ids(shown))
    assert plain.orders[0] == "as in the list of prompts"


def test_what_a_reconstruction_lost_is_below_it(tmp_path: Path) -> None:
    rows, sets = Prompts("rows", (Prompt("0", "key"),)), {}
    for name, colour in (("original", (90, 100, 250)), ("vae", (100, 100, 50))):
        writer = ImageSetWriter(tmp_path / name, rows, {})
        writer.save(writer.files[0], [np.full((64, 64, 3), colour, np.uint8)])
        writer.finish({})
        sets[name] = ImageSetReader.open(tmp_path / name)
    psnr, originals = {"vae": {"0": 12.34}}, {"vae": sets["original"]}
    shown = gallery(list(sets.items()), 1, psnr=psnr, originals=originals)
    first, second = shown.pictures[0]["pictures"]
    assert (first["lost"], second["note"]) == ("", "12.3 dB")
    data = base64.b64decode(second["lost"].partition(",")[2])
    lost = np.asarray(Image.open(io.BytesIO(data)), int)
    assert lost.shape == (64, 64, 3)
    assert abs(lost - (4 * 10, 0, 255)).max() < 20  # as WebP keeps colours


def test_a_page_of_553_prompts_and_six_sets_has_a_bound(tmp_path: Path) -> None:
    """The smallest pictures, and of these as many prompts as there is room for, evenly apart."""
    prompts = Prompts("many", tuple(Prompt(f"{i:03d}", f"prompt {i}") for i in range(553)))
    sets = sets_of(tmp_path, "a", prompts, side=80)
    bytes_ = 60_000
    shown = gallery([(str(i), sets[0][1]) for i in range(6)], 553, most_bytes=bytes_)
    uris = [p["uri"] for record in shown.pictures for p in record["pictures"]]
    assert 0.5 * bytes_ < sum(map(len, uris)) <= bytes_
    assert {p["width"] for p in shown.pictures[0]["pictures"]} == {64}
    assert f"553 were asked for; there is room for {len(shown.pictures)}." in shown.chosen
    gaps = np.diff(ids(shown))
    assert gaps.max() - gaps.min() <= 1
    sizes = [gallery(sets, 20, most_bytes=n).pictures[0]["pictures"][0] for n in (10**6, 90_000)]
    assert [size["width"] for size in sizes] == [80, 64]
    assert len(gallery(sets, 20, most_bytes=90_000).pictures) == 20
    whole = gallery(sets, 4)
    assert "room" not in whole.chosen


VIEW = "document.querySelector('.gallery').dataset.view"
SEEN = """JSON.stringify([...document.querySelectorAll('.gallery figure')].map(figure =>
    [...figure.querySelectorAll('.row button')].filter(b => b.offsetParent).map(b => b.dataset.name).join('')))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three sets, of which a is best in later prompts."""
    folder = tmp_path_factory.mktemp("page")
    values = {"a": [i / N for i in range(N)], "b": [0.5] * N, "c": [0.4] * N}
    return html_of(gallery(sets_of(folder, "abc", side=64), 6, scores=scores_of(values)))


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_key_b_shows_the_sets_in_turn_in_one_place(page: str, tmp_path: Path) -> None:
    with Tab(tmp_path) as tab:
        tab.open(page)
        assert json.loads(tab.evaluate(SEEN)) == ["abc"] * 6
        seen = []
        for _ in range(4):
            tab.press("b")
            seen.append(json.loads(tab.evaluate(SEEN)))
        assert seen == [["a"] * 6, ["b"] * 6, ["c"] * 6, ["a"] * 6]
        assert tab.evaluate("document.querySelector('[type=radio]:checked').value") == "0"
        tab.evaluate("document.querySelector('[type=radio]:checked').focus()")
        tab.press("ArrowRight")  # the radio buttons' own
        assert json.loads(tab.evaluate(SEEN)) == ["b"] * 6
        tab.evaluate("document.querySelector('.order').focus()")
        tab.press("b")  # a letter of the list's
        assert json.loads(tab.evaluate(SEEN)) == ["b"] * 6
        tab.evaluate("document.querySelector('[value=side]').click()")
        assert json.loads(tab.evaluate(SEEN)) == ["abc"] * 6
        assert tab.faults == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_all_pictures_are_seen_without_a_script_and_on_paper(page: str, tmp_path: Path) -> None:
    controls = "document.querySelector('.controls').offsetParent !== null"
    with Tab(tmp_path) as tab:
        tab.open(page)
        assert tab.evaluate(controls)
        tab.call("Emulation.setEmulatedMedia", media="print")
        assert not tab.evaluate(controls)
        assert json.loads(tab.evaluate(SEEN)) == ["abc"] * 6
        tab.call("Emulation.setEmulatedMedia", media="screen")
        tab.evaluate("document.querySelector('[value=slider]').click()")
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert json.loads(tab.evaluate(SEEN)) == ["abc"] * 6
        tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.open(page)
        assert not tab.evaluate(controls)
        assert json.loads(tab.evaluate(SEEN)) == ["abc"] * 6
        assert tab.faults == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_rows_of_many_sets_become_cards_of_one(tmp_path: Path) -> None:
    html = html_of(gallery(sets_of(tmp_path, "abcde"), 6))
    heads, cards = (f"document.querySelector('{name}')" for name in (".heads", ".pictures"))
    columns = f"getComputedStyle({cards}).gridTemplateColumns.split(' ').length"
    with Tab(tmp_path) as tab:
        tab.open(html)
        assert tab.evaluate(f"{heads}.offsetParent !== null")
        tab.press("b")
        assert tab.evaluate(f"{heads}.offsetParent === null")
        assert tab.evaluate(columns) > 3
        tab.evaluate("document.querySelector('[value=side]').click()")
        assert tab.evaluate(f"{heads}.offsetParent !== null")
        assert tab.faults == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_slider_moves_by_keys_and_by_a_finger(page: str, tmp_path: Path) -> None:
    slider = "document.querySelector('.slide input')"
    left = "document.querySelector('.slide img + img')"
    with Tab(tmp_path, width=390, dark=True) as tab:
        tab.open(page)
        tab.evaluate("document.querySelector('[value=slider]').click()")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert json.loads(tab.evaluate(SEEN)) == [""] * 6
        tab.evaluate(f"{slider}.focus(); {slider}.scrollIntoView({{block: 'center'}})")
        tab.press("ArrowRight", "ArrowRight")
        assert tab.evaluate(f"{slider}.value") == "52"
        assert tab.evaluate(f"getComputedStyle({left}).clipPath") == "inset(0px 48% 0px 0px)"
        assert (
            tab.evaluate(f"{slider}.getAttribute('aria-valuetext')") == "52 % of a, the rest of b"
        )
        assert tab.evaluate(f"getComputedStyle({slider}.parentElement).outlineStyle") == "solid"
        label = tab.evaluate(f"{slider}.getAttribute('aria-label')")
        assert label.startswith("Slider between a and b: prompt <")
        box = tab.evaluate(
            f"(b => [b.x, b.y, b.width, b.height])({slider}.getBoundingClientRect())"
        )
        x, y, width, height = box
        places = [(x + width * share, y + height / 2) for share in (0.3, 0.6, 0.8)]
        tab.touch(*places)
        assert abs(int(tab.evaluate(f"{slider}.value")) - 80) <= 1
        tab.press("b")
        assert tab.evaluate(f"{slider}.value") == "100"
        tab.press("b")
        assert tab.evaluate(f"{slider}.value") == "0"
        chosen = "document.querySelectorAll('.pair select')[1]"
        tab.evaluate(f"{chosen}.selectedIndex = 2; {chosen}.onchange()")
        assert tab.evaluate("document.querySelector('.ends').textContent") == "alargec"
        tab.evaluate(f"{slider}.focus()")
        tab.press("Enter")
        assert tab.evaluate("document.querySelector('dialog').open")
        assert tab.evaluate("document.activeElement.matches('dialog [type=range]')")
        tab.press("ArrowRight")
        assert tab.evaluate("document.activeElement.value") == "1"
        tab.press("Escape")
        assert tab.becomes("document.activeElement.matches('figure [type=range]')", True)
        assert tab.faults == []


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_the_order_may_be_chosen_and_a_large_picture_follows_it(page: str, tmp_path: Path) -> None:
    captions = "[...document.querySelectorAll('.gallery figcaption')].map(c => parseInt(c.textContent.slice(8)))"
    with Tab(tmp_path) as tab:
        tab.open(page)
        orders = []
        for i in range(5):
            tab.evaluate(
                f"(s => {{ s.selectedIndex = {i}; s.onchange(); }})(document.querySelector('.order'))"
            )
            orders.append(tab.evaluate(captions))
        difference, a, b, c, listed = orders
        assert listed == sorted(listed)
        assert a == sorted(listed, reverse=True)
        assert b == c == sorted(listed, key=lambda i: max(i / N, 0.5))
        spread = {i: max(i / N, 0.5) - min(i / N, 0.4) for i in listed}
        assert difference == sorted(listed, key=lambda i: -spread[i])
        tab.evaluate("document.querySelector('.row button').focus()")
        tab.press("Enter")
        title = "document.querySelector('dialog .bar span').textContent"
        assert tab.evaluate(title).startswith(f"1 of 6: prompt <{listed[0]}>")
        pressed = "document.querySelector('dialog [aria-pressed=true]')?.textContent"
        assert tab.evaluate(pressed) == "side by side"
        tab.press("ArrowDown")
        assert tab.evaluate(title).startswith(f"2 of 6: prompt <{listed[1]}>")
        names = "[...document.querySelectorAll('dialog figcaption')].map(c => c.textContent)"
        tab.press("b")
        assert tab.evaluate(names) == ["a"]
        assert tab.evaluate(pressed) is None
        tab.press("ArrowRight")
        assert tab.evaluate(names) == ["b"]
        tab.press("Escape")
        assert not tab.evaluate("document.querySelector('dialog').open")
        assert tab.becomes("document.activeElement.dataset.name", "b")
        assert tab.faults == []
