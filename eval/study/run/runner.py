"""`python -m eval study run`: what is missing is made, one command after the other or several at a time.

Each command is a process of its own, whose output is its log. Whether it is done is seen from what it
made, so the study goes on wherever it was killed, and a second call does only what is missing. A
command that fails is named with its log; what does not need it goes on.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO

import yaml

from configs import Strict, read_yaml
from shards import LeaseHeld, atomic_write, canonical_json, open_store
from shards.column import Lease, lease_chain
from shards.console import Bar, duration_text
from shards.format import differences
from shards.processes import bound_to, with_this_python

from ...errors import StudyRunning
from ..checks import check_columns, check_pair, check_ranks, check_sets, preflight
from ..earlier import take_over, taken_over
from ..graph import Node, nodes_of, train_id
from ..lock import write_lock
from ..reuse import Existing
from ..study import Study

FAILED, HELD = 3, 5  # exit codes: some command failed; a trainer's: another job has its folder
LEASE_SECONDS = 180  # that a command waits for a folder which an earlier one, killed, still holds
POLL = 0.2  # seconds between two looks at the commands
PATIENCE = 900  # seconds that a stopped command has to save what it does
TAIL = 8  # lines of a failed command's log that are shown


def run(study: Study) -> int:
    """Makes what is missing of a study; returns 0, or 3 where a command failed.

    Raises the named errors of `checks.preflight` before anything is written, StudyRunning where
    another call works in the folder, and NotPaired.
    """
    import torch  # takes seconds

    check_ranks(study, torch.cuda.device_count())
    study = preflight(study)
    with alone(study):
        write_configs(study)
        runner = Runner(study)
        try:
            code = runner.go()
        finally:
            runner.stop()
        check_sets(runner.study)
        if len(runner.done) == len(runner.nodes):
            write_lock(runner.study)
    return code


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Holds the lease of the study's folder; StudyRunning if another process does."""
    study.out.mkdir(parents=True, exist_ok=True)
    lease = Lease(study.out, "eval study run")
    try:
        lease.__enter__()
    except LeaseHeld:
        holder = lease_chain(open_store(study.out))[1] or {}
        raise StudyRunning(
            f"{study.out}: another `study run` works there (pid {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown host')}). Wait for its end, or stop it; `study status` shows how far "
            "it is"
        ) from None
    try:
        yield
    finally:
        lease.release()


def write_configs(study: Study) -> None:
    """Writes the configs of all commands, and the study as it is now; says what has changed in it."""
    text, path = _yaml(study.config, f"As last run from {study.path}."), study.out / "study.yaml"
    if path.is_file():
        now = study.config.model_dump(mode="json", by_alias=True)
        for line in differences(read_yaml(path), now):
            print(f"changed since the last run: {line}", flush=True)
    atomic_write(path, text)
    folder = study.out / "configs"
    folder.mkdir(exist_ok=True)
    note = f"Made by `study run` from {study.path} and {study.config.train}: change those."
    for entry in study.entries:
        for phase in range(len(study.parts(entry))):
            config = study.train_config(entry, study.seeds[0], phase)
            config = config.model_copy(update={"init_from": None} if phase else {})
            atomic_write(study.config_path(entry, phase), _yaml(config, note))
    for path, (encode, _) in study.encode_configs.items():
        if path.parent == folder:
            atomic_write(path, _yaml(encode, note))


def _yaml(config: Strict, note: str) -> bytes:
    values = config.model_dump(mode="json", by_alias=True)
    return f"# {note}\n{yaml.safe_dump(values, sort_keys=False)}".encode()


@dataclass
class Running:
    """A command in progress."""

    node: Node
    process: subprocess.Popen[bytes]
    log: BinaryIO
    slot: int  # which of the jobs it is, and so which GPUs it has
    start: datetime
    scores: Mapping[str, int]  # times of the scores that were there before, by name


@dataclass
class Runner:
    """The nodes of a study, and what has become of them."""

    study: Study
    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(
        default_factory=dict
    )  # by id: why, or which failed node it needs
    running: list[Running] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)  # since when a node waits for a folder
    paired: set[tuple[str, int]] = field(default_factory=set)  # entry and seed that were compared
    looked: set[str] = field(default_factory=set)  # nodes that may have been done before
    broken: int = 0  # commands that failed

    def __post_init__(self) -> None:
        self.nodes = nodes_of(self.study)
        self.existing = Existing(self.study)
        self.gpus = visible_gpus() if self.study.jobs > 1 else []

    def go(self) -> int:
        """Runs until nothing more can be done; returns the exit code."""
        for node in self.nodes:
            self._look(node)
        with Bar(f"{self.study.path.stem}:", len(self.nodes), "commands") as self.bar:
            self.bar.skip(len(self.done))
            for line in self._plan():
                self.bar.note(line)
            while self._collect() or self._begin() or self.running:
                time.sleep(POLL)
        left = len(self.nodes) - len(self.done)
        state = f"{left} commands are left" if left else "all that the study asks for exists"
        print(f"{self.study.out}: {state}", flush=True)
        return FAILED if self.broken else 0

    def _look(self, node: Node) -> bool:
        """Whether a node whose needs are done is done itself; looked at once before it runs."""
        if not set(node.needs) <= self.done or node.id in self.looked:
            return False
        self.looked.add(node.id)
        if self.existing.done(node):
            self.done.add(node.id)
        return node.id in self.done

    def _plan(self) -> Iterator[str]:
        """Yields what is taken over, and what there is to do."""
        for name, folder in taken_over(self.study).items():
            yield f"{name}: taken over from {folder}"
        kinds = Counter(node.kind for node in self.nodes if node.id not in self.done)
        todo = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"{len(self.done)} of {len(self.nodes)} commands are done; to do: {todo or 'nothing'}"

    # Beginning ------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Starts commands as long as there is room; returns whether one was started."""
        started = False
        while len(self.running) < self.study.jobs and (node := self._next()):
            self._check_pairs(node)
            self._start(node)
            started = True
        return started

    def _next(self) -> Node | None:
        """Returns the first node whose needs are done, and whose outputs no other command writes."""
        busy = {running.node.id for running in self.running}
        writing = {path for running in self.running for path in running.node.outputs}
        for node in self.nodes:
            if node.id in self.done or node.id in self.failed or node.id in busy:
                continue
            if cause := next((need for need in node.needs if need in self.failed), None):
                self.failed[node.id] = f"needs {cause}"
            elif self._look(node):
                self.bar.skip(1)
            elif set(node.needs) <= self.done and not writing & set(node.outputs):
                return node
        return None

    def _check_pairs(self, node: Node) -> None:
        """Before the first pictures of a seed: its trainings differ in nothing but what they should."""
        if node.kind != "generate" or node.seed is None:
            return
        for entry in self.study.entries[1:]:
            trained = train_id(self.study, entry, node.seed) in self.done
            baseline = train_id(self.study, self.study.baseline, node.seed) in self.done
            if trained and baseline and (entry, node.seed) not in self.paired:
                check_pair(self.study, entry, node.seed)
                self.paired.add((entry, node.seed))

    def _start(self, node: Node) -> None:
        path = self.study.log(node.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        used = {running.slot for running in self.running}
        slot = next(number for number in range(self.study.jobs) if number not in used)
        path.with_suffix(".json").unlink(missing_ok=True)
        log = path.open("ab" if node.id in self.held else "wb")
        log.write(f"$ {shlex.join(node.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            bound_to(os.getpid(), with_this_python(node.command)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._environment(slot),
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
        )
        scores = score_times(node) if node.kind == "score" else {}
        self.running.append(Running(node, process, log, slot, datetime.now(UTC), scores))
        if node.id not in self.held:
            self.bar.note(f"begins: {node.id}")

    def _environment(self, slot: int) -> dict[str, str]:
        """Returns the environment of a command: its share of the GPUs, or of the cores."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.study.jobs == 1:
            return environment
        if not self.gpus:
            share = max(1, (os.cpu_count() or 1) // self.study.jobs)
            return {"OMP_NUM_THREADS": str(share)} | environment
        each = max(1, len(self.gpus) // self.study.jobs)
        first = slot * each % len(self.gpus)
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[first : first + each])}

    # Ending ---------------------------------------------------------------------------------------

    def _collect(self) -> bool:
        """Takes up commands that have ended; returns whether there was one."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            running.log.close()
            self._end(running, running.process.returncode)
        return bool(ended)

    def _end(self, running: Running, code: int) -> None:
        node, now = running.node, datetime.now(UTC)
        seconds = (now - running.start).total_seconds()
        if (
            code == HELD
            and time.monotonic() - self.held.setdefault(node.id, time.monotonic()) < LEASE_SECONDS
        ):
            self.bar.note(f"{node.id}: its folder is held by an earlier command; waits for it")
            time.sleep(2)
            return
        record: dict[str, Any] = {
            "id": node.id,
            "command": list(node.command),
            "start": running.start.isoformat(),
            "end": now.isoformat(),
            "seconds": round(seconds, 3),
            "exit_code": code,
        }
        if node.kind == "score":
            record["scores"] = new_scores(node, running.scores)
            record["beside"] = files_beside(node, record["scores"])
        atomic_write(self.study.log(node.id).with_suffix(".json"), canonical_json(record))
        if node.kind == "encode" and code == 0:
            self._encoded()
        if code == 0 and self.existing.done(node):
            self.done.add(node.id)
            self.bar.advance(1)
            self.bar.note(f"done: {node.id}, {duration_text(seconds)}")
            return
        self.broken += 1
        self.failed[node.id] = f"exit code {code}"
        log = self.study.log(node.id)
        ending = (
            f"exit code {code}"
            if code
            else "exit code 0, but what it should have made is not there"
        )
        self.bar.note(f"failed: {node.id}, {ending}: {shlex.join(node.command)}")
        for line in log.read_text(errors="replace").splitlines()[-TAIL:]:
            self.bar.note(f"    {line}")
        self.bar.note(f"    all of it is in {log}; what does not need it goes on")

    def _encoded(self) -> None:
        """Takes over what was made by hand of columns that exist only now, and checks these."""
        before = taken_over(self.study)
        self.study = take_over(self.study)
        self.nodes, self.existing = nodes_of(self.study), Existing(self.study)
        check_columns(self.study, self.existing)
        for name, folder in taken_over(self.study).items():
            if name not in before:
                self.bar.note(f"{name}: taken over from {folder}")

    def stop(self) -> None:
        """Stops what still runs, as a signal would, and waits until it has saved its state."""
        for running in self.running:
            with suppress(ProcessLookupError):
                running.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        for running in self.running:
            try:
                running.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            running.log.close()
        self.running = []


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def files_beside(node: Node, names: Collection[str]) -> list[str]:
    """Returns the files of items and influences that lie beside some scores of a set."""
    (folder,) = node.outputs
    return sorted(p.name for p in folder.glob("*.jsonl") if p.name.rsplit(".", 2)[0] in names)


def score_times(node: Node) -> dict[str, int]:
    """Returns the times at which the scores of a set were written, by name."""
    (folder,) = node.outputs
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def new_scores(node: Node, before: Mapping[str, int]) -> list[str]:
    """Returns the names of the scores that were written since."""
    now = score_times(node)
    return sorted(name for name, written in now.items() if before.get(name) != written)
