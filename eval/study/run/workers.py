"""Any number of `study run` in one study's folder, all of one YAML and one version of the project and of packages.

    OUT/workers/session.json     what the workers of this session are, put there by the first of them
    OUT/workers/worker-ID/       the claim of a worker: it is at work while that is renewed
    OUT/workers/lease.json       the claim of who joins or finishes: one at a time
    OUT/claims/NODE/             the claim of a node, of which the commands of one set share one

A session ends when no worker is at work. The next `study run` then begins another, of whatever its YAML
says, and tries again what has failed.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards import LeaseHeld, canonical_json
from shards.format import differences
from shards.format.atomic import read_json

from ...errors import ClaimLost, StudyRunning, WorkerDiffers
from ..graph import Node
from ..lock import FILE, code_digest, versions, write_lock
from ..study import Study
from .claims import SECONDS, Claim, holder, holder_text
from .files import SESSION, config_values, write_configs

Json = dict[str, Any]
COMMAND = "eval study run"
# packages of whose versions numbers depend: workers with others would make parts of one study differently
COMPUTING = ("torch", "diffusers", "transformers", "deepspeed", "numpy")
MOST_LINES = 6  # of differences that a message names
POLL = 0.2  # seconds between two tries to join


def claim_folder(study: Study, node: Node) -> Path:
    """Returns the folder of a node's claim. A set's pictures and scores share one: commands that write into
    one folder never run at the same time.
    """
    name = node.needs[0] if node.kind == "score" else node.id
    return study.out / "claims" / name


class Worker:
    """This process among those that work on a study: `join`, `keep` now and then, `leave`."""

    def __init__(self, study: Study, seconds: float = SECONDS) -> None:
        self.study, self.seconds = study, seconds
        self.folder = study.out / "workers"
        self.identity = identity_of(study)
        self.session = ""
        self.others = False  # whether others were at work when this one joined
        self._claim: Claim | None = None

    def refuse_others(self) -> None:
        """Raises WorkerDiffers where workers of another YAML or version are at work; nothing is written."""
        if at_work := workers(self.study):
            session = self._read_session()
            lines = differences(session.get("worker", {}), self.identity)
            if session and lines:
                more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
                title = (
                    f"{self.study.out}: a worker ({holder_text(at_work[0])}) of another YAML, or of another version of "
                    "the project or of a package, works on this study:"
                )
                advice = (
                    "Start all workers with the same YAML, --out, code and packages, from the same folder; or wait "
                    f"until that one has ended or, if it was killed, its lease of {self.seconds:g} s has"
                )
                raise WorkerDiffers(
                    "\n  ".join([title, *lines[:MOST_LINES], *more]) + f"\n{advice}"
                )

    def join(self) -> None:
        """Joins the workers, or is the first of them, which writes the configs of all commands and says
        what has changed since they were last written; WorkerDiffers.
        """
        while True:
            try:
                with self._door() as door:
                    self._enter(door)
                return
            except ClaimLost:  # this process was suspended, and another came in meanwhile
                self._withdraw()

    def _enter(self, door: Claim) -> None:
        self.refuse_others()
        session = self._read_session()
        self.others = bool(workers(self.study)) and bool(session)
        if self.others:
            self.session = session["session"]
        else:
            self.session = secrets.token_hex(8)
            door.check()
            shutil.rmtree(self.study.out / "claims", ignore_errors=True)
            for folder in self.folder.glob("worker-*"):
                shutil.rmtree(folder, ignore_errors=True)
            door.remove(self.study.out / SESSION)  # while it exists, configs are as it says
            write_configs(self.study, door.write)
            self._write_session(door)
        claim = Claim(self.folder / f"worker-{secrets.token_hex(8)}", COMMAND, self.seconds)
        claim.take()
        self._claim = claim
        door.check()  # from here on, who comes in sees this worker

    def _withdraw(self) -> None:
        if self._claim is not None:
            self._claim.release()
            shutil.rmtree(self._claim.folder, ignore_errors=True)
            self._claim = None

    @contextmanager
    def _door(self) -> Iterator[Claim]:
        """Holds the claim of who joins or finishes, once it is free."""
        said = False
        while True:
            claim = Claim(self.folder, COMMAND, self.seconds)
            try:
                claim.take()
                break
            except LeaseHeld:
                record = holder(self.folder)
                if record is not None and not said:
                    said = True
                    print(f"waits until {holder_text(record)} has joined or finished", flush=True)
                time.sleep(POLL)
        try:
            yield claim
        finally:
            claim.release()

    def keep(self) -> None:
        """Joins again where this worker was suspended for so long that others began without it;
        WorkerDiffers if they are of another YAML or version.
        """
        if self._claim is not None and self._claim.lapsed:
            try:
                self._claim.check()
            except ClaimLost:
                self._withdraw()
                self.join()

    def finish(self, study: Study) -> None:
        """Writes the lock of the study, of which all exists, unless another worker of this session did."""
        while True:
            try:
                with self._door() as door:
                    session = self._read_session()
                    path = self.study.out / FILE
                    if session.get("session") != self.session:  # others began without this one
                        return
                    if not (session.get("locked") and path.is_file()):
                        write_lock(study, door.write)
                        self._write_session(door, locked=True)
                return
            except ClaimLost:
                continue

    def leave(self) -> None:
        """Says that this worker is not at work any more."""
        self._withdraw()

    def _read_session(self) -> Json:
        try:
            session = read_json(self.study.out / SESSION)
        except (OSError, ValueError):
            return {}
        return session if isinstance(session, dict) and "session" in session else {}

    def _write_session(self, door: Claim, locked: bool = False) -> None:
        session = {"session": self.session, "worker": self.identity, "locked": locked}
        door.write(self.study.out / SESSION, canonical_json(session))


def claimed(study: Study, nodes: Iterable[Node]) -> Iterator[tuple[str, Json]]:
    """Yields the nodes that workers have, with who has them and since when."""
    for folder in dict.fromkeys(claim_folder(study, node) for node in nodes):
        if (record := holder(folder)) is not None:
            yield str(record.get("command")), record


def workers(study: Study) -> list[Json]:
    """Returns the workers that are at work: pid, host, since when."""
    folders = sorted((study.out / "workers").glob("worker-*"))
    return [record for folder in folders if (record := holder(folder)) is not None]


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Lets no worker join meanwhile; StudyRunning if one is at work."""
    study.out.mkdir(parents=True, exist_ok=True)
    claim = Claim(study.out / "workers", COMMAND)
    try:
        claim.take()
    except LeaseHeld:
        raise _running(study, holder(study.out / "workers") or {}) from None
    try:
        if at_work := workers(study):
            raise _running(study, at_work[0])
        yield
    finally:
        claim.release()


def _running(study: Study, record: Json) -> StudyRunning:
    return StudyRunning(
        f"{study.out}: a `study run` works there ({holder_text(record)}). Wait for its end, or stop it; `study "
        "status` shows how far it is"
    )


def identity_of(study: Study) -> Json:
    """Returns what must be the same for all workers: the YAML and all configs as they are resolved, the
    project's code, and the versions of the packages that compute.
    """
    installed = versions()
    return {
        **config_values(study),
        "project": installed.get("latentbank", "unknown"),
        "code": code_digest(),
        "versions": {name: installed.get(name, "not installed") for name in COMPUTING},
    }
