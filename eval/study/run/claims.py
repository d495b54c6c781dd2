"""A claim: the right to do a piece of a study's work, which one worker at a time has.

    <folder>/lease.json, lease-<owner>.json    who has it, and until when (`shards.column.lease`)
    <folder>/fence-<owner>/                    within it everything is written (`eval.fence`)

A worker that stops loses its claim to another, which removes the fence first: whatever the former holder
does when it goes on, it publishes nothing. Clocks of machines may differ by less than three quarters of a lease.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards import LeaseHeld, open_store
from shards.column import Lease, lease_chain, stale

from ... import fence

SECONDS = 60.0  # until the claim of a worker that stopped is another's


class Claim:
    """The exclusive right that a folder stands for; renewed by a thread while it is held."""

    def __init__(self, folder: Path, command: str, seconds: float = SECONDS) -> None:
        self.folder, self.command, self.seconds = folder, command, seconds
        self._lease = Lease(folder, command, seconds=seconds)
        self.fence = self._fence(self._lease.owner)

    def _fence(self, owner: str) -> Path:
        return self.folder / f"fence-{owner}"

    def take(self) -> None:
        """Takes the claim; LeaseHeld if another has it, or is faster."""
        # of those that this one follows on, not of one that takes over from it meanwhile
        former = set(self.folder.glob(self._fence("*").name))
        self._lease.__enter__()
        fence.put(self.fence)
        names, _ = lease_chain(open_store(self.folder))
        for name in names[1:]:
            owner = name.removeprefix("lease-").removesuffix(".json")
            if owner == self._lease.owner:
                break
            former.add(self._fence(owner))
        for each in former:
            fence.remove(each)
        try:
            self._lease.check()  # from here on, who takes over sees the fence
        except LeaseHeld:
            self.release()
            raise

    def check(self) -> None:
        """Raises ClaimLost if another took over meanwhile, even if it has ended since. A lease that
        expired (this worker was suspended) and that nobody took over is followed by a new one.
        """
        try:
            fence.refuse_removed(self.fence)
            self._lease.check()
        except LeaseHeld:
            last = lease_chain(open_store(self.folder))[1]
            if last is None or last["owner"] != self._lease.owner or not self._follow():
                fence.remove(self.fence)
                fence.refuse_removed(self.fence)

    def _follow(self) -> bool:
        lease = Lease(self.folder, self.command, seconds=self.seconds)
        lease.since = self._lease.since
        try:
            self._lease = lease.__enter__()
        except LeaseHeld:
            return False
        return True

    @property
    def lapsed(self) -> bool:
        """Whether it may be lost: `check` says so. Nothing is read for it."""
        return self._lease.lapsed

    def write(self, path: Path, data: bytes) -> None:
        """Writes or replaces a file at once; ClaimLost if another took over."""
        fence.publish(path, data, self.fence)

    def remove(self, path: Path) -> None:
        """Removes a file, if there is one; ClaimLost if another took over."""
        if path.exists():
            fence.move(path, self.fence / path.name, self.fence)

    def release(self) -> None:
        """Gives the claim back; nothing is published within it from here on."""
        fence.remove(self.fence)
        self._lease.release()


def holder(folder: Path) -> dict[str, Any] | None:
    """Returns who has a claim: host, pid, command, since when; None if nobody has."""
    record = lease_chain(open_store(folder))[1]
    return None if record is None or stale(record) else record


def holder_text(record: dict[str, Any]) -> str:
    """Returns who has a claim, in words."""
    return f"pid {record.get('pid', 'unknown')} on {record.get('host', 'an unknown host')}"
