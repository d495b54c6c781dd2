"""Scores over steps, and the time to quality, on the page of a study."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.study.report.page import report
from tests.eval.browser import Page
from tests.eval.study.handmade import fill, open_study

Json = dict[str, Any]


def test_time_to_quality_is_on_the_page_where_steps_are_scored(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path, checkpoints=[20, 30, 50, 100]), (1.0, 2.0))
    for i, (name, seconds) in enumerate(zip(study.entries, (2, 4), strict=True)):
        for seed in study.seeds:
            run = study.run_folder(name, seed)
            run.mkdir(parents=True)
            start = {
                "world": 1,
                "device": "H200",
                "flops_a_sample": 10 + i,
                "flops_a_text_token": 1,
            }
            records = [
                {"step": 0, "start": start},
                {
                    "step": 100,
                    "position": 3200,
                    "samples_per_second": 3200 / (100 * seconds),
                    "text_tokens": 5,
                },
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = report(study, pictures=0)
    (record,) = data["time_to_quality"]
    units = {unit["unit"]: unit for unit in record["units"]}
    assert [*units] == ["steps", "samples", "FLOPs", "hours", "GPU hours"]
    # scores are 1 + gap x share of the steps: the entry has the baseline's last value half way
    assert units["steps"]["ratio"]["value"] == pytest.approx(2, rel=0.1)
    steps = units["steps"]["ratio"]["value"]
    assert units["FLOPs"]["ratio"]["value"] == pytest.approx(steps * 15 / 16)
    assert units["hours"]["ratio"]["value"] == pytest.approx(steps / 2)
    assert (record["outcome"], units["hours"]["outcome"]) == ("sooner", "not resolved")
    assert record["sentence"] in Page((study.out / "report.html").read_text()).text


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
