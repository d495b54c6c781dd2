"""The whole road through the project's own commands, from tars to the page, at a size for tests."""

import json
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from encode.__main__ import main as encode
from eval.commands import main
from eval.demo.page import write_report
from eval.demo.pipeline import VAES, StepFailed, put_prompts, together, train_command
from shards import seal
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
    lines = (whole / "prompts.jsonl").read_text().splitlines(keepends=True)
    (data / "prompts.jsonl").write_text("".join(lines[::6]))
    put_prompts(data)
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
        for source in ("openmoji-val", "photos"):
            evaluate(
                "reconstruct", f"{out}/cache/{source}/{vae}", "--tars", f"{data}/{source}",
                "--save_dir", f"{out}/reconstructions/{source}/{vae}", "--count", "280",
            )  # fmt: skip
    return out


@pytest.mark.timeout(600)
def test_the_page_says_what_was_measured(out: Path) -> None:
    clock = {"pictures": 1.0}
    summary = write_report(out, VAES, Path("configs/demo/classifier"), ["a < b"], clock)
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    html = (out / "report.html").read_text()
    assert summary["verdict"] in html.replace("&#39;", "'")
    assert "a &lt; b" in html
    assert 'src="http' not in html
    assert "url(http" not in html
    assert html.count("data:image/png") > 100
    assert summary["accuracy_of_real_pictures"] > 0.8
    for vae in VAES:
        score = summary["scores"][vae]["demo-acc"]
        assert score["low"] <= score["value"] <= score["high"]
        assert summary["runs"][vae]["steps"] == 6
        assert summary["runs"][vae]["samples"] == 6 * 32
        assert summary["encoding"][vae]["every_step"] > 0
        assert summary["runs"][vae]["initial_share"] == pytest.approx(0.99**6)
    assert summary["pairing"]["paired"] is True
    assert "they do not cover other training seeds" in summary["verdict"]
    assert any("94.1% of the averaged weights" in note for note in summary["pairing"]["notes"])

    record = out / "images" / VAES[1] / "run.json"
    kept = record.read_bytes()
    run = json.loads(kept)
    del run["digest"]
    run["training"]["optim"]["lr"] *= 2
    record.write_bytes(seal(run))
    try:
        other = write_report(out, VAES, Path("configs/demo/classifier"), [], clock)
    finally:
        record.write_bytes(kept)
    assert other["verdict"].startswith("Compares sets that differ in more than VAEs. ")
    assert "optim.lr differs (0.0015, 0.003)" in (out / "report.html").read_text()


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
