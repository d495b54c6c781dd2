"""Sets of averages of other lengths: `eval generate --ema`, from a run of small real snapshots."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs import ConfigError
from encode.models.text import TextEncoder
from encode.models.vae import Vae
from eval.commands import main
from eval.errors import BadRequest, Watched
from eval.images.generate import Generator, Request, generate, generate_each, requests_of
from eval.images.runs import Run, read
from eval.report import sweeps
from eval.report.entries import open_all
from eval.report.pairing import pairing_of
from eval.report.report import report
from eval.study.lock import record_of
from eval.watch import Watcher
from shards import exits, seal
from tests.eval.models import DIT, save_run, states
from tests.eval.study.handmade import open_study
from tests.memory import MEMORY
from train.__main__ import main as train_main
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import State
from train.checkpoints.snapshots import (
    EmaLengthRefused,
    PowerAverages,
    digest_of_length,
    load_of_length,
)
from train.config import EmaConfig
from train.model.dit import DiT
from train.ranks.world import World
from train.step.engine import Fragment

UPDATES = 48
FOLDERS = ["ema-0.05", "ema-0.06", "ema-0.12"]


@pytest.fixture(scope="module")
def averaged(vae: Vae, text: TextEncoder) -> Iterator[Path]:
    """A run of 48 small steps of chance from weights that follow the prompt, with a snapshot at every third."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield save_averaged(Path(folder) / "tiny", vae, text)


def save_averaged(folder: Path, vae: Vae, text: TextEncoder, seed: int = 0) -> Path:
    run = save_run(folder, vae, text)
    record = json.loads((run / "checkpoints/step-00000020/manifest.json").read_text())
    shutil.rmtree(run / "checkpoints")
    model = DiT(DIT)
    model.load_state_dict(states()["ema"])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weights = torch.cat([p.flatten() for p in parameters.values()])
    fragments, at = [], 0
    for name, p in parameters.items():
        fragments.append(Fragment(name, 0, p.numel(), 0, at))
        at += p.numel()
    totals = {name: p.numel() for name, p in parameters.items()}
    config = EmaConfig(power=(0.05, 0.1), snapshots=16)
    averages = PowerAverages([weights], config, UPDATES, run)
    world, chance = World(0, 1, torch.device("cpu")), torch.Generator().manual_seed(seed)
    for step in range(1, UPDATES + 1):
        weights = weights + 0.02 * torch.randn(len(weights), generator=chance)
        averages.update([weights], step)
        if averages.due(step):
            averages.save(step, step, DIT.model_dump(), State(fragments, totals, {}), world)
    flats = {kind: [weights.clone()] for kind in checkpoint.KINDS} | averages.parts
    record = {key: record[key] for key in ("model", "data")} | {
        "step": UPDATES,
        "average": {"initial_share": 0.5, **averages.record(UPDATES)},
        "config": {
            "ema": {"decay": 0.9}, "steps": UPDATES, "seed": 0, "optim": {}, "global_batch": 1, "deepspeed": {},
            "flow": {}, "data": {"caption_dropout": 0.1},
        },
    }  # fmt: skip
    record["config"]["optim"] = {"schedule": "constant"}
    checkpoint.save(
        run / "checkpoints", State(fragments, totals, flats), model, record, world, keep=2
    )
    return run


@pytest.fixture
def fields(tmp_path: Path, averaged: Path) -> dict[str, Any]:
    (tmp_path / "few.json").write_text(json.dumps(["a red cat", "the blue dog on a flag"]))
    return {
        "checkpoint": averaged, "prompts": tmp_path / "few.json", "save_dir": tmp_path / "out",
        "num_inference_steps": 3, "batch_size": 2,
    }  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["settings"]
    return found


def test_several_lengths_make_a_set_each(fields: dict[str, Any], tmp_path: Path) -> None:
    """The pictures are those of single commands; settings name the length, and the plain average's are as they were."""
    words = [
        "--checkpoint",
        fields["checkpoint"],
        "--prompts",
        fields["prompts"],
        "--device",
        "cpu",
    ]
    words += ["--num_inference_steps", 3, "--batch_size", 2, "--save_dir", fields["save_dir"]]
    assert main(["generate", *map(str, words), "--ema", "0.05", "0.06", "0.12"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [*FOLDERS, "text"]
    assert [settings(out / name)["ema"] for name in FOLDERS] == [0.05, 0.06, 0.12]
    assert len({settings(out / name)["weights"] for name in FOLDERS}) == 3
    assert len({str(files(out / name)) for name in FOLDERS}) == 3
    alone = tmp_path / "alone"
    generate(Request(**{**fields, "ema": 0.06, "save_dir": alone}))
    assert (settings(alone), files(alone)) == (
        settings(out / "ema-0.06"),
        files(out / "ema-0.06"),
    )
    plain = generate(Request(**{**fields, "save_dir": tmp_path / "plain"}))["settings"]
    assert plain["ema"] is True
    manifest = checkpoint.manifest_of(fields["checkpoint"] / f"checkpoints/step-{UPDATES:08d}")
    assert plain["weights"] == manifest["files"]["ema.safetensors"]["sha256"]
    assert plain.keys() == settings(alone).keys()


def test_another_scale_of_a_length_has_its_own_folder(fields: dict[str, Any]) -> None:
    requests = requests_of({**fields, "ema": [0.06, 0.12], "guidance_scale": [2.0, 3.0]})
    names = [request.save_dir.name for request in requests]
    assert names[:2] == ["ema-0.06-guidance_scale-2", "ema-0.06-guidance_scale-3"]
    assert len(set(names)) == 4
    assert [request.ema for request in requests] == [0.06, 0.06, 0.12, 0.12]  # loaded once each


def test_a_length_is_chosen_beside_a_scale(fields: dict[str, Any], tmp_path: Path) -> None:
    names = {f"flag-{i}": "a red flag" for i in range(6)}
    (tmp_path / "flag.json").write_text(json.dumps(names))
    words = ["--prompts", tmp_path / "flag.json", "--save_dir", tmp_path / "out", "--device", "cpu"]
    words += ["--num_inference_steps", 2, "--scorer", "demo-acc"]
    over = ["--over", "guidance_scale=1,3", "ema=0.05,0.12"]
    assert main(list(map(str, ["sweep", fields["checkpoint"], *over, *words]))) == 0
    points = sweeps.read(tmp_path / "out").points
    assert [(point.setting["ema"], point.setting["guidance_scale"]) for point in points] == [
        (0.05, 1.0), (0.05, 3.0), (0.12, 1.0), (0.12, 3.0),
    ]  # fmt: skip
    for point in points:
        made = settings(tmp_path / "out" / point.folder)
        assert {name: made[name] for name in ("ema", "guidance_scale")} == point.setting


def test_no_initial_weights_are_in_it(
    fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the plain average are weights that training began with, which is warned of; of a power average none."""
    Generator.load(Request(**fields))
    assert "50.0% of the averaged weights" in caplog.text
    caplog.clear()
    generate(Request(**{**fields, "ema": 0.06}))
    assert "averaged weights" not in caplog.text
    recorded = read(fields["save_dir"], settings(fields["save_dir"])["weights"])
    assert isinstance(recorded, Run)
    assert recorded.initial_share == 0.0
    assert recorded.training["ema"] == {"decay": 0.9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": 0.005}, "--ema: found 0.005, expected 0.01 to 0.25"),
        ({"ema": 0.3}, "--ema: found 0.3, expected 0.01 to 0.25"),
        ({"ema": float("nan")}, "--ema: found nan, expected 0.01"),
        ({"ema": 0.1, "ema_weights": False}, "found it beside --no-ema_weights"),
        ({"ema": 0.1, "type": "baseline-dit"}, "found it beside --type baseline-dit"),
        ({"ema": [0.1, 0.1]}, "--ema: found 0.1 twice"),
    ],
)
def test_bad_requests(fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        requests_of({**fields, **change})


def test_a_length_that_cannot_be_made_is_refused_before_anything_is_loaded(
    fields: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two lengths, and any of a run without power averages; nothing is written."""

    def never(request: Request) -> Generator:
        raise AssertionError("loaded")

    monkeypatch.setattr(Generator, "load", never)
    with pytest.raises(EmaLengthRefused, match="found 16 snapshots .* It takes 61"):
        generate_each(requests_of({**fields, "ema": [0.06, 0.02]}))
    with pytest.raises(EmaLengthRefused, match="found no power averages"):
        generate(Request(**{**fields, "checkpoint": run, "ema": 0.1}))
    assert not fields["save_dir"].exists()
    words = ["--checkpoint", fields["checkpoint"], "--prompts", fields["prompts"]]
    words = ["generate", *map(str, words), "--save_dir", str(fields["save_dir"]), "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--ema", "0.3"])
    assert caught.value.code == 2
    with pytest.raises(EmaLengthRefused) as refused:
        main([*words, "--ema", "0.02"])
    assert exits.explained(refused.value) is not None
    assert refused.value.exit_code == 2


# While it is trained, and in another program -----------------------------------------------------


def watched(run: Path, length: float = 0.06) -> int:
    """Scores what exists of a run of 48 steps with `eval watch --ema`; returns the exit code."""
    prompts = run.parent / "flags.json"
    prompts.write_text(json.dumps({f"flag-{i}": "a red flag" for i in range(2)}))
    ema = {"decay": 0.9, "power": [0.05, 0.1], "snapshots": 16}
    (run / "config.yaml").write_text(json.dumps({"steps": UPDATES, "ema": ema}))
    words = ["watch", run, "--prompts", prompts, "--ema", length, "--device", "cpu"]
    words += ["--num_inference_steps", 2, "--once", "--scorer", "demo-acc"]
    return main(list(map(str, words))) or 0


def test_a_run_is_watched_by_an_average_of_a_length(
    averaged: Path,
    tmp_path: Path,
    vae: Vae,
    text: TextEncoder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step that has kept too little is passed over; a step that was trained again is scored again."""
    run, last = tmp_path / "run", f"step-{UPDATES:08d}"
    shutil.copytree(averaged, run)
    early = run / "checkpoints/step-00000006"
    shutil.copytree(run / "checkpoints" / last, early)
    record = json.loads((early / "manifest.json").read_text())
    del record["digest"]
    power = record["average"]["power"]
    record["average"]["power"] = {**power, "updates": 6, "snapshots": power["snapshots"][:1]}
    (early / "manifest.json").write_bytes(seal(record | {"step": 6}))
    assert watched(run) == 0
    out = capsys.readouterr().out
    assert f"step {UPDATES}: scored" in out
    assert "step 6: passed over. " in out
    assert "found 2 snapshots" in out
    digest = digest_of_length(run, 0.06)
    made = settings(run / "eval" / last)
    assert (made["ema"], made["weights"]) == (0.06, digest)
    before = files(run / "eval" / last)
    assert watched(run) == 0
    assert "scored, after" not in capsys.readouterr().out
    with pytest.raises(Watched, match=r"ema: found 0\.06, expected 0\.12"):
        watched(run, 0.12)
    again = save_averaged(tmp_path / "again", vae, text, seed=1)
    for name in ("checkpoints", "ema-snapshots"):
        shutil.rmtree(run / name)
        shutil.copytree(again / name, run / name)
    assert watched(run) == 0
    assert f"step {UPDATES}: trained again since it was scored" in capsys.readouterr().out
    assert settings(run / "eval" / last)["weights"] == digest_of_length(run, 0.06) != digest
    assert files(run / "eval" / last) != before == files(run / f"eval/old-1-{last}")


def test_the_lock_of_a_study_holds_what_an_average_is_made_of(
    averaged: Path, tmp_path: Path
) -> None:
    study = open_study(
        tmp_path, seeds=[0], generate={"ema": 0.06},
        **{"with": [f"steps={UPDATES}", "ema.power=[0.05,0.1]", "ema.snapshots=16"]},
    )  # fmt: skip
    for name in study.entries:
        shutil.copytree(averaged, study.run_folder(name, 0))
    before = record_of(study)["outputs"]
    snapshots = sorted((study.run_folder("flux", 0) / "ema-snapshots").glob("*/state-*"))
    locked = [path for path in snapshots if str(path.relative_to(study.out)) in before]
    assert len(locked) > 4  # not all: some have no share that shows
    content = bytearray(locked[0].read_bytes())
    content[-1] ^= 1
    locked[0].write_bytes(content)
    after = record_of(study)["outputs"]
    changed = [name for name in before if after[name] != before[name]]
    assert changed == [str(locked[0].relative_to(study.out))]


def test_a_length_that_a_run_will_not_have_is_not_watched(
    fields: dict[str, Any], averaged: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(averaged, copy)
    with pytest.raises(EmaLengthRefused, match="--ema: step 48 will have 16 .* It takes 61") as e:
        watched(copy, 0.02)
    assert e.value.exit_code == 2
    (copy / "config.yaml").write_text(json.dumps({"steps": UPDATES, "ema": {"decay": 0.9}}))
    request = Request(**{**fields, "checkpoint": copy, "ema": 0.06})
    with pytest.raises(EmaLengthRefused, match="--ema: found no ema.power"):
        Watcher(copy, request, [], "newest")
    assert not (copy / "eval").exists()


def test_an_average_of_a_length_is_exported(
    averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step, out = averaged / f"checkpoints/step-{UPDATES:08d}", tmp_path / "export"

    def export(*words: str) -> int:
        command = ["train", "export", str(step), str(out), *words]
        monkeypatch.setattr(sys, "argv", command)
        return train_main()

    assert export("--layout", "safetensors", "--ema", "0.06") == 0
    assert "It holds an average of length 0.06 (EMA)" in capsys.readouterr().out
    state = load_file(out / "diffusion_pytorch_model.safetensors")
    model = load_of_length(averaged, 0.06)[0]
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    shutil.rmtree(out)
    for words, message in (
        (["--ema", "0.06"], "--ema: found --layout reference"),
        (["--layout", "safetensors", "--ema", "0.06", "--weights"], "found 0.06 beside --weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(*words)
    with pytest.raises(EmaLengthRefused, match="It takes 61"):
        export("--layout", "safetensors", "--ema", "0.02")
    with pytest.raises(SystemExit) as caught:
        export("--layout", "safetensors", "--ema", "0.3")
    assert caught.value.code == 2
    assert not out.exists()


def test_the_report_says_that_lengths_are_compared(fields: dict[str, Any], tmp_path: Path) -> None:
    generate_each(requests_of({**fields, "ema": [0.06, 0.12]}))
    generate(Request(**{**fields, "save_dir": tmp_path / "plain"}))
    folders = [tmp_path / "plain", *(tmp_path / "out" / name for name in FOLDERS[1:])]
    sets = open_all(folders)
    for a, b in ((0, 1), (1, 2)):
        pairing = pairing_of(sets[a], sets[b])
        assert (pairing.subject, pairing.differ.keys()) == ("EMA lengths", {"ema", "weights"})
        assert not [w for w in pairing.warnings if "ema" in w]
    page = tmp_path / "page.html"
    data = report(folders, page)
    assert [s["settings"]["ema"] for s in data["sections"][0]["sets"]] == [True, 0.06, 0.12]
    text = page.read_text()
    assert "EMA lengths" in text
    assert "ema-0.12" in text
