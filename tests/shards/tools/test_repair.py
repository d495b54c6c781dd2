"""What is damaged is put aside, encoded again, and the column is what it was; `gc` takes only what
nothing needs.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shards import (
    Column,
    IncompleteColumn,
    LeaseHeld,
    ShardWriter,
    create_column,
    put_complete,
    put_empty,
)
from shards.column.commits import committed, read_commit
from shards.column.lease import Lease
from shards.errors import ObjectsMissing, ShardsError
from shards.format.atomic import canonical_json, seal, unseal
from shards.store.local import LocalStore
from shards.tools.gc import collect, seconds_of
from shards.tools.repair import repair
from shards.tools.verify import examine, logical_digest, verify
from tests.shards.toy import (
    EMPTY,
    ROWS,
    STORED,
    files_of,
    image_status,
    moments_of,
    moments_spec,
    row_ids,
    tokens_spec,
    write_column,
    write_shard,
)

SPECS: dict[str, Callable[..., Any]] = {
    "moments": moments_spec,
    "tokens": tokens_spec,
    "blosc": partial(tokens_spec, codec="blosc"),
    "webdataset": partial(tokens_spec, backend="webdataset"),
}


def flip(path: Path, place: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)


def standing(path: Path) -> dict[str, bytes]:
    """Every file but those put aside."""
    return {n: d for n, d in files_of(path).items() if not n.startswith("quarantine/")}


def encode(path: Path, spec: Any, rows: tuple[int, ...] = ROWS) -> None:
    """What is not committed, as `encode run` does."""
    digest = create_column(path, spec)
    if spec.layout.ragged:
        put_empty(path, spec, EMPTY)
    for shard in set(range(len(rows))) - set(committed(LocalStore(path), len(rows))):
        write_shard(path, spec, digest, shard, rows)
    put_complete(path, digest, len(rows), allow_failed=False)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "blosc")) for k in SPECS]
)
def test_damage_of_any_file_is_mended(tmp_path: Path, kind: str) -> None:
    """For each file in turn: cut off, or a bit changed; repaired, written again, the same bytes."""
    spec, rows = SPECS[kind](2), (1030, 40)
    path = write_column(tmp_path / "c", spec, rows)
    sound, digest = files_of(path), logical_digest(path)
    chance = random.Random(0)
    for name in list(sound)[:: 1 if kind == "moments" else 3]:  # of the others a third will do
        if name == "column.json":
            continue
        if chance.random() < 0.5:
            flip(path / name, chance.randrange(10**6))
        else:
            os.truncate(path / name, len(sound[name]) // 2)
        faults = verify(path)
        assert faults, name
        before = files_of(path)
        _, plan = repair(path, yes=False)
        assert files_of(path) == before, "a dry run changes nothing"
        assert plan, name
        repair(path, yes=True)
        leavings = standing(path)
        assert leavings.items() <= sound.items(), "what is left is sound"
        remaining = [
            n for n in sound if n.startswith(("tar/", "moments/c", "tokens/c")) and n != name
        ]
        if not name.startswith("commits/"):
            assert set(remaining) <= leavings.keys(), "sound values are adopted"
        encode(path, spec, rows)
        assert standing(path) == sound, name
        assert logical_digest(path) == digest
    assert verify(path) == []
    assert len(list((path / "quarantine").iterdir())) > 1


def test_folders_that_lie_on_another_disk(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their links are followed, and in no circle."""
    spec, stranger = moments_spec(), tmp_path_factory.mktemp("other") / "moments"
    path = write_column(tmp_path / "c", spec)
    sound, store = files_of(path), LocalStore(path)
    shutil.move(path / "moments", stranger)
    (path / "moments").symlink_to(stranger)
    (path / "up").symlink_to(tmp_path)
    (stranger / "loop").symlink_to(path)
    assert [name for name, _ in store.list()] == sorted(sound)
    flip(stranger / "c/0/0/0/0")
    (stranger / ".tmp-0").touch()
    assert store.stale_temporaries(0) == ["moments/.tmp-0"]
    repair(path, yes=True)
    assert not (stranger / "c/0/0/0/0").exists()
    (put_aside,) = path.glob("quarantine/*/moments/c/0/0/0/0")
    assert len(put_aside.read_bytes()) == len(sound["moments/c/0/0/0/0"])
    encode(path, spec)
    assert {name: store.read(name) for name in sound} == sound
    assert verify(path) == []


class Late(LocalStore):
    """A column whose encode ends once the commits have been listed."""

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        examination = super().list(prefix)
        if prefix == "commits" and len(examination) == 2:
            encode(self.folder, moments_spec())
        return examination


def test_an_encode_that_ends_meanwhile_is_no_damage(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in (0, 1):
        write_shard(path, spec, digest, shard)
    examination, plan = repair(Late(path), yes=True)
    assert (examination.faults, plan.quarantine, examination.column.missing) == ([], [], [2])
    assert Column.open(path).snapshot.rows == ROWS


def test_only_derived_objects_are_put_aside_alone(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", tokens_spec())
    flip(path / "crc/c/1")
    _, plan = repair(path, yes=False)
    names = [name for name, _ in plan.quarantine]
    assert names[0].startswith("complete/")
    assert names[-2:] == ["crc/c/1", "commits/00001.json"]  # the commit last: see `repair`
    assert len(names) == 4  # with the valid-row bits
    assert plan.shards == [1]


def test_many_faults_at_once(tmp_path: Path) -> None:
    spec = tokens_spec()
    path = write_column(tmp_path / "c", spec)
    sound = files_of(path)
    flip(path / "tokens/c/0/0")
    (path / "tokens/c/1/0").unlink()
    flip(path / "lengths/c/1")
    (path / "commits/00002.json").write_bytes(b"{}")
    flip(path / "zarr.json")
    flip(path / "empty/c/0/0")
    repair(path, yes=True)
    examination = examine(path)
    assert examination.faults == []
    assert examination.column.missing == [0, 1, 2]
    assert not [
        n for n in standing(path) if n.startswith("tokens/c/4")
    ]  # nothing says that it is sound
    with pytest.raises(IncompleteColumn):
        Column.open(path)
    encode(path, spec)
    assert standing(path) == sound


def repair_and_die(path: Path, at: int) -> int:
    """Repair in a forked process that is killed before its move number `at`; its exit status."""
    pid = os.fork()
    if pid == 0:
        calls, move = itertools.count(), LocalStore.move

        def fatal(self: LocalStore, name: str, to: str) -> None:
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            move(self, name, to)

        LocalStore.move = fatal  # type: ignore[method-assign]  # of this child alone
        try:
            repair(path, yes=True)
            os._exit(0)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_anywhere_it_leaves_nothing_that_an_encode_would_adopt(tmp_path: Path) -> None:
    spec = moments_spec()
    column = write_column(tmp_path / "c", spec)
    sound = files_of(column)
    flip(column / "moments/c/0/0/0/0")
    for deaths in itertools.count():
        path = tmp_path / str(deaths)
        shutil.copytree(column, path)
        status = repair_and_die(path, deaths)
        if status != 0:
            assert status == -signal.SIGKILL
            with suppress(ObjectsMissing):  # the objects are put aside, the commit is not yet
                encode(path, spec)  # somebody encodes at once
            assert verify(path), "and does not take damaged values for sound"
            repair(path, yes=True)  # over the lease of the dead one
        encode(path, spec)
        assert standing(path) == sound
        if status == 0:
            break
    assert deaths == 6  # bits and record of COMPLETE; values, status and crc; the commit


def test_complete_records_that_are_wrong_are_written_again(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec())
    sound = files_of(path)
    (name,) = (n for n in sound if n.startswith("complete/") and n.endswith(".json"))
    flip(path / name)
    repair(path, yes=True)
    assert standing(path) == sound
    record = unseal(path / name, "latentbank-complete", 1)  # sealed well, but of other rows
    del record["digest"]
    record["counts"]["ok"] += 1
    record["counts"]["truncated"] -= 1
    forged = path / "complete" / f"{'0' * 64}.json"
    forged.write_bytes(seal(record))
    shutil.copy(path / name.replace(".json", ".valid"), forged.with_suffix(".valid"))
    assert any("not what the commits that it names make up" in f.message for f in verify(path))
    repair(path, yes=True)
    assert standing(path) == sound


def test_records_that_only_people_can_restore(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec())
    flip(path / "column.json")
    before = files_of(path)
    _, plan = repair(path, yes=True)
    assert not plan
    assert "delete it and run `python -m encode run`" in plan.beyond[0]
    assert files_of(path) == before


def test_hostile_names_in_a_commit_are_not_followed(tmp_path: Path) -> None:
    """A record whose digest fits, but which names a file outside."""
    path = write_column(tmp_path / "c", moments_spec())
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 100)
    place = path / "commits/00001.json"
    for name in ("../precious", str(precious), "column.json", "moments/c/0/0/0/0"):
        record = unseal(place, "latentbank-commit", 1)
        del record["digest"]
        record["objects"][0][0] = name
        place.chmod(0o644)
        place.write_bytes(seal(record))
        faults = verify(path)
        assert [f.kind for f in faults] == ["commit", "complete"]
        _, plan = repair(path, yes=False)
        assert not {name, "../precious"} & {n for n, _ in plan.quarantine}
    repair(path, yes=True)
    assert precious.exists()
    assert (path / "moments/c/0/0/0/0").exists()


def test_neither_works_while_another_holds_the_lease(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec())
    flip(path / "crc/c/1")
    before = files_of(path)
    with Lease(path, "shards gc"):
        for work in (lambda: repair(path, yes=True), lambda: collect(path, yes=True)):
            with pytest.raises(LeaseHeld, match="shards gc"):
                work()
        assert files_of(path).items() >= before.items()
        assert repair(path, yes=False)[1]  # looking is free
        assert not any("lease" in str(f) for f in verify(path))
    assert files_of(path) == before


# gc -----------------------------------------------------------------------------------------------


def age(path: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(path, (then, then))


def test_gc_takes_only_what_is_old_and_of_no_commit(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in range(3):
        write_shard(path, spec, digest, shard)
    (path / "commits/00002.json").unlink()  # an encode that was interrupted before its commit
    (path / "notes.txt").write_text("not ours")
    (path / "moments/c/1").mkdir(parents=True, exist_ok=True)
    shutil.copytree(path / "moments/c/2", path / "moments/c/3")  # of shard 1, but not of its commit
    (path / "moments/c/0/0/0/.tmp-0123").write_bytes(b"half")
    sound = files_of(path)
    assert [item.name for item in collect(path, yes=True)[0]] == ["moments/c/3/0/0/0"]
    for name in ("moments/c/4/0/0/0", "moments/c/0/0/0/.tmp-0123", "notes.txt"):
        age(path / name, 25)
    garbage, remaining = collect(path, yes=False)
    names = {item.name for item in garbage}
    assert names == {"moments/c/4/0/0/0", "moments/c/0/0/0/.tmp-0123"}
    assert sum(item.bytes for item in garbage) == len(sound["moments/c/4/0/0/0"]) + 4
    assert {line.split(":")[0] for line in remaining} == {"notes.txt", "status/c/2", "crc/c/2"}
    collect(path, yes=True)
    assert files_of(path).keys() == sound.keys() - {"moments/c/4/0/0/0", "moments/c/3/0/0/0"}
    assert not list(path.rglob(".tmp-*"))
    write_shard(path, spec, digest, 2)
    assert verify(path) == []


class Busy(LocalStore):
    """A folder in which things happen once somebody has seen how old an object is."""

    happens: dict[str, Callable[[], object]]

    def age(self, name: str) -> float | None:
        age = super().age(name)
        self.happens.pop(name, lambda: None)()
        return age


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_gc_leaves_what_a_writer_has_adopted(tmp_path: Path, storage: str) -> None:
    """Also where the writer came after `gc` had found it old. What it did take is not committed."""
    spec, path, ids = moments_spec(1, **STORED[storage]), tmp_path / "c", row_ids(0, (40,))
    digest = create_column(path, spec)

    def begun() -> ShardWriter:
        writer = ShardWriter(path, spec, digest, 0, 40, "index")
        writer.put_block(moments_of(ids), image_status(ids))
        return writer

    begun().commit({})
    (path / "commits/00000.json").unlink()  # an encode that was killed before its commit
    (name,) = (n for n in files_of(path) if n.startswith(("moments/c", "tar/")))
    for standing_name in files_of(path):
        age(path / standing_name, 25)
    writers: list[ShardWriter] = []
    store = Busy(path)
    store.happens = {name: lambda: writers.append(begun())}
    garbage, remaining = collect(store, yes=True)
    assert {item.name for item in garbage} == {"crc/c/0", "status/c/0"}
    assert remaining == [f"{name}: a writer uses it"]
    writers[0].commit({})
    assert verify(path) == []

    (path / "commits/00000.json").unlink()
    with begun() as writer:
        (path / name).unlink()
        with pytest.raises(IncompleteColumn, match=f"{name}: no object .* Run encode again"):
            writer.commit({})
    assert not (path / "commits/00000.json").exists()
    begun().commit({})
    assert verify(path) == []


def test_gc_of_generations_and_quarantines_only_if_asked(tmp_path: Path) -> None:
    spec, path = moments_spec(), tmp_path / "c"
    digest = create_column(path, spec)
    for shard in (0, 1):
        write_shard(path, spec, digest, shard)
    record = {"format": "latentbank-failure", "version": 1, "shard": 2, "reason": "BadTar: x"}
    LocalStore(path).replace("failures/00002.json", seal(record))
    old = put_complete(path, digest, 3, allow_failed=True)
    write_shard(path, spec, digest, 2)
    new = put_complete(path, digest, 3, allow_failed=False)
    (path / "quarantine/x").mkdir(parents=True)
    (path / "quarantine/x/crc").write_bytes(b"bad")
    assert collect(path, yes=True) == ([], [])
    collect(path, yes=True, generations=True)
    assert not (path / f"complete/{old.digest}.json").exists()
    assert not (path / f"complete/{old.digest}.valid").exists()
    assert Column.open(path).snapshot.digest == new.digest
    assert (path / "quarantine/x/crc").exists()
    collect(path, yes=True, quarantine=True)
    assert not (path / "quarantine/x/crc").exists()
    assert verify(path) == []


def test_gc_of_a_damaged_column_deletes_nothing(tmp_path: Path) -> None:
    path = write_column(tmp_path / "c", moments_spec())
    (path / "commits/00001.json").write_bytes(b"{}")
    for name in files_of(path):
        age(path / name, 48)
    before = files_of(path)
    garbage, remaining = collect(path, yes=True, generations=True)
    assert garbage == []
    assert "repair" in remaining[0]
    assert files_of(path) == before


def test_times() -> None:
    assert [seconds_of(t) for t in ("90s", "1.5m", "24h", "7d")] == [90, 90, 86400, 604800]
    for text in ("", "24", "h", "-1h", "1e3h", "24h x"):
        with pytest.raises(ShardsError, match="such as 24h"):
            seconds_of(text)


def test_a_commit_of_nonsense_is_a_fault(tmp_path: Path) -> None:
    """Sealed well, and yet not what a writer writes."""
    path = write_column(tmp_path / "c", moments_spec())
    good = read_commit(path, 0).record()
    for change in (
        {"rows": 10**9},
        {"rows": -1},
        {"blocks": []},
        {"not_ok": [[0, 2000, 3]]},
        {"not_ok": [[5, 1, 99]]},
        {"not_ok": [[9, 2, 3], [5, 1, 3]]},
        {"objects": []},
    ):
        record = good | change
        content = [record[k] for k in ("shard", "rows", "not_ok", "blocks", "index")]
        record["content"] = hashlib.sha256(canonical_json(content)).hexdigest()
        (path / "commits/00000.json").write_bytes(seal(record))
        faults = verify(path)
        assert (faults[0].kind, faults[0].shard) == ("commit", 0), change
        assert "commits/00000.json" in str(faults[0])
