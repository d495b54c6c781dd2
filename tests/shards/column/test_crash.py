"""Deaths, power cuts, failing disks, races and damage: one real case of each, a sample of each sweep.

`python -m tests.soak` runs the sweeps in full.
"""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards import put_if_absent
from shards.format.atomic import make_durable
from shards.tools.verify import verify
from tests.shards import killer, sweeps
from tests.shards.killer import Act, machine, trace
from tests.shards.sweeps import ADOPTING, ANEW, Disk, expected, make, reads, sound_column
from tests.shards.toy import files_of
from tests.soak.sweep import Sweep, run, sample

SAMPLES = {
    "kills": 16, "deaths": 2, "power": 6, "errors": 20, "reads": 12, "races": 4, "flips": 48,
    "cuts": 48, "swaps": 32,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _standing_columns() -> Iterator[None]:
    yield
    while sweeps._sound_columns:
        sweeps._sound_columns.popitem()[1].cleanup()


@pytest.mark.parametrize("sweep", sweeps.SWEEPS, ids=lambda sweep: sweep.name)
def test_a_sample_of_each_sweep(sweep: Sweep) -> None:
    outcome = run(sweep, sample(sweep, SAMPLES[sweep.name]))
    assert outcome.failures == []
    assert outcome.cases == SAMPLES[sweep.name]


def test_a_stat_of_an_open_tar_that_fails_names_it() -> None:
    failures = [
        (variant, start, error, at, label)
        for variant, start, error, at, label in sweeps.error_cases()
        if (variant, start, error) == ("tokens tar", ADOPTING, "EIO")
        and label.endswith("newfstatat c/tar/00000.tar")
    ]
    assert failures
    for case in failures:
        sweeps.check_error(*case)


def test_every_system_call_of_a_writer_is_known() -> None:
    """At least 200 distinct calls for two kinds of column, and the ones that publish each file."""
    counts = {}
    for variant in ("moments", "tokens"):
        calls = sweeps.calls(variant, ANEW)
        counts[variant] = len({call.label for call in calls})
        published = [c.paths[1].removeprefix("c/") for c in calls if c.name.startswith("link")]
        assert sorted(published) == sorted(expected(variant))
    assert sum(counts.values()) >= 400
    whole = [call for call in sweeps.calls("moments", ANEW) if call.name in sweeps.CHANGING]
    assert len(whole) >= 100  # what is on the disk changes so many times


# ---- the tracer itself --------------------------------------------------------------------------


def in_steps(path: Path) -> Callable[[], None]:
    """Open, write 10 bytes, sync, link, unlink: nothing but system calls."""

    def work() -> None:
        descriptor = os.open(path / "one", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(descriptor, b"0123456789")
        os.fsync(descriptor)
        os.close(descriptor)
        os.link(path / "one", path / "two")
        os.unlink(path / "one")

    return work


STEPS = ["openat one", "write one", "fsync one", "close one", "link one two", "unlink one"]


def test_calls_are_listed_by_name_and_path(tmp_path: Path) -> None:
    done = trace(in_steps(tmp_path), tmp_path)
    assert [f"{c.name.replace('at', '')} {' '.join(c.paths)}".replace("open ", "openat ")
            for c in done.calls] == STEPS  # fmt: skip
    assert done.status == 0
    assert done.results[1:] == (10, 0, 0, 0, 0)
    assert (tmp_path / "two").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("act", "files"),
    [
        (Act("kill before", 0), {}),
        (Act("kill after", 0), {"one": b""}),
        (Act("kill before", 1), {"one": b""}),
        (Act("tear", 1), {"one": b"01234"}),
        (Act("kill after", 1), {"one": b"0123456789"}),
        (Act("kill before", 4), {"one": b"0123456789"}),
        (Act("kill after", 4), {"one": b"0123456789", "two": b"0123456789"}),
        (Act("kill after", 5), {"two": b"0123456789"}),
    ],
    ids=lambda value: f"{value.what} {value.at}" if isinstance(value, Act) else "",
)
def test_death_comes_just_there(tmp_path: Path, act: Act, files: dict[str, bytes]) -> None:
    done = trace(in_steps(tmp_path), tmp_path, act)
    assert done.killed
    assert len(done.calls) == act.at + 1
    assert files_of(tmp_path) == files


def test_a_call_fails_or_does_half(tmp_path: Path) -> None:
    work = in_steps(tmp_path)
    for at, number in ((0, errno.EACCES), (1, errno.ENOSPC), (2, errno.EIO), (4, errno.EROFS)):
        done = trace(work, tmp_path, Act("fail", at, number))
        assert os.waitstatus_to_exitcode(done.status) == 1
        assert f"[Errno {number}]" in done.error
        assert done.results[-1] == -number
        (tmp_path / "one").unlink(missing_ok=True)
    done = trace(work, tmp_path, Act("fail", 1, errno.EINTR))  # which Python tries again
    assert done.status == 0
    assert done.results[1:3] == (-errno.EINTR, 10)
    (tmp_path / "two").unlink()
    assert trace(work, tmp_path, Act("shorten", 1)).results[1] == 5
    assert (tmp_path / "two").read_bytes() == b"01234"


def test_a_read_of_half(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))

    def work() -> None:
        handle = os.open(tmp_path / "file", os.O_RDONLY)
        data = bytearray(60)
        assert os.preadv(handle, [data], 0) == 30
        assert data == bytes([*range(30), *bytes(30)])

    done = trace(work, tmp_path, Act("shorten", 1))
    assert done.status == 0, done.error


def test_where_tracing_is_forbidden(tmp_path: Path) -> None:
    """Told in words, never taken for a pass: here, because a tracer is there already."""
    with pytest.raises(PermissionError, match="ptrace is forbidden here, and these tests"):
        trace(lambda: killer._ptrace(killer.TRACEME, 0), tmp_path)


def test_registers_of_both_processors() -> None:
    for name in ("x86_64", "aarch64"):
        kind = machine(name)
        assert {"openat", "write", "fsync", "linkat", "unlinkat"} <= set(kind.names.values())
        assert set(kind.names.values()) <= set(killer.ARGUMENTS)
    with pytest.raises(NotImplementedError, match="no register layout for 'riscv64'"):
        machine("riscv64")


# ---- the checks can fail ------------------------------------------------------------------------


def test_a_writer_in_place_would_be_caught(tmp_path: Path) -> None:
    """What the sweeps look for: a torn file under its final name."""
    done = trace(lambda: (tmp_path / "column.json").write_bytes(b"0123456789"), tmp_path)
    write = next(call.number for call in done.calls if call.name == "write")
    trace(
        lambda: (tmp_path / "column.json").write_bytes(b"0123456789"), tmp_path, Act("tear", write)
    )
    assert files_of(tmp_path) == {"column.json": b"01234"}


def lost(work: Callable[[], object], folder: Path, name: str) -> bool:
    """Whether a power cut after `work` may lose a file."""
    disk, done = Disk(folder), trace(work, folder)
    assert done.status == 0, done.error
    for call, result in zip(done.calls, done.results, strict=True):
        disk.follow(call, result)
    return not disk.keeps(str(folder / name))


def test_a_power_cut_takes_what_is_not_synced(tmp_path: Path) -> None:
    folder = tmp_path.resolve()

    def bare() -> None:
        (folder / "a").write_bytes(b"x")

    def linked() -> None:
        with (folder / "t").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        os.link(folder / "t", folder / "b")

    def in_a_new_folder() -> None:
        (folder / "new").mkdir()
        put_in(folder / "new")

    def put_in(where: Path) -> None:
        with (where / "c").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        handle = os.open(where, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    assert lost(bare, folder, "a")
    assert lost(linked, folder, "b")  # its bytes are safe, its name is not
    assert lost(in_a_new_folder, folder, "new/c")  # the folder's own name is not
    assert not lost(lambda: put_in(folder), folder, "c")
    assert not lost(lambda: put_if_absent(folder / "new/deep/d", b"x"), folder, "new/deep/d")


def test_a_name_that_stands_is_made_durable_too(tmp_path: Path) -> None:
    """Its writer may have been killed before the folder was synced."""
    folder, path = tmp_path.resolve(), tmp_path.resolve() / "new/e"
    disk = Disk(folder)
    linked = trace(lambda: put_if_absent(path, b"x"), folder)
    at = next(call.number for call in linked.calls if call.name == "link")
    shutil.rmtree(folder / "new")
    killed = trace(lambda: put_if_absent(path, b"x"), folder, Act("kill after", at))
    for second in (killed, trace(lambda: put_if_absent(path, b"y"), folder)):
        assert second is killed or disk.keeps(str(path)) is False
        for call, result in zip(second.calls, second.results, strict=False):
            disk.follow(call, result)
    assert path.read_bytes() == b"x"
    assert disk.keeps(str(path))


def test_folders_are_synced_once_a_process(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)

    def twice() -> None:
        make_durable(tmp_path / "a/b/one")
        make_durable(tmp_path / "a/b/two")

    synced = [call.paths[0] for call in trace(twice, tmp_path).calls if call.name == "fsync"]
    assert sorted(synced) == [".", "a", "a/b", "a/b"]


# ---- real disks that fail -----------------------------------------------------------------------


def refused(path: Path, work: Callable[[], object]) -> str:
    """The message of a write that cannot be done; nothing half-written stands."""
    with pytest.raises(OSError, match=str(path)) as caught:
        work()
    standing_files = files_of(path)
    assert standing_files.items() <= expected("moments").items()
    assert not list(path.rglob(".tmp-*"))
    return str(caught.value)


def test_a_file_too_large_for_its_limit(tmp_path: Path) -> None:
    """EFBIG at the first object above the limit; the smaller ones before it stand."""
    path, limits = tmp_path / "c", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        message = refused(path, lambda: make("moments", path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "File too large" in message
    assert "moments/c/0" in message
    make("moments", path)
    assert files_of(path) == expected("moments")


ON_A_MOUNT = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from tests.shards.sweeps import expected, make
from tests.shards.toy import files_of
column = Path({folder!r}) / "c"
try:
    make("moments", column)
except OSError as error:
    print(error)
assert files_of(column).items() <= expected("moments").items()
assert not list(column.rglob(".tmp-*"))
"""


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ("mount -t tmpfs -o size=16k none {0}", "No space left on device"),
        ("mount -t tmpfs -o size=1m,ro none {0}", "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_is_full_or_read_only(tmp_path: Path, mount: str, message: str) -> None:
    """Real mounts, where a user may make them in a namespace; the sweeps inject the same errors."""
    try:
        subprocess.run(["unshare", "-Urm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here; `errors` covers ENOSPC and EROFS without them")
    folder = tmp_path / "disk"
    folder.mkdir()
    script = ON_A_MOUNT.format(path=[os.getcwd(), *sys.path], folder=str(folder))
    (tmp_path / "script.py").write_text(script)
    command = f"{mount.format(folder)} && exec {sys.executable} {tmp_path / 'script.py'}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert str(folder / "c") in done.stdout


# ---- damage -------------------------------------------------------------------------------------


def test_a_reader_never_returns_what_a_flipped_bit_says() -> None:
    """Of each byte of values, lengths, statuses and checksums: an error before use, or no effect."""
    path = sound_column("tokens")
    sound = expected("tokens", True)
    for name in (n for n in sound if "/c/" in n):
        for place in range(0, len(sound[name]), 97):
            data = bytearray(sound[name])
            data[place] ^= 0x10
            with sweeps.damaged("tokens", name, bytes(data)):
                sweeps.check_found(path, name)
    assert verify(path) == []
    assert len(reads("tokens")) > 20
