"""Losses of the validation by noise level: of each entry's runs, and over the linear reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from eval.study.report import losses
from eval.study.report.page import report
from eval.study.study import Study
from tests.eval.browser import Page
from tests.eval.study.handmade import fill, open_study

Json = dict[str, Any]
# the middles of eighths of 1,000 levels at shift 3: 3u / (1 + 2u), with u = 0.063, 0.188 ... from the noisy end
SIGMAS = [3 * u / (1 + 2 * u) for u in (0.938 - 0.125 * i for i in range(8))]


def loss(entry: int, seed: int, step: int) -> float:
    return (1 + entry + 0.1 * seed) * 100 / step


def validation(entry: int, seed: int, step: int, reference: bool) -> Json:
    levels = [loss(entry, seed, step) * (1 + i) for i in range(8)]
    record: Json = {"loss": sum(levels) / 8, "normalised": 0.5, "levels": levels}
    if reference:
        record |= {"levels_over_reference": [x / 10 for x in levels], "over_reference": 0.1 * step}
    return record


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """The second entry's last seed has no linear reference; each run goes on beyond the study's end."""
    study = fill(open_study(tmp_path), (0.0, 0.5))
    for i, name in enumerate(study.entries):
        for seed in study.seeds:
            run = study.run_folder(name, seed)
            run.mkdir(parents=True)
            records: list[Json] = [{"step": 10, "loss": 1.0}]
            records += [
                {"step": step, "validation": validation(i, seed, step, not (i and seed == 2))}
                for step in (50, 100, 200)
            ]
            text = "".join(json.dumps(record) + "\n" for record in records)
            (run / "metrics.jsonl").write_text(text)
    return study


def ends(drawing: str) -> tuple[int, int]:
    """How many lines and bands a chart has."""
    figure = ElementTree.fromstring(drawing)
    return len(figure.findall(".//polyline")), len(figure.findall(".//polygon"))


def test_validations_are_in_the_json(study: Study) -> None:
    data = report(study, pictures=0)
    assert json.loads((study.out / "study.json").read_text())["validation"] == data["validation"]
    runs = {(run["entry"], run["seed"]): run for run in data["validation"]}
    assert len(runs) == 2 * 3
    run = runs["e2e", 1]
    assert run["step"] == 100  # not 200
    assert run["levels"] == pytest.approx([2.1 * (1 + i) for i in range(8)])
    assert run["levels_over_reference"] == pytest.approx([0.21 * (1 + i) for i in range(8)])
    assert run["over_reference"] == [[50, 5.0], [100, 10.0]]
    assert run["sigmas"] == pytest.approx(SIGMAS, abs=2e-3)
    assert runs["e2e", 2]["levels_over_reference"] is None


def test_charts_are_by_sigma_and_over_steps(study: Study) -> None:
    data = report(study, pictures=0)
    ratio, error, over_steps = losses.by_sigma(data)
    assert "over the linear reference, by noise level, at step 100" in ratio
    assert "squared error, at step 100" in error
    assert ">sigma</text>" in ratio
    assert [ends(drawing) for drawing in (ratio, error, over_steps)] == [(2, 2)] * 3
    text = Page((study.out / "report.html").read_text()).text
    assert "Only a loss\nover its linear reference may be set beside another's" in text
    absent = {"levels_over_reference": None, "over_reference": []}
    data["validation"] = [run | absent for run in data["validation"]]
    assert len(losses.by_sigma(data)) == 1


def test_a_study_without_validations_has_none(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path, seeds=[0]), (0.0, 0.5))
    data = report(study, pictures=0)
    assert data["validation"] == []
    assert losses.by_sigma(data) == []
    assert 'id="losses"' not in (study.out / "report.html").read_text()
