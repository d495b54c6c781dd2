"""Learning rates of which the validation loss chooses one for each entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from eval.errors import BadStudy, OutputEdited
from eval.study.checks import check_settled
from eval.study.choices import choices, settle
from eval.study.graph import nodes_of
from eval.study.pictures import reported_set, trial_sets
from eval.study.report.analysis import analyse
from eval.study.run.edited import digests_of, refuse_edited
from eval.study.run.files import write_configs
from eval.study.study import Study
from tests.eval.study.handmade import open_study
from tests.eval.study.settled.test_choices import opened, values
from tests.eval.study.small_study import study, study_yaml, write_inputs


@pytest.mark.slow
def test_learning_rates_are_trained_and_chosen_by_the_validation_loss(tmp_path: Path) -> None:
    """A rate of next to nothing learns nothing, so the larger one is chosen for both, by the losses in the runs'
    metrics; pictures are made of the chosen trainings alone.
    """
    folder = write_inputs(tmp_path / "inputs")
    train = yaml.safe_load((folder / "train.yaml").read_text())
    train |= {
        "validation": {"source": str(folder / "cache/pets"), "every": 3, "rows": 8, "batch": 8}
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    rates = {"lr": [1e-9, 1e-2], "guidance_scale": None, "ema": None, "accept_edge": True}
    result = study("run", study_yaml(folder, **values(settle=rates)), "--out", folder / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    fair = opened(folder)
    assert len(list((folder / "out/runs").iterdir())) == 2 * 2 * 2
    runs = {}
    for path in (folder / "out/runs").glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        entry = path.parent.name.partition("-lr-")[0]
        runs[entry, config["optim"]["lr"], config["seed"]] = path.parent
    for entry in fair.entries:
        losses = []
        for rate in (1e-9, 1e-2):
            of_seeds = []
            for seed in (0, 1):
                metrics = runs[entry, rate, seed] / "metrics.jsonl"
                lines = map(json.loads, metrics.read_text().splitlines())
                of_seeds.append(
                    [line["validation"]["loss"] for line in lines if "validation" in line][-1]
                )
            losses.append(fmean(of_seeds))
        assert losses[1] < losses[0]
        assert fair.settled[entry] == {"lr": 1e-2}
        commands = [node.command for node in nodes_of(fair) if node.kind == "generate"]
        assert all(
            "-lr-0.01-" in command[command.index("--checkpoint") + 1] for command in commands
        )
    data = analyse(fair).data
    assert data["complete"]
    assert data["settled"][0]["axes"][0]["scorer"] == "validation loss"
    again = study("run", folder / "fair.yaml", "--out", folder / "out")
    assert again.returncode == 0, again.stderr
    assert "begins: " not in again.stdout + again.stderr


def test_learning_rates_are_trainings_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry with each rate in each seed, of which the validation loss chooses; the rest waits for it."""
    rates = {"lr": [1e-4, 1e-3, 1e-2], "guidance_scale": [1, 3], "ema": None}
    fair = open_study(tmp_path, settle=rates)
    nodes = nodes_of(fair)
    trained = [node for node in nodes if node.kind == "train"]
    assert len(trained) == len({node.outputs for node in trained}) == 2 * 3 * 3
    assert {node.entry for node in trained} >= {"flux-lr-0.0001", "e2e-lr-0.01"}
    assert all(node.open for node in nodes if node.kind == "generate")
    for name, rate in (("flux-lr-0.0001", 1e-4), ("flux-lr-0.01", 1e-2)):
        assert fair.train_config(name, 0).optim.lr == rate
    write_configs_to(fair)
    write_losses(fair, {1e-4: 0.4, 1e-3: 0.5, 1e-2: 0.7})
    monkeypatch.setattr("eval.study.reuse.Existing.trained", lambda *_: True)
    chosen = settle(fair)
    assert chosen.settled == {"flux": {"lr": 1e-4}, "e2e": {"lr": 1e-4}}
    assert chosen.run_folder("flux", 0).name.startswith("flux-lr-0.0001-")
    assert chosen.train_config("flux", 0).optim.lr == 1e-4
    waiting = {node.axis for node in nodes_of(chosen) if node.kind == "generate" and node.open}
    assert waiting == {""}  # guidance is sampled now, and what is reported waits for it
    # sets of another rate would be other sets: each has a folder of its own
    assert "flux-lr-0.0001-seed0" in str(trial_sets(chosen, "flux", 0, "guidance_scale")[0].folder)
    assert "flux-lr-0.0001-seed0" in str(reported_set(chosen, "flux", 0, 100).folder)
    (of_flux,) = choices(chosen)["flux"]
    assert (of_flux.scorer, of_flux.prompts, of_flux.edge) == ("validation loss", None, "smallest")


def test_a_loss_that_is_not_finite_chooses_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics have null for it."""
    fair = open_study(tmp_path, settle={"lr": [1e-4, 1e-3], "guidance_scale": None, "ema": None})
    write_losses(fair, {1e-4: 0.4, 1e-3: 0.5})
    metrics = fair.run_folder("e2e-lr-0.001", 1) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.51", "null"))
    monkeypatch.setattr("eval.study.reuse.Existing.trained", lambda *_: True)
    assert settle(fair).settled == {"flux": {"lr": 1e-4}, "e2e": {}}


def test_losses_that_were_edited_choose_no_rate(tmp_path: Path) -> None:
    """They are digested as soon as their training has ended, and refused before anything is chosen by them."""
    fair = open_study(tmp_path, settle={"lr": [1e-4, 1e-3], "guidance_scale": None, "ema": None})
    write_losses(fair, {1e-4: 0.4, 1e-3: 0.5})
    for node in nodes_of(fair):
        if node.kind == "train":
            path = fair.log(node.id).with_suffix(".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"exit_code": 0, "files": digests_of(fair, node, {})}
            path.write_text(json.dumps(record))
    refuse_edited(fair)
    metrics = fair.run_folder("e2e-lr-0.001", 1) / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(before.replace("0.51", "0.11"))
    with pytest.raises(
        OutputEdited, match=r"metrics.jsonl, of train/e2e-lr-0.001/seed1: found sha"
    ):
        refuse_edited(fair)
    metrics.unlink()
    refuse_edited(fair)


def write_configs_to(fair: Study) -> None:
    fair.out.mkdir(parents=True, exist_ok=True)
    write_configs(fair)


def write_losses(fair: Study, losses: Mapping[float, float]) -> None:
    """Writes metrics of all trainings, with a validation loss by their learning rate."""
    for name in fair.trainings:
        for seed in fair.seeds:
            folder = fair.run_folder(name, seed)
            folder.mkdir(parents=True, exist_ok=True)
            loss = losses[fair.train_config(name, seed).optim.lr]
            lines = [
                {"step": step, "validation": {"loss": loss + (0.5 if step < 100 else 0.01 * seed)}}
                for step in (50, 100)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text)


def test_rates_without_a_validation_are_refused(tmp_path: Path) -> None:
    fair = open_study(tmp_path, settle={"lr": [1e-4, 1e-3]}, **{"with": ["validation=null"]})
    with pytest.raises(
        BadStudy, match=r"found no validation.source in the training config of flux"
    ):
        check_settled(fair, 100)
