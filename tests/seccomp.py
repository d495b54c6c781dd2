"""System calls that a process is denied from now on: the kernel answers them with an error, as a file system does
that lacks them. Linux on x86_64 or aarch64; no rights are needed."""

import ctypes
import errno
import platform
import struct

NUMBERS = {
    "x86_64": {
        "link": 86,
        "linkat": 265,
        "renameat2": 316,
        "chmod": 90,
        "fchmodat": 268,
        "fchmodat2": 452,
    },
    "aarch64": {"linkat": 37, "renameat2": 276, "fchmodat": 53, "fchmodat2": 452},
}
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of classic BPF
ALLOW, ERROR = 0x7FFF0000, 0x00050000  # what a filter may answer
NO_NEW_PRIVS, SECCOMP, FILTER = 38, 22, 2  # of prctl


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def deny(error: int, *names: str) -> None:
    """Let this process, and its children, get an error for these calls, for ever."""
    numbers = [NUMBERS[platform.machine()][n] for n in names if n in NUMBERS[platform.machine()]]
    steps = [(LOAD, 0, 0, 0)]
    for number in numbers:
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | error)]
    steps.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert prctl(SECCOMP, FILTER, ctypes.byref(Program(len(steps), code))) == 0, ctypes.get_errno()


def no_links(error: int = errno.EOPNOTSUPP) -> None:
    """As on exFAT, SMB or a mount of a bucket."""
    deny(error, "link", "linkat")


def no_atomic_names() -> None:
    """Nor a rename that does not replace, as on most mounts in user space."""
    no_links()
    deny(errno.EINVAL, "renameat2")
