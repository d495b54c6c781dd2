"""One command of a study in progress: a process of its own, whose output is its log, under a claim."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from shards.processes import bound_to, kill, with_this_python

from ... import fence
from ..graph import Node
from ..study import Study
from .claims import Claim
from .edited import digests_of

Json = dict[str, Any]


@dataclass
class Running:
    """A command in progress."""

    node: Node
    claim: Claim
    process: subprocess.Popen[bytes]
    log: BinaryIO
    slot: int  # which of the jobs it is, and so which GPUs it has
    start: datetime
    scores: Mapping[str, int]  # times of the scores that were there before, by name

    @classmethod
    def begin(
        cls, node: Node, claim: Claim, path: Path, slot: int, environment: Mapping[str, str], again: bool
    ) -> Running:  # fmt: skip
        """Starts a node's command. Its log is a new file, or with `again` the one of before; the record of
        how it ended before is removed. ClaimLost if another worker took over.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        claim.remove(path.with_suffix(".json"))
        if again:
            log = path.open("ab")
        else:  # a file of this holder's own: what a former one still writes goes into its own
            new = claim.fence / path.name
            log = new.open("wb")
            fence.move(new, path, claim.fence)
        log.write(f"$ {shlex.join(node.command)}\n".encode())
        log.flush()
        scores = score_times(node) if node.kind == "score" else {}
        process = subprocess.Popen(
            bound_to(os.getpid(), with_this_python(node.command), claim.fence / fence.HELD),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, fence.VARIABLE: str(claim.fence.absolute())},
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
        )
        return cls(node, claim, process, log, slot, datetime.now(UTC), scores)

    def record(self, study: Study, code: int, session: str) -> Json:
        """Returns what is kept of a command that ended: when it ran, where, how it ended, and where that
        was well, the digests of the small files that it made.
        """
        now = datetime.now(UTC)
        record: Json = {
            "id": self.node.id,
            "command": list(self.node.command),
            "start": self.start.isoformat(),
            "end": now.isoformat(),
            "seconds": round((now - self.start).total_seconds(), 3),
            "exit_code": code,
            "host": platform.node(),
            "pid": os.getpid(),
            "session": session,
        }
        if self.node.kind == "score":
            record["scores"] = new_scores(self.node, self.scores)
            record["beside"] = files_beside(self.node, record["scores"])
        if code == 0:
            record["files"] = digests_of(study, self.node, record)
        return record

    def stop(self) -> None:
        """Asks the command to save and end, as a signal to this process would."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Waits until the command has ended, for so long; then ends it."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.close()

    def kill(self) -> None:
        """Ends the command and all that it started, at once."""
        if self.process.poll() is None:
            kill(self.process.pid)
        self.process.wait()
        self.log.close()


def environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Returns the environment of one of so many commands: its share of the GPUs, or of the cores."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    if jobs == 1:
        return variables
    if not gpus:
        share = max(1, (os.cpu_count() or 1) // jobs)
        return {"OMP_NUM_THREADS": str(share)} | variables
    each = max(1, len(gpus) // jobs)
    first = slot * each % len(gpus)
    return variables | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def list_anew(*folders: Path) -> None:
    """Lists folders, those above and those below them: a network's file system may hold for a minute that a
    file does not exist which another machine has made, but not past a listing.
    """
    for folder in {above for each in folders for above in (each.parent.parent, each.parent, each)}:
        with suppress(OSError):
            for entry in [*os.scandir(folder)]:
                if folder in folders and entry.is_dir():
                    os.listdir(entry.path)


def files_beside(node: Node, names: Collection[str]) -> list[str]:
    """Returns the files of items and influences that lie beside some scores, the same of each set."""
    folder = node.outputs[0]
    return sorted(p.name for p in folder.glob("*.jsonl") if p.name.rsplit(".", 2)[0] in names)


def score_times(node: Node) -> dict[str, int]:
    """Returns the times at which scores were written, by name; of several sets the first, of scores that
    all of them have.
    """
    times = [
        {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}
        for folder in node.outputs
    ]
    names = set.intersection(*(set(of_set) for of_set in times))
    return {name: min(of_set[name] for of_set in times) for name in names}


def new_scores(node: Node, before: Mapping[str, int]) -> list[str]:
    """Returns the names of the scores that were written since."""
    now = score_times(node)
    return sorted(name for name, written in now.items() if before.get(name) != written)
