"""A fence: a folder that whoever takes work over removes, so that its former holder can publish nothing.

    <fence>/held      a file to look at
    <fence>/.tmp-*    what is being written

What is published is written into the folder, and renamed to its place. Once the folder is removed the
rename fails, however late it comes and on a network's file system, too: no moment lies between look and write.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from shards import atomic_write
from shards.processes import exists

from .errors import ClaimLost

VARIABLE = "LATENTBANK_FENCE"  # of a command's environment
HELD = "held"
TRIES = 100  # to remove a folder into which another process writes


def put(fence: Path) -> None:
    """Makes a fence, which another may remove at once."""
    fence.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (fence / HELD).touch()


def remove(fence: Path) -> None:
    """Removes a fence, whatever its holder still writes into it."""
    # first under its name, which holds for all of this machine: a file that one of its processes has open
    # keeps a folder in NFS; then the folder itself, which holds for other machines
    gone = fence.with_name(f".gone-{secrets.token_hex(8)}")
    try:
        fence.rename(gone)
    except FileNotFoundError:
        return
    for _ in range(TRIES):
        shutil.rmtree(gone, ignore_errors=True)
        if not gone.exists():
            return


def publish(path: Path, data: bytes, fence: Path | None = None) -> None:
    """Writes or replaces a file as `atomic_write` does; within a fence, where one is named or the
    environment names one. ClaimLost once that is removed.
    """
    name = os.environ.get(VARIABLE)
    fence = fence or (Path(name) if name else None)
    try:
        atomic_write(path, data, fence)
    except OSError as error:
        if fence is None or (held(fence) and error.errno != errno.EXDEV):
            raise
        refuse_removed(fence)
        atomic_write(path, data)  # on another file system: a moment lies between look and write


def move(path: Path, to: Path, fence: Path) -> None:
    """Renames a file, of which one name is in the fence; ClaimLost once that is removed."""
    try:
        os.replace(path, to)
    except OSError:
        refuse_removed(fence)
        raise


def held(fence: Path) -> bool:
    """Returns whether a fence exists."""
    return exists(str(fence / HELD))


def refuse_removed(fence: Path) -> None:
    """Raises ClaimLost where a fence was removed."""
    if not held(fence):
        raise ClaimLost(
            f"{fence.parent}: another worker of the study has taken this over. Nothing was written since; it is "
            "made there"
        )
