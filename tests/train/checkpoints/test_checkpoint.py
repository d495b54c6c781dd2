"""The checkpoint format, without training: whole or refused, and readable by any number of ranks."""

import errno
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shards.errors import StoreError
from tests.forks import fork, wait
from tests.seccomp import deny, no_atomic_names, no_links
from tests.soak.sweep import Sweep, run, sample
from tests.train import saves
from tests.train.saves import MODEL, RECORD, SIZE, SWEEP, TOTALS, part, save, state_of
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointError, State
from train.checkpoints.resume import ResumeRefused, refuse_other_run
from train.ranks.lock import RunLock


def test_any_part_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = checkpoint.verified(path)
    cuts = [0, 7, SIZE // 3, SIZE // 3 + 1, SIZE]
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        blank = State(
            part(start, stop), TOTALS, {k: [torch.zeros(stop - start)] for k in checkpoint.KINDS}
        )
        loaded = checkpoint.load(path, manifest, blank)
        for kind, values in state_of(1, start, stop).flats.items():
            assert torch.equal(loaded.flats[kind][0], values[0])


def test_whole_weights_and_average_stand_beside(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    weights, ema = load_file(path / "weights.safetensors"), load_file(path / "ema.safetensors")
    assert weights.keys() == MODEL.state_dict().keys()
    flat = torch.cat([weights[name].flatten() for name in TOTALS])
    assert torch.equal(flat, torch.arange(SIZE, dtype=torch.float32) + 1)
    assert torch.equal(torch.cat([ema[name].flatten() for name in TOTALS]), flat + 3e6)
    sampled, manifest = checkpoint.load_for_sampling(path)
    assert torch.equal(sampled.state_dict()["proj_out.bias"], ema["proj_out.bias"])
    assert manifest["model"]["hidden_size"] == 8


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000010",
        "step-00000015",
    ]
    assert (tmp_path / "latest").read_text() == "step-00000015\n"
    (tmp_path / "latest").write_text("step-00000099\n")  # a hint for people, nothing else
    result = checkpoint.newest(tmp_path)
    assert result is not None
    assert result[0].name == "step-00000015"


@pytest.mark.parametrize(
    "name", ["manifest.json", "state-00000-of-00001.safetensors", "ema.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_damaged_file_sends_to_the_checkpoint_before(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "gone":
        file.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"x"}[damage])
    result = checkpoint.newest(tmp_path)
    assert result is not None
    assert result[0].name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text
    assert name in caplog.text
    save(tmp_path, 2)  # trained again, it takes the place of the damaged one
    again = checkpoint.newest(tmp_path)
    assert again is not None
    assert again[0].name == "step-00000002"


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.verified(path.parent, names=[])


def test_nothing_whole_is_an_error_and_nothing_at_all_is_a_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    shutil.rmtree(save(tmp_path, 1) / "manifest.json", ignore_errors=True)
    (tmp_path / "step-00000001/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 1 checkpoints are damaged"):
        checkpoint.newest(tmp_path)


def test_a_failed_save_leaves_what_stands(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    result = checkpoint.newest(tmp_path)
    assert result is not None
    assert result[0].name == "step-00000001"


def test_another_run_is_refused_with_the_fields(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = checkpoint.verified(path)
    refuse_other_run(path, manifest, RECORD)
    changed = {
        **RECORD,
        "data": {"latents": {"complete": "xyz"}},
        "order": {"seed": 1, "lanes": 8, "window": 1024},
        "model": {**RECORD["model"], "layers": 3},
        "objective": {**RECORD["objective"], "caption_dropout": 0.2},
    }
    with pytest.raises(ResumeRefused) as caught:
        refuse_other_run(path, manifest, changed)
    for field in (
        "data.latents.complete",
        "order.seed",
        "order.window",
        "model.layers",
        "objective.caption_dropout",
    ):
        assert f"{field}: found" in str(caught.value)
    assert "order.lanes" not in str(caught.value)


# Faults: a sample of what the soak run does ------------------------------------------------------------------------


def test_faults_within_a_save_and_damage_to_what_stands() -> None:
    """One of each kind of fault for each rank and file, and a few more."""
    picked = sample(saves_only(), 14) + sample(damage_only(), 24)
    killed = {case[1:3] for case in picked if str(case[0]).startswith("kill")}
    assert killed == {(1, 0), (2, 0), (2, 1)}
    outcome = run(SWEEP, picked)
    assert not outcome.failures, outcome.failures[0]


def saves_only() -> Sweep:
    return replace(
        SWEEP,
        cases=lambda: [*saves.kill_cases(), *saves.error_cases()],
        group=lambda case: f"{str(case[0]).split()[0]} {case[1:3]}",
    )


def damage_only() -> Sweep:
    return replace(SWEEP, cases=lambda: [*saves.flip_cases(), *saves.cut_cases()])


def test_a_full_disk_leaves_what_stands() -> None:
    """Whichever write finds it full, of either rank."""
    full = [c for c in saves.error_cases() if c[0] == "error ENOSPC" and "write" in str(c[4])]
    assert {case[1:3] for case in full} == {(1, 0), (2, 1)}
    outcome = run(SWEEP, full)
    assert not outcome.failures, outcome.failures[0]


def test_a_power_cut_leaves_a_whole_checkpoint() -> None:
    """Before a name appears, all bytes below it are safe; before an older one vanishes, the newer name is."""
    calls = saves.calls(1, 0)
    dirty: set[str] = set()
    staged, renamed, safe = False, False, False
    for call in calls:
        path, new = call.paths[0], call.paths[-1]
        if ".staging-" in path and call.name in ("write", "openat", "open", "ftruncate"):
            writes = call.name in ("write", "ftruncate") or call.arguments[2] & os.O_CREAT
            dirty |= {path} if writes else set()
        if call.name.startswith("rename") and path in dirty:
            dirty = dirty - {path} | {new}
        if call.name == "fsync":
            dirty.discard(path)
            staged = staged or (path.startswith(".staging-") and "/" not in path and not dirty)
            safe = safe or (renamed and path == ".")
        if call.name.startswith("rename") and new == "step-00000004":
            assert staged, "the name appears before the bytes are safe"
            assert not dirty, dirty
            renamed = True
        if call.name.startswith("rename") and ".removed-" in new:
            assert safe, "an older one goes before the name of the newer one is safe"
    assert renamed
    assert safe


def test_a_pause_within_a_save_while_another_job_takes_over() -> None:
    """Before each name appears or vanishes, and at a few other moments."""
    sweep = replace(SWEEP, cases=saves.pause_cases)
    names = [case for case in saves.pause_cases() if " rename " in str(case[3])]
    outcome = run(SWEEP, names + sample(sweep, 6))
    assert not outcome.failures, outcome.failures[0]


def test_damaged_ones_are_set_aside_and_crashes_leave_nothing(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=4)
    for step in (3, 4):
        saves.damage(tmp_path / f"step-{step:08d}/ema.safetensors", 99)
    for name in (".staging-step-00000009", ".removed-step-00000000"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / ".tmp-0123").write_bytes(b"x")
    assert saves.resumed_step(tmp_path) == 2
    save(tmp_path, 3, keep=4)
    assert saves.listing(tmp_path) == [
        ".damaged-step-00000004", "latest", *(f"step-{step:08d}" for step in (1, 2, 3))
    ]  # fmt: skip
    assert saves.resumed_step(tmp_path) == 3


def test_steps_that_are_kept_are_not_counted(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=2, kept=(2, 4))
    names = ["latest", *(f"step-{step:08d}" for step in (2, 4, 6, 7))]
    assert saves.listing(tmp_path) == names


@pytest.mark.parametrize("atomic", [True, False])
def test_a_file_system_without_hard_links(tmp_path: Path, atomic: bool) -> None:
    def work() -> None:
        (no_links if atomic else no_atomic_names)()
        lock = RunLock(tmp_path)
        if atomic:
            lock.take()
            save(tmp_path / "checkpoints", 1)
            checkpoint.verified(tmp_path / "checkpoints/step-00000001")
            lock.release()
        else:
            with pytest.raises(StoreError, match="neither hard links"):
                lock.take()

    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_where_files_have_no_rights(tmp_path: Path) -> None:
    """exFAT refuses other rights than those of the mount: the file stays as it is."""

    def work() -> None:
        deny(errno.EPERM, "chmod", "fchmodat", "fchmodat2")
        checkpoint.verified(save(tmp_path / "checkpoints", 1))

    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
