"""A run watched: each checkpoint's pictures and scores, beside a trainer that saves and removes checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from eval.commands import main
from eval.distances.measure import DISTANCES
from eval.errors import BadReport, TooFewImages, Watched
from eval.images.generate import Request
from eval.images.imageset import ImageSetReader
from eval.report.entries import open_one
from eval.report.report import report
from eval.score import SCORERS as SCORERS_OF_ALL
from eval.scores import results
from eval.scores.aggregate import aggregate
from eval.scores.results import Item, Score
from eval.scores.scorer import Scorer
from eval.watch import ScorerRequest, Watcher, parse_scorers, watch
from shards import seal
from tests.eval.small import save_clip, save_folder
from tests.forks import fork, wait
from train.checkpoints.checkpoint import CheckpointError

PROMPTS = ["a red cat", "the blue dog", "a flag"]
CONFIG = {
    "steps": 30,
    "global_batch": 8,
    "seed": 0,
    "data": {"latents": "cache/vae", "text": "cache/text"},
}


def flags(add: argparse.ArgumentParser) -> None:
    """mean brightness"""
    add.add_argument("--scale", type=float, default=1.0)


def brightness(
    images: ImageSetReader, args: argparse.Namespace
) -> Iterator[tuple[Score, list[Item]]]:
    items = [
        Item(one.file.prompt.id, one.number, float(one.read().mean()) * args.scale)
        for one in images
    ]
    value, groups = aggregate(items)
    yield Score(
        scorer=f"bright-{args.scale:g}", benchmark=images.prompts.benchmark, value=value, groups=groups,
        better="higher", prompts=len(PROMPTS), pictures=len(items), images=images.digest,
        prompt_list=images.prompts.digest, made_by={},
    ), items  # fmt: skip


SCORERS = {"bright": Scorer(flags, brightness)}


@pytest.fixture
def trained(run: Path, tmp_path: Path) -> Path:
    """A run in progress, whose steps 10 and 20 are saved, of 30."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "metrics.jsonl").write_text("")
    (tmp_path / "few.json").write_text(json.dumps(PROMPTS))
    return folder


def request_of(run: Path, **fields: Any) -> Request:
    few = {"num_inference_steps": 2, "prompts": run.parent / "few.json"} | fields
    return Request(checkpoint=run, save_dir=run / "eval", **few)


def scorers(*words: str) -> list[ScorerRequest]:
    return parse_scorers(words or ("bright",), SCORERS, "cpu")


def publish(run: Path, step: int) -> None:
    """A checkpoint appears as the trainer's do: staged, then renamed."""
    folder = run / "checkpoints"
    staging = folder / f".staging-step-{step:08d}"
    shutil.copytree(folder / "step-00000020", staging)
    record = json.loads((staging / "manifest.json").read_bytes())
    del record["digest"]
    (staging / "manifest.json").write_bytes(seal(record | {"step": step}))
    staging.rename(folder / f"step-{step:08d}")


def other_weights(checkpoint: Path) -> None:
    """The step as if it was trained again: its average is now what its weights are."""
    weights, average = (checkpoint / f"{name}.safetensors" for name in ("weights", "ema"))
    average.write_bytes(weights.read_bytes())
    record = json.loads((checkpoint / "manifest.json").read_bytes())
    del record["digest"]
    record["files"]["ema.safetensors"] = record["files"]["weights.safetensors"]
    (checkpoint / "manifest.json").write_bytes(seal(record))


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "eval" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(found: Callable[[], bool], pid: int, seconds: float = 200) -> None:
    """Wait for what a process that goes on will do."""
    end = time.monotonic() + seconds
    while not found():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended"
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_each_checkpoint_is_scored_once(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainers = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    told = capsys.readouterr().out
    assert told.index("step 20") < told.index("step 10")  # the newest first
    found = lines(trained)
    assert [record["step"] for record in found] == [10, 20]
    for record in found:
        folder = trained / "eval" / f"step-{record['step']:08d}"
        pixels = [np.asarray(Image.open(path)).mean() for path in (folder / "images").iterdir()]
        assert len(pixels) == 3
        assert record["scores"]["bright-1"]["value"] == pytest.approx(np.mean(pixels))
        assert results.read_all(folder)["bright-1"].value.value == pytest.approx(np.mean(pixels))
        assert record["seconds"]["generate"] > 0
    page = (trained / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "bright-1" in page
    assert trainers == {path: path.read_bytes() for path in trainers}

    data = report(sorted((trained / "eval").glob("step-*")), trained.parent / "r.html")
    assert [point[0] for point in data["curves"][0]["points"]] == [10, 20]
    assert (
        data["sections"][0]["comparisons"][0]["subject"] == "step"
    )  # the weights are the same ones

    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not (trained / "eval" / "lease.json").exists()

    shutil.rmtree(
        trained / "checkpoints" / "step-00000010"
    )  # as the trainer does; the pictures are enough
    both = scorers("bright", "--scorer", "bright", "--scale", "2")
    assert watch(trained, request_of(trained), both, once=True) == 0
    for record in lines(trained):
        assert list(record["scores"]) == ["bright-1", "bright-2"]
        assert record["scores"]["bright-2"]["value"] == pytest.approx(
            2 * record["scores"]["bright-1"]["value"]
        )
    images = [path for path in before if path.suffix == ".png"]
    assert len(images) == 6
    assert all(path.stat().st_mtime_ns == before[path] for path in images)


def test_what_is_known_of_the_training_goes_with_each_set(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what speaks against sampling it so is said: a young average, guidance that was never trained."""
    config = CONFIG | {
        "ema": {"decay": 0.9999},
        "data": {"caption_dropout": 0.0},
        "flow": {},
        "deepspeed": {},
        "optim": {"lr": 1e-3, "schedule": "constant"},
    }
    for path in (trained / "checkpoints").glob("*/manifest.json"):
        record = json.loads(path.read_bytes())
        del record["digest"]
        path.write_bytes(
            seal(record | {"config": config, "optimizer": {"step": 10 * record["step"]}})
        )
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "98.0% of the averaged weights" in said  # of 200 updates
    assert "trained without dropped captions" in said
    for step in (10, 20):
        set_ = open_one(trained / f"eval/step-{step:08d}")
        assert set_.trained is not None
        assert set_.trained.initial_share == pytest.approx(0.9999 ** (10 * step))
        assert set_.trained.training["optim"]["lr"] == 1e-3
        assert len(set_.notes) == 2


def test_stopped_gone_on_and_ended_by_itself(trained: Path, tmp_path: Path) -> None:
    """SIGTERM while the first set is scored; then on, while the last checkpoint appears."""
    marker = tmp_path / "scoring"

    def slow(
        images: ImageSetReader, args: argparse.Namespace
    ) -> Iterator[tuple[Score, list[Item]]]:
        marker.touch()
        time.sleep(600)
        return brightness(images, args)

    waiting = [
        ScorerRequest("bright", Scorer(flags, slow), argparse.Namespace(scale=1.0, partial=False))
    ]
    pid = fork(lambda: sys.exit(watch(trained, request_of(trained), waiting)), tmp_path / "first")
    until(marker.exists, pid)
    with pytest.raises(Watched, match=f"another process watches this run .pid {pid} on"):
        watch(trained, request_of(trained), scorers(), once=True)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "first").read_text()
    assert not (trained / "eval" / "lease.json").exists()
    assert lines(trained) == []
    images = sorted((trained / "eval/step-00000020/images").iterdir())
    times = [path.stat().st_mtime_ns for path in images]

    def go_on() -> None:
        sys.exit(watch(trained, request_of(trained), scorers(), "oldest", every=0.05))

    pid = fork(go_on, tmp_path / "second")
    until(lambda: len(lines(trained)) == 2, pid)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # step 30 is still to come
    publish(trained, 30)
    assert wait(pid) == 0
    told = (tmp_path / "second").read_text()
    assert told.index("step 10") < told.index("step 20") < told.index("step 30")
    assert [record["step"] for record in lines(trained)] == [10, 20, 30]
    assert [path.stat().st_mtime_ns for path in images] == times


def test_checkpoints_that_vanish_or_are_damaged_are_passed_over(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = trained / "checkpoints/step-00000020/ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    assert "step 20: passed over. " in (told := capsys.readouterr().out)
    assert "damaged" in told
    assert told.endswith("are scored, but for those that were passed over: step 20\n")
    assert [record["step"] for record in lines(trained)] == [10]

    watcher = Watcher(trained, request_of(trained), scorers(), "oldest")
    with watcher.alone():
        assert watcher.pending() == [20]
        shutil.rmtree(trained / "checkpoints/step-00000020")  # between the look and the reading
        assert watcher._sample_and_score(20) is False
        assert watcher.pending() == []
    assert "step 20: passed over, its checkpoint was removed" in capsys.readouterr().out
    assert [record["step"] for record in lines(trained)] == [10]


def test_a_step_that_is_trained_again_is_scored_again(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    before = lines(trained)
    other_weights(trained / "checkpoints/step-00000010")
    shutil.rmtree(trained / "checkpoints/step-00000020")  # with nothing to compare, its set stays
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    told = capsys.readouterr().out
    assert "step 10: trained again since it was scored" in told
    old, new = trained / "eval/old-1-step-00000010", trained / "eval/step-00000010"
    assert json.loads((old / "record.json").read_text()) == before[0]
    assert ImageSetReader.open(old).digest == before[0]["images"] != ImageSetReader.open(new).digest
    ten, twenty = lines(trained)
    assert twenty == before[1]
    assert ten["weights"] == ImageSetReader.open(new).settings["weights"] != before[0]["weights"]
    assert ten["scores"] != before[0]["scores"]
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    assert lines(trained) == [ten, twenty]


def test_a_checkpoint_that_was_passed_over_is_read_when_it_is_replaced(trained: Path) -> None:
    folder = trained / "checkpoints/step-00000020"
    weights = folder / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    watcher = Watcher(trained, request_of(trained), scorers(), "newest")
    with watcher.alone():
        watcher.go(0.1, once=True)
        assert watcher.pending() == []
        other_weights(folder)
        assert watcher.pending() == [20]


def test_folders_that_are_no_steps_are_left_alone(trained: Path) -> None:
    aside = trained / "eval/step-00000010-old"
    aside.mkdir(parents=True)
    (aside / "manifest.json").write_text('{"complete": true}')
    (trained / "checkpoints/step-copy").mkdir()
    watcher = Watcher(trained, request_of(trained), scorers(), "newest")
    assert watcher.pending() == [20, 10]
    assert not watcher.finished()


def test_mind_has_a_curve_over_steps(trained: Path, tmp_path: Path) -> None:
    """Of three pictures here, so of fewer than the features of any network: no covariance is needed."""
    real = save_folder(tmp_path / "real", 20)
    words = ["demo-mind", "--reference", str(real), "--scorer", "demo-recall", "--reference"]
    recall = parse_scorers([*words, str(real)], SCORERS_OF_ALL, "cpu")
    with pytest.raises(TooFewImages, match=r"few\.json: found 3 pictures, expected at least 5"):
        watch(trained, request_of(trained), recall, once=True)
    assert watch(trained, request_of(trained), recall[:1], once=True) == 0
    (name,) = lines(trained)[0]["scores"]
    assert name.startswith("demo-mind-few-real-")
    assert name.endswith("-3")
    values = [record["scores"][name]["value"] for record in lines(trained)]
    assert len(values) == 2
    assert min(values) > 0
    data = report(sorted((trained / "eval").glob("step-*")), tmp_path / "r.html")
    assert [(c["scorer"], len(c["points"])) for c in data["curves"]] == [(name, 2)]
    assert name in (trained / "page.html").read_text()


def test_too_few_prompts_are_said_before_anything_is_sampled(trained: Path, tmp_path: Path) -> None:
    real = save_folder(tmp_path / "real", 20)
    words = ["clip-fid", "--reference", str(real), "--model", str(save_clip(tmp_path / "clip"))]
    with pytest.raises(TooFewImages, match=r"few\.json: found 3 pictures, expected at least 13"):
        watch(trained, request_of(trained), parse_scorers(words, DISTANCES, "cpu"), once=True)
    assert not (trained / "eval").exists()
    Watcher(
        trained,
        request_of(trained),
        parse_scorers([*words, "--allow-few"], DISTANCES, "cpu"),
        "newest",
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_lands_in_a_finaliser_stops_it_all_the_same(trained: Path) -> None:
    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def finalising(
        images: ImageSetReader, args: argparse.Namespace
    ) -> Iterator[tuple[Score, list[Item]]]:
        Last()
        return brightness(images, args)

    one = [
        ScorerRequest(
            "bright", Scorer(flags, finalising), argparse.Namespace(scale=1.0, partial=False)
        )
    ]
    assert watch(trained, request_of(trained), one, once=True) == 128 + signal.SIGTERM
    # it comes again a moment later: before the score is written down, or after
    assert [record["step"] for record in lines(trained)] in ([], [20])
    assert watch(trained, request_of(trained), scorers(), once=True) == 0
    assert [record["step"] for record in lines(trained)] == [10, 20]


def test_a_run_without_a_config_has_ended(trained: Path) -> None:
    """Imported weights: nothing trains there."""
    (trained / "config.yaml").unlink()
    assert watch(trained, request_of(trained), scorers(), every=600) == 0
    assert len(lines(trained)) == 2


def test_bad_input_is_said_before_anything_is_written(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        watch(tmp_path / "none", request_of(trained), scorers())
    with pytest.raises(CheckpointError, match="expected the folder of a run"):
        watch(tmp_path, request_of(trained), scorers())
    with pytest.raises(BadReport, match="at least one"):
        watch(trained, request_of(trained), [])
    with pytest.raises(BadReport, match="found 'dark', expected one of bright"):
        scorers("bright", "--scorer", "dark")
    with pytest.raises(SystemExit):
        scorers("bright", "--size", "3")
    assert not (trained / "eval").exists()


def test_other_settings_are_refused(trained: Path) -> None:
    for named in (None, ["own:Vae"]):  # once the first watcher was refused for want of it
        with Watcher(trained, request_of(trained, allow_class=named), scorers(), "newest").alone():
            pass
    other = request_of(trained, guidance_scale=3.0, batch_size=1)
    with pytest.raises(Watched, match=r"guidance_scale: found 6.0, expected 3.0") as error:
        watch(trained, other, scorers(), once=True)
    assert "batch_size" not in str(error.value)
    with pytest.raises(Watched, match=r"precision: found 'fp32', expected 'bf16-autocast'"):
        watch(trained, request_of(trained, device="meta"), scorers(), once=True)
    (trained / "eval" / "watch.json").write_text("[")
    with pytest.raises(Watched, match=r"watch\.json: not readable"):
        watch(trained, request_of(trained), scorers(), once=True)
    assert lines(trained) == []
    assert not (trained / "eval" / "lease.json").exists()


def test_the_command_hands_flags_to_the_scorers(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.score.SCORERS", SCORERS)
    words = ["watch", str(trained), "--prompts", str(trained.parent / "few.json"), "--num_inference_steps", "1",
             "--once", "--device", "cpu", "--scorer", "bright", "--scale", "3", "--scorer", "bright"]  # fmt: skip
    assert main(words) == 0
    assert set(lines(trained)[0]["scores"]) == {"bright-1", "bright-3"}
    assert "bright-3" in capsys.readouterr().out


def test_distances_over_steps(trained: Path, tmp_path: Path) -> None:
    """The real scorers by the real command: what `score` says of the same pictures, for each checkpoint."""
    real = [
        "--reference",
        str(save_folder(tmp_path / "real", 20)),
        "--label",
        "real",
        "--allow-few",
    ]
    clip = str(save_clip(tmp_path / "clip"))
    asked_for = [
        ["cmmd", *real, "--model", clip],
        ["clip-fid", *real, "--model", clip],
    ]
    words = [
        "--prompts",
        str(trained.parent / "few.json"),
        "--num_inference_steps",
        "1",
        "--device",
        "cpu",
    ]
    flags = [word for scorer in asked_for for word in ("--scorer", *scorer)]
    assert main(["watch", str(trained), "--once", *words, *flags]) == 0
    for record in lines(trained):
        step = f"step-{record['step']:08d}"
        alone = tmp_path / step  # the pictures, and nothing that was computed of them
        shutil.copytree(
            trained / "eval" / step, alone, ignore=shutil.ignore_patterns("scores", "features")
        )
        assert results.read_all(alone) == {}
        for scorer in asked_for:
            main(["score", scorer[0], str(alone), *scorer[1:], "--device", "cpu"])
        said = {name: score.value.value for name, score in results.read_all(alone).items()}
        assert {name.split("-")[0] for name in said} == {"cmmd", "clip"}
        assert {name: score["value"] for name, score in record["scores"].items()} == said
    page = (trained / "page.html").read_text()
    assert all(name in page for name in lines(trained)[0]["scores"])
