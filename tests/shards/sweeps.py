"""Everything that can go wrong while a shard is written, and all damage to what stands, case by case.

kills       SIGKILL before, after and within every system call of a writer
deaths      SIGKILL at any moment, again and again, until the column is done
power       a power cut takes all that was not synced, after a kill at every such call
errors      every system call that can fails with each error that it can give, or does half
races       several writers at once on one column
flips       a bit of every byte of every file changed
cuts        every file at every shorter length, and with bytes added
swaps       every file replaced by another one
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from shards import (
    Column,
    ColumnSpec,
    FormatVersion,
    ShardsError,
    create_column,
    put_complete,
    put_empty,
)
from shards.tools.verify import verify
from tests.forks import split
from tests.memory import MEMORY
from tests.shards.killer import SIZED, VECTORED, Act, Call, Run, trace
from tests.shards.toy import (
    EMPTY,
    caption_status,
    files_of,
    image_status,
    length_of,
    moments_of,
    moments_spec,
    row_ids,
    tokens_of,
    tokens_spec,
    write_column,
    write_shard,
)
from tests.soak.sweep import Case, Sweep

SCRATCH = os.environ.get("LATENTBANK_SCRATCH") or MEMORY

# name -> its spec for so many shards, and rows of a small column of two shards
Variant = tuple[Callable[[int], ColumnSpec], tuple[int, ...]]
VARIANTS: dict[str, Variant] = {
    "moments": (moments_spec, (70, 3)),
    "tokens": (tokens_spec, (70, 3)),
    "moments blosc": (lambda n: moments_spec(n, codec="blosc"), (20, 3)),
    "tokens tar": (lambda n: tokens_spec(n, backend="webdataset"), (9, 3)),
}
ONE = {"moments": 70, "tokens": 70, "moments blosc": 8, "tokens tar": 6}  # rows of one of one shard


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="sweep-") as name:
        yield Path(name)


def make(variant: str, path: Path, single: bool = False) -> Path:
    """Write the small column of a variant, or go on with one; `single`: that of one shard."""
    spec, rows = VARIANTS[variant]
    rows = (ONE[variant],) if single else rows
    return write_column(path, spec(len(rows)), rows)


@cache
def expected(variant: str, single: bool = False) -> dict[str, bytes]:
    """The files of a column that nothing happened to."""
    with scratch() as folder:
        return files_of(make(variant, folder / "c", single))


ANEW, ADOPTING = "anew", "adopting"  # what a writer finds: nothing, or all but the records


def begin(variant: str, start: str, path: Path) -> None:
    """What a writer finds: nothing, or what others left who were killed before the first commit."""
    for name, data in expected(variant).items() if start == ADOPTING else ():
        if not name.startswith(("commits/", "complete/")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)


@cache
def calls(variant: str, start: str) -> tuple[Call, ...]:
    """The system calls that write a column."""
    with scratch() as folder:
        begin(variant, start, folder / "c")
        run = trace(lambda: make(variant, folder / "c"), folder)
    assert run.status == 0, run.error
    return run.calls


def check_readable(path: Path, complete: bool = False) -> None:
    """No committed row that cannot be read, or that holds anything but what was written."""
    if not (path / "column.json").exists():
        return
    column = Column.open(path, partial=not complete)
    for shard, rows in enumerate(column.snapshot.rows):
        ids = row_ids(shard, column.snapshot.rows)[:rows]
        if rows:
            check_values(column, ids)
    column.close()


def check_values(column: Column, ids: np.ndarray) -> None:
    """Values and statuses of rows, against the formulas they were made by."""
    values = column.read(ids, check=True)
    status = column.status(ids)
    if column.layout.ragged:
        assert status.tolist() == caption_status(ids).tolist()
        present = [int(i) for i in ids if caption_status(np.array([i]))[0] == 0]
        lengths = [length_of(int(i)) if i in present else 0 for i in ids]
        assert column.lengths(ids).tolist() == lengths
        assert np.array_equal(values, np.concatenate([tokens_of(i) for i in present]))
    else:
        statuses = image_status(ids)
        assert status.tolist() == statuses.tolist()
        assert np.array_equal(values[statuses <= 1], moments_of(ids)[statuses <= 1])
        assert np.isnan(values[statuses > 1]).all()


def check_finishes(variant: str, path: Path) -> None:
    """Another run ends in the column that nothing happened to."""
    make(variant, path)
    assert files_of(path) == expected(variant)
    assert verify(path) == []


# ---- kills -------------------------------------------------------------------------------------

WRITING = ("write", "pwrite64")
CHANGING = (
    "mkdir", "mkdirat", "open", "openat", "link", "linkat", "fsync", "unlink", "unlinkat", *WRITING
)  # fmt: skip


def kill_cases() -> list[Case]:
    """Before every call, after those that change what is on the disk, and within every write of two
    bytes or more. (After any other call is the same as before the next.)
    """
    return [
        (variant, start, what, call.number, call.label)
        for variant in VARIANTS
        for start in (ANEW, ADOPTING)
        for call in calls(variant, start)
        for what in ("kill before", "kill after", "tear")
        if what == "kill before"
        or (what == "kill after" and call.name in CHANGING)
        or (what == "tear" and call.name in WRITING and call.arguments[2] > 1)
    ]


def act_on(variant: str, start: str, folder: Path, act: Act, label: str) -> Run:
    """Write a column with one thing happening to it, at the very call that the case names."""
    begin(variant, start, folder / "c")
    run = trace(lambda: make(variant, folder / "c"), folder, act)
    assert run.calls[act.at].label == label, f"{run.calls[act.at].label!r} is not {label!r}"
    return run


def check_kill(variant: str, start: str, kind: str, at: int, label: str) -> None:
    with scratch() as folder:
        path = folder / "c"
        run = act_on(variant, start, folder, Act(kind, at), label)  # type: ignore[arg-type]
        assert run.killed, run
        files = files_of(path)
        assert files.items() <= expected(variant).items(), "something else than whole objects"
        check_readable(path)
        check_finishes(variant, path)


# ---- deaths ------------------------------------------------------------------------------------


def death_cases() -> list[Case]:
    return [(variant, seed) for seed in range(30) for variant in VARIANTS]


def check_deaths(variant: str, seed: int) -> None:
    """Two writers a round, each killed after up to 30 ms, until one comes through."""
    chance = random.Random(seed)
    with scratch() as folder:
        path, finished = folder / "c", False
        while not finished:
            pids = [spawn(lambda: make(variant, path)) for _ in range(2)]
            time.sleep(chance.random() * 0.03)
            if chance.random() < 0.9:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            statuses = [os.waitpid(pid, 0)[1] for pid in pids]
            assert all(s == 0 or os.WIFSIGNALED(s) for s in statuses), statuses
            assert files_of(path).items() <= expected(variant).items()
            check_readable(path)
            finished = 0 in statuses
        check_finishes(variant, path)


def spawn(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its pid. It ends with 0, or 9 where `work` raised."""
    pid = split()
    if pid == 0:
        code = 9
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


# ---- power -------------------------------------------------------------------------------------


RECORD = re.compile(r"(commits|complete)/.*\.json")


class Disk:
    """What a power cut is sure to leave: a file's bytes after its fsync, a name after its folder's.

    Follows a writer's calls. The worst is assumed: what is not synced is lost, and what came after
    it may stay.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.files: dict[str, int] = {}  # path -> file, as processes see it
        self.clean: set[int] = set()  # files whose bytes are on disk
        self.durable: set[str] = set()  # paths whose last name is on disk
        self._next = 0

    def follow(self, call: Call, result: int) -> None:
        if result < 0:
            return
        path = call.real[0]
        if call.name in ("mkdir", "mkdirat") or (
            call.name in ("open", "openat", "creat")
            and path not in self.files
            and path != self.root
        ):
            self._next += 1
            self.files[path] = self._next
            self.durable.discard(path)
        elif call.name in (*WRITING, "ftruncate"):
            self.clean.discard(self.files[path])
        elif call.name in ("fsync", "fdatasync"):
            if path != self.root:
                self.clean.add(self.files[path])
            self.durable |= {p for p in self.files if os.path.dirname(p) == path}
        elif call.name in ("link", "linkat"):
            self.files[call.real[1]] = self.files[path]
            self.durable.discard(call.real[1])
        elif call.name in ("unlink", "unlinkat"):
            self.files.pop(path, None)
            self.durable.discard(path)
        elif call.name.startswith(("rename", "truncate", "symlink", "copy", "fallocate")):
            raise NotImplementedError(f"this model of a disk knows no {call.name}")

    def keeps(self, path: str) -> bool:
        """Whether a file would be there, whole, after a power cut."""
        if self.files.get(path) not in self.clean:
            return False
        while path != self.root:
            if path not in self.durable:
                return False
            path = os.path.dirname(path)
        return True


def needed(files: dict[str, bytes], record: str) -> list[str]:
    """Files that must be safe before a record that speaks of them appears."""
    metadata = [name for name in files if name.endswith("zarr.json")]
    if record.startswith("commits/"):
        return ["column.json", *metadata, *(o[0] for o in json.loads(files[record])["objects"])]
    commits = [name for name in files if name.startswith("commits/")]
    return [*commits, record.replace(".json", ".valid")]


def follow(variant: str, disk: Disk, run: Run, path: Path) -> None:
    """Take a run's calls into account; at each record that appears, all it speaks of must be safe."""
    files = expected(variant)
    for call, result in zip(run.calls, run.results, strict=False):
        disk.follow(call, result)
        name = os.path.relpath(call.real[-1], path)
        if call.name.startswith("link") and result == 0 and RECORD.fullmatch(name):
            lost = [n for n in needed(files, name) if not disk.keeps(str(path / n))]
            assert not lost, f"a power cut after {call.label} may keep it and lose {lost}"


def power_cases() -> list[Case]:
    return [
        (variant, call.number, call.label)
        for variant in VARIANTS
        for call in calls(variant, ANEW)
        if call.name in CHANGING
    ]


def check_power(variant: str, at: int, label: str) -> None:
    """Killed after a call, then run to the end: records and a finished column outlive a power cut."""
    with scratch() as folder:
        folder = folder.resolve()
        path, disk = folder / "c", Disk(folder)
        killed = act_on(variant, ANEW, folder, Act("kill after", at), label)
        follow(variant, disk, killed, path)
        run = trace(lambda: make(variant, path), folder)
        assert run.status == 0, run.error
        follow(variant, disk, run, path)
        lost = [name for name in expected(variant) if not disk.keeps(str(path / name))]
        assert not lost, f"a power cut after the run may lose {lost}"


# ---- errors ------------------------------------------------------------------------------------

CAN: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ["open", "openat", "mkdir", "mkdirat"],
        (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMFILE, errno.EDQUOT),
    ),
    **dict.fromkeys(WRITING, (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EINTR)),
    **dict.fromkeys(["fsync", "fdatasync"], (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)),
    **dict.fromkeys(
        ["link", "linkat"], (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EMLINK)
    ),
    **dict.fromkeys(["unlink", "unlinkat"], (errno.EIO, errno.EACCES, errno.EROFS)),
    **dict.fromkeys(["read", "pread64", "preadv", "preadv2"], (errno.EIO, errno.EINTR)),
    "getdents64": (errno.EIO,),
    **dict.fromkeys(["stat", "newfstatat", "fstat", "statx"], (errno.EIO, errno.EACCES)),
}
HALF = "half"
BORNE = (errno.errorcode[errno.EINTR], HALF)  # what nobody must even notice


def errors_of(call: Call) -> list[str]:
    """Names of the errors that a call can give."""
    errors = [errno.errorcode[e] for e in CAN.get(call.name, ())]
    if call.name in ("open", "openat") and not call.arguments[2] & os.O_CREAT:
        errors = [e for e in errors if e not in ("ENOSPC", "EROFS", "EDQUOT")]
    if call.name.endswith("stat") and call.by_descriptor:
        errors = ["EIO"]
    if call.name == "close" and ".tmp-*" in call.label:  # of a file that was written
        errors = ["EIO", "ENOSPC"]
    if (call.name in SIZED and call.arguments[2] > 1) or call.name in VECTORED:
        errors.append(HALF)
    return errors


def act_of(error: str, at: int) -> Act:
    return Act("shorten", at) if error == HALF else Act("fail", at, getattr(errno, error))


def error_cases() -> list[Case]:
    return [
        (variant, start, error, call.number, call.label)
        for variant in VARIANTS
        for start in (ANEW, ADOPTING)
        for call in calls(variant, start)
        for error in errors_of(call)
    ]


def check_error(variant: str, start: str, error: str, at: int, label: str) -> None:
    """The writer does not notice, or says which file; what stands is whole, and a later run finishes."""
    with scratch() as folder:
        path = folder / "c"
        run = act_on(variant, start, folder, act_of(error, at), label)
        if run.status == 0:
            assert files_of(path) == expected(variant)
        else:
            assert error not in BORNE, run.error
            assert os.waitstatus_to_exitcode(run.status) == 1, run
            assert str(folder) in run.error, f"the message names no file: {run.error!r}"
            assert files_of(path).items() <= expected(variant).items()
        check_readable(path)
        check_finishes(variant, path)


def read_all(path: Path) -> None:
    """All rows of a finished column, and the empty caption."""
    check_readable(path, complete=True)
    column = Column.open(path)
    if column.spec.empty_tokens:
        assert np.array_equal(column.empty(), EMPTY)


@cache
def reads(variant: str) -> tuple[Call, ...]:
    """The system calls that read a column."""
    path = sound_column(variant)
    run = trace(lambda: read_all(path), path)
    assert run.status == 0, run.error
    return run.calls


def read_cases() -> list[Case]:
    return [
        (variant, error, call.number, call.label)
        for variant in VARIANTS
        for call in reads(variant)
        for error in errors_of(call)
    ]


def check_read(variant: str, error: str, at: int, label: str) -> None:
    """The reader gets the right values, or an error that names the file."""
    path = sound_column(variant)
    run = trace(lambda: read_all(path), path, act_of(error, at))
    assert run.calls[at].label == label, f"{run.calls[at].label!r} is not {label!r}"
    if run.status:
        assert error not in BORNE, run.error
        assert str(path) in run.error, f"the message names no file: {run.error!r}"
        assert "AssertionError" not in run.error, run.error


# ---- races -------------------------------------------------------------------------------------


def race_cases() -> list[Case]:
    return [
        (variant, writers, shift, seed)
        for seed in range(10)
        for variant in VARIANTS
        for writers in (2, 3)
        for shift in ((0, 1) if "moments" in variant else (0,))
    ]


def check_race(variant: str, writers: int, shift: int, seed: int) -> None:
    """Writers that start together, of equal values or of values that differ by a rounding."""
    spec_of, rows = VARIANTS[variant]
    spec, chance = spec_of(len(rows)), random.Random(seed)

    def write(number: int, wait: float) -> None:
        os.read(reading, 1)  # until all are there
        time.sleep(wait)
        digest = create_column(path, spec)
        if spec.layout.ragged:
            put_empty(path, spec, EMPTY)
        how = {"shift": shift * number * 2**-10} if shift else {}
        for shard in range(len(rows)):
            write_shard(path, spec, digest, shard, rows, **how)
        put_complete(path, digest, len(rows), allow_failed=False)

    with scratch() as folder:
        path = folder / "c"
        reading, starting = os.pipe()
        waits = [chance.random() * 0.004 for _ in range(writers)]
        pids = [spawn(lambda n=n: write(n, waits[n])) for n in range(writers)]
        os.write(starting, bytes(writers))
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        os.close(reading)
        os.close(starting)
        assert statuses == [0] * writers
        assert verify(path) == []
        assert not list(path.rglob(".tmp-*"))
        assert len(list((path / "complete").glob("*.json"))) == 1
        if not shift:
            assert files_of(path) == expected(variant)
            return
        column = Column.open(path)
        for shard in range(len(rows)):  # a block is of one writer
            ids = row_ids(shard, rows)
            moments = column.read(ids, check=True).astype(np.float32)
            present = ~np.isnan(moments[:, 0, 0, 0])
            offset = moments[present, 2] - moments_of(ids)[present, 2]
            assert len(np.unique(offset)) == 1
            assert 0 <= offset.flat[0] * 2**10 < writers


# ---- flips, cuts, swaps ------------------------------------------------------------------------

_sound_columns: dict[str, tempfile.TemporaryDirectory[str]] = {}


def sound_column(variant: str) -> Path:
    """A sound column of this process, for cases that put it back as it was."""
    key = f"{variant} {os.getpid()}"
    if key not in _sound_columns:
        _sound_columns[key] = tempfile.TemporaryDirectory(dir=SCRATCH, prefix="sweep-")
        make(variant, Path(_sound_columns[key].name) / "c", single=True)
    return Path(_sound_columns[key].name) / "c"


@contextmanager
def damaged(variant: str, name: str, data: bytes) -> Iterator[Path]:
    """A column in which one file holds something else."""
    path = sound_column(variant)
    (path / name).write_bytes(data)
    try:
        yield path
    finally:
        (path / name).write_bytes(expected(variant, True)[name])


def check_found(path: Path, name: str) -> None:
    """`verify` names the file; no reader that checks returns wrong values of it."""
    try:
        faults = verify(path)
    except FormatVersion as error:  # column.json is a record of another kind: nothing to verify
        faults = [str(error)]
    assert any(name in str(fault) for fault in faults), f"{name} is not named by {faults}"
    try:
        check_readable(path, complete=True)
    except ShardsError:
        return  # refused before use
    except AssertionError:
        raise AssertionError(f"wrong values were read of {name}") from None


def flip_cases() -> list[Case]:
    return [
        (variant, name, place)
        for variant in VARIANTS
        for name, data in expected(variant, True).items()
        for place in range(len(data))
    ]


def check_flip(variant: str, name: str, place: int) -> None:
    """One bit of the byte, another one in the next byte; all eight would take eight times as long."""
    data = bytearray(expected(variant, True)[name])
    data[place] ^= 1 << place % 8
    with damaged(variant, name, bytes(data)) as path:
        check_found(path, name)


def cut_cases() -> list[Case]:
    """Lengths from 0 to one less, and 1, 2, 512 and 4,096 bytes more."""
    return [
        (variant, name, size)
        for variant in VARIANTS
        for name, data in expected(variant, True).items()
        for size in (*range(len(data)), *(len(data) + extra for extra in (1, 2, 512, 4096)))
    ]


def check_cut(variant: str, name: str, size: int) -> None:
    data = expected(variant, True)[name]
    with damaged(variant, name, (data + bytes(4096))[:size]) as path:
        check_found(path, name)


def swap_cases() -> list[Case]:
    """Every file replaced by every other of its column, and by its namesake of another column."""
    cases: list[Case] = []
    for variant in VARIANTS:
        files = expected(variant, True)
        cases += [
            (variant, name, f"own {other}")
            for name in files
            for other in files
            if files[name] != files[other]
        ]
        strange = stranger(variant)
        cases += [
            (variant, name, "namesake")
            for name in files
            if strange.get(name, files[name]) != files[name]
        ]
    return cases


@cache
def stranger(variant: str) -> dict[str, bytes]:
    """The files of a column of another source, whose rows are other ones."""
    spec = VARIANTS[variant][0](1)
    spec = replace(spec, identity={**spec.identity, "source": "another"})
    with scratch() as folder:
        return files_of(write_column(folder / "c", spec, (ONE[variant] - 1,)))


def check_swap(variant: str, name: str, by: str) -> None:
    source = stranger(variant)[name] if by == "namesake" else expected(variant, True)[by[4:]]
    with damaged(variant, name, source) as path:
        check_found(path, name)


def by_file(case: Case) -> str:
    """The kind of file: its first folder, or its name."""
    return f"{case[0]}: {str(case[1]).split('/')[0]}"


SWEEPS = [
    Sweep("kills", "a system call of a writer, and SIGKILL before, after or half-way through it",
          kill_cases, check_kill, lambda c: f"{c[2]} {str(c[4]).split()[1]}"),
    Sweep("deaths", "two writers killed at random times, started again until one is done",
          death_cases, check_deaths, lambda c: str(c[0])),
    Sweep("power", "a writer killed after a call that changes the disk, started again, then a power cut",
          power_cases, check_power, lambda c: str(c[2]).split()[1]),
    Sweep("errors", "a system call of a writer, and an error that it gives, or half of its bytes",
          error_cases, check_error, lambda c: f"{c[2]} of {str(c[4]).split()[1]}"),
    Sweep("reads", "a system call of a reader, and an error that it gives, or half of its bytes",
          read_cases, check_read, lambda c: f"{c[1]} of {str(c[3]).split()[1]}"),
    Sweep("races", "two or three processes write one column at once",
          race_cases, check_race, lambda c: f"{c[1]} writers of {c[0]}" + ", values differ" * int(c[2])),
    Sweep("flips", "a byte of a column, one bit of it changed",
          flip_cases, check_flip, by_file),
    Sweep("cuts", "a length of a file of a column, shorter than it is or longer",
          cut_cases, check_cut, by_file),
    Sweep("swaps", "a file of a column replaced by another one, of it or of another column",
          swap_cases, check_swap, by_file),
]  # fmt: skip
