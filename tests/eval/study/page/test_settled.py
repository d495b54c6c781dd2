"""Settings that were chosen for each entry, on the page of a study."""

from __future__ import annotations

import json
import re
from math import log
from pathlib import Path
from typing import Any

import pytest

from eval.study.report.exports import latex
from eval.study.report.figures import settled, whole_set
from eval.study.report.page import render, report
from eval.study.report.settled import beyond
from shards import charts
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.study.handmade import PRIMARY, fill, open_study

Json = dict[str, Any]
SCALES = [1.5, 3.0, 6.0]
WHOLE = "contains the half that settings were chosen on"


def value(x: float) -> Json:
    return {"value": x, "low": x - 0.1, "high": x + 0.1, "count": 15}


def axis(
    name: str, values: list[float], scores: list[float], chosen: int, edge: str | None
) -> Json:
    return {
        "axis": name, "scorer": f"{PRIMARY}-half-a", "better": "higher", "prompts": 15, "values": values,
        "over_seeds": [value(x) for x in scores], "by_seed": [{"0": value(x)} for x in scores],
        "chosen": chosen, "edge": edge, "accepted": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The JSON of a study at one setting, to which the choices of another are added."""
    study = fill(open_study(tmp_path_factory.mktemp("settled")), (0.0, 0.5))
    report(study, pictures=0)
    data: Json = json.loads((study.out / "study.json").read_text())
    return data


@pytest.fixture
def data(made: Json) -> Json:
    data: Json = json.loads(json.dumps(made))
    flux = [axis("guidance_scale", SCALES, [1.0, 2.0, 1.5], 1, None)]
    e2e = [axis("guidance_scale", SCALES, [3.0, 2.5, 2.0], 0, "smallest")]
    flux.append(axis("ema", [0.05, 0.1], [2.0, 2.1], 1, "largest"))
    about = {"scorer": f"{PRIMARY}-half-a", "better": "higher", "prompts": 15}
    data["settled"] = [
        {"entry": "flux", **about, "axes": flux},
        {"entry": "e2e", **about, "axes": e2e},
    ]
    data["whole"] = {key: data[key] for key in ("prompts", "scores", "comparisons")}
    data["differ"]["settings"]["guidance_scale"] = [3.0, 1.5]
    return data


def test_a_study_at_one_setting_has_no_such_section(made: Json) -> None:
    for nothing in ({}, {"settled": []}, {"settled": [], "whole": None}):
        data = {k: v for k, v in made.items() if k not in ("settled", "whole")} | nothing
        page = render(data)
        assert "half A" not in latex(data)
        assert "chosen for each entry" not in page.casefold()
        assert WHOLE not in page


def test_each_axis_has_a_chart_with_the_chosen_values_marked(data: Json) -> None:
    section = settled(data)
    assert section is not None
    guidance, ema = section["axes"]
    assert [e["value"] for e in guidance["entries"]] == [3.0, 1.5]
    assert (ema["entries"][0]["value"], ema["entries"][1]) == (0.1, None)  # still to be chosen
    width = charts.CURVES_WIDTH - 8 - charts.LEFT
    places = re.findall(r'<circle class="ring" cx="([\d.]+)"', guidance["drawing"])
    middle = charts.LEFT + width * log(3.0 / 1.5) / log(6.0 / 1.5)
    assert [float(x) for x in places] == pytest.approx([middle, charts.LEFT], abs=0.1)
    assert guidance["drawing"].count('class="band"') == 2
    numbers = re.findall(r'text-anchor="(?:start|middle|end)">([\d.]+)</text>', guidance["drawing"])
    assert numbers[-3:] == ["1.5", "3", "6"]  # those that were tried


def test_the_page_says_what_was_chosen_on_what(data: Json) -> None:
    page = Page(render(data))
    text = re.sub(r"\s+", " ", page.text)
    assert "settled" in page.ids
    assert (
        "Each entry has its own guidance scale and length of the average: that with the best mean over training "
        f"seeds, by {PRIMARY} on half A of the prompts (15)."
    ) in text
    assert "the verdict and the scores below are of half B" in text
    assert "e2e: the guidance scale chosen, 1.5, is the smallest that was tried." in text
    assert "flux: the length of the average chosen, 0.1, is the largest that was tried." in text
    assert "3 of 1.5 to 62 [1.9, 2.1]" in text.replace("\u00a0", " ")
    assert "guidance_scale of the pictures chosen for each entry" in text
    assert text.index("half B") < text.index("Differences from")
    assert (
        "% settings were chosen for each entry on half A of the prompts: the verdict is by half B"
        in latex(data)
    )


def test_a_learning_rate_is_said_to_be_chosen_by_the_loss(data: Json) -> None:
    """Not by the score on half A of the prompts; also while one entry has nothing else yet."""
    loss = {"scorer": "validation loss", "better": "lower", "prompts": None}
    rate = axis("lr", [1e-4, 1e-3, 1e-2], [0.5, 0.4, 0.6], 1, None) | loss
    flux, e2e = data["settled"]
    flux |= {"axes": [rate], **loss}
    e2e["axes"].insert(0, rate)
    text = re.sub(r"\s+", " ", Page(render(data)).text)
    head = "Each entry has its own learning rate and guidance scale: that with the best mean over training seeds, by "
    assert (
        f"{head}{PRIMARY} on half A of the prompts (15); the learning rate by the validation loss. The"
        in text
    )
    data |= {"settled": [flux], "whole": None}
    text = re.sub(r"\s+", " ", Page(render(data)).text)
    assert (
        "learning rate: that with the best mean over training seeds, by the validation loss. "
        in text
    )


def test_an_edge_that_was_accepted_is_a_plain_note(data: Json) -> None:
    lines = "e2e: the guidance scale chosen, 1.5, is the smallest that was tried{}. A better one may lie beyond{}."
    warned = []
    for accepted in (False, True):
        data["settled"][1]["axes"][0]["accepted"] = accepted
        page = Page(render(data))
        expected = (
            (", and was accepted as it is", "") if accepted else ("", ": widen its range in settle")
        )
        assert lines.format(*expected) in page.text
        assert "smallest tried, accepted" in page.text or not accepted
        warned.append(len([p for p in page.all("p") if p.get("class") == "warn"]))
    assert warned == [warned[1] + 1, warned[1]]


def test_what_an_accepted_edge_leaves_open_is_said_once_an_axis(data: Json) -> None:
    assert beyond(data["settled"]) == []
    for record in data["settled"]:
        record["axes"][0]["accepted"] = True
    (line,) = beyond(data["settled"])
    assert line.startswith("values of guidance_scale beyond")


def test_entries_with_equal_choices_are_told_apart(data: Json) -> None:
    data["settled"][0]["axes"] = data["settled"][1]["axes"]
    text = Page(render(data)).text
    for name in ("flux", "e2e"):
        assert f"{name}: the guidance scale chosen, 1.5, is the smallest that was tried." in text
    assert "half-a" not in text.casefold()


def test_the_whole_set_is_labelled(data: Json) -> None:
    rows = whole_set(data)
    assert [(row["scorer"], row["entry"]) for row in rows[:2]] == [
        (PRIMARY, "flux"),
        (PRIMARY, "e2e"),
    ]
    assert rows[0]["difference"] is None
    expected = data["comparisons"][0]["differences"]
    assert rows[1]["difference"] in [difference["value"] for difference in expected]
    text = re.sub(r"\s+", " ", Page(render(data)).text)
    assert f"On all 30 prompts {WHOLE}" in text
    del data["whole"]
    assert whole_set(data) == []


def test_a_learning_rate_is_chosen_by_a_loss(data: Json) -> None:
    rate = axis("lr", [1e-4, 3e-4, 1e-3], [0.5, 0.4, 0.6], 1, None)
    rate |= {"scorer": "validation loss", "better": "lower", "prompts": None}
    for value in rate["over_seeds"]:
        value["low"] = value["high"] = None
    data["settled"] = [
        {
            "entry": name,
            "scorer": "validation loss",
            "better": "lower",
            "prompts": None,
            "axes": [rate],
        }
        for name in ("flux", "e2e")
    ]
    data["whole"] = None
    data["differ"]["training"]["optim.lr"] = [3e-4, 1e-4]
    section = settled(data)
    assert section is not None
    assert section["settings"] == ["optim.lr"]
    assert "band" not in section["axes"][0]["drawing"]
    text = re.sub(r"\s+", " ", Page(render(data)).text)
    assert "half" not in text.split("Differences from")[0].split("Verdict")[-1]
    assert "optim.lr chosen for each entry" in text


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
@pytest.mark.parametrize(("dark", "width"), [(True, 390), (False, 1280)])
def test_in_a_browser(data: Json, tmp_path: Path, dark: bool, width: int) -> None:
    facts = in_browser(render(data), tmp_path, dark=dark, width=width)
    assert (facts["wide"], facts["faults"]) == (width, [])
