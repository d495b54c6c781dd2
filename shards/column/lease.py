"""One command at a time changes what a column holds: the exclusive lease.

    <column>/lease.json              who works on the column, and until when; put if absent
    <column>/lease-<owner>.json      who took over from that owner; put if absent

A lease that has expired, or whose process is dead, is followed by the one that names its owner; so
of all who see it stale, one alone takes over. The lease is taken off from its start on: who took
over from an owner that was seen before then finds the start changed, and withdraws.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import LeaseHeld
from ..format.atomic import Json, canonical_json, sha256
from ..store.base import Place, Store
from ..store.open import open_store

LEASE = "lease.json"
LEASE_SECONDS = 120.0  # until a lease that is not renewed expires; clocks of hosts differ by less
ATTEMPTS = 8
LATEST = 1e11  # seconds since 1970: a later end, after the year 5000, is damage


def successor(owner: str) -> str:
    """Returns the name of the lease that follows on one of this owner."""
    return f"lease-{owner}.json"


def machine() -> str | None:
    """Returns what a pid is a number of: this boot of this host and its namespace of pids; None if it is
    unknown.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def read_lease(store: Store, name: str) -> Json | None:
    """Returns a lease record; None if there is none. One that cannot be read holds nobody off for ever: it
    counts as expired, and its owner is what it is and holds.
    """
    try:
        data = store.read(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        record = json.loads(data)
        record = {**record, "owner": str(record["owner"]), "expires": float(record["expires"])}
        if not re.fullmatch("[0-9a-f]{32}", record["owner"]):  # it becomes part of a name
            raise ValueError(record["owner"])
        if not math.isfinite(record["expires"]) or abs(record["expires"]) > LATEST:
            raise ValueError(record["expires"])
        return record
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {"owner": sha256(name.encode() + data)[:32], "expires": 0.0}


def lease_chain(store: Store) -> tuple[list[str], Json | None]:
    """Returns the names of the chain of leases from its start on, and the last record of it."""
    names: list[str] = []
    name, last = LEASE, None
    while name not in names and (record := read_lease(store, name)) is not None:
        names.append(name)
        last, name = record, successor(record["owner"])
    return names, last


def stale(record: Json) -> bool:
    """Returns whether a lease has expired, or its process is dead."""
    if record["expires"] <= time.time():
        return True
    this_machine = machine()
    if (
        this_machine is None
        or record.get("machine") != this_machine
        or not isinstance(record.get("pid"), int)
    ):
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


class Lease:
    """The exclusive right to change a column: `with Lease(url, "repair") as lease: ...`.

    Renewed by a thread while it is held. `check` before each change: LeaseHeld if another took the
    lease away meanwhile. `force` takes over a lease that another still holds.
    """

    def __init__(
        self, column: Place, command: str, force: bool = False, seconds: float = LEASE_SECONDS
    ) -> None:
        self.store, self.command, self.force = open_store(column), command, force
        self.seconds, self.owner = seconds, secrets.token_hex(16)
        self.since = time.time()
        self._name = LEASE
        self._until = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def _record(self, until: float) -> bytes:
        return canonical_json(
            {
                "owner": self.owner,
                "host": platform.node(),
                "machine": machine(),
                "pid": os.getpid(),
                "command": self.command,
                "since": self.since,
                "expires": until,
            }
        )

    def acquire(self) -> None:
        """Takes the lease; LeaseHeld, naming the holder, if another has it."""
        for _ in range(ATTEMPTS):
            names, last = lease_chain(self.store)
            if last is None:
                self._name = LEASE
            elif stale(last) or self.force:
                self._name = successor(last["owner"])
            else:
                raise LeaseHeld(self._held(last))
            until = time.time() + self.seconds
            is_new = self.store.put_if_absent(self._name, self._record(until))
            if self._is_last():  # also where the store's answer was lost, and it seemed not to be
                self._until = until
                return
            if is_new and self._name not in lease_chain(self.store)[0]:
                self.store.delete(self._name)  # the chain that it followed on is gone
            # else another was faster, or followed on this one, which was suspended: look again
        raise LeaseHeld(f"{self.store.url}: several commands try to take the lease at once")

    @property
    def lapsed(self) -> bool:
        """Whether it was not renewed in time, or another was seen to have it: `check` says which. Nothing is
        read for it.
        """
        return time.time() >= self._until

    def _held(self, record: Json) -> str:
        def field(name: str) -> Any:
            return record.get(name, "unknown")

        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["expires"]))
        return (
            f"{self.store.at(LEASE)}: held by `{field('command')}` (pid {field('pid')} on "
            f"{field('host')}) until {until}. Wait for it; or, if that process is surely gone, "
            "repeat with --break-lease"
        )

    def _is_last(self) -> bool:
        _, last = lease_chain(self.store)
        return last is not None and last["owner"] == self.owner

    def check(self) -> None:
        """Raises LeaseHeld unless the lease is still held."""
        if self.lapsed or not self._is_last():
            self._until = 0.0
            raise LeaseHeld(
                f"{self.store.url}: the lease of this `{self.command}` was taken away or expired; "
                "it stopped. What it did is kept; run it again"
            )

    def _renew(self) -> None:
        while not self._over.wait(self.seconds / 4):
            if self.lapsed:
                return  # too late: another may have it
            try:
                if not self._is_last():
                    self._until = 0.0
                    return
                until = time.time() + self.seconds
                self.store.replace(self._name, self._record(until))
                self._until = until
            except OSError as error:  # the next try may do better; the lease expires otherwise
                print(f"lease of {self.store.url} not renewed: {error}", file=sys.stderr)

    def release(self) -> None:
        """Gives the lease back, with what was before it in the chain."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        names, last = lease_chain(self.store)
        # one that lapsed may be followed at any moment, by one that these names lead to
        if last is not None and last["owner"] == self.owner and not self.lapsed:
            for name in names:  # from the start on: see above
                self.store.delete(name)

    def __enter__(self) -> Lease:
        self.acquire()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
