"""The demo's commands, from tars to the report, at a size for tests."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from configs import read_yaml
from encode.__main__ import main as encode
from encode.models.pixels import to_pixels
from eval.commands import main
from eval.demo import pipeline
from eval.demo.classifier import load_classifier
from eval.demo.pipeline import VAES, StepFailed, together
from eval.distances.frechet import frechet_features
from eval.errors import BadPrompts
from eval.scores import results
from eval.study.graph import nodes_of
from eval.study.run.files import write_configs
from eval.study.study import Study
from shards import canonical_json
from shards.__main__ import main as order
from tests.train.here import forked
from train.__main__ import main as train

SMALL_MODEL = ["model.hidden_size=64", "model.layers=1", "model.heads=1", "model.kv_heads=1"]


def command(folder: Path, main: Callable[[], int], *words: str) -> str:
    """What a command of `python -m` says, in a fork, which need not wait for imports."""
    with mock.patch.object(sys, "argv", ["command", *words]):
        code, text = forked(main, folder / "log")
    assert code == 0, text
    return text


def evaluate(*words: str) -> None:
    """`python -m eval` in this process, which has loaded all that it needs."""
    with mock.patch.object(sys, "argv", ["eval", *words]):
        main()


def some_of(path: Path, into: Path) -> None:
    """Every sixth sample of a tar of the demo's."""
    into.parent.mkdir(parents=True)
    with tarfile.open(path) as whole, tarfile.open(into, "w") as some:
        members = whole.getmembers()
        keys = list(dict.fromkeys(m.name.split(".")[0] for m in members))[::6]
        for member in members:
            if member.name.split(".")[0] in keys:
                some.addfile(member, whole.extractfile(member))


@pytest.fixture(scope="module")
def out(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves behind, after six training steps on a sixth of the held-out tar."""
    out = tmp_path_factory.mktemp("demo")
    whole, data = data, out / "data"
    for name in ("openmoji-val", "photos"):
        some_of(whole / name / "00000.tar", data / name / "00000.tar")
    prompts = json.loads((whole / "prompts.json").read_text())
    (data / "prompts.json").write_bytes(canonical_json(dict(list(prompts.items())[::6])))
    tar = data / "openmoji-val/00000.tar"
    command(
        out, encode, "run", "configs/demo/encode.yaml", f"root={out}/cache",
        f"sources.openmoji={tar}", f"sources.openmoji-val={tar}",
        f"sources.photos={data}/photos/00000.tar", "engine.executor=inline",
    )  # fmt: skip
    for vae in VAES:
        for source in pipeline.SOURCES:
            evaluate(
                "reconstruct", f"{out}/cache/{source}/{vae}", "--tars", f"{data}/{source}",
                "--save_dir", f"{out}/reconstructions/{source}-{vae}", "--count", "280",
            )  # fmt: skip
    make_study(out)
    return out


def make_study(out: Path) -> None:
    """The demo's study with its own columns, small and of one seed, by the commands that it is made of."""
    config = read_yaml(Path("configs/demo/study.yaml"))
    cache = out / "cache/openmoji"
    config |= {
        "with": [
            f"data.text={cache}/minilm", f"validation.source={out}/cache/openmoji-val", "steps=6", "log_every=2",
            "validation.every=3", "validation.rows=8", "optim.warmup=2", *SMALL_MODEL,
        ],
        "seeds": [0],
        "entries": {vae: f"{cache}/{vae}" for vae in VAES},
        "prompts": f"{out}/data/prompts.json",
        "generate": {"num_inference_steps": 2, "batch_size": 140},
    }  # fmt: skip
    config["scorers"][0]["demo-fd"]["reference"] = str(held_out(out))
    (out / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    study = Study.open(out / "study.yaml", out)
    write_configs(study)
    for node in nodes_of(study):
        module, *words = node.command[2:]  # after python -m
        if module == "train":
            command(out, train, *words)
        else:
            evaluate(*words)


def held_out(out: Path) -> Path:
    return out / "reconstructions/openmoji-val-vae-plain/original/images"


@pytest.mark.timeout(600)
def test_the_scores_and_the_report(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "OUT", out)
    monkeypatch.setattr(pipeline, "STUDY", out / "study.yaml")
    for words in (
        *pipeline.score_commands().values(),
        pipeline.report_command(),
        pipeline.study_command("report"),
    ):
        evaluate(*words[3:])  # after python -m eval
    pipeline.summarise()
    assert "how much another seed would move this is not known" in capsys.readouterr().out
    html, data = (out / "report.html").read_text(), json.loads((out / "study.json").read_text())
    assert "CC BY-SA 4.0" in html
    assert (out / "report.html").stat().st_size < 10_000_000
    assert not re.search(r'(src|href)="http|url\(', html)
    assert [entry["name"] for entry in data["entries"]] == list(VAES)
    assert data["complete"]
    (comparison,) = data["comparisons"]
    assert (comparison["subject"], comparison["paired"]) == ("VAEs", True)
    assert [score["scorer"].split("-")[1] for score in data["scores"]] == ["fd", "acc"]
    assert data["primary"]["asked"] == "demo-fd"
    for score in data["scores"]:
        for entry in score["entries"]:
            value = entry["by_seed"]["0"]
            assert value["low"] <= value["value"] <= value["high"]
    for entry in data["cost"]["entries"]:
        assert min(entry["encode"], entry["train"], entry["generate"], entry["score"]) > 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdicts"] == data["verdicts"]
    assert (summary["seeds"], summary["step"]) == ([0], 6)
    for score in data["scores"]:
        for vae, entry in zip(VAES, score["entries"], strict=True):
            values = summary["scores"][score["scorer"]]["entries"][vae]
            assert values["by_seed"] == {"0": entry["by_seed"]["0"]["value"]}


def test_the_page_of_the_reconstructions(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "OUT", out)
    evaluate(*pipeline.report_command()[3:])
    assert "CC BY-SA 4.0" in (out / "reconstructions.html").read_text()
    drawings, photos = json.loads((out / "reconstructions.json").read_text())["sections"]
    for section in (drawings, photos):
        assert {"psnr", "ssim"} <= {score["scorer"] for score in section["scores"]}
        assert [described["name"].partition("-vae-")[2] for described in section["sets"]] == [
            "plain",
            "equi",
        ]


def test_the_judge_is_right_about_held_out_drawings(out: Path) -> None:
    original = out / "reconstructions/openmoji-val-vae-plain/original"
    evaluate("score", "demo-acc", str(original))
    (score,) = results.read_all(original).values()
    assert score.value.value > 0.8  # chance is 1/7
    items = results.read_items(original / "scores" / f"{score.scorer}.json")
    assert score.value.value == pytest.approx(sum(i.value for i in items) / len(items))
    for item in items:
        assert item.value == (item.found["group"] in item.groups)
    photos = out / "reconstructions/photos-vae-plain/original"
    with pytest.raises(BadPrompts, match="begins with one: face, flag"):
        evaluate("score", "demo-acc", str(photos))


def test_demo_fd_is_the_distance_of_the_classifiers_features(out: Path) -> None:
    """Against the formula, from features computed here; of the reference itself it is 0."""
    top = out / "reconstructions/openmoji-val-vae-plain"
    words = ["--reference", str(top / "original/images"), "--label", "real"]
    for kind in ("original", "reconstruction"):
        evaluate("score", "demo-fd", str(top / kind), *words)
    classifier = load_classifier("configs/demo/classifier")
    features = [
        classifier.features(
            to_pixels(np.stack([np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))]))
        )
        .detach()
        .numpy()
        for folder in (top / "reconstruction/images", top / "original/images")
    ]
    for kind, expected in (
        ("reconstruction", frechet_features(*features)),
        ("original", 0.0),
    ):
        scores = results.read_all(top / kind)
        (name,) = (name for name in scores if name.startswith("demo-fd-") and "-real-" in name)
        assert scores[name].value.value == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_both_runs_saw_the_same_rows(out: Path) -> None:
    """Only the latents differ between the two runs: rows are those of `shards order`, by either column."""
    lines = [
        command(
            out, order, "order", f"{out}/cache/openmoji/{vae}", f"{out}/cache/openmoji/minilm",
            "--global-batch", "32", "--lanes", "32", "--steps", "6",
        )
        for vae in VAES
    ]  # fmt: skip
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 6


def test_commands_run_side_by_side_and_one_that_fails_ends_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    together({"one": ["python", "-c", "print('here')"], "other": ["python", "-c", "print('too')"]})
    assert {"here", "too"} <= {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    start = time.monotonic()
    forever = ["python", "-c", "import time; time.sleep(600)"]
    with pytest.raises(StepFailed, match=r"'bad': 7"):
        together({"bad": ["python", "-c", "raise SystemExit(7)"], "forever": forever})
    assert time.monotonic() - start < 300


def test_the_study_of_the_demo_differs_in_the_vae_alone() -> None:
    """By hand, a training on either VAE is one word more than the other; both see the rows of both."""
    study = Study.open(pipeline.STUDY, pipeline.OUT)
    configs = [study.train_config(vae, 0).model_dump(mode="json") for vae in study.entries]
    latents = [config["data"].pop("latents") for config in configs]
    assert latents == [f"demo/cache/openmoji/{vae}" for vae in VAES]
    assert configs[0] == configs[1]
    assert set(latents) <= set(configs[0]["data"]["also"])
    assert len(study.seeds) >= 3
