"""Kill a writer, or make one of its system calls fail, at any boundary between system calls.

The writer runs in a child that is forked after all imports and traced by ptrace (ctypes only). It
stops before and after every system call; those that concern files below one folder are counted,
named and listed. At the call asked for, an `Act` is done to it:

    kill before or after it          SIGKILL; a call killed before is not executed
    tear                             a write puts half of its bytes on disk, then SIGKILL
    fail with an errno               the call is not executed and returns the error
    shorten                          a write or read takes half of its bytes, and the writer goes on
    pause                            `meanwhile` runs before the call, and the writer goes on

The child must stay single-threaded, so that one tracee is all there is to follow. Needs Linux on
x86_64 or aarch64, and the right to trace one's own children.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.forks import split

TRACEME, SYSCALL, SETOPTIONS, GETREGSET, SETREGSET = 0, 24, 0x4200, 0x4204, 0x4205
OPTIONS = 0x100001  # EXITKILL: no orphan outlives the tracer; TRACESYSGOOD: marks syscall stops
NT_PRSTATUS, NT_ARM_SYSTEM_CALL = 1, 0x404
SYSCALL_STOP = signal.SIGTRAP | 0x80
AT_FDCWD = -100
NO_CALL = 2**64 - 1  # the kernel skips a call of this number

# Where a call's path or descriptor stands among its arguments: (directory, path) pairs, None where
# there is no such argument. A pair without a path is a plain descriptor.
Pairs = tuple[tuple[int | None, int | None], ...]
DESCRIPTOR: Pairs = ((0, None),)
PATH, AT = ((None, 0),), ((0, 1),)


def each(names: str, value: Pairs) -> dict[str, Pairs]:
    return dict.fromkeys(names.split(), value)


ARGUMENTS: dict[str, Pairs] = {
    **each(
        "read write close fstat lseek pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 sendfile fcntl "
        "flock fsync fdatasync ftruncate fallocate getdents64 ioctl fadvise64 sync_file_range "
        "syncfs fchmod",
        DESCRIPTOR,
    ),
    **each("open stat lstat access truncate mkdir rmdir creat unlink chmod", PATH),
    **each("openat mkdirat newfstatat unlinkat fchmodat faccessat faccessat2 statx openat2", AT),
    **each("rename link", ((None, 0), (None, 1))),
    **each("renameat renameat2 linkat", ((0, 1), (2, 3))),
    "copy_file_range": ((0, None), (2, None)),
    "symlink": ((None, 1),),
    "symlinkat": ((1, 2),),
}
AT_CALLS = [name for name, pairs in ARGUMENTS.items() if pairs == AT]
SIZED = ("write", "pwrite64", "read", "pread64")  # the third argument is a number of bytes
# the second argument points to the address and number of bytes
VECTORED = ("writev", "pwritev", "pwritev2", "readv", "preadv", "preadv2")

NUMBERS = {
    "x86_64": (
        "read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 lseek 8 ioctl 16 pread64 17 "
        "pwrite64 18 readv 19 writev 20 access 21 sendfile 40 fcntl 72 flock 73 fsync 74 "
        "fdatasync 75 truncate 76 ftruncate 77 rename 82 mkdir 83 rmdir 84 creat 85 link 86 "
        "unlink 87 symlink 88 chmod 90 fchmod 91 getdents64 217 fadvise64 221 openat 257 "
        "mkdirat 258 newfstatat 262 unlinkat 263 renameat 264 linkat 265 symlinkat 266 "
        "fchmodat 268 faccessat 269 sync_file_range 277 fallocate 285 preadv 295 pwritev 296 "
        "syncfs 306 renameat2 316 copy_file_range 326 preadv2 327 pwritev2 328 statx 332 openat2 437 faccessat2 439"
    ),
    "aarch64": (
        "fcntl 25 ioctl 29 flock 32 mkdirat 34 unlinkat 35 symlinkat 36 linkat 37 renameat 38 "
        "truncate 45 ftruncate 46 fallocate 47 faccessat 48 fchmod 52 fchmodat 53 openat 56 "
        "close 57 getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 "
        "pwrite64 68 preadv 69 pwritev 70 sendfile 71 newfstatat 79 fstat 80 fsync 82 "
        "fdatasync 83 sync_file_range 84 fadvise64 223 syncfs 267 renameat2 276 "
        "copy_file_range 285 preadv2 286 pwritev2 287 statx 291 openat2 437 faccessat2 439"
    ),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the registers of a kind of processor hold a system call, by place in NT_PRSTATUS."""

    words: int
    number: int
    arguments: tuple[int, ...]
    result: int
    names: dict[int, str]


def machine(name: str = platform.machine()) -> Machine:
    """The register layout of this processor; NotImplementedError for another one."""
    if name not in NUMBERS:
        raise NotImplementedError(f"no register layout for {name!r}: only {', '.join(NUMBERS)}")
    words = NUMBERS[name].split()
    names = {int(n): call for call, n in zip(words[::2], words[1::2], strict=True)}
    if name == "x86_64":  # orig_rax; rdi rsi rdx r10 r8 r9; rax
        return Machine(27, 15, (14, 13, 12, 7, 9, 8), 10, names)
    return Machine(34, 8, (0, 1, 2, 3, 4, 5), 0, names)  # x8; x0 to x5; x0


@dataclass(frozen=True, slots=True)
class Call:
    """One system call that concerns the folder."""

    number: int  # its place among these calls, from 0
    name: str
    paths: tuple[str, ...]  # below the folder; the random part of a temporary name is `*`
    arguments: tuple[int, ...]
    real: tuple[str, ...]  # the paths as they are

    @property
    def by_descriptor(self) -> bool:
        """Whether an open file is named, not a path."""
        return self.name in AT_CALLS and ctypes.c_int(self.arguments[0]).value != AT_FDCWD

    @property
    def label(self) -> str:
        return f"{self.number} {self.name} {' '.join(self.paths)}"


@dataclass(frozen=True, slots=True)
class Act:
    """What to do at call number `at`."""

    what: Literal["kill before", "kill after", "tear", "fail", "shorten", "pause"]
    at: int
    error: int = 0  # errno of "fail"
    meanwhile: Callable[[], object] | None = None  # of "pause", in the parent


@dataclass(frozen=True, slots=True)
class Run:
    """What a traced child did: the calls until its end, its wait status, and its error's text."""

    calls: tuple[Call, ...]
    results: tuple[int, ...]  # what each call returned; one less than calls if killed before one
    status: int
    error: str

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) == -1:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            raise PermissionError(
                number,
                "ptrace is forbidden here, and these tests need it: allow SYS_PTRACE to the "
                "container, and set kernel.yama.ptrace_scope to 0 or 1",
            )
        raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Child:
    """A stopped tracee: its registers and its memory."""

    def __init__(self, pid: int, kind: Machine) -> None:
        self.pid, self.kind = pid, kind
        self.registers = (ctypes.c_uint64 * kind.words)()
        self._vector = _Vector(ctypes.addressof(self.registers), ctypes.sizeof(self.registers))
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)

    def fetch(self) -> None:
        self._vector.length = ctypes.sizeof(self.registers)
        _ptrace(GETREGSET, self.pid, NT_PRSTATUS, ctypes.addressof(self._vector))

    def store(self) -> None:
        _ptrace(SETREGSET, self.pid, NT_PRSTATUS, ctypes.addressof(self._vector))

    def skip(self) -> None:
        """Make the kernel not execute the call at whose entry the child stands."""
        self.registers[self.kind.number] = NO_CALL
        self.store()
        if self.kind.words == 34:  # aarch64 keeps the number apart as well
            number = ctypes.c_int(-1)
            vector = _Vector(ctypes.addressof(number), ctypes.sizeof(number))
            _ptrace(SETREGSET, self.pid, NT_ARM_SYSTEM_CALL, ctypes.addressof(vector))

    def words(self, address: int, count: int) -> tuple[int, ...]:
        """64-bit numbers at an address of the child."""
        return struct.unpack(f"={count}Q", os.pread(self._memory, 8 * count, address))

    def put_word(self, address: int, value: int) -> None:
        os.pwrite(self._memory, struct.pack("=Q", value), address)

    def text(self, address: int) -> str:
        """The string at an address of the child."""
        data = b""
        while b"\0" not in data:
            part = os.pread(self._memory, 256 - address % 256, address)  # never over a page's end
            if not part:
                break
            data, address = data + part, address + len(part)
        return os.fsdecode(data.partition(b"\0")[0])

    def path(self, directory: int | None, name: int | None) -> str:
        """What a (directory, path) pair of argument values stands for."""
        text = self.text(name) if name is not None else ""
        if text.startswith("/"):
            return os.path.normpath(text)
        descriptor = AT_FDCWD if directory is None else ctypes.c_int(directory).value
        link = "cwd" if descriptor == AT_FDCWD else f"fd/{descriptor}"
        try:
            return os.path.normpath(os.path.join(os.readlink(f"/proc/{self.pid}/{link}"), text))
        except FileNotFoundError:
            return ""

    def close(self) -> None:
        os.close(self._memory)


def _wait(pid: int) -> int:
    return os.waitpid(pid, 0x40000000)[1]  # __WALL


def trace(work: Callable[[], object], folder: Path, act: Act | None = None) -> Run:
    """Run `work` in a traced child, do `act` to it, and list its calls on files below `folder`.

    PermissionError where tracing is forbidden.
    """
    kind, root = machine(), os.path.realpath(folder)
    reading, writing = os.pipe()
    pid = split()
    if pid == 0:
        code = 1
        try:
            os.close(reading)
            _ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)  # the marker: what follows is counted
            work()
            code = 0
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode()[:60_000])
        finally:
            os._exit(code)  # never back into the tests
    os.close(writing)
    calls: list[Call] = []
    results: list[int] = []
    try:
        status = _follow(pid, kind, root, act, calls, results)
    finally:
        error = b""
        while part := os.read(reading, 65536):
            error += part
        os.close(reading)
    if not os.WIFSIGNALED(status) and b"ptrace is forbidden" in error:
        raise PermissionError(error.decode())
    return Run(tuple(calls), tuple(results), status, error.decode(errors="replace"))


def _follow(
    pid: int, kind: Machine, root: str, act: Act | None, calls: list[Call], results: list[int]
) -> int:
    """Step the child from call to call to its end; returns its wait status."""
    status = _wait(pid)
    if not os.WIFSTOPPED(status):
        return status
    _ptrace(SETOPTIONS, pid, 0, OPTIONS)
    child, entering, current, deliver = _Child(pid, kind), True, None, 0
    try:
        while True:
            _ptrace(SYSCALL, pid, 0, deliver)
            status, deliver = _wait(pid), 0
            if not os.WIFSTOPPED(status):
                return status
            if os.WSTOPSIG(status) != SYSCALL_STOP:
                deliver = os.WSTOPSIG(status)  # a signal of its own
                continue
            child.fetch()
            if entering:
                current = _entered(child, root, len(calls))
                if current:
                    calls.append(current)
                    event = act if act is not None and act.at == current.number else None
                    if event and event.what in ("kill before", "fail") and current.name != "close":
                        child.skip()  # a close that fails has closed all the same
                    if event and event.what == "kill before":
                        return _kill(pid)
                    if event and event.meanwhile:
                        event.meanwhile()
                    if event and event.what in ("tear", "shorten"):
                        _halve(child, current)
            elif current:
                event = act if act is not None and act.at == current.number else None
                if event and event.what == "fail":
                    child.registers[kind.result] = 2**64 - event.error
                    child.store()
                results.append(ctypes.c_int64(child.registers[kind.result]).value)
                if event and event.what in ("kill after", "tear"):
                    return _kill(pid)
            entering = not entering
    except BaseException:
        _kill(pid)
        raise
    finally:
        child.close()


def _entered(child: _Child, root: str, number: int) -> Call | None:
    """The call at whose entry the child stands, if it concerns a file at or below `root`."""
    kind = child.kind
    name = kind.names.get(child.registers[kind.number])
    if name is None:
        return None
    values = tuple(child.registers[i] for i in kind.arguments)
    pairs = ARGUMENTS[name]
    real = tuple(
        child.path(None if d is None else values[d], None if p is None else values[p])
        for d, p in pairs
    )
    if not any(path == root or path.startswith(root + "/") for path in real):
        return None
    return Call(number, name, tuple(_shown(path, root) for path in real), values, real)


def _shown(path: str, root: str) -> str:
    """A path below the root without what is random in it."""
    head, name = os.path.split(os.path.relpath(path, root) if path.startswith(root) else path)
    return os.path.join(head, ".tmp-*" if name.startswith(".tmp-") else name)


def _halve(child: _Child, call: Call) -> None:
    """Let a write or a read take half of its bytes."""
    if call.name in VECTORED:
        _, address, buffers = call.arguments[:3]
        assert buffers == 1, f"{call.label} of {buffers} buffers"
        child.put_word(address + 8, child.words(address, 2)[1] // 2)
        return
    if call.name not in SIZED:
        raise ValueError(f"{call.label} neither writes nor reads")
    child.registers[child.kind.arguments[2]] = call.arguments[2] // 2
    child.store()


def _kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    while os.WIFSTOPPED(status := _wait(pid)):
        pass
    return status
