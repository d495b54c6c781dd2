"""The page of a report as a reader sees it: pictures, charts, folded parts, on a phone too."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from eval.prompts.prompts import Prompt, Prompts
from eval.report.entries import unique_names
from eval.report.orders import spread
from eval.report.page import as_text, render
from eval.report.report import report
from shards import charts
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.sets import PROMPTS, make_items, make_score, make_set, training

N = len(PROMPTS.items)


LARGE = """() => {
  const [first, second] = document.querySelectorAll('.pictures button'), press = key =>
    document.querySelector('dialog').dispatchEvent(new KeyboardEvent('keydown', {key}));
  const text = () => [...document.querySelectorAll('dialog .bar span, dialog figcaption, dialog .current img')].map(
    element => element.textContent || element.alt);
  const seen = [];
  second.click(); seen.push(text());
  press('ArrowLeft'); seen.push(text());
  press('ArrowDown'); seen.push(text());
  const dialog = document.querySelector('dialog'), modal = dialog.matches(':modal');
  dialog.close();
  return {seen, modal, open: dialog.open};
}"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_picture_opens_large_with_its_prompt_and_both_sets(tmp_path: Path) -> None:
    for i, name in enumerate(("plain", "e2e")):
        make_score(make_set(tmp_path / name, seed=i), "acc", make_items([0.5] * N))
    report([tmp_path / "plain", tmp_path / "e2e"], tmp_path / "r.html", pictures=6)
    found = in_browser(
        (tmp_path / "r.html").read_text(), tmp_path, dark=False, width=1280, extra=LARGE
    )
    first, left, down = found["seen"]
    assert first == ['1 of 6: prompt <6> & "more" (counting)', "plain", first[2], "e2e"]
    assert first[2].startswith("e2e: prompt <6>")
    assert left == [first[0], left[1], "plain", "e2e"]
    assert left[1].startswith("plain: prompt <6>")
    assert down[0] == '2 of 6: prompt <7> & "more" (colors)'
    assert (found["modal"], found["open"], found["faults"]) == (True, False, [])


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of six sets with three scores, two of them between 0 and 1."""
    top = tmp_path_factory.mktemp("six")
    random = np.random.default_rng(2)
    for i in range(6):
        settings = {"vae": str(i) * 64, "weights": str(i) * 64}
        make_set(top / f"set-{i}", settings, seed=i, trained=training())
        values = random.uniform(0.3, 0.5, N) + 0.05 * i
        for scorer, scale in (("acc", 1), ("share", 1), ("points", 20)):
            make_score(top / f"set-{i}", scorer, make_items(scale * values))
    report([top / f"set-{i}" for i in range(6)], top / "r.html", pictures=9)
    return (top / "r.html").read_text()


SCROLLED = """() => {
  const frame = document.querySelector('.pictures.aligned').parentElement, box = element =>
    element.getBoundingClientRect();
  frame.scrollTop = 200; frame.scrollLeft = 150;
  const columns = [...frame.querySelectorAll('.row')].map(row =>
    [...row.children].map(cell => Math.round(box(cell).left)).join(' '));
  return {columns: [...new Set(columns)], rows: columns.length, scrolled: [frame.scrollTop, frame.scrollLeft],
          above: box(frame.querySelector('.heads')).top - box(frame).top};
}"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_columns_of_six_sets_are_aligned_below_their_names(six: str, tmp_path: Path) -> None:
    """On a phone they scroll in their own frame, and the names stay in sight."""
    found = in_browser(six, tmp_path, dark=True, width=390, extra=SCROLLED)
    assert found["wide"] == 390
    assert found["rows"] == 1 + 9
    (places,) = found["columns"]  # the same of all rows
    assert len(set(places.split())) == 6
    assert found["scrolled"] == [200, 150]
    assert abs(found["above"]) < 1
    assert found["faults"] == []


def test_differences_lie_on_one_scale(six: str) -> None:
    """Scores between 0 and 1 share an axis; each other score has its own, of all comparisons."""
    titles = re.findall(r'aria-label="([^"]*): differences"', six)
    assert titles == ["Scores between 0 and 1", "points"]
    shares = six.partition('aria-label="Scores between 0 and 1: differences"')[2].partition(
        "</svg>"
    )[0]
    assert shares.count("<circle") == 2 * 5
    assert shares.count("better +") == 1  # one axis


def test_settings_that_are_the_same_are_folded(six: str) -> None:
    folded = six.partition("<summary>Settings: what is the same</summary>")
    shown = folded[0].partition("<summary>Settings: what differs</summary>")[2]
    assert re.findall(r'class="differs"><th scope="row">(\w+)', shown) == ["vae", "weights"]
    assert 'scope="row">guidance_scale' in folded[2]
    assert 'scope="row">guidance_scale' not in shown


def test_all_pages_have_one_style_and_one_script() -> None:
    """What a page adds of its own would differ from the others."""
    templates = [*Path("eval").rglob("*.j2")]
    assert len(templates) > 5
    own = ("<style", "<script", "<!doctype", "<html", "<body")
    assert [(path, tag) for path in templates for tag in own if tag in path.read_text()] == []
    first, second = charts.page("<a>", "<p>a</p>"), charts.document("b", "<p>b</p>")
    heads = [page.partition("</title>")[2].partition("<body>")[0] for page in (first, second)]
    scripts = [page.partition("<script>")[2] for page in (first, second)]
    assert heads[0] == heads[1] != ""
    assert scripts[0] == scripts[1] != ""
    assert "<title>&lt;a&gt;</title>" in first
    assert not re.search("transition|animation|scroll-behavior", first)  # nothing moves by itself
    assert "<header><h1>b</h1></header><main><p>b</p></main>" in second


@pytest.mark.parametrize(
    ("groups", "most", "expected"),
    [
        ("aaaaaaaaaa", 2, [2, 7]),
        ("aaaabbbbbbbb", 4, [1, 3, 6, 10]),
        ("abbbbbb", 4, [0, 2, 4, 6]),  # a small group leaves its share to the other
        ("abcdef", 2, [1, 4]),  # more groups than pictures
        ("ab", 24, [0, 1]),
        ("ab", 0, []),
    ],
)
def test_every_nth_prompt_of_all_groups_is_shown(
    groups: str, most: int, expected: list[int]
) -> None:
    prompts = [Prompt(str(i), f"prompt {i}", group=group) for i, group in enumerate(groups)]
    assert [int(prompt.id) for prompt in spread(prompts, most)] == expected


def test_scores_over_steps_have_bands() -> None:
    points = [
        [10, {"value": 1.0, "low": 0.5, "high": 1.5}],
        [20, {"value": 2.0, "low": 1.0, "high": 3.0}],
    ]
    data = {
        "confidence": 0.95, "sections": [], "sweeps": [],
        "curves": [{"scorer": "acc", "run": "runs/a", "points": points}],
    }  # fmt: skip
    page = Page(render(data, []))
    (band,) = page.all("polygon")
    assert band["class"] == "band"
    assert len((band["points"] or "").split()) == 4


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_folded_parts_are_printed_and_wide_tables_lie_across(six: str, tmp_path: Path) -> None:
    """The three tables of groups have eleven columns, and two of them are folded on the screen."""
    (tmp_path / "r.html").write_text(six)
    subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chrome",
         f"--print-to-pdf={tmp_path}/r.pdf", f"file://{tmp_path}/r.html"],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", (tmp_path / "r.pdf").read_bytes())
    assert sum(float(width) > float(height) for width, height in boxes) == 3
    assert len(boxes) > 3


def test_many_large_pictures_make_a_small_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Prompts("few", PROMPTS.items[:6])
    make_set(tmp_path / "a", prompts=few, side=260)
    monkeypatch.setattr(
        "eval.report.gallery.MOST_BYTES", 30_000
    )  # six of 256 pixels, of noise, take 200,000
    report([tmp_path / "a"], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.all("img")) == 6
    assert {a["width"] for a in page.all("img")} <= {"64", "96"}
    assert (tmp_path / "r.html").stat().st_size < 50_000
    assert {a["data-full"] for a in page.all("button")} == {"260 x 260"}


def test_pictures_are_whole_where_the_page_has_room(tmp_path: Path) -> None:
    """So that a click shows them in their own size."""
    make_set(tmp_path / "a", prompts=Prompts("few", PROMPTS.items[:2]), side=300)
    report([tmp_path / "a"], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert {(a["width"], a["height"]) for a in page.all("img")} == {("300", "300")}
    assert not any("data-full" in a for a in page.all("button"))


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = ("x/flux/geneval", "y/flux/geneval", "y/sd/geneval")
    assert unique_names([tmp_path / n for n in names]) == list(names)
    assert unique_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_scores_without_an_interval_are_said_on_the_terminal(tmp_path: Path) -> None:
    """As a table with what the page says, and why there is no verdict."""
    for name in ("a", "b"):
        make_set(tmp_path / name)
        make_score(tmp_path / name, "clipscore", make_items([1.0] * len(PROMPTS.items)))
        for path in (tmp_path / name / "scores").glob("*.items.jsonl"):
            path.unlink()
    data = report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html")
    text = as_text(data["sections"][0])
    assert "2 sets of pictures" in text
    assert "clipscore" in text.splitlines()[1]
    assert "No verdict by clipscore: neither set has clipscore.items.jsonl" in text
