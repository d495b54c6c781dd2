"""An entry with options of training of its own, from the YAML to the page; and what the page says of the targets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.study.checks import check_pair
from eval.study.earlier import take_over, taken_over
from eval.study.report.page import report
from eval.study.report.targets import target_lines
from eval.study.study import Study
from shards import Column
from tests.eval.study.handmade import fill, open_study
from tests.eval.study.small_study import study, study_yaml
from train.checkpoints.checkpoint import manifest_of


@pytest.mark.timeout(900)  # half a dozen processes, each of which imports torch
def test_an_entry_with_another_prediction_is_trained_sampled_and_said(made: Path) -> None:
    entries = {
        "plain": "plain",
        "latent": {"latents": "plain", "with": ["flow.prediction=latent", "optim.lr=1e-3"]},
    }
    shutil.copytree(made / "out/images", made / "options-images")  # sets are scored where they are
    by_hand = [str(made / "out/runs"), str(made / "options-images")]
    config, out = study_yaml(made, "options", entries=entries, reuse=by_hand), made / "options"
    result = study("run", config, "--out", out, "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    fair = take_over(Study.open(config, out))
    assert "train/plain/seed0" in taken_over(fair)
    check_pair(fair, "latent", 0)
    flows = {
        name: manifest_of(fair.run_folder(name, 0) / "checkpoints/step-00000006")["config"]["flow"]
        for name in entries
    }
    assert {name: flow["prediction"] for name, flow in flows.items()} == {
        "plain": "velocity",
        "latent": "latent",
    }
    data = report(fair)
    differ = data["differ"]["training"]
    assert set(differ) == {"flow.prediction", "optim.lr"}
    assert differ["flow.prediction"] == ["velocity", "latent"]
    (comparison,) = data["comparisons"]
    assert set(comparison["training"]["differ"]) == {"flow.prediction", "optim.lr"}
    line = "each entry with its own target of the model (plain: the velocity; latent: the latent without noise)"
    assert line in data["covers"]
    assert any(
        text.startswith("how much of a difference is the target's") for text in data["leaves_open"]
    )
    page = (out / "report.html").read_text()
    assert line in page
    written = json.loads((out / "study.json").read_text())
    assert written["targets"]["latent"]["prediction"] == "latent"
    moments, height, width = Column.open(made / "cache/pets/plain").layout.row_shape
    assert written["targets"]["latent"]["channels"] == moments // 2
    assert written["targets"]["latent"]["values"] == moments // 2 * height * width


def test_latents_of_different_dimensions_have_one_target(tmp_path: Path) -> None:
    """Of the study's trainings made by hand one has 4 channels, the other 16."""
    data = report(fill(open_study(tmp_path, seeds=[0]), (0.0, 0.5)))
    line = "one target for all, the velocity, though the latents differ in dimension"
    line += " (flux: 4 channels; e2e: 16 channels)"
    assert line in data["covers"]
    assert any(text.startswith("another target (flow.prediction)") for text in data["leaves_open"])
    assert line in (tmp_path / "out/report.html").read_text()


def test_lines_of_targets() -> None:
    def target(prediction: str, channels: int, values: int) -> dict[str, Any]:
        return {"prediction": prediction, "channels": channels, "values": values}

    a, b = target("velocity", 16, 16_384), target("velocity", 32, 2_048)
    assert target_lines({}) == target_lines({"a": a}) == target_lines({"a": a, "b": a}) == ([], [])
    (covered,), (left_open,) = target_lines({"a": a, "b": b})
    assert "(a: 16 channels, 16,384 values; b: 32 channels, 2,048 values)" in covered
    assert "may suit latents of another dimension better" in left_open
    same_channels = target("velocity", 16, 65_536)
    assert target_lines({"a": a, "b": same_channels})[0][0].startswith("one target for all")
    latent = target("latent", 32, 2_048)
    assert (
        "a: the velocity; b: the latent without noise" in target_lines({"a": a, "b": latent})[0][0]
    )
