"""A whole study of small real models, in processes of its own: a column, trainings, pictures, scores, the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from encode.errors import ModelNotUsable
from eval.errors import BadStudy, NoSpace
from eval.study.checks import preflight
from eval.study.earlier import take_over, taken_over
from eval.study.encoders import check_encoders
from eval.study.lock import verify
from eval.study.plan.cost import Assumptions
from eval.study.plan.plan import plan_existing
from eval.study.reuse import column_identity
from eval.study.run.files import write_configs
from eval.study.study import Study
from shards import open_join, sha256_file
from shards.format.atomic import seal
from tests.commands.lines import next_lines
from tests.eval.study.small_study import ROOT, environment, study, study_yaml, vae, write

pytestmark = pytest.mark.timeout(900)  # a study is a dozen processes, each of which imports torch


def test_all_is_made(made: Path) -> None:
    joined = open_join(made / "cache/pets/other", made / "cache/pets/text")
    assert len(joined.valid_rows) == 48
    for name in ("plain", "other"):
        folder = made / f"out/images/{name}-seed0/step-00000006"
        assert json.loads((folder / "manifest.json").read_bytes())["complete"]
        assert len(list((folder / "images").glob("*.png"))) == 6
        assert list((folder / "scores").glob("demo-acc-*.json"))
    report = study("report", made / "fair.yaml", "--out", made / "out")
    assert report.returncode == 0, report.stderr
    assert "other" in report.stdout
    assert json.loads((made / "out/study.json").read_bytes())["format"] == "latentbank-study"
    assert (made / "out/report.html").stat().st_size > 1000


def test_a_finished_study_is_locked(made: Path) -> None:
    lock = json.loads((made / "out/study.lock").read_bytes())
    assert not {"absent"} & set(lock["outputs"].values())
    of_runs = [path for path in lock["outputs"] if path.startswith("runs/")]
    assert [Path(path).name for path in of_runs] == 2 * ["ema.safetensors", "config.yaml"]
    for path in of_runs:
        assert lock["outputs"][path] == sha256_file(made / "out" / path)
    assert verify(Study.open(made / "fair.yaml", made / "out")) == ([], [])


def test_a_second_call_starts_nothing(made: Path) -> None:
    logs = {path: path.stat().st_mtime_ns for path in (made / "out/logs").rglob("*")}
    again = study("run", made / "fair.yaml", "--out", made / "out")
    assert again.returncode == 0, again.stderr
    assert "begins" not in again.stdout + again.stderr
    words = f"report {made}/fair.yaml --out {made}/out"
    assert next_lines(again.stdout) == [f"next: python -m eval study {words}"]
    assert {path: path.stat().st_mtime_ns for path in (made / "out/logs").rglob("*")} == logs


def test_one_more_seed_is_all_that_is_to_be_made(made: Path) -> None:
    """Its hours are those that the first seed took."""
    config = study_yaml(made, "more", seeds=[0, 1])
    plan = plan_existing(Study.open(config, made / "out"), Assumptions())
    todo = plan.to_make()
    assert [cost.node.id for cost in todo] == [
        "train/plain/seed1", "train/other/seed1", "generate/plain/seed1/step-00000006",
        "generate/other/seed1/step-00000006", "score/demo-acc/plain/seed1/step-00000006",
        "score/demo-acc/other/seed1/step-00000006",
    ]  # fmt: skip
    assert all(cost.measured for cost in todo)
    took = json.loads((made / "out/logs/train/plain/seed0.json").read_bytes())["seconds"]
    assert todo[0].gpu_hours == pytest.approx(took / 3600)


def test_what_another_study_made_is_taken_over(made: Path) -> None:
    """And a run of another release is left alone."""
    shutil.copytree(made / "out/runs/plain", made / "old/plain", dirs_exist_ok=True)
    for path in (made / "old/plain/checkpoints").glob("*/manifest.json"):
        record = json.loads(path.read_bytes())
        del record["digest"]
        path.write_bytes(seal(record | {"version": record["version"] + 1}))
    folders = [str(made / name) for name in ("old", "out/runs", "out/images")]
    config = study_yaml(made, "other-folder", reuse=folders)
    by_hand = taken_over(take_over(Study.open(config, made / "second")))
    assert {name: path.relative_to(made / "out").as_posix() for name, path in by_hand.items()} == {
        "train/plain/seed0": "runs/plain", "train/other/seed0": "runs/other",
        "generate/plain/seed0/step-00000006": "images/plain-seed0/step-00000006",
        "generate/other/seed0/step-00000006": "images/other-seed0/step-00000006",
    }  # fmt: skip


def test_a_run_that_fits_but_has_not_kept_the_scored_steps_is_named(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be trained again without a word."""
    config = study_yaml(made, "steps", reuse=[str(made / "out/runs")], checkpoints=[1, 6])
    assert taken_over(take_over(Study.open(config, tmp_path / "out"))) == {}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert f"{made}/out/runs/plain is the training of plain with seed 0, but is not" in messages[0]
    assert "no checkpoint of step 1 there" in messages[0]
    assert "`checkpoints: 1` scores the last step alone" in messages[0]


def test_checkpoints_are_of_the_size_that_is_planned(made: Path) -> None:
    """To the byte, but for headers, manifests, and what a model has beside its parameters."""
    plan = plan_existing(Study.open(made / "fair.yaml", made / "elsewhere"), Assumptions())
    cost = next(cost for cost in plan.costs if cost.node.id == "train/plain/seed0")
    planned = {files.part: files for files in cost.files}
    steps = sorted((made / "out/runs/plain/checkpoints").glob("step-*"))
    assert len(steps) == 3  # the last is scored and kept, and two more; while one is written, four
    assert planned["scored_checkpoints"].bytes == tensor_bytes(steps[-1])
    assert planned["other_checkpoints"].bytes == sum(map(tensor_bytes, steps[:-1]))
    assert planned["ema_snapshots"].bytes == 0
    size = sum(file.stat().st_size for step in steps for file in step.iterdir())
    assert cost.bytes == pytest.approx(size, rel=0.15)


def test_snapshots_of_averages_are_of_the_size_that_is_planned(made: Path, tmp_path: Path) -> None:
    words = ["ema.power=[0.05,0.1]", "ema.snapshots=3"]
    config = study_yaml(made, "averages", **{"with": words, "checkpoints": [3, 6]})
    fair = Study.open(config, tmp_path / "out")
    cost = next(c for c in plan_existing(fair, Assumptions()).costs if c.node.kind == "train")
    planned = {files.part: files.bytes for files in cost.files}
    fair.out.mkdir()
    write_configs(fair)
    command = [sys.executable, *cost.node.command[1:]]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)
    run = fair.run_folder("plain", 0)
    snapshots = list((run / "ema-snapshots").glob("step-*"))
    assert len(snapshots) == 3
    assert planned["ema_snapshots"] == sum(map(tensor_bytes, snapshots))
    scored = [run / f"checkpoints/step-{step:08d}" for step in (3, 6)]
    assert planned["scored_checkpoints"] == sum(map(tensor_bytes, scored))
    (left,) = (c for c in plan_existing(fair, Assumptions()).costs if c.node.id == cost.node.id)
    assert left.bytes == 0


def tensor_bytes(folder: Path) -> int:
    """Returns the bytes of the values in a folder's files, but for the table of positions."""
    size = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        size += sum(t.nbytes for name, t in tensors.items() if "pos_embed" not in name)
    return size


def test_what_is_left_of_a_training_and_more_sets_are_as_large_as_what_exists(made: Path) -> None:
    config = study_yaml(made, "more", seeds=[0, 1])
    study_ = Study.open(config, made / "out")
    plan = plan_existing(study_, Assumptions())
    folder = study_.set_folder("plain", 0, 6)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    costs = {cost.node.id: cost for cost in plan.costs}
    assert costs["generate/plain/seed1/step-00000006"].bytes == size
    assert costs["train/plain/seed0"].bytes == 0
    checkpoints = plan.files["scored_checkpoints"]
    assert checkpoints["bytes"] == 2 * checkpoints["each"]


def test_a_full_disk_is_told_before_anything_runs(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(made)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(NoSpace, match="are free, expected"):
        preflight(Study.open(study_yaml(made, "full", seeds=[7]), made / "full"))
    assert not (made / "full").exists()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("fluxx", "'fluxx': no such name; did you mean flux. Known are"),
        ({"class": "AutoencoderKL", "path": "/models/none"}, "no such folder"),
    ],
)
def test_an_encoder_that_is_no_model(made: Path, encoder: object, message: str) -> None:
    own = {"latents": "own", "encoder": encoder, "resolution": 32}
    config = study_yaml(made, "own", entries={"plain": "plain", "own": own})
    with pytest.raises(ModelNotUsable, match=message):
        preflight(Study.open(config, made / "own"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "kl"}, r"encoder\.path: found '\S+/other', expected '\S+/kl'"),
        ({"resolution": 64}, "resolution: found 32, expected 64"),
        ({"kind": "latents"}, "kind: found 'moments', expected 'latents'"),
        ({"precision": "bf16-autocast"}, r"encoder\.precision: found 'fp32'"),
    ],
)
def test_a_column_that_another_encoder_made(
    made: Path, change: dict[str, object], message: str
) -> None:
    own: dict[str, object] = {"latents": "other", "resolution": 32} | {
        key: value for key, value in change.items() if key in ("resolution", "kind")
    }
    own["encoder"] = vae(made, str(change.get("encoder", "other")))
    if "precision" in change:
        own["encoder"] = {**vae(made, "other"), "precision": change["precision"]}
    config = study_yaml(made, "another", entries={"plain": "plain", "other": own})
    with pytest.raises(
        BadStudy, match=rf"cache/pets/other was made in another way(.|\n)*{message}"
    ):
        preflight(Study.open(config, made / "another"))
    assert not (made / "another").exists()


def test_a_column_of_the_same_encoder_under_another_spelling(made: Path) -> None:
    """A path through a link, and a column that is only begun."""
    (made / "link").symlink_to(made)
    own = {"latents": "other", "resolution": 32, "encoder": vae(made / "link", "other")}
    config = study_yaml(made, "spelled", entries={"plain": "plain", "other": own})
    check_encoders(Study.open(config, made / "spelled"))
    (made / "begun/pets").mkdir(parents=True)
    shutil.copytree(
        made / "cache/pets/other",
        made / "begun/pets/other",
        ignore=shutil.ignore_patterns("commits"),
    )
    assert column_identity(str(made / "begun/pets/other"))["encoder"]["class"] == "AutoencoderKL"
    assert column_identity(str(made / "begun/pets/none")) == {}


def test_one_column_under_two_names_shows_a_difference_of_0(made: Path) -> None:
    """A copy: its model, pictures and scores are those of the first, which is taken over."""
    shutil.copytree(made / "cache/pets/plain", made / "cache/pets/copy")
    entries = {"plain": "plain", "copy": "copy"}
    config = study_yaml(made, "twins", entries=entries, reuse=[str(made / "out/runs")])
    out = made / "twins"
    result = study("run", config, "--out", out, "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert study("report", config, "--out", out).returncode == 0
    data = json.loads((out / "study.json").read_bytes())
    (verdict,) = data["verdicts"]
    assert verdict["outcome"] == "equal"
    assert verdict["sentence"].startswith("copy and plain are equal: all differences are exactly 0")
    names = {name: out / f"images/{name}-seed0/step-00000006/images" for name in entries}
    pictures = {name: sorted(folder.glob("*.png")) for name, folder in names.items()}
    assert len(pictures["copy"]) == 6
    for a, b in zip(*pictures.values(), strict=True):
        assert np.array_equal(np.array(Image.open(a)), np.array(Image.open(b)))


def test_pictures_of_another_yaml_are_not_reported(made: Path) -> None:
    generate = {"guidance_scale": 2, "num_inference_steps": 2, "batch_size": 6}
    config = study_yaml(made, "guided", generate=generate)
    page = (made / "out/report.html").read_bytes()
    result = study("report", config, "--out", made / "out")
    assert result.returncode == 2
    assert result.stderr.startswith("StudyChanged: ")
    assert "guidance_scale: 1" in result.stderr
    assert (made / "out/report.html").read_bytes() == page


def test_runs_of_a_column_that_is_yet_to_be_encoded_are_taken_over(
    made: Path, tmp_path: Path
) -> None:
    """Whether they fit is known once the column exists: no training runs again."""
    shutil.copytree(made / "cache/pets", tmp_path / "cache/pets", ignore=lambda *_: ["other"])
    for name in ("train", "encode"):
        config = yaml.safe_load((made / f"{name}.yaml").read_text())
        (config["data"] if name == "train" else config)["root"] = str(tmp_path / "cache")
        write(tmp_path / f"{name}.yaml", config)
    shutil.copy(made / "few.json", tmp_path)
    shutil.copytree(made / "out/images", tmp_path / "images")  # sets are scored where they are
    by_hand = [str(made / "out/runs"), str(tmp_path / "images")]
    entries = {
        "plain": "plain",
        "other": {"latents": "other", "encoder": vae(made, "other"), "resolution": 32},
    }
    config = study_yaml(tmp_path, "late", entries=entries, reuse=by_hand)
    result = study("run", config, "--out", tmp_path / "late")
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "begins: encode/" in output
    assert f"train/other/seed0: taken over from {made / 'out/runs/other'}" in output
    assert "begins: train/" not in output
    assert "begins: generate/" not in output
