"""One real case of each kind of fault of a training job; the soak run has them in great numbers."""

import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import distributed_c10d

from shards import exits
from shards.column.lease import LEASE, Lease
from shards.format.atomic import atomic_write, canonical_json
from tests.forks import fork, leave_pytest, start_torchrun, wait
from tests.train import faults
from tests.train.faults import HOW, check_lost, ends_as_straight, go, lost, saved, scratch
from tests.train.processes import Job, in_world, load_all, settle, start
from train.config import GuardConfig, TrainConfig
from train.ranks.lock import RunLock, RunLocked
from train.ranks.world import World, joined
from train.step.engine import Engine

# The first rank holds the store by which the others would learn of its loss.
LOST = [*((how, 1) for how in HOW), ("stop", 0)]


@pytest.fixture(scope="module")
def losses() -> Iterator[dict[tuple[str, int], tuple[Path, Job]]]:
    """Jobs of 2 ranks of which one is lost before step 3, side by side: they do little but wait."""
    with scratch() as folder:
        places = {case: folder / "-".join(map(str, case)) for case in LOST}
        jobs = {
            (how, rank): (place, lost(place, how, 2, rank, 3))
            for (how, rank), place in places.items()
        }
        yield jobs
        for _, job in jobs.values():
            job.kill()


@pytest.mark.parametrize(("how", "rank"), LOST)
def test_a_lost_rank_ends_the_job_and_is_named(
    losses: dict[tuple[str, int], tuple[Path, Job]], how: str, rank: int
) -> None:
    folder, job = losses[how, rank]
    check_lost(job, how, 2, rank)
    if rank:  # the first may be stopped before it has saved
        assert saved(folder / "tiny-vae") == [2]
    if how == "kill":
        ends_as_straight(folder, 2)


def test_the_first_of_four_may_be_lost_too() -> None:
    with scratch() as folder:
        check_lost(lost(folder, "kill", 4, 0, 1), "kill", 4, 0)


@pytest.mark.parametrize("hang", [0.0, 5.0, 600.0, 1e6])
def test_every_process_group_waits_longer_than_the_guard(hang: float) -> None:
    """Also those that DeepSpeed makes, for an engine and later; torch's own times are 10 and 30 minutes."""

    def work(world: World) -> list[timedelta]:
        import deepspeed.comm

        values = faults.values_of(Path(), world.size)
        engine = Engine(torch.nn.Linear(4, 4), TrainConfig.model_validate(values), world)
        engine.backward(engine(torch.ones(1, 4)).sum())
        deepspeed.comm.new_group([0, 1])
        groups = [group._get_backend(world.device) for group in distributed_c10d._world.pg_map]
        return [group.options._timeout for group in groups]

    for times in in_world(2, work, GuardConfig(hang=hang)):
        assert len(times) >= 3
        assert len(set(times)) == 1
        longest = timedelta(days=24, seconds=-1)  # torch rounds it
        assert times[0] >= (min(timedelta(seconds=hang + 3600), longest) if hang else longest)


def test_a_hung_rank_is_named_by_the_guard_and_not_by_torch(tmp_path: Path) -> None:
    """In a group that DeepSpeed makes, whose time-out would be torch's own: here one that runs out before `hang`."""
    guard = GuardConfig(hang=4.0, silence=8.0)

    def work(rank: int) -> None:
        distributed_c10d.default_pg_timeout = timedelta(seconds=1)
        with joined(guard, tmp_path / "run") as world:
            import deepspeed.comm

            group = deepspeed.comm.new_group([0, 1])
            world.phase("a step")
            world.barrier()  # a rank that is late for the phase would be the one to blame
            while rank == 1:
                time.sleep(0.01)
            deepspeed.comm.all_reduce(torch.ones(1), group=group)

    job = start(lambda rank: exits.run(lambda: work(rank)), 2, tmp_path)
    assert job.wait() == [4, 4], job.text()
    for rank in (0, 1):
        assert "no rank has got on for 4 s (guard.hang): rank 1 (" in job.text(rank)
    assert "timed out" not in job.text().lower().replace("guard", "")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_job_that_was_suspended_goes_on(tmp_path: Path, ranks: int) -> None:
    """For longer than ranks may stand still or be silent: a scheduler does it, and nobody has hung."""
    guard = GuardConfig(hang=3.0, silence=6.0)

    def work(rank: int) -> None:
        with joined(guard, tmp_path / "run") as world:
            for _ in range(20):  # 20 times 0.1 s of CPU time, which stands while the process does
                world.phase("a step")
                until = time.process_time() + 0.1
                while time.process_time() < until:
                    pass
                print("done", flush=True)

    job = start(work, ranks, tmp_path)
    job.logged("done")
    job.send(signal.SIGSTOP)
    time.sleep(7)
    job.send(signal.SIGCONT)
    assert job.wait() == [0] * ranks, job.text()


def test_ranks_that_get_on_outlive_a_stopped_torchrun(tmp_path: Path) -> None:
    """It holds the store, which nobody needs meanwhile; Ctrl-Z stops it and not them."""
    load_all()
    log = tmp_path / "log"
    log.touch()

    def work() -> None:
        settle()
        with joined(GuardConfig(silence=6.0), tmp_path / "run") as world:
            while not (tmp_path / "over").exists():
                world.phase("a step")
                time.sleep(0.1)
                print("done", flush=True)

    agent = start_torchrun(work, 2, log)
    end = time.monotonic() + 60
    while "done" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    os.kill(agent, signal.SIGSTOP)
    time.sleep(7)
    os.kill(agent, signal.SIGCONT)
    (tmp_path / "over").touch()
    assert wait(agent) == 0, log.read_text()


def test_sigkill_within_a_save() -> None:
    faults.killed_saving(2, 7, 5)


@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", 1), ("SIGINT", 2)])
def test_a_signal_to_one_rank_saves_the_step_in_progress(name: str, ranks: int) -> None:
    faults.terminated(name, ranks, "one", 1)


def test_a_signal_within_a_save_comes_twice() -> None:
    faults.terminated_saving("SIGTERM", 2, 2)


def test_a_signal_within_validation() -> None:
    faults.terminated_validating("SIGTERM", 2)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_one_rank_has_a_loss_that_is_not_finite(mode: str) -> None:
    faults.poisoned(mode, 2, 1, 5)


def test_weights_that_an_earlier_step_spoiled_are_said_to_be() -> None:
    """The loss of step 1 is not finite because step 0 moved the weights to infinity."""
    with scratch() as folder:
        job = go(folder, 2, "optim.lr=1e38", "optim.weight_decay=100")
        assert job.wait() == [3, 3]
        assert "the loss of step 1 is not finite" in job.text(0)
        assert "not finite before it, so an earlier step has spoiled them" in job.text(0)


def test_too_many_steps_in_a_row_are_skipped() -> None:
    guard = {"nonfinite": "skip", "skips": 2}
    with scratch() as folder:
        job = go(folder, 1, "optim.lr=1e38", guard=guard)
        assert job.wait() == [3]
        assert "3 such steps in a row are more than guard.skips" in job.text()
        assert len(list((folder / "tiny-vae").glob("nonfinite-*.json"))) == 3


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_damaged_row_is_named_by_all_ranks(ranks: int) -> None:
    with scratch() as folder:
        faults.write_columns(folder / "toy", "toy", 150, 1)
        (payload,) = (folder / "toy/vae/moments/c").rglob("[0-9]*/0/0/0")
        data = bytearray(payload.read_bytes())
        data[37 * 2 * 4 * 64 * 2] ^= 0x10  # row 37, of 8 channels of 8 x 8 of 2 bytes
        payload.write_bytes(data)
        columns = {"latents": str(folder / "toy/vae"), "text": str(folder / "toy/text"), "lanes": 8}
        job = go(folder, ranks, data=columns)
        assert job.wait() == [2] * ranks, job.text()
        for rank in range(ranks):
            text = job.text(rank)
            assert "CorruptColumn" in text
            assert "toy/vae" in text
            assert "row 37" in text, text
            assert "Traceback" not in text


# One job on a folder -----------------------------------------------------------------------------------------------


def test_a_second_job_on_a_folder_is_refused() -> None:
    with scratch() as folder:
        first = go(folder, 1, "steps=100000")
        first.logged("step 1/")
        second = go(folder / "second", 2, f"runs={folder}")
        assert second.wait() == [5, 5], second.text()
        for rank in (0, 1):
            assert f"another job trains in this folder (pid {first.pids[0]} on" in second.text(rank)
        first.kill()  # and leaves its lease
        assert (folder / "tiny-vae" / LEASE).exists()
        third = go(folder, 1, "steps=100000")
        third.logged("DeepSpeed")  # from here on a signal is heeded
        third.send(signal.SIGTERM)
        assert third.wait() == [143]
        assert not list((folder / "tiny-vae").glob("lease*"))


def write_lease(run: Path, seconds: float) -> None:
    """That of a job on another host."""
    run.mkdir(exist_ok=True)
    record = {
        "owner": "0" * 32, "host": "far", "machine": "another", "pid": os.getpid(), "command": "train",
        "expires": time.time() + seconds,
    }  # fmt: skip
    atomic_write(run / LEASE, canonical_json(record))


def test_a_job_of_another_host_is_given_time(tmp_path: Path) -> None:
    """Until its lease expires, or is renewed."""
    write_lease(tmp_path / "run", 0.5)
    lock = RunLock(tmp_path / "run")
    lock.take()
    lock.check()
    lock.release()
    assert not list((tmp_path / "run").iterdir())
    write_lease(tmp_path / "run", 50)

    def renew() -> None:
        leave_pytest()
        while True:
            time.sleep(0.3)
            write_lease(tmp_path / "run", 100)

    pid = fork(renew, tmp_path / "log")
    try:
        with pytest.raises(RunLocked, match="another job trains in this folder .* on far"):
            RunLock(tmp_path / "run", seconds=1).take()
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)


def test_a_lock_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    lock, thief = RunLock(tmp_path), Lease(tmp_path, "train", force=True)
    lock.take()
    lock.check()
    thief.acquire()
    with pytest.raises(RunLocked, match=rf"took over this folder \(pid {os.getpid()} on"):
        lock.check()
    thief.release()
    with pytest.raises(RunLocked, match=r"took over this folder \(and has ended\)"):
        lock.check()  # nobody has it, but what it wrote is there
    lock.release()


def test_a_lease_that_expired_and_nobody_took_is_taken_anew(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    owner = lock.owner
    lock._lease._until = 0.0  # type: ignore[union-attr]  # as of a process that was stopped
    (tmp_path / LEASE).write_bytes(
        canonical_json({**json.loads((tmp_path / LEASE).read_bytes()), "expires": 0.0})
    )
    lock.check()
    assert lock.owner != owner
    with pytest.raises(RunLocked):
        RunLock(tmp_path).take()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("point", "ranks", "wakes"),
    [
        ("checkpoints/checkpoint.py:_write_whole", 2, "beside it"),
        ("report/metrics.py:write", 1, "ended"),
        ("report/records.py:forget_after", 1, "beside it"),
    ],
)
def test_a_suspended_job_wakes_beside_its_successor(point: str, ranks: int, wakes: str) -> None:
    faults.suspended(point, ranks, wakes)
