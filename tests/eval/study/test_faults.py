"""Studies that are killed, that fail in part, that grow, and that are refused before anything runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from eval.errors import BadPrompts, BadStudy, NotPaired, StudyChanged
from eval.images.checks import read_manifest
from eval.study.checks import (
    check_differ,
    check_pair,
    check_reconstructions,
    check_sets,
    preflight,
    refuse_unpaired,
)
from eval.study.earlier import refuse_changed
from eval.study.graph import nodes_of
from eval.study.plan.cost import Assumptions
from eval.study.plan.plan import plan_existing
from eval.study.reuse import Existing
from eval.study.run.command import environment as environment_of
from eval.study.run.command import visible_gpus
from eval.study.run.files import write_configs
from eval.study.status import states, status
from eval.study.study import Study
from shards import ShardsError
from tests.commands.lines import next_lines
from tests.eval.study.small_study import (
    ROOT,
    SIDE,
    environment,
    numbers,
    study,
    study_yaml,
    training_of,
    vae,
    write_inputs,
)

pytestmark = pytest.mark.timeout(900)  # a study is a dozen processes, each of which imports torch

NO_PROMPTS = "no such file, expected the file of your prompts: .txt, a prompt a line, or .json. Check the path"


def opened(made: Path, out: str = "out", **values: Any) -> Study:
    return Study.open(study_yaml(made, "changed", **values), made / out)


def processes_of(out: Path) -> list[int]:
    """The processes whose command names this folder."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                pids.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return pids


def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(made: Path) -> None:
    yaml_path, out = study_yaml(made, "killed"), made / "killed"
    words = [sys.executable, "-m", "eval", "study", "run", str(yaml_path), "--out", str(out)]
    with (made / "killed.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        training = training_of(out / "configs/other.yaml", process)
        os.kill(training, signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(training, signal.SIGCONT)
    until = time.monotonic() + 120
    while processes_of(out) and time.monotonic() < until:  # the trainer stops in order
        time.sleep(0.1)
    assert processes_of(out) == []
    assert not (out / "images").exists()
    assert "no `study run` works on it" in status(Study.open(yaml_path, out))
    again = study("run", yaml_path, "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "begins: train/plain/seed0" not in again.stdout + again.stderr
    assert numbers(out) == numbers(made / "out")
    assert numbers(out)


def test_a_command_that_fails_is_named_and_the_others_go_on(made: Path) -> None:
    wild = {"latents": "plain", "with": ["optim.lr=1e30", "optim.clip=null"]}
    values = {"entries": {"plain": "plain", "wild": wild}, "reuse": [str(made / "out/runs")]}
    yaml_path, out = study_yaml(made, "wild", **values), made / "wild"
    result = study("run", yaml_path, "--out", out)
    output = result.stdout + result.stderr
    assert result.returncode == 3, output
    assert f"train/plain/seed0: taken over from {made / 'out/runs/plain'}" in output
    assert re.search(
        r"failed: train/wild/seed0, exit code 3: python -m train \S+wild.yaml seed=0", output
    )
    assert "NonFiniteLoss" in output
    assert str(out / "logs/train/wild/seed0.log") in output
    assert "done: score/demo-acc/plain/seed0/step-00000006" in output
    assert "begins: generate/wild" not in output
    words = f"{yaml_path} --out {out}"
    (line,) = next_lines(result.stdout)
    assert line.startswith(f"next: python -m eval study status {words} ")
    text = status(Study.open(yaml_path, out))
    assert next_lines(text) == [f"next: python -m eval study run {words}"]
    assert "failed: train/wild/seed0, exit code 3" in text
    assert re.search(r"wild +0 +step 0 of 6 +0 of 1 +0 of 1", text)
    assert re.search(rf"plain +0 +done +1 of 1 +1 of 1 +{made / 'out/runs/plain'}", text)


def test_an_entry_more_leaves_the_others_as_they_are(made: Path) -> None:
    """Although all runs join the new column, too: the rows that are valid are the same."""
    if not (made / "cache/pets/third").exists():
        shutil.copytree(made / "cache/pets/plain", made / "cache/pets/third")
    larger = opened(made, entries={"plain": "plain", "other": "other", "third": "third"})
    refuse_changed(larger)
    done = states(larger)
    assert {name for name, state in done.items() if not state} == {
        "train/third/seed0", "generate/third/seed0/step-00000006", "score/demo-acc/third/seed0/step-00000006",
    }  # fmt: skip


def test_checkpoints_that_are_to_be_scored_stay(made: Path) -> None:
    config = opened(made, checkpoints=[1, 3, 6]).train_config("plain", 0)
    assert config.save_at == (1, 3, 6)


def test_a_step_that_a_training_has_passed_is_named_before_anything_runs(made: Path) -> None:
    """The training of `plain` is at step 6, and step 1 is not there any more."""
    with pytest.raises(StudyChanged, match=r"no checkpoint of step 1 there(.|\n)*at step 6"):
        preflight(opened(made, checkpoints=[1, 6]))
    assert states(opened(made, checkpoints=1))["train/plain/seed0"]
    advice = "To go on with what exists say `checkpoints: 1`, as the study said when it last ran"
    with pytest.raises(StudyChanged, match=advice):
        refuse_changed(opened(made, checkpoints=8))
    shorter = opened(made, **{"with": ["steps=5"]})
    with pytest.raises(StudyChanged, match="no checkpoint of step 5 there"):
        refuse_changed(shorter)


def test_what_is_done_is_seen_from_what_is_there(made: Path) -> None:
    folder = made / "damaged"
    shutil.copytree(made / "out", folder)
    study = Study.open(study_yaml(made), folder)
    assert all(
        states(study)[name] for name in states(study) if name.startswith(("train", "generate"))
    )
    pictures = folder / "images/plain-seed0/step-00000006"
    next((pictures / "images").glob("*.png")).unlink()
    assert not states(study)["generate/plain/seed0/step-00000006"]
    shutil.rmtree(folder / "runs/other/checkpoints/step-00000006")
    done = states(study)
    assert not done["train/other/seed0"]
    assert not done["score/demo-acc/other/seed0/step-00000006"]


def test_a_score_whose_items_are_deleted_is_made_again(made: Path) -> None:
    """Without them no difference has an interval."""
    folder, yaml_path = made / "no-items", study_yaml(made)
    shutil.copytree(made / "out", folder)
    opened_there = Study.open(yaml_path, folder)
    assert all(states(opened_there).values())
    (line,) = next_lines(status(opened_there))
    assert line == f"next: python -m eval study report {yaml_path} --out {folder}"
    scores = folder / "images/plain-seed0/step-00000006/scores"
    (items,) = scores.glob("demo-acc-*.items.jsonl")
    before = items.read_bytes()
    items.unlink()
    missing = [name for name, done in states(opened_there).items() if not done]
    assert missing == ["score/demo-acc/plain/seed0/step-00000006"]
    assert study("run", yaml_path, "--out", folder).returncode == 0
    assert items.read_bytes() == before
    assert all(states(opened_there).values())


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"with": ["optim.lr=1e-4"]}, StudyChanged, "optim.lr: 0.003 there, 0.0001 now"),
        ({"generate": {"guidance_scale": 3}}, StudyChanged, "guidance_scale: 1.0 there, 3.0 now"),
        ({"entries": {"plain": "plain", "new": "none"}}, BadStudy, "found no complete column at"),
        ({"scorers": ["genevil"]}, BadStudy, "found 'genevil', expected one of"),
        (
            {"scorers": [{"fid": {"reference": "x", "cropp": "none"}}]},
            BadStudy,
            "found cropp, expected flags of `eval score fid`; did you mean crop?",
        ),
        ({"scorers": ["demo-fd"]}, BadStudy, "--reference"),
        ({"scorers": [{"demo-fd": {"reference": "absent"}}]}, BadStudy, "absent"),
        ({"generate": {"guidanse_scale": 3}}, BadStudy, "flags of `eval generate`; did you mean guidance_scale?"),
        ({"generate": {"ema": 0.1}}, BadStudy, "generate: ema: plain: found no ema.power"),
        ({"generate": {"ema": 0.3}}, BadStudy, "--ema: found '0.3', expected a number of at least 0.01"),
        ({"generate": {"ema": [0.05, 0.1]}}, BadStudy, "--ema: found 2 values, expected one"),
        (
            {"generate": {"ema": 0.1, "ema_weights": False}},
            BadStudy,
            "generate: ema: found it beside ema_weights: false",
        ),
        (
            {"with": ["ema.power=[0.05,0.1]", "ema.snapshots=2"], "generate": {"ema": 0.02}},
            BadStudy,
            "generate: ema: plain: step 6 will have 2 snapshots of averages",
        ),
        (
            {"with": ["ema.power=[0.05,0.1]"], "generate": {"ema": 0.05}},
            StudyChanged,
            '"power": null, "snapshots": 32} there, {"decay": 0.5, "power": [0.05, 0.1]',
        ),
        ({"prompts": "absent.json"}, BadPrompts, f"changed.yaml: prompts: absent.json: {NO_PROMPTS}"),
        ({"prompts": None, "benchmark": "geneval"}, BadPrompts, "changed.yaml: benchmark: found no file"),
        ({"prompts": None, "benchmark": "geneval"}, BadPrompts, "prompts fetch geneval` brings them"),
        ({"with": ["init_from=absent"]}, BadStudy, "plain: init_from: found no checkpoint in absent"),
        ({"differ": ["optim.lrr"]}, BadStudy, "differ: found optim.lrr, expected"),
        ({"differ": ["optim.lrr"]}, BadStudy, "did you mean optim.lr?"),
        ({"differ": ["guidanse_scale"]}, BadStudy, "did you mean guidance_scale?"),
        (
            {"panel": {"reconstructions": {"plain": "absent"}}},
            BadStudy,
            "changed.yaml: panel.reconstructions.plain: found no folder absent, expected one that `python -m eval "
            "reconstruct` made. Make it, correct the path, or leave it out",
        ),
        ({"ranks": 3}, configs.ConfigError, "cannot be cut into micro-batches"),
    ],
)  # fmt: skip
def test_refused_before_anything_runs(
    made: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = sorted((made / "out").rglob("*"))
    values = {"prompts": str(made / "few.json"), **values}
    if values["prompts"] is None:
        text = yaml.safe_load(study_yaml(made, "changed", **values).read_text())
        del text["prompts"]
        (made / "changed.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
        study = Study.open(made / "changed.yaml", made / "out")
    else:
        study = opened(made, **values)
    with pytest.raises(error, match=re.escape(message)):
        preflight(study)
    assert sorted((made / "out").rglob("*")) == before


def test_reconstructions_that_are_absent_are_refused_by_the_plan_too(made: Path) -> None:
    """But not those of a column that the study is still to make, of which there can be none yet."""
    absent = {"reconstructions": {"plain": "absent"}}
    with pytest.raises(BadStudy, match=r"panel\.reconstructions\.plain: found no folder absent"):
        plan_existing(opened(made, panel=absent), Assumptions())
    entries = {
        "plain": {"latents": "new", "encoder": vae(made, "kl"), "resolution": SIDE},
        "other": "other",
    }
    check_reconstructions(opened(made, entries=entries, panel=absent))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vae": "/absent/vae"}, "generate: vae: /absent/vae: no such folder, and no hub id"),
        ({"vae": "{made}/kll"}, "generate: vae: {made}/kll: no such folder"),
        ({"text-encoder": "a/b/c"}, "generate: text_encoder: a/b/c: no such folder"),
    ],
)
def test_an_encoder_that_is_not_there_is_found_before_anything_runs(
    made: Path, flags: dict[str, str], message: str
) -> None:
    flags = {name: value.format(made=made) for name, value in flags.items()}
    sampling = {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 6}
    changed = opened(made, "no-encoder", generate=sampling | flags)
    with pytest.raises(BadStudy, match=re.escape(message.format(made=made))):
        preflight(changed)
    (note,) = [n for n in plan_existing(changed, Assumptions()).notes if "refuse" in n]
    assert message.format(made=made) in note
    preflight(opened(made, generate=sampling | flags))  # all its pictures exist


def test_a_device_that_does_not_exist_is_found_before_anything_runs(made: Path) -> None:
    sampling = {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 6, "device": "gpu"}
    with pytest.raises(BadStudy, match="generate: --device: found 'gpu', expected cpu, cuda"):
        preflight(opened(made, "no-device", generate=sampling))


def test_a_vae_of_a_column_that_moved_is_found_before_anything_runs(made: Path) -> None:
    sampling = {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 6}
    (made / "kl").rename(made / "moved")
    try:
        with pytest.raises(
            BadStudy, match=r"plain: \S+/pets/plain: the VAE that made it is needed"
        ):
            preflight(opened(made, "no-encoder", generate=sampling))
    finally:
        (made / "moved").rename(made / "kl")
    preflight(opened(made, "no-encoder", generate=sampling))


def test_other_prompts_are_said_in_words(made: Path, tmp_path: Path) -> None:
    """And not by two digests."""
    (tmp_path / "others.json").write_text(json.dumps({"one": "a horse"}))
    with pytest.raises(StudyChanged) as error:
        refuse_changed(opened(made, prompts=str(tmp_path / "others.json")))
    lines = str(error.value).splitlines()
    assert lines[1].endswith("out/images/plain-seed0/step-00000006:")
    assert lines[2].strip() == "prompts: other prompts"


def test_what_differ_may_name(made: Path) -> None:
    """Parts of trainings and groups of them, and each setting of a set."""
    manifest = read_manifest(made / "out/images/plain-seed0/step-00000006/manifest.json")
    differ = ["optim", "optim.lr", "init.sha256", *manifest["settings"]]
    study = opened(made, differ=differ)
    check_differ(study, Existing(study))


def test_columns_of_another_source(made: Path, tmp_path: Path) -> None:
    foreign = write_inputs(tmp_path / "foreign", rows=32)
    values = {"entries": {"plain": "plain", "foreign": str(foreign / "cache/pets/plain")}}
    words = [f"data.text={made}/cache/pets/text"]
    values["entries"]["plain"] = f"{made}/cache/pets/plain"  # type: ignore[index]
    with pytest.raises(ShardsError, match="source"):
        preflight(opened(made, "foreign", **values, **{"with": words}))


def test_trainings_are_compared_by_their_own_records(made: Path) -> None:
    study = opened(made)
    check_pair(study, "other", 0)
    check_sets(study)
    existing = Existing(study)
    a, b = existing.training("plain", 0), existing.training("other", 0)
    assert a is not None
    assert b is not None
    sides = "plain", 0, "other", 0
    refuse_unpaired(study, sides, a, b)
    faster = {**b, "optim": {**b["optim"], "lr": 1.0}}
    with pytest.raises(NotPaired, match=r"optim\.lr: 0\.003 and 1\.0(.|\n)*differ: \[optim\.lr\]"):
        refuse_unpaired(study, sides, a, faster)
    other = {"latents": "other", "with": ["optim.lr=1.0"]}
    for values in ({"entries": {"plain": "plain", "other": other}}, {"differ": ["optim.lr"]}):
        refuse_unpaired(opened(made, **values), sides, a, faster)
    rows = {**b, "order": {**b["order"], "valid_rows": ["00"]}}
    with pytest.raises(NotPaired, match=r"order\.valid_rows"):
        refuse_unpaired(study, sides, a, rows)


def test_sets_are_compared_by_their_own_settings(made: Path) -> None:
    folder = made / "other-set"
    shutil.copytree(made / "out/images/other-seed0/step-00000006", folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["settings"]["guidance_scale"] = 7.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(folder / "manifest.json")["settings"]["guidance_scale"] == 7.0
    study = replace(opened(made), hand_sets={("other", 0, 6): folder})
    with pytest.raises(NotPaired, match=r"guidance_scale: 1\.0 and 7\.0"):
        check_sets(study)


# The runner's parts -------------------------------------------------------------------------------


def test_jobs_share_the_gpus_or_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shares = [environment_of(slot, 2, visible_gpus())["CUDA_VISIBLE_DEVICES"] for slot in range(2)]
    assert shares == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cores = str(max(1, (os.cpu_count() or 1) // 2))
    assert environment_of(1, 2, visible_gpus())["OMP_NUM_THREADS"] == cores
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster that encodes
    assert {environment_of(0, n, [])["RAY_ADDRESS"] for n in (1, 2)} == {"10.0.0.1:6379"}


def test_the_configs_are_those_of_the_runs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study.open(study_yaml(made, "grows", seeds=[0]), tmp_path / "out")
    study.out.mkdir()
    write_configs(study)
    assert capsys.readouterr().out == ""
    again = Study.open(tmp_path / "out/study.yaml", tmp_path / "out")
    assert [node.command for node in nodes_of(again)] == [node.command for node in nodes_of(study)]
    write_configs(Study.open(study_yaml(made, "grows", seeds=[0, 1]), tmp_path / "out"))
    assert (
        "changed since the last run: seeds: found [0], expected [0, 1]" in capsys.readouterr().out
    )


def test_prompts_that_a_scorer_cannot_judge(made: Path, tmp_path: Path) -> None:
    """Known from their list: nothing is trained for them."""
    (tmp_path / "prompts.txt").write_text("a castle by the sea\n")
    path = study_yaml(made, "castles", prompts=str(tmp_path / "prompts.txt"))
    result = study("run", path, "--out", made / "castles")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "BadPrompts: prompt 00000: found no group of emoji" in result.stderr
    assert not (made / "castles/runs").exists()
