"""Several workers of a study whose commands are small: each node is made once, whatever happens to a worker."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.errors import StudyRunning, WorkerDiffers
from eval.study.lock import versions
from eval.study.run.claims import Claim
from eval.study.run.workers import Worker, alone, claimed, workers
from eval.study.status import status
from eval.study.study import Study
from tests.encode.rays import parent, processes
from tests.eval.study.workers.small_worker import (
    NodeLine,
    Process,
    lines,
    nodes_in,
    small_yaml,
    start,
    write_nodes,
)

pytestmark = pytest.mark.timeout(300)  # each worker imports torch
LEASE = 2.0  # seconds, where a worker is suspended
LONG = 60.0
# two chains of three whose first are begun by two workers, and one that needs both and waits for the test
CHAINS: list[NodeLine] = [
    ("a0", [], "b0", 0), ("b0", [], "a0", 0),
    *((f"{chain}{n}", [f"{chain}{n - 1}"], 0.5, 0) for n in (1, 2) for chain in "ab"),
    ("end", ["a2", "b2"], "go", 0),
]  # fmt: skip


def wait_until(condition: Callable[[], object], worker: Process) -> None:
    while not condition():
        assert worker.poll() is None, worker.text()
        time.sleep(0.02)


def go(folder: Path) -> None:
    """Lets the commands end that wait for the test."""
    (folder / "go.begun").touch()


def ended(worker: Process) -> str:
    worker.wait(240)
    return worker.text()


def record(out: Path, name: str) -> dict[str, object]:
    values: dict[str, object] = json.loads((out / f"logs/train/{name}.json").read_bytes())
    return values


def test_each_node_is_made_once_by_one_of_two(tmp_path: Path) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    write_nodes(tmp_path, *CHAINS)
    pair = [start(path, out, LONG) for _ in range(2)]
    wait_until(lambda: any("waits for train/" in worker.text() for worker in pair), pair[0])
    go(tmp_path)
    outputs = [ended(worker) for worker in pair]
    assert [worker.returncode for worker in pair] == [0, 0], outputs
    for name, *_ in CHAINS:
        assert lines(tmp_path, f"{name}.begun") == 1
        assert sum(output.count(f"done: train/{name},") for output in outputs) == 1
        assert record(out, name)["exit_code"] == 0
    pids = {record(out, name)["pid"] for name, *_ in CHAINS}
    assert pids == {worker.pid for worker in pair}
    study = Study.open(path, out)
    assert workers(study) == []
    assert list(claimed(study, nodes_in(tmp_path))) == []


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_killed_worker_had_is_made_by_another(tmp_path: Path, number: int) -> None:
    """At work on the second or third of a chain, whose commands wait for the test."""
    path, out = small_yaml(tmp_path), tmp_path / "out"
    waits = (f"a{number}", f"b{number}")
    nodes = [(name, needs, "go" if name in waits else wait, 0) for name, needs, wait, _ in CHAINS]
    write_nodes(tmp_path, *nodes)
    first, second = (start(path, out, LONG) for _ in range(2))
    wait_until(lambda: all(lines(tmp_path, f"{name}.begun") for name in waits), second)
    first.kill()
    first.wait()  # its command gets a signal then
    go(tmp_path)
    output = ended(second)
    assert second.returncode == 0, output
    for name, *_ in CHAINS:
        assert lines(tmp_path, f"{name}.ended") == 1
        assert record(out, name)["exit_code"] == 0
    assert record(out, "end")["pid"] == second.pid


def test_a_suspended_worker_loses_its_node_and_its_command(tmp_path: Path) -> None:
    """The command itself was not suspended: the guard ends it."""
    path, out = small_yaml(tmp_path), tmp_path / "out"
    write_nodes(tmp_path, ("long", [], "go", 0), ("after", ["long"], 0.1, 0))
    first = start(path, out, LEASE)
    wait_until(lambda: lines(tmp_path, "long.begun"), first)
    (command,) = commands(tmp_path, "long")
    text = status_of(path, out, tmp_path)
    assert f"train/long: pid {first.pid} on " in text
    first.send_signal(signal.SIGSTOP)
    second = start(path, out, LONG)
    wait_until(lambda: lines(tmp_path, "long.begun") == 2, second)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: "waits for train/long" in first.text(), first)
    wait_until(lambda: command not in commands(tmp_path, "long"), second)
    go(tmp_path)
    outputs = [ended(first), ended(second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    taken = "train/long: another worker has taken it over, since this one was suspended"
    assert taken in outputs[0]
    assert f"waits for train/long (pid {second.pid} on " in outputs[0]
    assert lines(tmp_path, "long.ended") == 1
    assert record(out, "long")["pid"] == second.pid
    assert "done: train/long" not in outputs[0]


def commands(folder: Path, name: str) -> list[int]:
    """The processes of a node's command; the guard, which is one's child, is named as the command is."""
    pids = processes(b"\0".join([os.fsencode(folder), name.encode(), b""]))
    return [pid for pid in pids if parent(pid) not in pids]


def status_of(path: Path, out: Path, folder: Path) -> str:
    """What `study status` says of the nodes that workers have."""
    study = Study.open(path, out)
    return "\n".join(
        f"{node}: pid {holder['pid']} on {holder['host']}"
        for node, holder in claimed(study, nodes_in(folder))
    )


def test_a_suspended_worker_that_nobody_followed_goes_on(tmp_path: Path) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    write_nodes(tmp_path, ("long", [], 4.0, 0), ("after", ["long"], 0.1, 0))
    worker = start(path, out, 1.0)
    wait_until(lambda: lines(tmp_path, "long.begun"), worker)
    worker.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    worker.send_signal(signal.SIGCONT)
    output = ended(worker)
    assert worker.returncode == 0, output
    assert [lines(tmp_path, f"{name}.begun") for name in ("long", "after")] == [1, 1]


def test_what_failed_is_not_tried_by_others_but_by_a_later_run(tmp_path: Path) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    write_nodes(
        tmp_path, ("bad", [], "long", 7), ("after", ["bad"], 0.1, 0), ("long", [], "bad", 0),
        ("end", ["long"], 1.0, 0),
    )  # fmt: skip
    pair = [start(path, out, LONG) for _ in range(2)]
    outputs = [ended(worker) for worker in pair]
    assert [worker.returncode for worker in pair] == [3, 3], outputs
    assert lines(tmp_path, "bad.begun") == 1
    assert lines(tmp_path, "after.begun") == 0
    assert lines(tmp_path, "end.ended") == 1
    assert sum("failed: train/bad, exit code 7" in output for output in outputs) == 1
    assert sum("failed: train/bad, by pid " in output for output in outputs) == 1
    again = start(path, out, LONG)
    assert "exit code 7" in ended(again)
    assert lines(tmp_path, "bad.begun") == 2
    assert lines(tmp_path, "long.begun") == 1


def test_a_worker_that_is_stopped_gives_its_node_back(tmp_path: Path) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    write_nodes(tmp_path, ("long", [], "never", 0))
    worker = start(path, out, 60)
    wait_until(lambda: lines(tmp_path, "long.begun"), worker)
    worker.send_signal(signal.SIGTERM)
    assert ended(worker)
    assert worker.returncode == 128 + signal.SIGTERM
    study = Study.open(path, out)
    assert list(claimed(study, nodes_in(tmp_path))) == []
    assert "no `study run` works on it" in status(study)
    assert not (out / "logs/train/long.json").exists()


# Who may join -------------------------------------------------------------------------------------


def test_a_worker_of_another_yaml_or_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    first, second = (Worker(Study.open(path, out), 60) for _ in range(2))
    first.join()
    second.join()
    assert second.others
    assert not first.others
    assert second.session == first.session
    assert f"works on it (pid {os.getpid()} on " in status(Study.open(path, out))
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for values, line in [
        ({"seeds": [0, 1]}, r"study\.seeds: found \[0\], expected \[0, 1\]"),
        ({"with": ["optim.lr=1e-3"]}, r"configs\.configs/a\.yaml\.optim\.lr: found "),
    ]:
        other = Worker(Study.open(small_yaml(tmp_path, "other", **values), out), 60)
        for refused in (other.refuse_others, other.join):
            with pytest.raises(WorkerDiffers, match=rf"pid {os.getpid()} on(.|\n)*{line}") as error:
                refused()
        assert error.value.exit_code == 2
    installed = versions()
    for name in ("torch", "diffusers", "transformers", "deepspeed", "numpy"):
        others = installed | {name: "9.9.9"}
        with monkeypatch.context() as patch:
            patch.setattr("eval.study.run.workers.versions", lambda others=others: others)
            line = rf"versions\.{name}: found '{re.escape(installed[name])}', expected '9\.9\.9'"
            with pytest.raises(WorkerDiffers, match=line):
                Worker(Study.open(path, out), 60).refuse_others()
    monkeypatch.setattr("eval.study.run.workers.code_digest", lambda: "0" * 64)
    newer = Worker(Study.open(path, out), 60)
    with pytest.raises(WorkerDiffers, match="code: found "):
        newer.join()
    with pytest.raises(StudyRunning, match=f"pid {os.getpid()} on "), alone(Study.open(path, out)):
        pass
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files
    first.leave()
    second.leave()
    newer.join()  # nobody is at work
    assert not newer.others
    newer.leave()
    with alone(Study.open(path, out)):
        assert workers(Study.open(path, out)) == []


def test_of_two_yamls_at_once_one_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_nodes(tmp_path, ("long", [], "go", 0))
    paths = [small_yaml(tmp_path, "one"), small_yaml(tmp_path, "two", seeds=[0, 1])]
    pair = [start(path, out, LONG) for path in paths]
    while all(worker.poll() is None for worker in pair):
        time.sleep(0.05)
    go(tmp_path)
    outputs = [ended(worker) for worker in pair]
    assert sorted(worker.returncode for worker in pair) == [0, 2], outputs
    refused = next(i for i, worker in enumerate(pair) if worker.returncode == 2)
    assert "WorkerDiffers: " in outputs[refused]
    assert "seeds: found " in outputs[refused]
    assert lines(tmp_path, "long.begun") == 1
    study = Study.open(paths[1 - refused], out)
    assert Study.open(out / "study.yaml", out).seeds == study.seeds


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets all leases expire, as if this process had been suspended."""
    now, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead[0])
    return lambda: ahead.append(ahead.pop() + 1000)


def test_who_is_suspended_while_it_joins_writes_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: Callable[[], None]
) -> None:
    """Before any of the files that it writes, and before it is seen: another of another YAML comes in meanwhile."""
    write, take = Claim.write, Claim.take
    for moment in range(6):  # the study, two configs, the session, the worker itself, none
        out, calls = tmp_path / f"out{moment}", itertools.count()
        slow = Worker(Study.open(small_yaml(tmp_path), out), 60)
        other = Worker(Study.open(small_yaml(tmp_path, "other", seeds=[0, 1]), out), 60)

        def come() -> None:
            if next(calls) == moment:  # noqa: B023 - called in this turn alone
                pause()
                other.join()  # noqa: B023

        def written(claim: Claim, path: Path, data: bytes) -> None:
            come()
            write(claim, path, data)

        def taken(claim: Claim) -> None:
            if claim.folder.name.startswith("worker-"):
                come()
            take(claim)

        with monkeypatch.context() as patch:
            patch.setattr(Claim, "write", written)
            patch.setattr(Claim, "take", taken)
            if moment < 5:
                with pytest.raises(WorkerDiffers, match=r"seeds: found \[0, 1\], expected \[0\]"):
                    slow.join()
                assert len(workers(other.study)) == 1
                assert Study.open(out / "study.yaml", out).seeds == (0, 1)
            else:
                slow.join()
                assert next(calls) == 5
                with pytest.raises(WorkerDiffers):
                    other.join()
        slow.leave()
        other.leave()


def test_a_worker_that_was_given_up_joins_again(tmp_path: Path, pause: Callable[[], None]) -> None:
    path, out = small_yaml(tmp_path), tmp_path / "out"
    first, second = (Worker(Study.open(path, out), 60) for _ in range(2))
    first.join()
    before = first.session
    pause()
    first.keep()  # nobody came
    assert first.session == before
    pause()
    second.join()
    assert not second.others
    assert second.session != before
    first.keep()
    assert first.session == second.session
    assert len(workers(first.study)) == 2
    second.leave()
    pause()
    other = Worker(Study.open(small_yaml(tmp_path, "other", seeds=[0, 1]), out), 60)
    other.join()
    with pytest.raises(WorkerDiffers):
        first.keep()
    first.leave()
    assert len(workers(other.study)) == 1
    other.leave()


def test_one_of_a_session_writes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: Callable[[], None]
) -> None:
    path, out, calls, written = small_yaml(tmp_path), tmp_path / "out", list[str](), list[str]()
    first, second, later = (Worker(Study.open(path, out), 60) for _ in range(3))

    def write_lock(study: Study, write: Callable[[Path, bytes], None]) -> None:
        calls.append("begun")
        if len(calls) == 1:  # suspended, while another comes to its end
            pause()
            second.finish(study)
        write(out / "study.lock", b"{}")
        written.append("ended")

    monkeypatch.setattr("eval.study.run.workers.write_lock", write_lock)
    first.join()
    second.join()
    first.finish(first.study)
    assert (len(calls), len(written)) == (2, 1)
    second.finish(second.study)
    assert len(calls) == 2
    first.leave()
    second.leave()
    later.join()  # of another session
    first.finish(first.study)
    assert len(calls) == 2
    later.finish(later.study)
    assert (len(calls), len(written)) == (3, 2)
    later.leave()
