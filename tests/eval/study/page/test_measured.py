"""`study online`: steps that encode beside steps that read columns, measured and on the page."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from encode.config import EncodeConfig
from encode.run.job import run as encode
from eval.commands import main
from eval.errors import MissingPictures
from eval.study.plan.online import FORMAT, VERSION, _digest, as_text, measured
from eval.study.report.page import report
from eval.study.study import Study
from shards import atomic_write, seal
from tests.eval.browser import Page
from tests.eval.study import small_study
from tests.eval.study.handmade import fill, open_study

Json = dict[str, Any]


def record_of(study: Study, **entries: Json) -> Json:
    return {
        "format": FORMAT, "version": VERSION, "device": "H200", "ranks": 8, "steps": 10, "rounds": 2,
        "entries": entries or {
            name: {"config": _digest(study, name), "cached": [0.5, 0.4], "online": [1.0, 0.6]}
            for name in study.entries
        },
    }  # fmt: skip


def write(study: Study, record: Json) -> None:
    study.out.mkdir(exist_ok=True)
    atomic_write(study.out / "online.json", seal(record))


def test_the_page_says_what_was_measured_and_how(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5))
    text = "Encoding in every step was not measured: python -m eval study online"
    assert report(study, pictures=0)["cost"]["measured"] is None
    assert text in Page((study.out / "report.html").read_text()).text
    write(study, record_of(study))
    cost = report(study, pictures=0)["cost"]["measured"]
    assert (cost["device"], cost["ranks"], cost["steps"], cost["rounds"]) == ("H200", 8, 10, 2)
    for entry in cost["entries"]:
        assert (entry["cached"], entry["online"]) == pytest.approx((0.45, 0.8))
        assert entry["times"] == {
            "value": pytest.approx(sqrt(2 * 1.5)),
            "low": pytest.approx(1.5),
            "high": 2.0,
            "count": 2,
        }
    page = Page((study.out / "report.html").read_text()).text
    assert text not in page
    assert (
        "Measured with study online on H200 (8 processes): each entry's own training, 10 steps"
        in page
    )
    assert "1.732 [1.5,\u00a02]" in page
    assert "1.73 (1.5 to 2)" in as_text(record_of(study))


def test_an_entry_whose_training_is_another_now_has_no_figures(tmp_path: Path) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5))
    own = {"cached": [0.5], "online": [1.0]}
    write(
        study,
        record_of(
            study, flux={"config": _digest(study, "flux"), **own}, e2e={"config": "0" * 64, **own}
        ),
    )
    first, second = report(study, pictures=0)["cost"]["measured"]["entries"]
    assert (first["times"]["value"], second) == (2.0, None)
    page = Page((study.out / "report.html").read_text()).text
    assert "An entry without figures was not measured as its config is now." in page


def test_seeds_and_logging_are_not_part_of_a_training_that_is_measured(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    other = open_study(tmp_path, seeds=[5], **{"with": ["log_every=7", "keep=9"]})
    changed = open_study(tmp_path, **{"with": ["micro_batch=1"]})
    assert _digest(study, "flux") == _digest(other, "flux") != _digest(changed, "flux")
    assert _digest(study, "flux") != _digest(study, "e2e")


def test_a_damaged_record_costs_the_page_these_figures_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = fill(open_study(tmp_path), (0.0, 0.5))
    write(study, record_of(study))
    path = study.out / "online.json"
    path.write_bytes(path.read_bytes().replace(b"H200", b"H100"))
    assert measured(study) is None
    assert "online.json" in caplog.text
    assert "Measure again with `study online`" in caplog.text
    assert report(study, pictures=0)["verdicts"][0]["outcome"] == "better"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars, models, and the columns of both entries."""
    folder = small_study.write_inputs(tmp_path_factory.mktemp("measured"))
    base = {
        "root": str(folder / "cache"), "sources": {"pets": str(folder / "0.tar")}, "shard_rows": 1024,
        "engine": {"executor": "inline", "device": "cpu", "batch": 8},
    }  # fmt: skip
    other = {
        "kind": "moments",
        "encoder": small_study.vae(folder, "other"),
        "resolution": small_study.SIDE,
    }
    assert encode(EncodeConfig.model_validate(base | {"columns": {"other": other}})) == 0
    return folder


def test_a_study_without_its_tars_measures_nothing(inputs: Path, tmp_path: Path) -> None:
    path = small_study.study_yaml(inputs, entries={"plain": "plain", "other": "other"})
    command = [
        "study",
        "online",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--tars",
        str(tmp_path),
    ]
    with pytest.raises(MissingPictures, match=r"0.tar: no such file.*--tars"):
        main(command)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_both_ways_are_measured(inputs: Path, tmp_path: Path) -> None:
    path = small_study.study_yaml(inputs, entries={"plain": "plain", "other": "other"})
    words = ["--out", tmp_path / "out", "--tars", inputs, "--steps", 2, "--rounds", 1]
    result = small_study.study("online", path, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "times as long" in result.stdout
    record = json.loads((tmp_path / "out/online.json").read_text())
    assert (record["device"], record["steps"], record["rounds"]) == ("cpu", 2, 1)
    for entry in record["entries"].values():
        assert len(entry["cached"]) == len(entry["online"]) == 1
        assert min(entry["cached"] + entry["online"]) > 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["online.json"]
    study = Study.open(path, tmp_path / "out")
    cost = measured(study)
    assert cost is not None
    assert None not in cost["entries"]


@pytest.mark.slow
def test_a_training_that_fails_is_said_with_its_log(inputs: Path, tmp_path: Path) -> None:
    """As for want of memory: here a batch that the rows do not fill."""
    path = small_study.study_yaml(
        inputs, entries={"plain": "plain", "other": "other"}, **{"with": ["micro_batch=3"]}
    )
    words = ["--out", tmp_path / "out", "--tars", inputs, "--steps", 1, "--rounds", 1]
    result = small_study.study("online", path, *words)
    assert result.returncode == 2
    assert "NotMeasured: plain: a training that reads columns ended with code 2" in result.stderr
    assert "micro_batch" in result.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["logs"]
    assert "micro_batch" in (tmp_path / "out/logs/online-plain.log").read_text()
