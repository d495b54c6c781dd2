"""One job at a time on a run's folder: a lease in it, that of `shards`, held by rank 0."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from shards import LeaseHeld, open_store
from shards.column import LEASE_SECONDS, Lease, lease_chain, machine

log = logging.getLogger(__name__)


class RunLocked(LeaseHeld):
    """Another job trains in this folder."""


class RunLock:
    """The right to write into a run's folder: `take`, `check` before each change, `release`."""

    def __init__(self, run: Path, seconds: float = LEASE_SECONDS) -> None:
        self.run, self.seconds = run, seconds
        self._lease: Lease | None = None

    def take(self) -> None:
        """Takes the lease; RunLocked if another job holds it.

        The lease of a job on another host, whose process cannot be seen, gets time to be renewed or
        to expire: a job that is started again on other hosts goes on by itself."""
        self.run.mkdir(parents=True, exist_ok=True)
        first = self._holder()
        while not self._acquired():
            holder = self._holder()
            if holder and (holder.get("machine") == machine() or _renewed(first, holder)):
                host, pid = holder.get("host", "an unknown host"), holder.get("pid", "unknown")
                raise RunLocked(
                    f"{self.run}: another job trains in this folder (pid {pid} on {host}). Wait for its end or stop "
                    "it; a run beside it needs another name of its config, or another runs="
                )
            if first and holder:
                log.info(
                    "%s: waiting for the lease of a job on %s to expire", self.run, holder.get("host")
                )  # fmt: skip
            first = first or holder
            time.sleep(min(1.0, self.seconds / 10))

    @property
    def owner(self) -> str:
        """The random name of the lease's owner."""
        assert self._lease is not None
        return self._lease.owner

    def check(self) -> None:
        """Raises RunLocked if another job has taken over meanwhile, even if that job has ended
        since.

        A lease that expired (this job was suspended) and that nobody took over is followed by a new
        one."""
        assert self._lease is not None
        try:
            self._lease.check()
        except LeaseHeld:
            last = self._holder()
            if last and last["owner"] == self._lease.owner and self._acquired():
                return
            last = last and self._holder()  # another job may have been faster
            end = f"pid {last.get('pid')} on {last.get('host')}" if last else "and has ended"
            raise RunLocked(
                f"{self.run}: another job took over this folder ({end}) while this one was suspended or could not "
                "renew its lease. This one stopped, and changed nothing since"
            ) from None

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _acquired(self) -> bool:
        """Whether a new lease could be taken."""
        try:
            self._lease = Lease(self.run, "train", seconds=self.seconds).__enter__()
        except LeaseHeld:
            return False
        return True

    def _holder(self) -> dict[str, Any] | None:
        return lease_chain(open_store(self.run))[1]


def _renewed(first: dict[str, Any] | None, holder: dict[str, Any]) -> bool:
    fields = ("owner", "expires")
    return first is not None and any(first[name] != holder[name] for name in fields)
