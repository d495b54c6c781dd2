"""One set of pictures by several processes: the same bytes, whatever their number and whatever befalls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.commands import main
from eval.errors import BadRequest, OtherImages
from eval.images.generate import generate
from eval.images.ranks import Rank
from shards import exits
from shards.errors import BadRanks
from shards.signals import Stopped
from tests.commands.lines import next_lines
from tests.eval import faults
from tests.eval.faults import made, request, same, start
from tests.forks import await_stop, fork, leave_pytest, torchrun, wait
from tests.memory import in_memory  # noqa: F401 - a fixture, instead of pytest's

ROOT = Path(__file__).parents[3]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_any_number_of_ranks_makes_the_set_of_one(tmp_path: Path, ranks: int) -> None:
    out = tmp_path / "out"
    pids = start(out, ranks, tmp_path / "log")
    assert [wait(pid) for pid in pids] == [0] * ranks
    same(out)


def test_ranks_that_start_one_after_the_other(tmp_path: Path) -> None:
    """As those of a scheduler's array: each ends well, and the last records the set."""
    out = tmp_path / "out"
    for number in (2, 0, 1):
        assert not (
            json.loads(m.read_text())["complete"]
            if (m := out / "manifest.json").exists()
            else False
        )
        (pid,) = start(out, 3, tmp_path / "log", (number,))
        assert wait(pid) == 0
    same(out)
    printed = [(tmp_path / f"log.{n}").read_text() for n in (2, 0, 1)]
    assert "rank 2: its part is done; 48 files of other ranks are missing" in printed[0]
    assert "its part is done" not in printed[2]


def test_a_rank_that_dies_keeps_no_other_waiting(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def before(number: int) -> None:
        if number == 1:
            faults.stop_at_pictures(out, 5)

    pids = start(out, 3, tmp_path / "log", before=before)
    await_stop(pids[1], tmp_path / "log.1")
    os.kill(pids[1], signal.SIGKILL)
    assert [wait(pid) for pid in pids] == [0, -signal.SIGKILL, 0]
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    pids = start(out, 2, tmp_path / "log")  # as many as are left
    assert [wait(pid) for pid in pids] == [0, 0]
    same(out)


@pytest.mark.parametrize(
    ("ranks", "moment"),
    [pytest.param(1, 100, marks=SLOW), pytest.param(2, 101, marks=SLOW), (4, 102)],
)
def test_killed_at_any_moment(ranks: int, moment: int) -> None:
    faults.killed(ranks, moment)


def words_of(save_dir: Path) -> list[str]:
    """`generate` as `start` runs it."""
    question = request(made()[0], save_dir)
    return [
        "generate", "--checkpoint", str(question.checkpoint), "--prompts", str(question.prompts), "--save_dir",
        str(question.save_dir), "--num_inference_steps", "2", "--batch_size", "4", "--device", "cpu",
    ]  # fmt: skip


def test_a_signal_whose_error_was_lost_stops_it_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        generate(request(made()[0], tmp_path / "out"), signals=[signal.SIGTERM])
    assert not list((tmp_path / "out/images").glob("*.png"))


def test_told_to_end_it_says_how_to_go_on(tmp_path: Path) -> None:
    words = words_of(tmp_path / "out")

    def work() -> None:
        leave_pytest()
        sys.exit(main(words))

    def stopping() -> None:
        faults.stop_at_pictures(tmp_path / "out", 5)
        work()

    pid = fork(stopping, tmp_path / "log")
    await_stop(pid, tmp_path / "log")
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM; run it again to go on from there" in printed
    assert "Traceback" not in printed
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
    assert wait(fork(work, tmp_path / "log")) == 0
    same(tmp_path / "out")


def test_the_one_that_records_verifies_what_others_made(tmp_path: Path) -> None:
    """Rank 1 has not looked at its part yet, and there a foreign picture lies."""

    def spoil(out: Path) -> None:
        record = json.loads((out / "manifest.json").read_text())
        del record["files"], record["provenance"]
        (out / "manifest.json").write_text(json.dumps({**record, "complete": False}))
        for name in ("00000", "00001"):  # of rank 0
            (out / f"images/{name}.png").unlink()
        whole = (out / "images/00004.png").read_bytes()
        (out / "images/00005.png").write_bytes(whole)  # of rank 1: its picture is another's

    out = faults.copied(tmp_path / "out", spoil)
    with pytest.raises(OtherImages, match=r"00005\.png"):
        generate(request(made()[0], out), rank=Rank(0, 2))
    assert not json.loads((out / "manifest.json").read_text())["complete"]


def command(launcher: list[str], words: list[str], output: Path, **more: str) -> int:
    """As a user types it: each rank starts with its imports, which take seconds."""
    with output.open("w") as log:
        run = [sys.executable, "-m", *launcher, "-m", *words]
        env = {**os.environ, **more}
        return subprocess.run(
            run, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=250
        ).returncode


def torch_run(words: list[str], output: Path) -> int:
    return command(
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], words, output
    )


def accelerate(words: list[str], output: Path) -> int:
    """`accelerate launch`, which the project needs for nothing else, from a folder of its own."""
    folder = output.parent / "accelerate"
    pip = ["pip", "install", "--no-deps", "--target", str(folder), "accelerate==1.15.0"]
    subprocess.run([sys.executable, "-m", *pip], check=True, capture_output=True)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return command(launch, words, output, PYTHONPATH=str(folder))


def agent(words: list[str], output: Path) -> int:
    return torchrun(lambda: exits.run(lambda: main(words[1:])), 2, output)


@pytest.mark.parametrize(
    "launcher",
    [
        agent,
        pytest.param(torch_run, marks=SLOW),
        pytest.param(accelerate, marks=SLOW),
    ],
)
def test_command_under_a_launcher(
    tmp_path: Path, launcher: Callable[[list[str], Path], int]
) -> None:
    log = tmp_path / "log"
    assert launcher(["eval", *words_of(tmp_path / "out")], log) == 0, log.read_text()
    same(tmp_path / "out")
    words = f"report {tmp_path}/out --out report.html"
    assert set(next_lines(log.read_text())) == {f"next: python -m eval {words}"}


def test_who_this_process_is() -> None:
    here = Rank.here({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert here == Rank(5, 8, 1)
    assert Rank.here({}) == Rank.here({"LOCAL_RANK": "3"}) == Rank(0, 1)
    assert list(here.share(range(20))) == [5, 13]
    everything = sorted(i for n in range(3) for i in Rank(n, 3).share(range(20)))
    assert everything == list(range(20))
    assert here.device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match="--device cuda: found 0 GPUs"):
            Rank(0, 2, 0).device("cuda")
    for bad in ({"RANK": "2"}, {"RANK": "-1"}, {"RANK": "x"}, {"RANK": "0", "LOCAL_RANK": "a"}):
        with pytest.raises(BadRanks, match="RANK="):
            Rank.here({"WORLD_SIZE": "2", **bad})


@pytest.mark.parametrize(
    "words",
    [
        ["score", "demo-acc", "none"],
        ["score", "clipscore", "none"],
        ["score", "reference", "none", "--out", "none"],
        ["reconstruct", "none", "--tars", "none", "--save_dir", "none"],
        ["preview", "none"],
        ["fid", "none", "none"],
    ],
)
def test_a_device_that_does_not_exist_is_named_first(words: list[str]) -> None:
    with pytest.raises(
        BadRequest, match=r"--device: found 'gpu', expected cpu, cuda or cuda:NUMBER"
    ):
        main([*words, "--device", "gpu"])
    with pytest.raises(
        BadRequest, match=r"--device cuda:99: found \d+ GPUs, expected at least 100"
    ):
        main([*words, "--device", "cuda:99"])
