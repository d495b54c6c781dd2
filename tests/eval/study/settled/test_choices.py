"""Settings that are chosen for each entry: on half A of the prompts, by the mean over seeds; reported on half B."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from configs import ConfigError
from eval.errors import OutputEdited
from eval.prompts.prompts import halves
from eval.study.earlier import take_over
from eval.study.graph import nodes_of
from eval.study.lock import verify
from eval.study.pictures import reported_set, trial_sets
from eval.study.report.analysis import analyse
from eval.study.report.exports import HALF, WHOLE, as_csv
from eval.study.report.page import report
from eval.study.run.edited import refuse_edited
from eval.study.run.gc import removals, remove
from eval.study.status import states
from eval.study.study import Study
from tests.encode.toy import jpeg
from tests.eval.study.handmade import open_study
from tests.eval.study.small_study import study, study_yaml, write_inputs
from train.checkpoints.snapshots import EmaLengthRefused, refuse_planned

pytestmark = pytest.mark.timeout(900)  # a study is dozens of processes, each of which imports torch
# in another order than they are chosen in
SETTLE = {"shift": [2, 4], "ema": [0.05, 0.1], "guidance_scale": [1, 2], "accept_edge": True}
AXES = ["guidance_scale", "ema", "shift"]


@pytest.fixture(scope="module", params=[[0], pytest.param([0, 1], marks=pytest.mark.slow)], ids=str)
def settled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has run; the study itself is in `out`."""
    folder = write_inputs(tmp_path_factory.mktemp("settled"))
    yaml_file = study_yaml(folder, **values(seeds=request.param))
    result = study("run", yaml_file, "--out", folder / "out", "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def values(**others: Any) -> dict[str, Any]:
    generate = {"num_inference_steps": 2, "batch_size": 6}
    return {"seeds": [0, 1], "settle": SETTLE, "generate": generate, "checkpoints": [6]} | others


def opened(folder: Path) -> Study:
    return take_over(Study.open(folder / "fair.yaml", folder / "out"))


def value_in(scores: Path) -> float:
    """The one score of a folder, read as any program may."""
    (path,) = (p for p in scores.glob("*.json"))
    return float(json.loads(path.read_bytes())["value"]["value"])


def test_the_best_mean_over_seeds_on_half_a_is_chosen(settled: Path) -> None:
    """By the files themselves: each set is of half A, and the chosen value has the highest mean accuracy."""
    fair = opened(settled)
    names = list(json.loads((settled / "few.json").read_text()))
    half_a = set(halves([(name, None) for name in names])[0])
    for entry in fair.entries:
        for number, axis in enumerate(AXES):
            means = []
            for i, value in enumerate(SETTLE[axis]):
                sets = [trial_sets(fair, entry, seed, axis)[i] for seed in fair.seeds]
                for each in sets:
                    manifest = json.loads((each.folder / "manifest.json").read_bytes())
                    assert manifest["settings"]["half"] == "a"
                    assert manifest["settings"][axis] == value
                    for before in AXES[:number]:  # each at what was chosen before
                        assert manifest["settings"][before] == fair.settled[entry][before]
                    prompts = json.loads((each.folder / "prompts.json").read_bytes())
                    assert {prompt["id"] for prompt in prompts} == half_a
                means.append(fmean(value_in(each.folder / "scores") for each in sets))
            best = means.index(max(means))
            assert fair.settled[entry][axis] == SETTLE[axis][best]
        for seed in fair.seeds:  # what is reported is made at what was chosen
            manifest = json.loads(
                (reported_set(fair, entry, seed, 6).folder / "manifest.json").read_bytes()
            )
            for axis in AXES:
                assert manifest["settings"][axis] == fair.settled[entry][axis]


def test_the_other_half_is_reported_and_the_whole_beside_it(settled: Path) -> None:
    data = analyse(opened(settled)).data
    assert data["complete"]
    assert {score["scorer"][-7:] for score in data["scores"]} == {"-half-b"}
    assert data["prompts"] == 3
    assert data["whole"]["prompts"] == 6
    (of_whole,) = (score["scorer"] for score in data["whole"]["scores"])
    assert f"{of_whole}-half-b" == data["primary"]["scorer"]
    assert [record["entry"] for record in data["settled"]] == ["plain", "other"]
    for record in data["settled"]:
        assert [axis["axis"] for axis in record["axes"]] == AXES
        for axis in record["axes"]:
            means = [fmean(v["value"] for v in seeds.values()) for seeds in axis["by_seed"]]
            assert means == pytest.approx([value["value"] for value in axis["over_seeds"]])
            assert axis["chosen"] == means.index(max(means))
    assert "which had no part in choosing guidance_scale, ema and shift" in " ".join(data["covers"])
    (left_open,) = (line for line in data["leaves_open"] if "an edge was accepted" in line)
    assert "ema" in left_open
    table = list(csv.DictReader(io.StringIO(as_csv(data))))
    assert {(row["scorer"], row["primary"], row["prompts"]) for row in table} == {
        (f"{of_whole}-half-b", "true", HALF), (of_whole, "false", WHOLE),
    }  # fmt: skip


def test_nothing_is_made_twice_and_the_lock_holds(settled: Path) -> None:
    again = study("run", settled / "fair.yaml", "--out", settled / "out")
    assert again.returncode == 0, again.stderr
    assert "all that the study asks for exists" in again.stdout
    assert "begins" not in again.stdout + again.stderr
    verified = study("verify", settled / "fair.yaml", "--out", settled / "out")
    assert verified.returncode == 0, verified.stdout
    lock = json.loads((settled / "out/study.lock").read_bytes())
    assert lock["settled"]["plain"].keys() == {*AXES}


def test_pictures_of_trials_are_removed_once_they_have_chosen(
    settled: Path, tmp_path: Path
) -> None:
    """All of them, as no page shows them; the choices are those of before, and the study is whole."""
    shutil.copytree(settled / "out", tmp_path / "out")
    fair = take_over(Study.open(settled / "fair.yaml", tmp_path / "out"))
    before = report(fair, 2)
    planned, remaining = removals(fair)
    assert remaining == []
    for removal in planned:
        remove(removal)
    again = take_over(Study.open(settled / "fair.yaml", tmp_path / "out"))
    assert again.settled == fair.settled
    for entry, seed in product(fair.entries, fair.seeds):
        for axis in AXES:
            for each in trial_sets(fair, entry, seed, axis):
                assert list(each.folder.rglob("*.png")) == []
        left = reported_set(fair, entry, seed, 6).folder.rglob("*.png")
        assert {path.stem for path in left} == set(before["shown"])
    assert all(states(again).values())
    assert verify(again) == ([], [])
    after = report(again, 2)
    for key in ("settled", "scores", "verdicts", "whole", "shown"):
        assert after[key] == before[key]
    assert removals(again) == ([], [])


def test_an_edited_score_of_a_trial_chooses_nothing(settled: Path) -> None:
    """Its axis and all after it are open, and `run` refuses it."""
    fair = opened(settled)
    (path,) = (trial_sets(fair, "plain", 0, "ema")[0].folder / "scores").glob("*.json")
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(b'"prompts":3', b'"prompts":2'))
        edited = opened(settled)
        assert edited.settled["plain"].keys() == {"guidance_scale"}
        waiting = {node.id for node in nodes_of(edited) if node.open}
        assert "generate/plain/seed0/step-00000006" in waiting
        assert "generate/other/seed0/step-00000006" not in waiting
        assert not analyse(edited).data["complete"]
        with pytest.raises(
            OutputEdited, match=f"{re.escape(str(path))}, of score/demo-acc/plain/seed0/ema"
        ):
            refuse_edited(edited)
    finally:
        path.write_bytes(before)


def test_status_and_plan_say_what_is_chosen(settled: Path) -> None:
    fair = opened(settled)
    said = study("status", settled / "fair.yaml", "--out", settled / "out").stdout
    for entry, chosen in fair.settled.items():
        text = f"{entry}: " + ", ".join(f"{axis} {chosen[axis]:g}" for axis in AXES)
        assert text in said
    planned = study("plan", settled / "fair.yaml", "--out", settled / "out").stdout
    assert "chosen for each entry: guidance_scale, of 1, 2" in planned
    assert "all that the study asks for exists" in planned


# Without a run ------------------------------------------------------------------------------------


def test_by_default_guidance_and_averages_are_chosen(tmp_path: Path) -> None:
    """And the runs keep what the averages of all three lengths take, at each of the eight scored steps."""
    fair = open_study(tmp_path, settle={}, checkpoints=8)
    assert fair.axes == {
        "guidance_scale": (1.5, 2, 3, 4.5, 6, 9), "ema": (0.05, 0.075, 0.1),
    }  # fmt: skip
    averages = fair.train_config("flux", 0).ema
    assert averages.power == (0.05, 0.1)
    for step, length in product(fair.steps, fair.axes["ema"]):
        refuse_planned(averages, 100, step, length)
    fewer = averages.model_copy(update={"snapshots": averages.snapshots // 2})
    with pytest.raises(EmaLengthRefused):
        refuse_planned(fewer, 100, fair.steps[0], 0.075)
    nodes = nodes_of(fair)
    made = [node for node in nodes if node.kind == "generate"]
    assert [node.axis for node in made] == 6 * ["guidance_scale"] + 6 * ["ema"] + 48 * [""]
    assert [node.open for node in made] == 6 * [False] + 54 * [True]
    first = made[0].command
    scales = first[first.index("--guidance_scale") + 1 : first.index("--half")]
    assert scales == ("1.5", "2", "3", "4.5", "6", "9")
    assert first[first.index("--half") + 1] == "a"
    (needed,) = {node.needs for node in made if node.id == "generate/flux/seed1/ema"}
    assert needed[-3:] == tuple(
        f"score/clipscore/flux/seed{seed}/guidance_scale" for seed in range(3)
    )
    halved = [node for node in nodes if node.kind == "score" and node.half == "b"]
    whole = [node for node in nodes if node.kind == "score" and not node.half and not node.axis]
    assert (len(halved), len(whole)) == (2 * 48, 2 * 6)  # all prompts at the last step alone


@pytest.mark.parametrize(
    ("generate", "axes"),
    [
        ({"guidance_scale": 3}, ["ema"]),
        ({"ema": 0.1}, ["guidance_scale"]),
        ({"ema-weights": False}, ["guidance_scale"]),
    ],
    ids=str,
)
def test_what_generate_names_is_not_chosen(
    tmp_path: Path, generate: Mapping[str, Any], axes: list[str]
) -> None:
    text = open_study(tmp_path, settle=None).config.train.read_text()
    config = yaml.safe_load(text) | {"ema": {"power": [0.05, 0.1], "snapshots": 64}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    fair = open_study(
        tmp_path, settle={}, generate=dict(generate), train=str(tmp_path / "own.yaml")
    )
    assert [*fair.axes] == axes


@pytest.mark.parametrize(
    ("settle", "message"),
    [
        ({"guidance_scale": [3]}, "a list of two or more numbers"),
        ({"guidance_scale": [3, 3]}, "3 is named twice"),
        ({"guidance_scale": [0.5, 1, 3]}, "make the same pictures"),
        ({"ema": [0.05, 0.5]}, "0.5"),
        ({"shift": [1, float("nan")]}, r"found \.nan"),
        ({"lr": [1e-4]}, "a list of two or more numbers"),
        ({"cfg": [1, 2]}, "cfg"),
    ],
    ids=str,
)
def test_bad_ranges_are_refused(tmp_path: Path, settle: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_study(tmp_path, settle=settle)


def test_what_is_named_and_to_be_chosen_is_refused(tmp_path: Path) -> None:
    twice = {"settle": {"guidance_scale": [1, 3]}, "generate": {"guidance_scale": 3}}
    with pytest.raises(ConfigError, match=r"settle.guidance_scale: found it in `generate`, too"):
        open_study(tmp_path, **twice)
    entries = {"flux": {"latents": "flux", "with": ["optim.lr=1e-3"]}, "e2e": "flux-e2e"}
    with pytest.raises(ConfigError, match=r"settle.lr: found optim.lr of an entry"):
        open_study(tmp_path, settle={"lr": [1e-4, 1e-3]}, entries=entries)
    entries = {"flux": {"latents": "flux", "with": ["ema.decay=0.9"]}, "e2e": "flux-e2e"}
    with pytest.raises(ConfigError, match=r"settle.ema: found ema.decay of an entry"):
        open_study(tmp_path, settle={}, entries=entries)


def test_an_edge_gives_no_verdict_until_it_is_accepted(settled: Path) -> None:
    """The ranges have two values each, so both choices are edges, but for guidance 1 below which none is."""
    accepted = opened(settled)
    config = yaml.safe_load((settled / "fair.yaml").read_text())
    del config["settle"]["accept_edge"]
    strict_yaml = settled / "strict.yaml"
    strict_yaml.write_text(yaml.safe_dump(config))
    strict = take_over(Study.open(strict_yaml, settled / "out"))
    assert strict.settled == accepted.settled
    (verdict,) = analyse(strict).data["verdicts"]
    assert verdict["outcome"] == "no verdict"
    assert "widen the range in `settle`" in verdict["sentence"]
    assert "or accept the edge" in verdict["sentence"]
    assert "of plain is best at" in verdict["sentence"]
    flagged = study("report", strict_yaml, "--out", settled / "out", "--accept-edge")
    assert flagged.returncode == 0, flagged.stderr
    assert "widen the range" not in flagged.stdout
    assert "WARNING" not in flagged.stdout + flagged.stderr
    page = (settled / "out/report.html").read_text()
    assert "widen its range" not in page
    assert "was accepted as it is" in page
    unflagged = study("report", strict_yaml, "--out", settled / "out")
    assert "widen the range" in unflagged.stdout
    page = (settled / "out/report.html").read_text()
    assert "widen its range" in page
    assert "was accepted as it is" not in page


def test_too_few_prompts_to_divide_are_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "inputs")
    (folder / "few.json").write_text('{"face-0": "a", "face-1": "b", "face-2": "c"}')
    result = study("run", study_yaml(folder, **values()), "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "settle: found 3 prompts, expected at least 4" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_scorer_that_cannot_score_a_half_is_refused_before_anything_runs(
    tmp_path: Path, verb: str
) -> None:
    """A Frechet distance of 32 features takes 33 pictures: 40 prompts are enough, a half of them is not."""
    folder = write_inputs(tmp_path / "inputs")
    prompts = {f"face-{n:02d}": f"face number {n}" for n in range(40)}
    (folder / "few.json").write_text(json.dumps(prompts))
    (folder / "real").mkdir()
    for n in range(40):
        (folder / f"real/{n}.jpg").write_bytes(jpeg(n, quality=90))
    scorers = ["demo-acc", {"demo-fd": {"reference": str(folder / "real"), "label": "real"}}]
    made = study_yaml(folder, **values(scorers=scorers))
    result = study(verb, made, "--out", tmp_path / "out")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "settle: half of " in result.stderr
    assert "found 20 pictures, expected at least 33 for demo-fd" in result.stderr
    assert "begins" not in result.stdout + result.stderr
    assert not (tmp_path / "out").exists()
    whole = study_yaml(folder, "whole", **values(scorers=scorers, settle=None))
    assert study("plan", whole, "--out", tmp_path / "out").returncode == 0
