"""File systems without hard links: names appear by a rename that does not replace, or nothing begins."""

import errno
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from shards import put_if_absent
from shards.__main__ import main
from shards.column.lease import Lease
from shards.errors import StoreError
from shards.format.atomic import appear
from shards.store.local import LocalStore
from shards.tools.verify import logical_digest, verify
from tests.forks import fork, wait
from tests.seccomp import deny, no_atomic_names, no_links
from tests.shards.killer import Act, trace
from tests.shards.toy import files_of, small_moments

ERRORS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_name_appears_once(tmp_path: Path, error: int) -> None:
    def work() -> None:
        no_links(error)
        assert put_if_absent(tmp_path / "a/x", b"one")
        assert not put_if_absent(tmp_path / "a/x", b"two")

    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert files_of(tmp_path / "a") == {"x": b"one"}


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOSPC, errno.EIO, errno.EROFS])
def test_other_errors_are_not_taken_for_a_want_of_links(tmp_path: Path, error: int) -> None:
    def work() -> None:
        no_links(error)
        with pytest.raises(OSError, match=os.strerror(error)) as caught:
            put_if_absent(tmp_path / "x", b"one")
        assert caught.value.errno == error

    assert wait(fork(work, tmp_path.with_suffix(".log"))) == 0
    assert not (tmp_path / "x").exists()


def test_a_right_that_is_lacking_is_said_as_such(tmp_path: Path) -> None:
    """EPERM may be either: the rename tells which."""

    def work() -> None:
        deny(errno.EPERM, "link", "linkat", "renameat2")
        with pytest.raises(PermissionError):
            put_if_absent(tmp_path / "x", b"one")

    assert wait(fork(work, tmp_path.with_suffix(".log"))) == 0


def test_writers_that_race_agree(tmp_path: Path) -> None:
    """Of eight processes, some with links and some without, one makes each name, and its bytes stay."""
    names, start = [f"n{i}" for i in range(40)], time.time() + 0.5

    def writer(number: int) -> None:
        if number % 2:
            no_links()
        time.sleep(max(0.0, start - time.time()))
        names_made = [n for n in names if put_if_absent(tmp_path / "c" / n, b"%d" % number * 5000)]
        print(*names_made)

    logs = [tmp_path / f"log-{i}" for i in range(8)]
    pids = [fork(lambda i=i: writer(i), log) for i, log in enumerate(logs)]  # type: ignore[misc]
    assert [wait(pid) for pid in pids] == [0] * 8
    created = [log.read_text().split() for log in logs]
    assert sorted(name for part in created for name in part) == sorted(names)
    for number, part in enumerate(created):
        for name in part:
            assert (tmp_path / "c" / name).read_bytes() == b"%d" % number * 5000
    assert sorted(files_of(tmp_path / "c")) == sorted(names)


def test_a_writer_that_is_killed_leaves_a_name_whole_or_absent(tmp_path: Path) -> None:
    """Before and after each system call that a put makes."""

    def put(folder: Path) -> None:
        no_links()
        put_if_absent(folder / "x", b"whole" * 1000)

    calls = trace(lambda: put(tmp_path / "0"), tmp_path / "0").calls
    assert [c.name for c in calls].count("renameat2") == 1
    for number in range(len(calls)):
        for what in ("kill before", "kill after"):
            folder = tmp_path / f"{number}-{what}"
            run = trace(lambda f=folder: put(f), folder, Act(what, number))  # type: ignore[misc, arg-type]
            assert os.WIFSIGNALED(run.status)
            if (folder / "x").exists():
                assert (folder / "x").read_bytes() == b"whole" * 1000
            assert put_if_absent(folder / "x", b"again") is not (
                (folder / "x").read_bytes() == b"whole" * 1000
            )


def test_a_file_system_with_neither_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def work() -> None:
        no_atomic_names()
        with pytest.raises(StoreError, match="neither hard links .* nor renames") as caught:
            put_if_absent(tmp_path / "x", b"one")
        assert type(caught.value).exit_code == 2

    assert wait(fork(work, tmp_path.with_suffix(".log"))) == 0, tmp_path.with_suffix(
        ".log"
    ).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_another_file_system_is_an_error_still(tmp_path: Path) -> None:
    device, places = tmp_path.stat().st_dev, map(Path, ("/dev/shm", "/tmp", "/var/tmp"))
    other_disk = next((p for p in places if p.is_dir() and p.stat().st_dev != device), None)
    if other_disk is None:
        pytest.skip("one file system only")
    (tmp_path / "x").write_bytes(b"one")
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)) as caught:
        appear(tmp_path / "x", other_disk / "never-made")
    assert caught.value.errno == errno.EXDEV


def test_an_object_moved_to_another_disk_is_durable_before_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, places = tmp_path.stat().st_dev, map(Path, ("/dev/shm", "/tmp", "/var/tmp"))
    other_disk = next((p for p in places if p.is_dir() and p.stat().st_dev != device), None)
    if other_disk is None:
        pytest.skip("one file system only")
    synced: list[tuple[int, bool]] = []  # inode, and whether the source was there then
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "x").exists()))
        sync(descriptor)

    with tempfile.TemporaryDirectory(dir=other_disk) as place:
        (tmp_path / "quarantine").symlink_to(place)
        (tmp_path / "x").write_bytes(b"one")
        monkeypatch.setattr(os, "fsync", note)
        LocalStore(tmp_path).move("x", "quarantine/x")
        assert (Path(place) / "x").read_bytes() == b"one"
        expected = {(Path(place) / "x").stat().st_ino, Path(place).stat().st_ino}
        assert expected <= {inode for inode, before in synced if before}
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["copy", "convert", "stage"])
@pytest.mark.parametrize("atomic", [True, False])
def test_commands_that_write_columns(tmp_path: Path, command: str, atomic: bool) -> None:
    source = small_moments(tmp_path / "s/vae")
    words = {
        "copy": [source, tmp_path / "t/vae"],
        "convert": [source, tmp_path / "t/vae", "--backend", "webdataset", "--processes", "1"],
        "stage": [source, tmp_path / "t"],
    }[command]

    def work() -> None:
        (no_links if atomic else no_atomic_names)()
        sys.argv = ["shards", command, *map(str, words)]
        sys.exit(main())

    code, output = wait(fork(work, tmp_path / "log")), (tmp_path / "log").read_text()
    if atomic:
        target = next((tmp_path / "t").rglob("column.json")).parent
        assert code == 0, output
        assert logical_digest(target) == logical_digest(source)
        assert verify(target) == []
    else:
        assert (code, "neither hard links" in output, output.count("\n")) == (2, True, 1)
        assert not [p for p in (tmp_path / "t").rglob("*") if p.is_file() and p.suffix]


def test_a_lease_is_held_by_one(tmp_path: Path) -> None:
    def work() -> None:
        no_links()
        with Lease(tmp_path / "c", "one"), pytest.raises(Exception, match="held by `one`"):
            Lease(tmp_path / "c", "two").acquire()

    assert wait(fork(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()


def test_a_folder_that_cannot_be_synced(tmp_path: Path) -> None:
    """As on some mounts of SMB; of a file it is an error."""

    def put() -> None:
        put_if_absent(tmp_path / "c/x", b"one")

    syncs = [c for c in trace(put, tmp_path).calls if c.name == "fsync"]
    assert len(syncs) > 1
    for call in syncs:
        shutil.rmtree(tmp_path / "c")
        run = trace(put, tmp_path, Act("fail", call.number, errno.EINVAL))
        of_a_file = ".tmp-" in call.label
        assert (run.status != 0) is of_a_file
        assert (tmp_path / "c/x").exists() is not of_a_file
