"""Signals to `study run`: what runs is saved, and the next call goes on. Also two ranks, and a column of ids."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from encode.config import EncodeConfig
from encode.run.job import run as encode
from eval.errors import StudyHalted
from eval.study.graph import Node
from eval.study.run import runner
from eval.study.run.claims import Claim
from eval.study.run.runner import Runner
from eval.study.status import status
from eval.study.study import Study
from shards import exits
from shards.exits import MAKE_ROOM
from shards.signals import stoppable
from tests.eval.study.small_study import (
    ROOT,
    environment,
    numbers,
    study,
    study_yaml,
    write_inputs,
)

pytestmark = pytest.mark.timeout(1200)
TRAIN, GENERATE = "train/plain/seed0", "generate/plain/seed0/step-00000040"


def interrupted(path: Path, out: Path, number: int, moment: Callable[[], bool]) -> str:
    """Output of a `study run` that gets a signal at a moment; its exit code must be that of the signal."""
    words = [sys.executable, "-m", "eval", "study", "run", str(path), "--out", str(out)]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while not moment():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number, output
    return output


@pytest.mark.slow
def test_signals_to_a_study_of_two_ranks_on_ids(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path)
    gemma = {"class": "GemmaModel", "path": str(folder / "gemma")}
    ids = {"kind": "ids", "encoder": gemma, "max_tokens": 32}
    base = {
        "root": str(folder / "cache"), "sources": {"pets": str(folder / "0.tar")}, "shard_rows": 1024,
        "engine": {"executor": "inline", "device": "cpu", "batch": 8}, "columns": {"ids": ids},
    }  # fmt: skip
    assert encode(EncodeConfig.model_validate(base)) == 0
    values = {
        "entries": {"plain": "plain", "fast": {"latents": "plain", "with": ["optim.lr=4e-3"]}}, "ranks": 2,
        "with": ["data.text=ids", f"data.encoder={json.dumps(gemma)}", "steps=40", "micro_batch=4"],
        "generate": {"guidance_scale": 1, "num_inference_steps": 2, "batch_size": 2},
    }  # fmt: skip
    path, whole, out = study_yaml(folder, **values), folder / "whole", folder / "stopped"
    ended = study("run", path, "--out", whole)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    command = json.loads((whole / f"logs/{TRAIN}.json").read_bytes())["command"]
    assert command[0] == "torchrun"
    assert command[-4:-1] == ["eval", "train", str(whole / "configs/plain.yaml")]

    checkpoints = out / "runs/plain/checkpoints"
    output = interrupted(
        path, out, signal.SIGINT, lambda: (checkpoints / "step-00000002/manifest.json").exists()
    )
    assert "stopped by SIGINT; run it again to go on from there" in output
    saved = [
        int(step.name[5:])
        for step in checkpoints.glob("step-*")
        if (step / "manifest.json").exists()
    ]
    assert 0 < max(saved) < 40
    assert not (out / f"logs/{TRAIN}.json").exists()
    assert "no `study run` works on it" in status(Study.open(path, out))
    text = (out / f"logs/{TRAIN}.log").read_text()
    assert f"stopped by SIGTERM after step {max(saved)}, saved" in text

    pictures = out / "images/plain-seed0/step-00000040"
    interrupted(path, out, signal.SIGTERM, lambda: (pictures / "manifest.json").exists())
    assert "no `study run` works on it" in status(Study.open(path, out))

    ended = study("run", path, "--out", out)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"begins: {TRAIN}" not in ended.stdout + ended.stderr
    assert numbers(out) == numbers(whole)
    assert len(numbers(out)) == 2

    scorers = ["demo-acc", {"clipscore": {"model": str(folder / "absent")}}]
    path = study_yaml(folder, "absent", **values, scorers=scorers)
    refused = study("run", path, "--out", folder / "unscored")
    assert refused.returncode == 2
    assert "a scorer cannot score:" in refused.stderr
    assert str(folder / "absent") in refused.stderr
    assert not (folder / "unscored").exists()


# Small processes ----------------------------------------------------------------------------------


@dataclass
class Made:
    """Says that a node is done once its outputs are there."""

    def done(self, node: Node) -> bool:
        return all(path.exists() for path in node.outputs)


HELD = """
import pathlib, sys
before, made = map(pathlib.Path, sys.argv[1:])
if before.exists():
    made.touch()
else:
    before.touch()
    sys.exit(5)
"""
TOUCH = "import pathlib, sys; pathlib.Path(sys.argv[2]).touch()"


def runner_of(folder: Path, *nodes: Node) -> Runner:
    """The runner of a study, with other commands in place of the study's."""
    (folder / "train.yaml").write_text((ROOT / "configs/demo/train.yaml").read_text())
    (folder / "few.json").write_text('{"a": "a"}')
    entries = {"a": str(folder / "a"), "b": str(folder / "b")}
    words = [f"data.text={folder}/text"]
    path = study_yaml(folder, entries=entries, **{"with": words})
    result = Runner(Study.open(path, folder / "out"))
    result.nodes, result.existing = list(nodes), Made()  # type: ignore[assignment]
    return result


def python(folder: Path, name: str, code: str, *needs: str) -> Node:
    """A command that gets two paths, of which it should make the second."""
    command = ("python", "-c", code, str(folder / f"{name}-first"), str(folder / name))
    return Node(
        id=f"encode/{name}", kind="train", command=command, needs=needs, outputs=(folder / name,)
    )


def test_a_folder_that_an_earlier_command_holds_is_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = runner_of(tmp_path, python(tmp_path, "held", HELD))
    assert held.go() == 0
    message = "encode/held: its folder is held by an earlier command; waits for it"
    assert message in "".join(capfd.readouterr())
    assert held.study.log("encode/held").read_text().count("$ python") == 2


def test_a_folder_that_stays_held_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs it does not run, what does not does."""
    monkeypatch.setattr(runner, "LEASE_SECONDS", 0)
    nodes = [
        python(tmp_path, "held", "raise SystemExit(5)"),
        python(tmp_path, "after", TOUCH, "encode/held"),
        python(tmp_path, "beside", TOUCH),
    ]
    held = runner_of(tmp_path, *nodes)
    assert held.go() == 3
    assert held.failed == {"encode/held": "exit code 5", "encode/after": "needs encode/held"}
    assert held.done == {"encode/beside"}


def test_a_stop_ends_a_command_in_order(tmp_path: Path) -> None:
    """It has the time that it needs to save."""
    code = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): time.sleep(0.3); pathlib.Path(sys.argv[2]).touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    )
    work = runner_of(tmp_path, python(tmp_path, "saves", code))

    def go() -> int:
        try:
            return work.go()
        finally:
            work.stop()

    def stop_once_begun() -> None:
        while not (tmp_path / "saves-first").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_begun).start()
    assert stoppable(go) == 128 + signal.SIGTERM
    assert (tmp_path / "saves").exists()
    assert not work.study.log("encode/saves").with_suffix(".json").exists()


@pytest.mark.parametrize("begun", [True, False])
def test_a_disk_that_is_full_ends_a_study_as_work_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """As what cannot be run at all before the first command: at its log, or at the record of how it ended."""
    work = runner_of(tmp_path, python(tmp_path, "made", TOUCH))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a/path")

    monkeypatch.setattr(Claim, "write" if begun else "remove", full)
    with pytest.raises((StudyHalted, OSError)) as caught, work.at_work():
        work.go()
    code, message = exits.explained(caught.value) or (None, "")
    assert code == (3 if begun else 2)
    assert f"No space left on device: 'a/path'. {MAKE_ROOM}" in message
    assert (tmp_path / "made").exists() == begun
    assert work.claims == {}


@pytest.mark.parametrize("needs", [(), ("encode/first",)])
def test_a_choice_that_can_be_made_by_what_another_worker_made(
    tmp_path: Path, needs: tuple[str, ...]
) -> None:
    """Seen at the start, or once what came before it is done: what waited for the choice runs."""
    first = python(tmp_path, "first", TOUCH)
    trial = replace(python(tmp_path, "trial", TOUCH, *needs), axis="guidance_scale")
    last = python(tmp_path, "last", TOUCH, trial.id)
    work = runner_of(tmp_path, first, trial, replace(last, open=True))
    (tmp_path / "trial").touch()

    def choose() -> None:
        if trial.id in work.done and any(node.open for node in work.nodes):
            work.nodes = [first, trial, last]

    work._choose = choose  # type: ignore[method-assign]
    assert work.go() == 0
    assert work.done == {first.id, trial.id, last.id}
    assert not work.study.log(trial.id).exists()
