"""One job at a time on a run's folder: a lease in it, that of `shards`, held by rank 0."""

import logging
import time
from pathlib import Path
from typing import Any

from shards.column.lease import SECONDS, Lease, machine, standing
from shards.errors import LeaseHeld
from shards.store.open import open_store

log = logging.getLogger(__name__)


class RunLocked(LeaseHeld):
    """Another job trains in this folder."""


class RunLock:
    """The right to write into a run's folder: `take`, `check` before each change in it, `release`."""

    def __init__(self, run: Path, seconds: float = SECONDS) -> None:
        self.run, self.seconds = run, seconds
        self._lease: Lease | None = None

    def take(self) -> None:
        """RunLocked if another job holds it.

        The lease of a job on another host, of which nothing more can be seen, is given the time to be renewed or to
        expire: a job that is started again on other hosts goes on by itself."""
        self.run.mkdir(parents=True, exist_ok=True)
        first = self._holder()
        while True:
            lease = Lease(self.run, "train", seconds=self.seconds)
            try:
                self._lease = lease.__enter__()
                return
            except LeaseHeld:
                now = self._holder()
                if now and (now.get("machine") == machine() or _renewed(first, now)):
                    raise RunLocked(self._held(now)) from None
                if first and now:
                    log.info(
                        "%s: waiting for the lease of a job on %s to expire",
                        self.run,
                        now.get("host"),
                    )
                first = first or now
                time.sleep(min(1.0, self.seconds / 10))

    @property
    def owner(self) -> str:
        """Of the lease that is held."""
        assert self._lease is not None
        return self._lease.owner

    def check(self) -> None:
        """RunLocked if another job has taken over meanwhile, even if that job has ended since.

        A lease that expired (this job was suspended) and that nobody took over is followed by a new one."""
        assert self._lease is not None
        try:
            self._lease.check()
        except LeaseHeld:
            last = self._holder()
            if last is None or last["owner"] != self._lease.owner:
                raise RunLocked(self._lost(last)) from None
            try:
                self._lease = Lease(self.run, "train", seconds=self.seconds).__enter__()
            except LeaseHeld:  # another job was faster
                raise RunLocked(self._lost(self._holder())) from None

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _holder(self) -> dict[str, Any] | None:
        return standing(open_store(self.run))[1]

    def _held(self, record: dict[str, Any]) -> str:
        host, pid = record.get("host", "an unknown host"), record.get("pid", "unknown")
        return (
            f"{self.run}: another job trains in this folder (pid {pid} on {host}). Wait for its end or stop it; "
            "a run beside it needs another name of its config, or another runs="
        )

    def _lost(self, record: dict[str, Any] | None) -> str:
        who = (
            "and has ended"
            if record is None
            else f"pid {record.get('pid')} on {record.get('host')}"
        )
        return (
            f"{self.run}: another job took over this folder ({who}) while this one was suspended or could not renew "
            "its lease. This one stopped, and changed nothing since"
        )


def _renewed(first: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    return first is not None and (
        first["owner"] != now["owner"] or first["expires"] != now["expires"]
    )
