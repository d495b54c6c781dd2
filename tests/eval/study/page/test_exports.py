"""What a reader takes along from a study: tables, files and charts."""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval.errors import BadReport
from eval.study.report.exports import COLUMNS, as_csv, downloads, latex, refuse_other_csv
from eval.study.report.page import render, report
from eval.study.study import Study
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.study.handmade import OTHER, PRIMARY, fill, open_study

Json = dict[str, Any]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("exports")
    names = {"flux": "flux", "e2e": "flux-e2e", "sd_35": "other"}
    study = fill(open_study(folder, entries=names), (0.0, 0.5, -0.01))
    report(study, pictures=0)
    return study


@pytest.fixture
def data(study: Study) -> Json:
    record: Json = json.loads((study.out / "study.json").read_text())
    return record


@pytest.fixture
def halved(data: Json) -> Json:
    """The same with settings that were chosen on half A, and all scores of the whole set larger by 1."""
    whole: Json = json.loads(json.dumps({key: data[key] for key in ("scores", "comparisons")}))
    for score in whole["scores"]:
        for entry in score["entries"]:
            entry["over_seeds"]["value"] += 1
    for difference in whole["comparisons"][0]["differences"]:
        difference.pop("p_adjusted", None)
    data["primary"]["scorer"] += "-half-b"
    scores = data["scores"] + [d for c in data["comparisons"] for d in c["differences"]]
    for score in scores:
        score["scorer"] += "-half-b"
    return data | {"prompts": 15, "whole": whole | {"prompts": 30}}


# LaTeX --------------------------------------------------------------------------------------------

SPECIAL = re.compile(r"(?<!\\)[&%#_^~]")  # in text, without a backslash


def cells_of(line: str) -> list[str]:
    """The cells of a row of a tabular."""
    assert line.endswith(r" \\"), line
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def columns_of(cells: list[str]) -> int:
    return sum(int(m[1]) if (m := re.match(r"\\multicolumn{(\d+)}", cell)) else 1 for cell in cells)


def check_tabular(table: str) -> list[list[str]]:
    """Checks that a tabular would be set without an error; returns its rows."""
    lines = [line for line in table.splitlines() if not line.startswith("%")]
    begin = re.fullmatch(r"\\begin{tabular}{([lcr]+)}", lines[0])
    assert begin
    assert lines[-1] == r"\end{tabular}"
    rules = [line for line in lines[1:-1] if re.match(r"\\(top|mid|bottom|cmid)rule", line)]
    kinds = [line.split("rule")[0] for line in rules]
    assert kinds in (["\\top", "\\cmid", *n * ["\\mid"], "\\bottom"] for n in (1, 2))
    for first, last in re.findall(r"\\cmidrule\(lr\){(\d+)-(\d+)}", table):
        assert 1 < int(first) < int(last) <= len(begin[1])
    rows = [cells_of(line) for line in lines[1:-1] if line not in rules]
    for row in rows:
        assert columns_of(row) == len(begin[1]), row
        for cell in row:
            plain = re.sub(r"\\[{}$]", "", cell)
            assert plain.count("$") % 2 == 0, cell
            assert plain.count("{") == plain.count("}"), cell
            text = re.sub(r"\$[^$]*\$", "", plain)
            assert not SPECIAL.search(text), cell
    return rows


def test_the_table_for_latex_has_means_differences_and_p(data: Json) -> None:
    table = latex(data)
    rows = check_tabular(table)
    assert [row[0] for row in rows[2:]] == ["flux", "e2e", r"sd\_35"]
    assert rows[2][2] == rows[2][4] == "--"
    difference = next(d for d in data["comparisons"][1]["differences"] if d["scorer"] == PRIMARY)
    cell = rows[4][2]
    value, low, high = (difference["value"][key] for key in ("value", "low", "high"))
    assert (
        cell
        == f"${value:+.3g}\\ [{low:+.3g},\\ {high:+.3g}]$, $p = {difference['p_adjusted']:.2g}$"
    )
    assert difference["p_adjusted"] >= difference["p"]
    assert "after Holm's adjustment over 2 entries" in table
    assert f"% p of {PRIMARY} is" in table


def test_the_table_for_latex_has_both_the_half_and_the_whole_set(halved: Json) -> None:
    table = latex(halved)
    rows = check_tabular(table)
    assert PRIMARY in rows[0][1]
    assert "half-b" not in table
    places = [i for i, row in enumerate(rows) if len(row) == 1]
    labels = [rows[i][0].removeprefix(r"\multicolumn{5}{l}{").removesuffix("}") for i in places]
    whole = "all 30 prompts: contains the half that settings were chosen on"
    assert labels == ["half B: 15 prompts", whole]
    names = ["flux", "e2e", r"sd\_35"]
    assert [row[0] for row in rows[3:6]] == [row[0] for row in rows[7:]] == names
    scores = halved["scores"][0]["entries"]
    for row, rise in (rows[4], 0), (rows[8], 1):
        value = scores[1]["over_seeds"]["value"] + rise
        assert row[1].startswith(f"${value:.4g}\\ ")
    assert f"% p of {PRIMARY} of half B is after Holm's adjustment over 2 entries" in table
    assert "the verdict is by half B, none by the rows of all prompts" in table
    halved["whole"] |= {"scores": [], "comparisons": []}  # before whole sets are scored
    assert check_tabular(latex(halved))[8] == ["e2e", *4 * ["--"]]


@pytest.mark.parametrize(
    "name", ["a_b%", "x & y", "50 $ #1", "{", "}", "^~", "\\", "two\nlines", "<a>"]
)
def test_names_are_escaped(data: Json, name: str) -> None:
    for entry in data["entries"]:
        entry["name"] = name
    for score in data["scores"]:
        score["scorer"] = data["primary"]["scorer"] = name
    data["baseline"] = name
    check_tabular(latex(data))


def test_large_small_and_absent_numbers(data: Json) -> None:
    first = data["scores"][0]["entries"]
    first[0]["over_seeds"] = {"value": 123456.0, "low": 1234.0, "high": 1e-7, "count": 3}
    first[1]["over_seeds"] = {"value": -1.5, "low": None, "high": None, "count": 3}
    first[2]["over_seeds"] = None
    for difference in data["comparisons"][0]["differences"]:
        difference["value"] = None
    rows = check_tabular(latex(data))
    large = r"$1.235\times 10^{5}\ [1{,}234,\ 1\times 10^{-7}]$"
    assert [row[1] for row in rows[2:]] == [large, "$-1.5$", "--"]
    assert rows[3][2] == "--"


def test_an_unfinished_study_has_a_table_too(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert as_csv(report(study)) == ",".join(COLUMNS) + "\n"
    assert 'id="latex"' not in (study.out / "report.html").read_text()
    fill(study, (0.0, 0.5), skip=[("e2e", seed) for seed in study.seeds])
    rows = check_tabular(latex(report(study)))
    assert rows[3] == ["e2e", *4 * ["--"]]


# Files --------------------------------------------------------------------------------------------


def test_the_csv_file_has_every_score_and_difference(study: Study, data: Json) -> None:
    rows = list(csv.DictReader(io.StringIO((study.out / "study.csv").read_text())))
    scores = [row for row in rows if row["what"] == "score"]
    differences = [row for row in rows if row["what"] == "difference"]
    assert len(scores) == 2 * 3 * (3 + 1)
    assert len(differences) == 2 * 2 * (3 + 1)
    assert {(row["scorer"], row["better"], row["primary"]) for row in rows} == {
        (PRIMARY, "higher", "true"), (OTHER, "lower", "false"),
    }  # fmt: skip
    entry = data["scores"][0]["entries"][1]
    mine = {row["seed"]: row for row in scores if (row["scorer"], row["entry"]) == (PRIMARY, "e2e")}
    assert float(mine["2"]["value"]) == entry["by_seed"]["2"]["value"]
    assert float(mine[""]["high"]) == entry["over_seeds"]["high"]
    assert {row["step"] for row in rows} == {"100"}
    assert {row["prompts"] for row in rows} == {"all"}
    ends = [row for row in differences if row["scorer"] == PRIMARY and not row["seed"]]
    assert [row["p_adjusted"] != "" for row in ends] == [True, True]


def test_the_csv_file_has_both_the_half_and_the_whole_set(data: Json, halved: Json) -> None:
    def lines(prompts: str) -> list[dict[str, str]]:
        return [
            row for row in csv.DictReader(io.StringIO(as_csv(halved))) if row["prompts"] == prompts
        ]

    half, whole = lines("half B"), lines("all: contains the half that settings were chosen on")
    assert len(half) == len(whole) == (2 * 3 + 2 * 2) * (3 + 1)
    assert {row["scorer"] for row in half} == {f"{PRIMARY}-half-b", f"{OTHER}-half-b"}
    assert {(row["scorer"], row["primary"]) for row in whole} == {
        (PRIMARY, "false"),
        (OTHER, "false"),
    }
    verdicts = [row for row in half if row["primary"] == "true" and row["p_adjusted"]]
    assert [row["entry"] for row in verdicts] == ["e2e", "sd_35"]
    value = data["scores"][0]["entries"][1]["over_seeds"]["value"]
    (mean,) = (
        float(row["value"]) for row in whole
        if (row["what"], row["scorer"], row["entry"], row["seed"]) == ("score", PRIMARY, "e2e", "")
    )  # fmt: skip
    assert mean == pytest.approx(value + 1)


def test_a_table_of_an_earlier_report_is_replaced(study: Study, tmp_path: Path) -> None:
    """Tables did not always say of which prompts they are."""
    path = tmp_path / "study.csv"
    path.write_text((study.out / "study.csv").read_text().replace(",prompts\n", "\n", 1))
    refuse_other_csv(path)
    path.write_text("what,scorer\n")
    with pytest.raises(BadReport):
        refuse_other_csv(path)


def test_the_csv_file_has_every_step(tmp_path: Path) -> None:
    data = report(fill(open_study(tmp_path, checkpoints=[50, 100]), (1.0, 2.0)), pictures=0)
    rows = list(csv.DictReader(io.StringIO(as_csv(data))))
    steps = [row["step"] for row in rows if row["what"] == "score"]
    assert (steps.count("50"), steps.count("100")) == (2 * 2 * 4, 2 * 2 * 4)


def test_the_page_holds_both_files(study: Study, data: Json) -> None:
    page = Page((study.out / "report.html").read_text())
    texts = {
        link["download"]: b64decode((link["href"] or "").split("base64,")[1]).decode()
        for link in page.all("a")
        if "download" in link
    }
    assert [*texts] == ["fair-study.csv", "fair-study.json"]
    assert texts["fair-study.csv"] == (study.out / "study.csv").read_text()
    assert json.loads(texts["fair-study.json"] or "") == data


def test_a_password_is_not_hidden_in_base64(data: Json) -> None:
    data["note"] = "from s3://user:secret@host/a.tar"
    data["commands"] = ["encode s3://user:secret@host/a.tar"]
    for address in downloads(data).values():
        assert "secret" not in b64decode(address.split("base64,")[1]).decode()
    assert "secret" in data["note"]  # of study.json itself, which is as it was


def test_a_foreign_table_is_not_replaced(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.out.mkdir()
    (study.out / "study.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadReport, match=r"study\.csv: found a file that is no table of ours"):
        report(study)
    assert [path.name for path in study.out.iterdir()] == ["study.csv"]


# In a browser -------------------------------------------------------------------------------------

SAVE = """() => {
  const files = [], names = [], copied = [], Real = Blob;
  window.Blob = function (parts) { files.push(parts[0]); return new Real(parts); };
  HTMLAnchorElement.prototype.click = function () { names.push(this.download); };
  document.querySelectorAll('button.save').forEach(button => button.click());
  Object.defineProperty(navigator, 'clipboard', {value: {writeText: text => copied.push(text)}});
  const button = document.querySelector('[data-copy]');
  button.click();
  return {files, names, copied, visible: button.getBoundingClientRect().height > 0,
    buttons: document.querySelectorAll('button.save').length, left: document.querySelectorAll('.light').length};
}"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_charts_are_saved_and_the_table_is_copied(study: Study, data: Json, tmp_path: Path) -> None:
    """A file needs nothing of the page, and is in light colours though the page is dark."""
    curve = '<figure class="curves"><figcaption>Loss<span class="name"><span class="chip" style="background:var(--c1)">'
    curve += '</span>e2e</span></figcaption><svg viewBox="0 0 480 240" role="img" aria-label="Loss, over steps">'
    curve += '<g style="color:var(--c1)"><polyline points="70,9 90,50"/></g></svg></figure>'
    facts = in_browser(render(data, curves=[curve]), tmp_path, dark=True, width=390, extra=SAVE)
    assert facts["faults"] == []
    assert facts["wide"] == 390
    assert (facts["left"], facts["visible"], facts["copied"]) == (0, True, [latex(data)])
    assert facts["names"] == [
        f"{PRIMARY}-differences-from-flux.svg", f"{OTHER}-differences-from-flux.svg",
        "Loss-over-steps.svg",
    ]  # fmt: skip
    for text in facts["files"]:
        svg = ElementTree.fromstring(text)
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        assert "currentcolor" not in text.casefold()
        assert not any({"class", "style"} & element.attrib.keys() for element in svg.iter())
    title, name = (text for text in ElementTree.fromstring(facts["files"][-1]).itertext())
    assert (title, name) == ("Loss, over steps", "e2e")
    assert "rgb(210, 105, 30)" in facts["files"][-1]  # --c1 of the light scheme, #d2691e
    assert "rgb(240, 149, 90)" not in facts["files"][-1]
