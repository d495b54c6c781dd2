"""Claims and their fences: whoever lost one publishes nothing, at whatever moment another came."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import fence
from eval.errors import ClaimLost
from eval.scores import results
from eval.study.run.claims import Claim, holder
from shards import LeaseHeld
from shards.processes import bound_to
from shards.store.local import LocalStore
from tests.eval.sets import PROMPTS, make_items, make_score, make_set
from tests.eval.study.small_study import ROOT, environment


def lapse(claim: Claim) -> None:
    """Leaves a claim as a worker that was suspended for longer than its lease does."""
    claim._lease._over.set()  # its thread renews it no more
    assert claim._lease._thread is not None
    claim._lease._thread.join()
    claim._lease._until = 0.0
    store, name = claim._lease.store, claim._lease._name
    store.replace(name, claim._lease._record(1.0))


def fences(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*fence*"))


def test_one_worker_at_a_time_has_a_claim(tmp_path: Path) -> None:
    claim, path = Claim(tmp_path / "node", "train/a"), tmp_path / "logs/a.json"
    claim.take()
    with pytest.raises(LeaseHeld):
        Claim(tmp_path / "node", "train/a").take()
    record = holder(tmp_path / "node")
    assert record is not None
    assert (record["command"], record["pid"]) == ("train/a", os.getpid())
    assert time.time() - 60 < record["since"] <= time.time()
    claim.write(path, b"1")
    claim.write(path, b"2")
    assert path.read_bytes() == b"2"
    claim.remove(path)
    claim.remove(path)  # there is none
    assert not path.exists()
    claim.check()
    claim.release()
    assert holder(tmp_path / "node") is None
    assert list((tmp_path / "node").iterdir()) == []
    with pytest.raises(ClaimLost):
        claim.write(path, b"3")
    assert not path.exists()


def test_who_lost_a_claim_publishes_nothing(tmp_path: Path) -> None:
    former, path = Claim(tmp_path / "node", "train/a"), tmp_path / "a.json"
    former.take()
    former.write(path, b"before")
    lapse(former)
    assert former.lapsed
    other = Claim(tmp_path / "node", "train/a")
    other.take()
    for act in (lambda: former.write(path, b"late"), lambda: former.remove(path), former.check):
        with pytest.raises(ClaimLost, match="another worker of the study has taken this over"):
            act()
    assert path.read_bytes() == b"before"
    former.release()  # which leaves the other's as it is
    other.check()
    other.write(path, b"other")
    other.release()
    with pytest.raises(ClaimLost):  # also when the other has ended
        former.check()
    assert path.read_bytes() == b"other"


def test_a_lapsed_claim_that_nobody_took_over_is_followed(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "node", "train/a")
    claim.take()
    since = (holder(tmp_path / "node") or {})["since"]
    for _ in range(2):
        lapse(claim)
        claim.check()
        assert not claim.lapsed
    claim.write(tmp_path / "a.json", b"1")
    assert (holder(tmp_path / "node") or {})["since"] == since
    lapse(claim)
    other = Claim(tmp_path / "node", "train/a")
    other.take()  # of all that went before, the fence is removed
    with pytest.raises(ClaimLost):
        claim.write(tmp_path / "a.json", b"2")
    other.release()
    assert list((tmp_path / "node").iterdir()) == []


def test_another_worker_between_any_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes a claim, writes and gives it back is suspended before each of its steps for longer than
    its lease, and another takes the claim over and writes. What stays is the other's, and no step harms it.
    """
    stopped, robbed = set(), 0
    for step in itertools.count():
        folder, path = tmp_path / str(step), tmp_path / f"{step}.json"
        slow, other, calls = Claim(folder, "slow"), Claim(folder, "other"), itertools.count()
        came, clock, now = False, [0.0], time.time

        def between(real: Any, *words: Any, **more: Any) -> Any:
            nonlocal came
            if not came and next(calls) == step:  # noqa: B023 - called in this turn alone
                came = True
                clock.append(clock[-1] + 1000)  # noqa: B023
                other.take()  # noqa: B023
                other.write(path, b"other")  # noqa: B023
            return real(*words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + clock[-1])  # noqa: B023
            for owner, name in [
                *((LocalStore, name) for name in ("read", "put_if_absent", "replace", "delete")),
                (os, "replace"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (os, "open"),
            ]:  # fmt: skip
                real = getattr(owner, name)
                patch.setattr(
                    owner, name, lambda *words, real=real, **more: between(real, *words, **more)
                )  # fmt: skip
            try:
                slow.take()
                slow.write(path, b"slow")
                slow.release()
                outcome = "whole"
            except LeaseHeld:
                outcome = "held"
            except ClaimLost:
                outcome = "lost"
                slow.release()
            if not came:
                assert path.read_bytes() == b"slow"
                break
            stopped.add(outcome)
            assert path.read_bytes() == b"other", (step, outcome)
            try:
                other.check()
            except ClaimLost:  # suspended between its last look and giving back
                robbed += 1
                other = Claim(folder, "other")  # which can be taken again
                other.take()
            other.write(path, b"again")
            other.release()
            with suppress(LeaseHeld, ClaimLost):
                slow.write(path, b"late")
            assert path.read_bytes() == b"again"
    assert robbed <= 1
    assert step > 25
    assert stopped == {"whole", "held", "lost"}


# What commands write ------------------------------------------------------------------------------


def test_scores_are_written_within_the_fence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, claim = make_set(tmp_path / "set"), Claim(tmp_path / "claim", "score/a")
    claim.take()
    monkeypatch.setenv(fence.VARIABLE, str(claim.fence))
    make_score(folder, "clipscore", make_items([1.0] * len(PROMPTS.items)))
    (path,) = (folder / "scores").glob("*.json")
    files = {p: p.read_bytes() for p in (folder / "scores").iterdir()}
    score, items = results.read(path), results.read_items(path)
    assert len(files) == 2
    fence.remove(claim.fence)  # as who takes over does
    for kept in (items, []):
        with pytest.raises(ClaimLost) as error:
            results.write(folder, replace(score, unit=2.0), kept)
        assert error.value.exit_code == 5
    assert {p: p.read_bytes() for p in (folder / "scores").iterdir()} == files
    claim.release()


def test_on_another_file_system_a_fence_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, path = Claim(tmp_path / "claim", "score/a"), tmp_path / "a.json"
    claim.take()
    real = os.replace

    def replace_within(old: Path, new: Path) -> None:
        if Path(old).parent == claim.fence:
            raise OSError(18, "Invalid cross-device link")
        real(old, new)

    monkeypatch.setattr(os, "replace", replace_within)
    claim.write(path, b"1")
    assert path.read_bytes() == b"1"
    fence.remove(claim.fence)
    with pytest.raises(ClaimLost):
        claim.write(path, b"2")
    assert path.read_bytes() == b"1"
    claim.release()


def begun(folder: Path, code: str, held: Path) -> subprocess.Popen[bytes]:
    """A command within a fence, once it has made the file `begun`."""
    command = bound_to(os.getpid(), [sys.executable, "-c", code, str(folder / "begun")], held)
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, env=environment())
    while not (folder / "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


SAVES = """
import pathlib, signal, sys, time
def stop(*_): pathlib.Path(sys.argv[1] + "-saved").touch(); sys.exit(143)
signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[1]).touch(); time.sleep(600)
"""
# its child has a session of its own, as torchrun's ranks have
STAYS = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1] + "-pid").write_text(str(child.pid))
pathlib.Path(sys.argv[1]).touch(); time.sleep(600)
"""


def test_a_command_whose_fence_is_removed_saves_and_ends(tmp_path: Path) -> None:
    fence.put(tmp_path / "fence")
    process = begun(tmp_path, SAVES, tmp_path / "fence" / fence.HELD)
    fence.remove(tmp_path / "fence")
    assert process.wait(120) == 143
    assert (tmp_path / "begun-saved").exists()


def test_a_command_that_does_not_end_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bound.py"  # the same, with less patience
    from shards import bound

    script.write_text(Path(bound.__file__).read_text().replace("GRACE = 60.0", "GRACE = 0.5"))
    monkeypatch.setattr(bound, "__file__", str(script))
    fence.put(tmp_path / "fence")
    process = begun(tmp_path, STAYS, tmp_path / "fence" / fence.HELD)
    child = int((tmp_path / "begun-pid").read_text())
    fence.remove(tmp_path / "fence")
    assert process.wait(120) == -signal.SIGKILL
    until = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # nobody reaps it in a container without an init
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_command_does_not_begin_without_its_fence(tmp_path: Path) -> None:
    command = bound_to(os.getpid(), [sys.executable, "-c", "print('begun')"], tmp_path / "gone")
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stdout == ""
    assert "another has taken this over" in process.stderr
