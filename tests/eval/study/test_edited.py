"""What somebody moved, edited, damaged or deleted in the folder of a study that has run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.errors import StudyChanged
from eval.study.checks import preflight
from eval.study.earlier import refuse_changed
from eval.study.report.sets import recorded_names
from eval.study.status import states
from eval.study.study import Study
from tests.eval.study.small_study import study_yaml

pytestmark = pytest.mark.timeout(900)  # the study before it is a dozen processes
TRAIN, SET = "runs/other/checkpoints/step-00000006", "images/other-seed0/step-00000006"
TRAINED, MADE = "train/other/seed0", "generate/other/seed0/step-00000006"
SCORED = "score/demo-acc/other/seed0/step-00000006"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Study:
    shutil.copytree(made / "out", tmp_path / "out")
    return Study.open(study_yaml(made, "copied"), tmp_path / "out")


def undone(study: Study) -> set[str]:
    return {name for name, done in states(study).items() if not done}


def test_a_folder_that_was_moved_is_as_it_was(copied: Study) -> None:
    assert undone(copied) == set()
    assert recorded_names(copied)["demo-acc"]
    preflight(copied)


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def scores(study: Study) -> Path:
    (path,) = (study.out / SET / "scores").glob("*.json")
    return path


def test_scores_that_were_edited_are_made_again(copied: Study) -> None:
    edit(scores(copied), lambda text: text.replace('"value":', '"value":1', 1))
    assert undone(copied) == {SCORED}


def test_items_that_were_edited_are_scored_again(copied: Study) -> None:
    lines = scores(copied).with_suffix(".items.jsonl")
    items = [json.loads(line) for line in lines.read_text().splitlines()]
    items[0]["value"] += 0.5
    lines.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert undone(copied) == {SCORED}
    lines.write_text("no JSON")
    assert undone(copied) == {SCORED}


@pytest.mark.parametrize("scores", [5, [5], {"a": 1}, None])
def test_a_log_that_was_edited_is_no_record(copied: Study, scores: object) -> None:
    path = copied.log(SCORED).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": scores}))
    assert undone(copied) == {SCORED}
    recorded_names(copied)
    path.write_text("[]")
    assert undone(copied) == {SCORED}


@pytest.mark.parametrize("name", ["manifest.json", "ema.safetensors"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: os.truncate(p, 9)])
def test_a_checkpoint_that_is_damaged_is_trained_again(
    copied: Study, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copied.out / TRAIN / name)
    assert TRAINED in undone(copied)
    refuse_changed(copied)  # from the checkpoint before it


def test_what_only_going_on_needs_may_be_deleted(copied: Study) -> None:
    for path in (copied.out / TRAIN).iterdir():
        if path.name not in ("manifest.json", "ema.safetensors"):
            path.unlink()
    assert undone(copied) == set()


def test_a_run_of_another_study_is_not_taken_for_ones_own(copied: Study) -> None:
    runs = copied.out / "runs"
    shutil.rmtree(runs / "other")
    shutil.copytree(runs / "plain", runs / "other")
    with pytest.raises(StudyChanged, match=r"runs/other:\n *data\S+encoder.weights: other weights"):
        preflight(copied)
