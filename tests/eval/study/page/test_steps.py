"""Scores over steps, and the time to quality, on the page of a study."""

from __future__ import annotations

import json
import re
import shutil
from math import log
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval.study.report.figures import over_steps
from eval.study.report.page import report
from eval.study.study import Study
from shards import charts
from tests.eval.browser import BROWSER, Page, in_browser
from tests.eval.study.handmade import fill, open_study

Json = dict[str, Any]


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study scored at four steps, of which each took 2 s for the first entry and 4 s for the second."""
    folder = tmp_path_factory.mktemp("timed")
    study = fill(open_study(folder, checkpoints=[20, 30, 50, 100]), (1.0, 2.0))
    for i, (name, seconds) in enumerate(zip(study.entries, (2, 4), strict=True)):
        start = {"world": 1, "device": "H200", "flops_a_sample": 10 + i, "flops_a_text_token": 1}
        rate = 3200 / (100 * seconds)
        last = {"step": 100, "position": 3200, "samples_per_second": rate, "text_tokens": 5}
        for seed in study.seeds:
            run = study.run_folder(name, seed)
            run.mkdir(parents=True)
            records = [{"step": 0, "start": start}, last]
            (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    report(study, pictures=0)
    return study


def read(study: Study) -> Json:
    data: Json = json.loads((study.out / "study.json").read_text())
    return data


def test_time_to_quality_is_on_the_page_where_steps_are_scored(timed: Study) -> None:
    (record,) = read(timed)["time_to_quality"]
    units = {unit["unit"]: unit for unit in record["units"]}
    assert [*units] == ["steps", "samples", "FLOPs", "hours", "GPU hours"]
    # scores are 1 + gap x share of the steps: the entry has the baseline's last value half way
    assert units["steps"]["ratio"]["value"] == pytest.approx(2, rel=0.1)
    steps = units["steps"]["ratio"]["value"]
    assert units["FLOPs"]["ratio"]["value"] == pytest.approx(steps * 15 / 16)
    assert units["hours"]["ratio"]["value"] == pytest.approx(steps / 2)
    assert (record["outcome"], units["hours"]["outcome"]) == ("sooner", "not resolved")
    assert record["sentence"] in Page((timed.out / "report.html").read_text()).text


def test_scores_are_drawn_over_steps_samples_flops_and_hours(timed: Study) -> None:
    data = read(timed)
    samples = timed.train_config("flux", 0).global_batch
    costs = {name: data["step_costs"][name] for name in ("flux", "e2e")}
    assert [costs["flux"][u] for u in ("steps", "samples", "FLOPs")] == [1, samples, 15 * samples]
    assert [c["hours"] for c in costs.values()] == pytest.approx([2 / 3600, 4 / 3600])
    primary, other = over_steps(data)
    assert [*primary] == [*other] == ["steps", "samples", "FLOPs", "hours"]
    assert ">minutes</text>" in primary["hours"]  # of 400 s
    ends = {}
    for axis in ("steps", "hours"):
        lines = re.findall(r'<polyline points="([^"]*)"', primary[axis])
        ends[axis] = [float(line.split()[-1].split(",")[0]) for line in lines]
    right = charts.CURVES_WIDTH - 8
    assert ends["steps"] == [right, right]
    # the first entry's 200 s of the second's 400 s, on an axis from 40 s to 400 s
    share = log(200 / 40) / log(400 / 40)
    assert ends["hours"] == pytest.approx(
        [charts.LEFT + share * (right - charts.LEFT), right], abs=0.1
    )


def test_the_level_and_both_places_are_marked_by_the_primary_score_alone(timed: Study) -> None:
    data = read(timed)
    (record,) = data["time_to_quality"]
    primary, other = over_steps(data)
    assert "whisker" not in other["steps"]
    width = charts.CURVES_WIDTH - 8 - charts.LEFT

    def across(step: float) -> float:
        return charts.LEFT + width * log(step / 20) / log(100 / 20)

    svg = ElementTree.fromstring(primary["steps"]).find("svg")
    assert svg is not None
    ring, dot = (float(c.attrib["cx"]) for c in svg.iter("circle"))
    (steps,) = (unit for unit in record["units"] if unit["unit"] == "steps")
    assert (ring, dot) == pytest.approx(
        (across(steps["baseline"]), across(steps["entry"])), abs=0.1
    )
    assert dot < ring
    (whisker,) = (p.attrib["d"] for p in svg.iter("path") if p.attrib["class"] == "whisker")
    start, stop = re.findall(r"^M([\d.]+) .*?H([\d.]+)", whisker)[0]
    low, high = (steps["baseline"] / steps["ratio"][key] for key in ("high", "low"))
    assert float(start) == pytest.approx(across(low), abs=0.1)
    assert float(stop) == pytest.approx(across(high), abs=0.1)


SWITCH = """() => {
  const radios = [...document.querySelectorAll('[name=axis]')];
  const shown = () => [...document.querySelectorAll('[class^=over]')].filter(
    drawing => drawing.getBoundingClientRect().height).map(drawing => drawing.className);
  const seen = [shown()];
  for (const radio of radios) { radio.click(); seen.push(shown()); }
  return {seen};
}"""


@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_one_axis_is_shown_at_a_time(timed: Study, tmp_path: Path) -> None:
    """Steps at first, by CSS alone: no script of the page has a part in it."""
    html = (timed.out / "report.html").read_text()
    facts = in_browser(html, tmp_path, dark=False, width=390, extra=SWITCH)
    assert facts["seen"] == [2 * [f"over{i}"] for i in (0, 0, 1, 2, 3)]
    assert (facts["wide"], facts["faults"]) == (390, [])
    assert "axis" not in html[html.rindex("<script>") :]


def test_an_axis_that_is_not_known_of_all_is_left_out(tmp_path: Path) -> None:
    data = report(fill(open_study(tmp_path, checkpoints=[50, 100]), (1.0, 2.0)), pictures=0)
    assert [[*axes] for axes in over_steps(data)] == 2 * [["steps", "samples"]]
    assert report(fill(open_study(tmp_path), (1.0, 2.0)), pictures=0)["step_costs"] == {}


@pytest.mark.parametrize(
    ("values", "gaps", "message"),
    [
        ({"seeds": [0, 1]}, (1.0, 2.0), "2 training seeds are too few"),
        ({"baseline": "e2e"}, (-1.0, 1.0), "does not get better from step 20 to 100"),
    ],
)
def test_a_study_without_time_to_quality_says_why(
    tmp_path: Path, values: Json, gaps: tuple[float, float], message: str
) -> None:
    study = fill(open_study(tmp_path, checkpoints=[20, 50, 100], **values), gaps)
    (record,) = report(study, pictures=0)["time_to_quality"]
    assert (record["outcome"], record["units"]) == (None, [])
    assert message in record["sentence"]


def test_a_score_that_is_missing_at_a_checkpoint_is_named(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path, checkpoints=[20, 50, 100]), (1.0, 2.0))
    shutil.rmtree(study.set_folder("flux", 0, 50))
    (record,) = report(study, pictures=0)["time_to_quality"]
    assert record["sentence"] == (
        "No time to quality for e2e: flux, seed 0, has no score at step 50."
    )
