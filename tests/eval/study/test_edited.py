"""What somebody moved, edited, damaged or deleted in the folder of a study that has run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eval.errors import OutputEdited, StudyChanged
from eval.study.checks import preflight
from eval.study.earlier import refuse_changed
from eval.study.report.analysis import analyse
from eval.study.report.sets import recorded_names
from eval.study.run import edited
from eval.study.run.claims import Claim
from eval.study.run.edited import refuse_edited
from eval.study.run.workers import Worker
from eval.study.status import states
from eval.study.study import Study
from shards import sha256_file
from tests.eval.study.small_study import study, study_yaml
from tests.eval.study.workers.small_worker import small_yaml

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
    assert recorded_names(copied)["demo-acc"].made
    preflight(copied)


def edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def scores(study: Study) -> Path:
    (path,) = (study.out / SET / "scores").glob("*.json")
    return path


def changed(text: str) -> str:
    """Another number in place of the first one: what an editor leaves, JSON and YAML as before."""
    return re.sub(r"(: ?)(\d)", r"\g<1>1\2", text, count=1)


RUN_CONFIG, METRICS = "runs/other/config.yaml", "runs/other/metrics.jsonl"
CONFIG = "configs/other.yaml"
SMALL_FILES = [
    *(f"{SET}/scores/demo-acc*{end}" for end in (".json", ".items.jsonl")), f"{SET}/manifest.json",
    f"{SET}/prompts.json", RUN_CONFIG, METRICS, f"{TRAIN}/manifest.json", CONFIG, "configs/encode.yaml", "study.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL_FILES)
def test_small_files_that_were_edited_are_refused(copied: Study, name: str) -> None:
    refuse_edited(copied)
    (path,) = copied.out.glob(name)
    before = path.read_bytes()
    edit(path, (lambda text: text + " ") if name.endswith("prompts.json") else changed)
    with pytest.raises(OutputEdited, match=re.escape(str(path))) as error:
        refuse_edited(copied)
    assert error.value.exit_code == 2
    path.write_bytes(before)
    refuse_edited(copied)
    path.unlink()  # what is missing is made again
    refuse_edited(copied)


def test_an_edit_is_refused_before_anything_is_written(copied: Study) -> None:
    """With everything that was changed, and what to do; and what is removed is made again."""
    names = [f"{SET}/scores/demo-acc*.json", RUN_CONFIG, CONFIG]
    paths = [next(copied.out.glob(name)) for name in names]
    then = sha256_file(paths[0])
    for path in paths:
        edit(path, changed)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(copied.out.rglob("*"))}
    result = study("run", copied.path, "--out", copied.out)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith(
        f"OutputEdited: {copied.out}: files that this study made were changed"
    )
    digests = f"found sha256 {sha256_file(paths[0])[:16]}…, expected {then[:16]}…"
    assert f"  {paths[0]}, of {SCORED}: {digests}" in lines
    assert re.search(rf"{paths[1]}, of {TRAINED}: found sha256 ", result.stderr)
    assert re.search(rf"{paths[2]}: \S+: found 1(\d+), expected \1", result.stderr)
    assert "Put back what was there. Or remove what is to be made again" in result.stderr
    assert "begins:" not in result.stdout + result.stderr
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(copied.out.rglob("*"))}
    assert after == before
    planned = study("plan", copied.path, "--out", copied.out)
    assert "`study run` will refuse: " in planned.stdout
    for path in (paths[0], paths[2]):
        path.unlink()
    shutil.rmtree(paths[1].parent)
    result = study("run", copied.path, "--out", copied.out)
    assert result.returncode == 0, result.stdout + result.stderr
    output = result.stdout + result.stderr
    assert [line for line in output.splitlines() if "begins: " in line and "plain" in line] == []
    assert f"begins: {TRAINED}" in output
    assert all(path.is_file() for path in paths)


def test_what_a_killed_command_left_is_no_edit(copied: Study) -> None:
    """A node whose command has begun has no record until that ends, and a failed one has another exit code."""
    path = scores(copied)
    edit(path, changed)
    record = copied.log(SCORED).with_suffix(".json")
    text = record.read_text()
    record.unlink()
    refuse_edited(copied)
    assert undone(copied) == {SCORED}
    record.write_text(text.replace('"exit_code":0', '"exit_code":-9'))
    refuse_edited(copied)
    record.write_text(text)
    with pytest.raises(OutputEdited):
        refuse_edited(copied)


def test_what_another_worker_has_just_begun_again_is_no_edit(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes the record first, and the session before it writes configs."""
    edit(scores(copied), changed)

    def removed(path: Path) -> str:
        copied.log(SCORED).with_suffix(".json").unlink(missing_ok=True)
        return sha256_file(path)

    monkeypatch.setattr(edited, "sha256_file", removed)
    refuse_edited(copied)
    edit(copied.out / CONFIG, changed)
    with pytest.raises(OutputEdited):
        refuse_edited(copied)
    read = edited.read_yaml

    def begun(path: Path) -> object:
        (copied.out / edited.SESSION).unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(edited, "read_yaml", begun)
    refuse_edited(copied)


def test_a_training_that_was_gone_on_with_by_hand_is_no_edit(copied: Study) -> None:
    """The trainer writes the config of the run anew: that of the study as it is now."""
    path = copied.out / RUN_CONFIG
    now = yaml.safe_load(path.read_text()) | {"log_every": 3}
    path.write_text(yaml.safe_dump(now, sort_keys=False))
    with pytest.raises(OutputEdited):
        refuse_edited(copied)
    yaml_path = study_yaml(copied.path.parent, "logs", **{"with": ["log_every=3"]})
    config = Study.open(yaml_path, copied.out)
    values = config.train_config("other", 0).model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    refuse_edited(config)


def test_lines_behind_the_metrics_of_a_training_are_no_edit(copied: Study) -> None:
    """The trainer writes one whenever it is started again, also beyond the training's end."""
    path = copied.out / METRICS
    text = path.read_text()
    path.write_text(f'{text}{{"step": 6, "start": {{"world": 1}}}}\n{{"step": 8}}\n')
    refuse_edited(copied)
    for other in (changed(text), text.partition("\n")[2], text[: text.rindex("{")]):
        path.write_text(other)
        with pytest.raises(OutputEdited, match=f"{METRICS}, of {TRAINED}: found sha256 "):
            refuse_edited(copied)


def test_a_worker_that_is_killed_while_it_writes_configs_leaves_no_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the YAML is another one by the next run."""
    out = tmp_path / "out"
    first = Worker(Study.open(small_yaml(tmp_path), out), 60)
    first.join()
    first.leave()
    refuse_edited(first.study)
    write = Claim.write

    def killed(claim: Claim, path: Path, data: bytes) -> None:
        if path.name == "b.yaml":
            raise KeyboardInterrupt
        write(claim, path, data)

    other = Study.open(small_yaml(tmp_path, "other", **{"with": ["log_every=7"]}), out)
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            Worker(other, 60).join()
    third = Study.open(small_yaml(tmp_path, "third", seeds=[0, 1]), out)
    refuse_edited(third)
    worker = Worker(third, 60)
    worker.join()
    worker.leave()
    edit(out / "configs/a.yaml", changed)
    for study_now in (third, other):
        with pytest.raises(OutputEdited, match=r"configs/a\.yaml: "):
            refuse_edited(study_now)


@pytest.mark.parametrize("verb", ["run", "report", "gc"])
def test_items_of_which_two_were_exchanged_are_used_by_nothing(copied: Study, verb: str) -> None:
    """They add up to the score as before, but no interval or difference of prompts would be of the pictures."""
    path = scores(copied).with_suffix(".items.jsonl")
    items = [json.loads(line) for line in path.read_text().splitlines()]
    low, high = items[0], items[1]
    low["value"], high["value"] = high["value"] + 0.25, low["value"] - 0.25
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert undone(copied) == set()
    result = study(verb, copied.path, "--out", copied.out)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("OutputEdited: ")
    assert f"{path}, of {SCORED}: found sha256 " in result.stderr
    assert not (copied.out / "report.html").exists()
    said = study("status", copied.path, "--out", copied.out).stdout
    assert f"`study run` will refuse: {copied.out}: files that this study made were changed" in said


def test_scores_that_were_edited_are_open(copied: Study) -> None:
    edit(scores(copied), lambda text: text.replace('"value":', '"value":1', 1))
    assert undone(copied) == {SCORED}


def test_items_that_were_edited_are_no_score(copied: Study) -> None:
    """`run` refuses them; what is missing is scored again."""
    lines = scores(copied).with_suffix(".items.jsonl")
    items = [json.loads(line) for line in lines.read_text().splitlines()]
    items[0]["value"] += 0.5
    lines.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert undone(copied) == {SCORED}
    lines.write_text("no JSON")
    assert undone(copied) == {SCORED}
    with pytest.raises(OutputEdited, match=re.escape(str(lines))):
        refuse_edited(copied)
    lines.unlink()
    refuse_edited(copied)
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


def test_a_score_by_former_flags_gives_no_verdict(copied: Study) -> None:
    """It is missing, as `status` says, until `study run` has scored the sets by the flags of now."""
    before = analyse(copied).data
    assert before["complete"]
    scorers = ({"demo-acc": {"batch_size": 3}},)
    changed = replace(copied, config=copied.config.model_copy(update={"scorers": scorers}))
    assert recorded_names(changed) == {"demo-acc": (set(), {before["primary"]["scorer"]})}
    data = analyse(changed).data
    missing = {(record["entry"], record["what"]) for record in data["missing"]}
    assert missing == {(entry, "demo-acc") for entry in copied.entries}
    assert data["primary"] == {"asked": "demo-acc", "scorer": None}
    assert [verdict["outcome"] for verdict in data["verdicts"]] == ["no verdict"]
