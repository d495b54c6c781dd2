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
from PIL import Image

from encode.__main__ import main as encode
from encode.models.pixels import to_pixels
from eval.commands import main
from eval.demo import pipeline
from eval.demo.classifier import load_classifier
from eval.demo.openmoji import GROUPS
from eval.demo.pipeline import VAES, StepFailed, together, train_command
from eval.distances.frechet import frechet_features
from eval.errors import BadPrompts
from eval.scores import results
from shards import canonical_json
from shards.__main__ import main as order
from tests.train.here import forked
from train.__main__ import main as train

SMALL_MODEL = ["model.hidden_size=32", "model.layers=1", "model.heads=1", "model.kv_heads=1"]


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
    cache = out / "cache/openmoji"
    settings = [
        "configs/demo/train.yaml",
        f"data.text={cache}/minilm", f"data.also=[{cache}/vae-plain,{cache}/vae-equi]",
        f"validation.source={out}/cache/openmoji-val", f"runs={out}/runs", "steps=6", "log_every=2",
        "validation.every=3", "validation.rows=8", "optim.warmup=2", *SMALL_MODEL,
    ]  # fmt: skip
    for vae in VAES:
        command(out, train, *settings, f"data.latents={cache}/{vae}")
    for vae in VAES:
        evaluate(
            "generate", "--checkpoint", f"{out}/runs/train-{vae}", "--prompts", f"{data}/prompts.json",
            "--save_dir", f"{out}/images/{vae}", "--num_inference_steps", "2", "--batch_size", "140",
        )  # fmt: skip
        for source in pipeline.SOURCES:
            evaluate(
                "reconstruct", f"{out}/cache/{source}/{vae}", "--tars", f"{data}/{source}",
                "--save_dir", f"{out}/reconstructions/{source}-{vae}", "--count", "280",
            )  # fmt: skip
    return out


@pytest.mark.timeout(600)
def test_the_scores_and_the_report(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "OUT", out)
    for words in (*pipeline.score_commands().values(), pipeline.report_command()):
        evaluate(*words[3:])  # after python -m eval
    assert "Other training seeds are not covered." in capsys.readouterr().out
    html, data = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert "CC BY-SA 4.0" in html
    assert not re.search(r'(src|href)="http|url\(', html)
    assert "Training losstrain-vae-plain" in re.sub("<[^>]*>", "", html)
    generated, held_out, photos = data["sections"]
    (comparison,) = generated["comparisons"]
    assert (comparison["subject"], comparison["paired"]) == ("VAEs", True)
    names = [score["scorer"] for score in generated["scores"]]
    assert [name.split("-")[1] for name in names] == ["acc", "fd"]
    for score in generated["scores"]:
        assert all(v["low"] <= v["value"] <= v["high"] for v in score["values"])
    assert all(d["value"]["low"] is not None for d in comparison["differences"])
    assert set(generated["scores"][0]["groups"]) == set(GROUPS)
    scores = {score["scorer"].partition("-")[0]: score for score in held_out["scores"]}
    assert sorted(scores) == ["demo", "psnr", "ssim"]
    assert [score["scorer"] for score in photos["scores"]] == ["psnr", "ssim"]
    for described in generated["sets"]:
        cost = described["cost"]
        assert (cost["training"]["step"], cost["training"]["samples"]) == (6, 6 * 32)
        assert cost["encoding"]["seconds"] > 0
        assert described["initial_share"] == pytest.approx(0.99**6)
        assert any("94.1% of the averaged weights" in note for note in described["notes"])


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


def test_swapping_the_vae_is_one_value() -> None:
    pairs = zip(*map(train_command, VAES), strict=True)
    different = [pair for pair in pairs if len(set(pair)) > 1]
    assert different == [tuple(f"data.latents=demo/cache/openmoji/{vae}" for vae in VAES)]
